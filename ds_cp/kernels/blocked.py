"""Sums of (dk, dv) in the order of a kernel's registers, which its tiles add to without a conversion: how to read and write them.

A block of keys of one head is contiguous, E elements. `place` says where in a block key n and element h stand; the same for every
block and head. A kernel adds whole blocks, so keys at which its tiles begin begin a block of their own: `starts`, ascending from 0.

    starts 0, 5, 9; 4 keys a block      keys   0 1 2 3 | 4 . . . | 5 6 7 8 | 9 10 . .

What a block holds beyond its keys and head size is never read.

Shapes: S keys, M key/value heads, H head size, 2 for (dk, dv); X elements of all blocks of a head; B keys of a block.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

MOST_RUNS = 9
"""Starts that a sum may have; where a block has more, only its first key begins one."""


def shifts(starts: Sequence[int], block: int) -> tuple[tuple[int, int], ...]:
    """(first key, shift) of each run: its key n stands where key n + shift would stand if there were one run alone."""
    taken, free = _taken(starts), 0
    runs = [(taken[0], -taken[0])]
    for start, end in pairwise(taken):
        free += _up(end - start, block)
        runs.append((end, free - end))
    return tuple(runs)


def blocks(starts: Sequence[int], keys: int, block: int) -> int:
    """Of a sum over so many keys."""
    start, shift = shifts(starts, block)[-1]
    return (start + shift + _up(keys - start, block)) // block


def first_block(start: int, end: int, starts: Sequence[int], block: int) -> int | None:
    """The block whose first key is `start`; None where there is none, or where the keys up to `end` are not of one run."""
    runs = shifts(starts, block)
    last = max(i for i, (first, _) in enumerate(runs) if first <= start)
    place = start + runs[last][1]
    whole = last + 1 == len(runs) or end <= runs[last + 1][0]
    return place // block if whole and place % block == 0 else None


def add_(
    into_2MX: Tensor,
    place_BH: Tensor,
    elements: int,
    starts: Sequence[int],
    first: int,
    dk_SMH: Tensor,
    dv_SMH: Tensor,
    dk_scale: float,
) -> None:
    """Adds dk * dk_scale and dv, of the keys from `first` on, any strides. `elements` are those of a block."""
    runs = shifts(starts, len(place_BH))
    if into_2MX.is_cuda:
        from ds_cp.kernels.blocked_cuda import add_fused_

        add_fused_(into_2MX, place_BH, elements, runs, first, dk_SMH, dv_SMH, dk_scale)
        return
    where = _where(place_BH, elements, runs, first, len(dk_SMH)).flatten()
    for total_MX, part, factor in zip(into_2MX, (dk_SMH, dv_SMH), (dk_scale, 1.0), strict=True):
        total_MX.index_add_(1, where, (part.to(total_MX.dtype) * factor).transpose(0, 1).flatten(1))


def plain(
    sums_2MX: Sequence[Tensor],
    place_BH: Tensor,
    elements: int,
    starts: Sequence[int],
    keys: int,
    dk_scale: float,
    dtype: torch.dtype,
    own: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """(dk * dk_scale, dv) [2, S, M, H] of one or two sums together, rounded to `dtype` once.

    Args:
        own: (dk, dv) [S, M, H] of the same keys to add, any strides, not to be scaled.
    """
    assert 0 < len(sums_2MX) <= 2
    runs = shifts(starts, len(place_BH))
    if sums_2MX[0].is_cuda:
        from ds_cp.kernels.blocked_cuda import plain_fused

        return plain_fused(sums_2MX, place_BH, elements, runs, keys, dk_scale, dtype, own)
    where = _where(place_BH, elements, runs, 0, keys)
    both = torch.stack([sums_2MX[0][kind][:, where] for kind in (0, 1)])  # [2, M, S, H]
    for other_2MX in sums_2MX[1:]:
        both += torch.stack([other_2MX[kind][:, where] for kind in (0, 1)])
    both[0] *= dk_scale
    both = both.transpose(1, 2)
    return (both if own is None else both + torch.stack(own)).to(dtype).contiguous()


def _where(place_BH: Tensor, elements: int, runs: Sequence[tuple[int, int]], first: int, keys: int) -> Tensor:
    """[S, H] positions in a head's X elements."""
    key = torch.arange(first, first + keys, device=place_BH.device)
    run = torch.bucketize(key, torch.tensor([start for start, _ in runs], device=key.device), right=True) - 1
    key = key + torch.tensor([shift for _, shift in runs], device=key.device)[run]
    return (key // len(place_BH) * elements).unsqueeze(1) + place_BH[key % len(place_BH)]


def _taken(starts: Sequence[int]) -> Sequence[int]:
    return starts if len(starts) <= MOST_RUNS else starts[:1]


def _up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
