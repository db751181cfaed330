"""`merge_` and `total` as one Triton kernel each. A program has some tokens of one head; their rows of H elements are contiguous.

What differs from block to block goes to the kernels in tuples. Triton compiles anew for integers in a tuple that are 1 or divide
by 16; `_plain` keeps all of them from being either, so that rows with other documents find the kernel compiled. For the same
reason there are four numbers of blocks; those that are not there have no tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

MERGED, MERGED_WARPS = 2**14, 4
"""Elements and warps of a program of `_merge`: the fastest of 2^11 to 2^14 and 4 or 8 on an H200, with up to 15 blocks."""
ADDED, ADDED_WARPS = 2**12, 8
"""Those of `_total`."""
COUNTS = (1, 3, 7, 15)


def merge_fused_(out_TNH: Tensor, lse_TN: Tensor, blocks: Sequence[tuple[int, Tensor, Tensor]], into_TNH: Tensor) -> None:
    """Blocks are (first query, out_TNH, lse_TN)."""
    tokens, heads, size = out_TNH.shape
    padded = triton.next_power_of_2(size)
    if not tokens:
        return
    outs, lses = [out for _, out, _ in blocks], [lse for _, _, lse in blocks]
    assert all(x.stride(2) == 1 for x in (out_TNH, into_TNH, *outs))
    spans = [_plain(start, start + len(lse), *lse.stride()) for start, _, lse in blocks]
    _merge[(triton.cdiv(tokens, MERGED // padded), heads)](
        lse_TN,
        out_TNH,
        into_TNH,
        *_filled(outs, lses, [out.stride()[:2] for out in outs], spans),
        tokens,
        *lse_TN.stride(),
        *out_TNH.stride()[:2],
        *into_TNH.stride()[:2],
        H=size,
        BLOCK_H=padded,
        BLOCK_T=MERGED // padded,
        num_warps=MERGED_WARPS,
    )


def total_fused(base_TNH: Tensor, parts: Sequence[tuple[int, Tensor]], dtype: torch.dtype) -> Tensor:
    tokens, heads, size = base_TNH.shape
    padded = triton.next_power_of_2(size)
    out = torch.empty(base_TNH.shape, dtype=dtype, device=base_TNH.device)
    tensors = [part for _, part in parts]
    assert all(x.stride(2) == 1 for x in (base_TNH, *tensors))
    spans = [_plain(start, start + len(part)) for start, part in parts]
    _total[(triton.cdiv(tokens, ADDED // padded), heads)](
        base_TNH,
        out,
        *_filled(tensors, [x.stride()[:2] for x in tensors], spans),
        tokens,
        *base_TNH.stride()[:2],
        *out.stride()[:2],
        H=size,
        BLOCK_H=padded,
        BLOCK_T=ADDED // padded,
        num_warps=ADDED_WARPS,
    )
    return out


def _plain(*numbers: int) -> tuple[int, ...]:
    return tuple(32 * n + 2 for n in numbers)


def _filled(*of_blocks: list) -> list[tuple]:
    """Each list as a tuple, filled up to one of COUNTS; the last list holds the spans."""
    *others, spans = of_blocks
    missing = min(count for count in COUNTS if count >= len(spans)) - len(spans)
    nothing = _plain(0, 0, *[1] * (len(spans[0]) - 2))
    return [*(tuple(x + x[:1] * missing) for x in others), tuple(spans + [nothing] * missing)]


@triton.jit
def _meet(span, first, BLOCK_T: tl.constexpr):
    """Whether a block has any of the program's tokens; most have none, and their loads would still be waited for."""
    return (span[0] // 32 < first + BLOCK_T) & (span[1] // 32 > first)


@triton.jit(do_not_specialize=["tokens"])
def _merge(
    lse,
    out,
    into,
    outs,
    lses,
    strides,
    spans,
    tokens,
    lse_t,
    lse_n,
    out_t,
    out_n,
    into_t,
    into_n,
    H: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    n = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0).to(tl.int64) * BLOCK_T
    t = first + tl.arange(0, BLOCK_T)
    inside = t < tokens
    mine = tl.load(lse + t * lse_t + n * lse_n, inside, other=0.0)
    high = mine
    for i in tl.static_range(len(spans)):
        if _meet(spans[i], first, BLOCK_T):
            here = (t >= spans[i][0] // 32) & (t < spans[i][1] // 32)
            at = (t - spans[i][0] // 32) * (spans[i][2] // 32) + n * (spans[i][3] // 32)
            high = tl.maximum(high, tl.load(lses[i] + at, here, other=float("-inf")))

    h = tl.arange(0, BLOCK_H)[None, :]
    total = tl.exp(mine - high)
    x = tl.load(out + (t * out_t + n * out_n)[:, None] + h, inside[:, None] & (h < H), other=0.0).to(tl.float32) * total[:, None]
    for i in tl.static_range(len(spans)):
        if _meet(spans[i], first, BLOCK_T):
            here = (t >= spans[i][0] // 32) & (t < spans[i][1] // 32)
            at = (t - spans[i][0] // 32) * (spans[i][2] // 32) + n * (spans[i][3] // 32)
            weight = tl.exp(tl.load(lses[i] + at, here, other=float("-inf")) - high)  # 0 where a block's lse is -inf
            at = (t - spans[i][0] // 32) * strides[i][0] + n * strides[i][1]
            x += tl.load(outs[i] + at[:, None] + h, here[:, None] & (h < H), other=0.0).to(tl.float32) * weight[:, None]
            total += weight
    # In place: several threads read the same lse, and no store may come before the last of them has.
    tl.debug_barrier()
    tl.store(lse + t * lse_t + n * lse_n, high + tl.log(total), inside)
    tl.store(into + (t * into_t + n * into_n)[:, None] + h, x / total[:, None], inside[:, None] & (h < H))


@triton.jit(do_not_specialize=["tokens"])
def _total(
    base,
    out,
    parts,
    strides,
    spans,
    tokens,
    base_t,
    base_n,
    out_t,
    out_n,
    H: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    n = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0).to(tl.int64) * BLOCK_T
    t = first + tl.arange(0, BLOCK_T)
    h = tl.arange(0, BLOCK_H)[None, :]
    x = tl.load(base + (t * base_t + n * base_n)[:, None] + h, (t < tokens)[:, None] & (h < H), other=0.0).to(tl.float32)
    for i in tl.static_range(len(spans)):
        if _meet(spans[i], first, BLOCK_T):
            here = (t >= spans[i][0] // 32) & (t < spans[i][1] // 32)
            at = (t - spans[i][0] // 32) * strides[i][0] + n * strides[i][1]
            x += tl.load(parts[i] + at[:, None] + h, here[:, None] & (h < H), other=0.0).to(tl.float32)
    tl.store(out + (t * out_t + n * out_n)[:, None] + h, x, (t < tokens)[:, None] & (h < H))
