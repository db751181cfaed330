"""What the workers run for gradient norms and clipping."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn

import ds_cp
from ds_cp import selftest
from ds_cp.batch import count_targets
from tests.dist import jobs

SHARE = 0.3
"""Of the true norm: what gradients are clipped to."""


@dataclass(frozen=True)
class Clipped:
    """One step against one process."""

    norm_error: float | None
    """Relative, of the norm that the engine reports; None where it reports none."""
    parameter: str
    error: float
    """Of the clipped gradient that was applied, in the worst parameter."""


def clipped(
    block: dict[str, Any],
    stage: int,
    replicas: int = 1,
    accumulation: int = 1,
    reduction: str = "mean",
    zero: dict[str, Any] | None = None,
    batches: list[dict[str, Any]] | None = None,
    changes: dict[str, Any] | None = None,
) -> Clipped:
    """A step of SGD in fp32, clipped to a share of the true norm, beside torch's own clipping in one process."""
    batches = batches or jobs.rows(replicas * accumulation, 50)
    wanted, norm = _one_process(selftest.tiny_model("llama", **(changes or {})), batches, reduction)
    config = selftest.ds_config(stage, {**block, "loss_reduction": reduction}, accumulation, zero)
    config["gradient_clipping"] = SHARE * norm
    model = selftest.tiny_model("llama", **(changes or {}))
    engine, *_ = ds_cp.initialize(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=selftest.LR), config=config)
    items = {"num_items_in_batch": sum(float(count_targets(b)) for b in batches)} if reduction == "token_mean" else {}
    mine = batches[ds_cp.data_parallel_rank(engine) * accumulation :][:accumulation]
    return _compared(engine, [{**batch, **items} for batch in mine], selftest.LR, wanted, norm)


def low_precision(block: dict[str, Any], stage: int, dtype: str, scale: float = 1.0) -> tuple[Clipped, float]:
    """The same in bf16, or in fp16 under a static loss scale; and the error of HF's gradients of that dtype in one process."""
    batches = jobs.rows(1, 64)
    wanted, norm = _one_process(selftest.tiny_model("llama"), batches, "mean")
    theirs, _ = _one_process(selftest.tiny_model("llama").to(getattr(torch, dtype)), batches, "mean")
    floor = selftest.compare(0.0, theirs, 0.0, wanted).worst[1]
    # The weights that are read back are rounded to the dtype: the step is large beside them, and within fp16's range.
    rate = 2.0 ** math.floor(math.log2(1000 / max(float(g.abs().max()) for g in wanted.values())))
    section = {"bfloat16": {"bf16": {"enabled": True}}, "float16": {"fp16": {"enabled": True, "loss_scale": scale}}}[dtype]
    config = selftest.ds_config(stage, {**block, "loss_reduction": "mean"}) | section | {"gradient_clipping": SHARE * norm}
    with any_dtype():
        model = selftest.tiny_model("llama")
        engine, *_ = ds_cp.initialize(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=rate), config=config)
        return _compared(engine, batches, rate, wanted, norm), floor


def overflow(block: dict[str, Any], stage: int) -> tuple[float, float, bool, float, float]:
    """A dynamic loss scale that is too large for fp16, then one that is not.

    (scale of the first step, after it, whether it left the weights alone, scale of the first step taken, error of its norm).
    """
    batches = jobs.rows(1, 64)
    _, norm = _one_process(selftest.tiny_model("llama"), batches, "mean")
    config = selftest.ds_config(stage, {**block, "loss_reduction": "mean"})
    config |= {"fp16": {"enabled": True, "initial_scale_power": 24, "hysteresis": 1}, "gradient_clipping": SHARE * norm}
    with any_dtype():
        model = selftest.tiny_model("llama")
        engine, *_ = ds_cp.initialize(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), config=config)
        before, scales = selftest.full_parameters(engine.module), []
        while not scales or math.isinf(engine.get_global_grad_norm()):
            scales.append(engine.optimizer.loss_scale)
            engine.backward(engine(**batches[0]).loss)
            engine.step()
            if len(scales) == 1:
                first, after = selftest.full_parameters(engine.module), engine.optimizer.loss_scale
        same = all(torch.equal(before[name], first[name]) for name in before)
        error = abs(float(engine.get_global_grad_norm()) / norm - 1)
        selftest.finish(engine)
    return scales[0], after, same, scales[-1], error


@contextmanager
def any_dtype() -> Iterator[None]:
    """DeepSpeed refuses fp16 on a CPU whose oneDNN has no kernels for it; PyTorch computes in it all the same."""
    accelerator = get_accelerator()
    accelerator.is_fp16_supported = lambda: True
    try:
        yield
    finally:
        del accelerator.is_fp16_supported


def _one_process(model: nn.Module, batches: list[dict[str, Any]], reduction: str) -> tuple[dict[str, Tensor], float]:
    """(gradients clipped to a share of their norm, in fp32, the norm)."""
    _, gradients = selftest.reference(model, batches, reduction)
    for name, p in model.float().named_parameters():
        p.grad = gradients[name].float()
    norm = float(torch.nn.utils.get_total_norm(p.grad for p in model.parameters()))
    torch.nn.utils.clip_grad_norm_(model.parameters(), SHARE * norm)
    return {name: p.grad for name, p in model.named_parameters()}, norm


def started(block: dict[str, Any], stage: int, section: dict[str, Any]) -> None:
    with any_dtype():
        model = selftest.tiny_model("llama")
        config = selftest.ds_config(stage, block) | section
        ds_cp.initialize(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=1.0), config=config)


def _compared(engine: Any, batches: list[dict[str, Any]], rate: float, wanted: dict[str, Tensor], norm: float) -> Clipped:
    before = selftest.full_parameters(engine.module)
    for batch in batches:
        engine.backward(engine(**batch).loss)
        engine.step()
    reported, after = engine.get_global_grad_norm(), selftest.full_parameters(engine.module)
    selftest.finish(engine)
    got = {name: (before[name].float() - after[name].float()) / rate for name in before}
    worst = selftest.compare(0.0, got, 0.0, wanted).worst
    return Clipped(None if reported is None else abs(float(reported) / norm - 1), *worst)
