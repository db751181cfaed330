"""What the workers run for the adapters of the peft package."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import ds_cp
from ds_cp import comm, selftest
from ds_cp.models import attach
from tests.dist import jobs


def with_adapters(modules: list[str] | str, changes: dict[str, Any] | None = None, model_type: str = "llama") -> nn.Module:
    """A tiny model under LoRA whose adapters all have gradients: peft starts one of each pair at zero."""
    config = LoraConfig(r=3, lora_alpha=6, target_modules=modules, init_lora_weights=False)
    return get_peft_model(selftest.tiny_model(model_type, **(changes or {})), config)


def quantized(folder: str, modules: list[str]) -> nn.Module:
    """QLoRA as peft makes it: the frozen weights in bitsandbytes' nf4, stored as numbers that ZeRO-3 can share out."""
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.float32,
        bnb_4bit_quant_storage=torch.float32,
    )
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=nf4, device_map="cpu")
    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    torch.manual_seed(1)
    return get_peft_model(model, LoraConfig(r=3, lora_alpha=6, target_modules=modules, init_lora_weights=False))


def qlora(folder: str, block: dict[str, Any], stage: int, modules: list[str]) -> tuple[float, float, str, float]:
    """As `lora`, over quantized weights, which are not compared: their bits are no numbers."""
    batches = jobs.rows(2, 50)
    alone, model = quantized(folder, modules), quantized(folder, modules)
    wanted_loss, wanted = selftest.reference(alone, batches, "mean")
    config = selftest.ds_config(stage, {**block, "loss_reduction": "mean"}, accumulation=2)
    loss, gradients = selftest.sharded(model, config, [batches])
    adapters = [name for name, p in alone.named_parameters() if p.requires_grad]
    given, asked = ({name: each[name] for name in adapters} for each in (gradients, wanted))
    report = selftest.compare(loss, given, wanted_loss, asked)
    assert sum(error > 0 for error in report.errors.values()) > 0, "nothing was trained"
    return report.loss, report.loss_error, *report.worst


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


def dropped(block: dict[str, Any], checkpointing: bool) -> tuple[list[list[float]], float, list[float]]:
    """(what each rank's dropout of the first adapter let through of its tokens, how far from their scale it is, the next random
    number of each rank); with checkpointing also that backward repeats the masks.
    """
    config = LoraConfig(r=3, target_modules=["q_proj"], init_lora_weights=False, lora_dropout=0.5)
    model = get_peft_model(selftest.tiny_model("llama"), config)
    seen: list[Tensor] = []
    name = next(name for name, m in model.named_modules() if isinstance(m, nn.Dropout))
    model.get_submodule(name).register_forward_hook(lambda module, args, y: seen.append(y / args[0]))
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine, *_ = ds_cp.initialize(model=model, optimizer=optimizer, config=selftest.ds_config(1, block))
    torch.manual_seed(5)
    engine.backward(engine(**jobs.rows(1, 48)[0]).loss)
    if checkpointing:
        assert torch.equal(seen[0], seen[1]), "backward computes with the masks of forward"
    handle = attach.handle_of(engine)
    assert handle is not None
    masks = comm.all_gather(seen[0].detach().flatten(), handle.mesh.seq.group)
    after = comm.all_gather(torch.rand(1), handle.mesh.seq.group).flatten().tolist()
    selftest.finish(engine)
    return masks.tolist(), float(masks.unique().sum() - 2), after
