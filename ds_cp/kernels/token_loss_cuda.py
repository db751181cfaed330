"""Losses of tokens and the gradient of their logits in one Triton kernel: the logits are read twice and written once.

A program has one token. It goes over the vocabulary for lse (the running maximum and sum of Milakov and Gimelshein, 2018) and the
mean, then once more for the gradient, which takes the logits' place. The terms are those of `ds_cp.tiled_head`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 8192
WARPS = 8


def losses_fused_(
    z_tV: Tensor, targets_t: Tensor, weights_t: Tensor | None, scale: float, label_smoothing: float, z_loss: float, ignore: int
) -> Tensor:
    """w * l [t] in fp32 of the logits scale * z; z, of any float dtype and contiguous, becomes the gradient of z.

    Args:
        targets_t: `ignore` for none. weights_t: None for ones.
    """
    tokens, vocabulary = z_tV.shape
    assert z_tV.is_contiguous()
    losses = torch.empty(tokens, dtype=torch.float32, device=z_tV.device)
    _losses[(tokens,)](
        z_tV,
        targets_t,
        targets_t if weights_t is None else weights_t,
        losses,
        targets_t.stride(0),
        0 if weights_t is None else weights_t.stride(0),
        scale,
        label_smoothing,
        z_loss,
        VOCABULARY=vocabulary,
        IGNORE=ignore,
        WEIGHTED=weights_t is not None,
        BLOCK=min(BLOCK, triton.next_power_of_2(vocabulary)),
        num_warps=WARPS,
    )
    return losses


@triton.jit
def _losses(
    z,
    targets,
    weights,
    losses,
    target_stride,
    weight_stride,
    scale,
    smooth,
    z_loss,
    VOCABULARY: tl.constexpr,
    IGNORE: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    row = z + token * VOCABULARY
    target = tl.load(targets + token * target_stride)
    there = target != IGNORE
    weight = tl.where(there, 1.0, 0.0)
    if WEIGHTED:
        weight = tl.where(there, tl.load(weights + token * weight_stride).to(tl.float32), 0.0)
    target = tl.where(there, target, 0)
    chosen = scale * tl.load(row + target).to(tl.float32)
    columns = tl.arange(0, BLOCK)
    largest, exponentials, total = -float("inf"), 0.0, 0.0
    for start in range(0, VOCABULARY, BLOCK):
        inside = start + columns < VOCABULARY
        x = scale * tl.load(row + start + columns, mask=inside, other=0.0).to(tl.float32)
        total += tl.sum(tl.where(inside, x, 0.0))
        x = tl.where(inside, x, -float("inf"))
        before = largest
        largest = tl.maximum(before, tl.max(x))
        exponentials = exponentials * tl.exp(before - largest) + tl.sum(tl.exp(x - largest))
    lse = largest + tl.log(exponentials)
    tl.store(losses + token, weight * (lse - (1 - smooth) * chosen - smooth * (total / VOCABULARY) + z_loss * lse * lse))
    tl.debug_barrier()  # every thread has read its `chosen` before any writes gradients
    of_softmax, of_all, of_target = weight * (1 + 2 * z_loss * lse), weight * smooth / VOCABULARY, weight * (1 - smooth)
    for start in range(0, VOCABULARY, BLOCK):
        inside = start + columns < VOCABULARY
        x = scale * tl.load(row + start + columns, mask=inside, other=0.0).to(tl.float32)
        dx = of_softmax * tl.exp(x - lse) - of_all - tl.where(start + columns == target, of_target, 0.0)
        tl.store(row + start + columns, (scale * dx).to(z.dtype.element_ty), mask=inside)
