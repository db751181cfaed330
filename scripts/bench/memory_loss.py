"""The loss of a shard alone, from bf16 hidden states: whole logits, ds_cp's tiles, DeepSpeed's and Liger's. Part of memory.py.

peak_gib       highest allocation of forward and backward above what is there before
over_own_gib   the same above the gradients that are there after (of the weight and of the hidden states)
*_difference   of the two gradients from those of whole logits, by norm
"""

from __future__ import annotations

import gc
import importlib.util
import statistics
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from one_rank import GIB, Timeline
from torch import Tensor


def loss_rows(tokens: int, vocabulary: int, hidden: int, turns: int) -> list[dict[str, Any]]:
    """A row for each way; `turns` timed passes after two to warm up."""
    from deepspeed.accelerator import get_accelerator

    device = torch.device(get_accelerator().current_device_name())
    cuda, generator = device.type == "cuda", torch.Generator(device).manual_seed(0)
    weight = torch.nn.Linear(hidden, vocabulary, bias=False, device=device, dtype=torch.bfloat16)
    x = torch.randn(1, tokens, hidden, device=device, dtype=torch.bfloat16, generator=generator).requires_grad_()
    labels = torch.randint(0, vocabulary, (1, tokens), device=device, generator=generator)
    wanted: list[Tensor] = []
    rows = []
    for name, loss in losses(weight, vocabulary).items():
        seconds, peaks, errors = [], [], []
        for turn in range(turns + 2):
            weight.weight.grad = x.grad = None
            before = reset_peak() if cuda else 0
            start = Timeline(cuda).now()
            loss(x, labels).backward()
            end = Timeline(cuda).now()
            peaks.append((torch.cuda.max_memory_allocated() - before) / GIB if cuda else float("nan"))
            if turn > 1:
                seconds += Timeline(cuda).seconds([start, end])
        gradients = [weight.weight.grad, x.grad]
        wanted = wanted or [g.clone() for g in gradients]
        errors = [float((g - w).float().norm() / w.float().norm()) for g, w in zip(gradients, wanted, strict=True)]
        own = sum(g.nbytes for g in gradients) / GIB
        rows.append(
            {"section": "loss", "contender": name, "tokens": tokens, "vocabulary": vocabulary, "peak_gib": max(peaks)}
            | {"over_own_gib": max(peaks) - own, "seconds": statistics.median(seconds), "fastest": min(seconds)}
            | {"to_whole": 0.0, "weight_difference": errors[0], "hidden_difference": errors[1]}
        )
        rows[-1]["to_whole"] = rows[-1]["seconds"] / rows[0]["seconds"]
    return rows


def reset_peak() -> int:
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def losses(head: torch.nn.Linear, vocabulary: int) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    import alst_tricks
    from transformers.loss.loss_utils import ForCausalLMLoss

    from ds_cp.models.lm_head import auto_tile
    from ds_cp.tiled_head import Head, Terms, tiled_loss

    def whole(x: Tensor, y: Tensor) -> Tensor:
        return ForCausalLMLoss(head(x), None, vocabulary, shift_labels=y)

    def ours(x: Tensor, y: Tensor) -> Tensor:
        forward = partial(torch.nn.Linear.forward, head)
        value, _ = tiled_loss(
            x, Head(forward, (head.weight,), True), auto_tile(vocabulary, 2 if x.is_cuda else 4), y, None, Terms()
        )
        return value / y.numel()

    fused = SimpleNamespace(lm_head=head, model=None, config=SimpleNamespace(vocab_size=vocabulary))
    fused.model = lambda inputs: SimpleNamespace(last_hidden_state=inputs)
    alst_tricks.tile_loss(fused, lambda function: function)

    def theirs(x: Tensor, y: Tensor) -> Tensor:
        return fused.forward(shift_labels=y, inputs=x) / y.numel()

    found = {"whole logits": whole, "ds_cp, loss_chunk auto": ours, "DeepSpeed TiledFusedLogitsLoss": theirs}
    return found | (ligers(head) if importlib.util.find_spec("liger_kernel") and head.weight.is_cuda else {})


def ligers(head: torch.nn.Linear) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """Its sum of the weight's gradient is in the weight's dtype unless it is asked for another."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    def way(dtype: torch.dtype | None) -> Callable[[Tensor, Tensor], Tensor]:
        fused = LigerFusedLinearCrossEntropyLoss(accum_dtype=dtype)
        return lambda x, y: fused(head.weight, x.flatten(0, 1), y.flatten())

    return {"Liger": way(None), "Liger, accum_dtype fp32": way(torch.float32)}
