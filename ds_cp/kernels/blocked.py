"""Sums of (dk, dv) in the order of a kernel's registers, which its tiles add to without a conversion: how to read and write them.

A block of keys of one head is contiguous, E elements. `place` says where in a block key n and element h stand; the same for every
block and head. What a block holds beyond its keys and head size is never read.

Shapes: S keys, M key/value heads, H head size, 2 for (dk, dv); X elements of all blocks of a head; B keys of a block.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def add_(into_2MX: Tensor, place_BH: Tensor, elements: int, start: int, dk_SMH: Tensor, dv_SMH: Tensor, dk_scale: float) -> None:
    """Adds dk * dk_scale and dv, of the keys from `start` on, any strides. `elements` are those of a block."""
    if into_2MX.is_cuda:
        from ds_cp.kernels.blocked_cuda import add_fused_

        add_fused_(into_2MX, place_BH, elements, start, dk_SMH, dv_SMH, dk_scale)
        return
    where = _where(place_BH, elements, start, len(dk_SMH)).flatten()
    for total_MX, part, factor in zip(into_2MX, (dk_SMH, dv_SMH), (dk_scale, 1.0), strict=True):
        total_MX.index_add_(1, where, (part.to(total_MX.dtype) * factor).transpose(0, 1).flatten(1))


def plain(sums_2MX: Sequence[Tensor], place_BH: Tensor, elements: int, keys: int, dk_scale: float, dtype: torch.dtype) -> Tensor:
    """(dk * dk_scale, dv) [2, S, M, H] of one or two sums together, rounded to `dtype` once."""
    assert 0 < len(sums_2MX) <= 2
    if sums_2MX[0].is_cuda:
        from ds_cp.kernels.blocked_cuda import plain_fused

        return plain_fused(sums_2MX, place_BH, elements, keys, dk_scale, dtype)
    where = _where(place_BH, elements, 0, keys)
    both = torch.stack([sum(x[kind][:, where] for x in sums_2MX) for kind in (0, 1)])  # [2, M, S, H]
    both[0] *= dk_scale
    return both.transpose(1, 2).to(dtype).contiguous()


def _where(place_BH: Tensor, elements: int, start: int, keys: int) -> Tensor:
    """[S, H] positions in a head's X elements."""
    key = torch.arange(start, start + keys, device=place_BH.device)
    return (key // len(place_BH) * elements).unsqueeze(1) + place_BH[key % len(place_BH)]
