"""`merge_` and `total` as one Triton kernel each. A program has 16 tokens of one head; their rows of H elements are contiguous."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

TOKENS = 16


def merge_fused_(out_TNH: Tensor, lse_TN: Tensor, blocks: Sequence[tuple[Tensor, Tensor]], into_TNH: Tensor) -> None:
    tokens, heads, size = out_TNH.shape
    if not tokens:
        return
    (a_out, a_lse), (b_out, b_lse) = blocks[0], blocks[-1]
    tensors = (lse_TN, out_TNH, into_TNH, a_out, a_lse, b_out, b_lse)
    assert all(x.ndim == 2 or x.stride(2) == 1 for x in tensors)
    _merge[(triton.cdiv(tokens, TOKENS), heads)](
        *tensors,
        tokens,
        *(stride for x in tensors for stride in x.stride()[:2]),
        TWO=len(blocks) == 2,
        H=size,
        BLOCK_H=triton.next_power_of_2(size),
        BLOCK_T=TOKENS,
    )


@triton.jit(do_not_specialize=["tokens"])
def _merge(
    lse,
    out,
    into,
    a_out,
    a_lse,
    b_out,
    b_lse,
    tokens,
    lse_t,
    lse_n,
    out_t,
    out_n,
    into_t,
    into_n,
    a_out_t,
    a_out_n,
    a_lse_t,
    a_lse_n,
    b_out_t,
    b_out_n,
    b_lse_t,
    b_lse_n,
    TWO: tl.constexpr,
    H: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    n = tl.program_id(1).to(tl.int64)
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    inside = t < tokens
    mine = tl.load(lse + t * lse_t + n * lse_n, inside, other=0.0)
    a = tl.load(a_lse + t * a_lse_t + n * a_lse_n, inside, other=0.0)
    high = tl.maximum(mine, a)
    if TWO:
        b = tl.load(b_lse + t * b_lse_t + n * b_lse_n, inside, other=0.0)
        high = tl.maximum(high, b)
    weight, weight_a = tl.exp(mine - high), tl.exp(a - high)  # 0 where a block's lse is -inf
    total = weight + weight_a
    if TWO:
        weight_b = tl.exp(b - high)
        total += weight_b

    h = tl.arange(0, BLOCK_H)[None, :]
    both = inside[:, None] & (h < H)
    x = tl.load(out + (t * out_t + n * out_n)[:, None] + h, both, other=0.0).to(tl.float32) * weight[:, None]
    x += tl.load(a_out + (t * a_out_t + n * a_out_n)[:, None] + h, both, other=0.0).to(tl.float32) * weight_a[:, None]
    if TWO:
        x += tl.load(b_out + (t * b_out_t + n * b_out_n)[:, None] + h, both, other=0.0).to(tl.float32) * weight_b[:, None]
    # In place: several threads read the same lse, and no store may come before the last of them has.
    tl.debug_barrier()
    tl.store(lse + t * lse_t + n * lse_n, high + tl.log(total), inside)
    tl.store(into + (t * into_t + n * into_n)[:, None] + h, x / total[:, None], both)


def total_fused(base_TNH: Tensor, parts: Sequence[tuple[int, Tensor]], dtype: torch.dtype) -> Tensor:
    tokens, heads, size = base_TNH.shape
    out = torch.empty(base_TNH.shape, dtype=dtype, device=base_TNH.device)
    (a_start, a), (b_start, b) = parts[0], parts[-1]
    tensors = (base_TNH, a, b, out)
    assert all(x.stride(2) == 1 for x in tensors)
    _total[(triton.cdiv(tokens, TOKENS), heads)](
        *tensors,
        tokens,
        a_start,
        a_start + len(a),
        b_start,
        b_start + len(b),
        *(stride for x in tensors for stride in x.stride()[:2]),
        TWO=len(parts) == 2,
        H=size,
        BLOCK_H=triton.next_power_of_2(size),
        BLOCK_T=TOKENS,
    )
    return out


@triton.jit(do_not_specialize=["tokens", "a_start", "a_end", "b_start", "b_end"])
def _total(
    base,
    a,
    b,
    out,
    tokens,
    a_start,
    a_end,
    b_start,
    b_end,
    base_t,
    base_n,
    a_t,
    a_n,
    b_t,
    b_n,
    out_t,
    out_n,
    TWO: tl.constexpr,
    H: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    n = tl.program_id(1).to(tl.int64)
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    h = tl.arange(0, BLOCK_H)[None, :]
    x = tl.load(base + (t * base_t + n * base_n)[:, None] + h, (t < tokens)[:, None] & (h < H), other=0.0).to(tl.float32)
    here = (t >= a_start) & (t < a_end)
    x += tl.load(a + ((t - a_start) * a_t + n * a_n)[:, None] + h, here[:, None] & (h < H), other=0.0).to(tl.float32)
    if TWO:
        here = (t >= b_start) & (t < b_end)
        x += tl.load(b + ((t - b_start) * b_t + n * b_n)[:, None] + h, here[:, None] & (h < H), other=0.0).to(tl.float32)
    tl.store(out + (t * out_t + n * out_n)[:, None] + h, x, (t < tokens)[:, None] & (h < H))
