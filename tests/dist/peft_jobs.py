"""What the workers run for the adapters of the peft package."""

from __future__ import annotations

from typing import Any

from peft import LoraConfig, get_peft_model
from torch import nn

from ds_cp import selftest
from tests.dist import jobs


def with_adapters(modules: list[str] | str, changes: dict[str, Any] | None = None, model_type: str = "llama") -> nn.Module:
    """A tiny model under LoRA whose adapters all have gradients: peft starts one of each pair at zero."""
    config = LoraConfig(r=3, lora_alpha=6, target_modules=modules, init_lora_weights=False)
    return get_peft_model(selftest.tiny_model(model_type, **(changes or {})), config)


def lora(
    block: dict[str, Any],
    stage: int,
    modules: list[str] | str,
    checkpointing: bool | None = None,
    length: int = 50,
    model_type: str = "llama",
    batches: list[dict[str, Any]] | None = None,
) -> tuple[float, float, str, float]:
    """(loss, loss error, worst parameter, its gradient error) against one process, of all parameters: frozen ones must not move."""
    batches = batches or jobs.rows(2, length)
    alone, model = (with_adapters(modules, model_type=model_type) for _ in range(2))
    model.load_state_dict(alone.state_dict())
    wanted = selftest.reference(alone, batches, "mean")
    if checkpointing is not None:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
    config = selftest.ds_config(stage, {**block, "loss_reduction": "mean"}, accumulation=2)
    report = selftest.compare(*selftest.sharded(model, config, [batches]), *wanted)
    assert sum(error > 0 for error in report.errors.values()) > 0, "nothing was trained"
    return report.loss, report.loss_error, *report.worst
