"""`merge_` as one Triton kernel. Grid: one program for 16 tokens of one head; its rows of H elements are contiguous."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

TOKENS = 16


def merge_fused_(out_TNH: Tensor, lse_TN: Tensor, block_out_TNH: Tensor, block_lse_TN: Tensor) -> None:
    tokens, heads, size = out_TNH.shape
    if not tokens:
        return
    _merge[(triton.cdiv(tokens, TOKENS), heads)](
        out_TNH,
        lse_TN,
        block_out_TNH,
        block_lse_TN,
        tokens,
        *out_TNH.stride(),
        *lse_TN.stride(),
        *block_out_TNH.stride(),
        *block_lse_TN.stride(),
        H=size,
        BLOCK_H=triton.next_power_of_2(size),
        BLOCK_T=TOKENS,
    )


@triton.jit(do_not_specialize=["tokens"])
def _merge(
    out,
    lse,
    block_out,
    block_lse,
    tokens,
    out_t,
    out_n,
    out_h,
    lse_t,
    lse_n,
    block_out_t,
    block_out_n,
    block_out_h,
    block_lse_t,
    block_lse_n,
    H: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    head = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    inside = token < tokens
    mine = tl.load(lse + token * lse_t + head * lse_n, inside, other=0.0)
    theirs = tl.load(block_lse + token * block_lse_t + head * block_lse_n, inside, other=0.0)
    weight = 1 / (1 + tl.exp(mine - theirs))  # exp(theirs - merged); 0 where theirs is -inf
    high = tl.maximum(mine, theirs)
    merged = high + tl.log(1 + tl.exp(tl.minimum(mine, theirs) - high))
    tl.store(lse + token * lse_t + head * lse_n, merged, inside)

    h = tl.arange(0, BLOCK_H)
    both = inside[:, None] & (h < H)[None, :]
    place = out + (token * out_t + head * out_n)[:, None] + h[None, :] * out_h
    source = block_out + (token * block_out_t + head * block_out_n)[:, None] + h[None, :] * block_out_h
    x = tl.load(place, both, other=0.0)
    y = tl.load(source, both, other=0.0).to(tl.float32)
    tl.store(place, x + (y - x) * weight[:, None], both)
