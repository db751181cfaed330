"""`blocked.add_` and `blocked.plain` as one Triton kernel each. A program has 16 keys of one head, of dk or of dv.

Runs go to the kernels as tuples of numbers that Triton does not compile anew for, in one of COUNTS; merge_cuda tells why.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

KEYS, WARPS = 16, 8
COUNTS = (1, 3, 9)
NEVER = 1 << 30


def add_fused_(
    into_2MX: Tensor,
    place_BH: Tensor,
    elements: int,
    runs: Sequence[tuple[int, int]],
    first: int,
    dk_SMH: Tensor,
    dv_SMH: Tensor,
    dk_scale: float,
) -> None:
    keys, heads = dk_SMH.shape[:2]
    assert dk_SMH.stride(2) == dv_SMH.stride(2) == 1
    _add[(triton.cdiv(keys, KEYS), heads, 2)](
        into_2MX,
        place_BH,
        dk_SMH,
        dv_SMH,
        dk_scale,
        _filled(runs),
        first,
        keys,
        *into_2MX.stride()[:2],
        *dk_SMH.stride()[:2],
        *dv_SMH.stride()[:2],
        **_sizes(place_BH, elements),
    )


def plain_fused(
    sums_2MX: Sequence[Tensor],
    place_BH: Tensor,
    elements: int,
    runs: Sequence[tuple[int, int]],
    keys: int,
    dk_scale: float,
    dtype: torch.dtype,
    own: tuple[Tensor, Tensor] | None,
) -> Tensor:
    first, last = sums_2MX[0], sums_2MX[-1]
    assert first.stride() == last.stride()
    size = place_BH.shape[1]
    out = torch.empty((2, keys, first.shape[1], size), dtype=dtype, device=first.device)
    dk, dv = (out[0], out[1]) if own is None else own
    assert dk.stride(2) == dv.stride(2) == 1
    _plain[(triton.cdiv(keys, KEYS), first.shape[1], 2)](
        first,
        last,
        place_BH,
        out,
        dk_scale,
        _filled(runs),
        keys,
        *first.stride()[:2],
        *out.stride()[:3],
        dk,
        dv,
        *dk.stride()[:2],
        *dv.stride()[:2],
        OWN=own is not None,
        TWO=len(sums_2MX) == 2,
        **_sizes(place_BH, elements),
    )
    return out


def _sizes(place_BH: Tensor, elements: int) -> dict[str, int]:
    block, size = place_BH.shape
    return {
        "ELEMENTS": elements,
        "BLOCK": block,
        "H": size,
        "BLOCK_H": triton.next_power_of_2(size),
        "KEYS": KEYS,
        "num_warps": WARPS,
    }


def _filled(runs: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    missing = min(count for count in COUNTS if count >= len(runs)) - len(runs)
    return tuple((32 * start + 2, 32 * shift + 2) for start, shift in [*runs, *[(NEVER // 32, 0)] * missing])


@triton.jit
def _places(place, runs, n, inside, ELEMENTS: tl.constexpr, BLOCK: tl.constexpr, H: tl.constexpr, BLOCK_H: tl.constexpr):
    """Offsets [KEYS, BLOCK_H] of keys n in a head's elements."""
    h = tl.arange(0, BLOCK_H)[None, :]
    shift = tl.zeros_like(n)
    for i in tl.static_range(len(runs)):
        shift = tl.where(n >= runs[i][0] // 32, runs[i][1] // 32, shift)
    n += shift
    at = tl.load(place + (n % BLOCK)[:, None] * H + h, inside[:, None] & (h < H), other=0)
    return (n // BLOCK * ELEMENTS)[:, None] + at


@triton.jit(do_not_specialize=["first", "keys"])
def _add(
    into,
    place,
    dk,
    dv,
    dk_scale,
    runs,
    first,
    keys,
    into_2,
    into_m,
    dk_s,
    dk_m,
    dv_s,
    dv_m,
    ELEMENTS: tl.constexpr,
    BLOCK: tl.constexpr,
    H: tl.constexpr,
    BLOCK_H: tl.constexpr,
    KEYS: tl.constexpr,
):
    s = tl.program_id(0).to(tl.int64) * KEYS + tl.arange(0, KEYS)
    m, kind = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    h = tl.arange(0, BLOCK_H)[None, :]
    here = (s < keys)[:, None] & (h < H)
    if kind == 0:
        x = tl.load(dk + (s * dk_s + m * dk_m)[:, None] + h, here, other=0.0).to(tl.float32) * dk_scale
    else:
        x = tl.load(dv + (s * dv_s + m * dv_m)[:, None] + h, here, other=0.0).to(tl.float32)
    at = into + kind * into_2 + m * into_m + _places(place, runs, s + first, s < keys, ELEMENTS, BLOCK, H, BLOCK_H)
    tl.store(at, tl.load(at, here, other=0.0) + x, here)


@triton.jit(do_not_specialize=["keys"])
def _plain(
    first,
    last,
    place,
    out,
    dk_scale,
    runs,
    keys,
    sum_2,
    sum_m,
    out_2,
    out_s,
    out_m,
    dk,
    dv,
    dk_s,
    dk_m,
    dv_s,
    dv_m,
    OWN: tl.constexpr,
    TWO: tl.constexpr,
    ELEMENTS: tl.constexpr,
    BLOCK: tl.constexpr,
    H: tl.constexpr,
    BLOCK_H: tl.constexpr,
    KEYS: tl.constexpr,
):
    s = tl.program_id(0).to(tl.int64) * KEYS + tl.arange(0, KEYS)
    m, kind = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    h = tl.arange(0, BLOCK_H)[None, :]
    here = (s < keys)[:, None] & (h < H)
    at = kind * sum_2 + m * sum_m + _places(place, runs, s, s < keys, ELEMENTS, BLOCK, H, BLOCK_H)
    x = tl.load(first + at, here, other=0.0)
    if TWO:
        x += tl.load(last + at, here, other=0.0)
    if kind == 0:
        x *= dk_scale
    if OWN:
        if kind == 0:
            x += tl.load(dk + (s * dk_s + m * dk_m)[:, None] + h, here, other=0.0).to(tl.float32)
        else:
            x += tl.load(dv + (s * dv_s + m * dv_m)[:, None] + h, here, other=0.0).to(tl.float32)
    tl.store(out + kind * out_2 + (s * out_s + m * out_m)[:, None] + h, x, here)
