"""What two ranks on two GPUs run."""

from __future__ import annotations

from typing import Any

import torch

import ds_cp
from ds_cp import selftest
from ds_cp.kernels import attention
from tests.dist import jobs

SIZES = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 8192}


def installed(kernel: str) -> str | None:
    """Why this kernel can't run here."""
    try:
        attention.load(kernel)
    except ValueError as error:
        return str(error)
    return None


def bf16_errors(block: dict[str, Any], stage: int, batches: list[dict[str, Any]]) -> tuple[float, float]:
    """Worst relative gradient error against fp32 of (ours in bf16, HF in one process in bf16), heads of 64."""
    model, low, alone = (selftest.tiny_model("llama", **SIZES).cuda() for _ in range(3))
    wanted = selftest.reference(alone, batches, "mean")
    theirs = selftest.compare(*selftest.reference(low.bfloat16(), batches, "mean"), *wanted)
    config = {**selftest.ds_config(stage, {**block, "loss_reduction": "mean"}), "bf16": {"enabled": True}}
    ours = selftest.compare(*selftest.sharded_low_precision(model, config, batches), *wanted)
    return ours.worst[1], theirs.worst[1]


def adamw_losses(block: dict[str, Any], steps: int) -> list[float]:
    """A raw loop with an optimizer that has state, in bf16 under ZeRO 3, with offloaded activations and tiles."""
    model = selftest.tiny_model("llama", **SIZES).cuda()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    config = {**selftest.ds_config(3, block), "bf16": {"enabled": True}}
    engine, *_ = ds_cp.initialize(model=model, optimizer=optimizer, config=config)
    losses, batch = [], jobs.rows(1, 4096)[0]
    for _ in range(steps):
        loss = engine(**batch).loss
        engine.backward(loss)
        engine.step()
        losses.append(float(loss.detach()))
    selftest.finish(engine)
    return losses


def nan_loss(block: dict[str, Any]) -> None:
    """Rank 1's head gives NaN from the second pass on; who notices it raises on every rank."""
    engine, _ = jobs.started(block)
    batch = jobs.rows(1, 20)[0]
    for step in range(4):
        if step == 1 and torch.distributed.get_rank() == 1:
            engine.module.lm_head.register_forward_hook(lambda module, given, out: out * float("nan"))
        engine.backward(engine(**batch).loss)
        engine.step()


def label_differs(block: dict[str, Any], passes: int) -> None:
    """The same row in `passes` passes; then one label is another one on rank 1."""
    engine, _ = jobs.started(block)
    for step in range(passes + 2):
        batch = jobs.rows(1, 20)[0]
        if step >= passes:
            batch["labels"][0, 7] += torch.distributed.get_rank()
        engine.backward(engine(**batch).loss)
        engine.step()
