"""What the workers run. Every function runs on all ranks of a pool and returns something small."""

from __future__ import annotations

from typing import Any

import torch

from ds_cp import selftest
from ds_cp.batch import IGNORE, count_targets


def rows(count: int, length: int, vocab: int = 96, seed: int = 1) -> list[dict[str, Any]]:
    """Rows of random tokens, one a batch."""
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(3, vocab, (1, length), generator=generator) for _ in range(count)]
    return [{"input_ids": x, "labels": x.clone()} for x in ids]


def parity(
    model_type: str,
    block: dict[str, Any],
    stage: int,
    batches: list[dict[str, Any]] | None = None,
    replicas: int = 1,
    accumulation: int = 1,
    reduction: str = "mean",
    zero: dict[str, Any] | None = None,
    checkpointing: bool | None = None,
    changes: dict[str, Any] | None = None,
    length: int = 50,
) -> tuple[float, float, str, float]:
    """(loss, loss error, worst parameter, its gradient error) of one step against one process."""
    batches = batches or rows(replicas * accumulation, length)
    per_replica = [batches[i * accumulation : (i + 1) * accumulation] for i in range(replicas)]
    wanted = selftest.reference(selftest.tiny_model(model_type, **(changes or {})), batches, reduction)
    model = selftest.tiny_model(model_type, **(changes or {}))
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
    items = sum(float(count_targets(batch)) for batch in batches) if reduction == "token_mean" else None
    block = {**block, "loss_reduction": reduction}
    got = selftest.sharded(model, selftest.ds_config(stage, block, accumulation, zero), per_replica, items)
    report = selftest.compare(*got, *wanted)
    return report.loss, report.loss_error, *report.worst


__all__ = ["IGNORE", "parity", "rows"]
