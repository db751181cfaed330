"""Short causal convolutions over a row that is spread over ranks: each rank fetches the few tokens before its own.

A rank holds pieces of the row. Before each run of its tokens (a piece, or the part of a document in it) there are `width` rows: the
tokens before it, from the ranks that hold them, or zeros where a document begins, as a convolution pads a row of its own:

    held      | a b c d | m n o p q |                 a, and p q, begin documents; m is in the middle of one; width 2
    padded    | 0 0 a b c d | k l m n o | 0 0 p q |   k and l came from another rank

A convolution of width + 1 taps that adds nothing at the ends gives every held token what it has in its document alone.

A rank sends at most `width` tokens for each piece that other ranks hold, whatever the row's length: with a piece on each of P ranks
(`contiguous`) width * C elements a layer, with two (`zigzag`) twice that, and the same back in backward.

Shapes: T local tokens, P padded rows, C channels, W taps.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ds_cp import comm
from ds_cp.layout import Range
from ds_cp.mesh import AxisGroup


@dataclass(frozen=True, eq=False)
class Halo:
    """Where a rank's tokens, and those that it fetches, stand among the padded rows. Planned once a batch."""

    width: int
    rows: int
    at_T: Tensor
    """The padded row of each local token."""
    sent: Tensor
    """Local tokens that others are sent, by receiver."""
    fetched: Tensor
    """Padded rows of what comes from others, by sender."""
    counts: tuple[list[int], list[int]]
    """Tokens sent to, and fetched from, each rank."""
    axis: AxisGroup


def plan(shards: Sequence[Sequence[Range]], documents: Sequence[int], width: int, axis: AxisGroup, device: torch.device) -> Halo:
    """The halo of one rank.

    Args:
        shards: the ascending token ranges of every rank of the group. documents: cu_seqlens of the row that they make up.
        width: tokens before its own that a token sees.
    """
    held, rank = [_merged(spans) for spans in shards], axis.rank
    runs = _runs(held[rank], documents)
    offsets = [0]
    for start, end in runs:
        offsets.append(offsets[-1] + width + end - start)
    at = [torch.arange(row + width, row + width + end - start) for (start, end), row in zip(runs, offsets, strict=False)]
    owners = sorted((start, end, owner) for owner, spans in enumerate(held) for start, end in spans)
    sent = [_needed(held[other], documents, width, owners)[rank] for other in range(len(held))]
    fetched = _needed(held[rank], documents, width, owners)
    starts = [start for start, _ in runs]
    before = [[offsets[bisect_right(starts, start) - 1] + width + token - start for start, token in theirs] for theirs in fetched]
    counts = [len(part) for part in sent], [len(part) for part in fetched]
    local = _places(held[rank], [token for theirs in sent for _, token in theirs])
    return Halo(
        width=width,
        rows=offsets[-1],
        at_T=_on(device, torch.cat(at)),
        sent=_on(device, torch.tensor(local, dtype=torch.long)),
        fetched=_on(device, torch.tensor([row for rows in before for row in rows], dtype=torch.long)),
        counts=counts,
        axis=axis,
    )


def _on(device: torch.device, x: Tensor) -> Tensor:
    """On a device, without waiting for it."""
    return (x.pin_memory() if device.type == "cuda" else x).to(device, non_blocking=True)


def _merged(spans: Sequence[Range]) -> list[Range]:
    found: list[Range] = []
    for start, end in spans:
        if found and found[-1][1] == start:
            start = found.pop()[0]
        found.append((start, end))
    return found


def _runs(spans: Sequence[Range], documents: Sequence[int]) -> list[Range]:
    """The parts of documents in these ranges."""
    cut = [(start, end, documents[bisect_right(documents, start) : bisect_right(documents, end - 1)]) for start, end in spans]
    return [run for start, end, inside in cut for run in pairwise((start, *inside, end))]


def _needed(
    spans: Sequence[Range], documents: Sequence[int], width: int, owners: Sequence[tuple[int, int, int]]
) -> list[list[tuple[int, int]]]:
    """By owner, the tokens before each range that belong to its document: pairs (start of the range, token), ascending."""
    found: list[list[tuple[int, int]]] = [[] for _ in range(max(owner for *_, owner in owners) + 1)]
    for start, _ in spans:
        first = documents[bisect_right(documents, start) - 1]
        for token in range(max(start - width, first), start):
            found[owners[bisect_right(owners, (token + 1,)) - 1][2]].append((start, token))
    return found


def _places(spans: Sequence[Range], tokens: Sequence[int]) -> list[int]:
    """Local indices of tokens of the row."""
    starts = [start for start, _ in spans]
    offsets = [0]
    for start, end in spans:
        offsets.append(offsets[-1] + end - start)
    pieces = [bisect_right(starts, token) - 1 for token in tokens]
    return [offsets[piece] + token - starts[piece] for piece, token in zip(pieces, tokens, strict=True)]


def pad(x_TC: Tensor, halo: Halo) -> Tensor:
    """Local tokens with those before them, [P, C]; every rank of the group must call it.

    Shards: `x_i` holds the tokens of rank i. Forward: a padded row is its token's, whoever holds it, or zero.
    Backward: `dx_i[token]` is the sum over all padded rows, of all ranks, that are that token.
    """
    return _Pad.apply(x_TC, halo)


class _Pad(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TC: Tensor, halo: Halo) -> Tensor:
        ctx.halo = halo
        padded = x_TC.new_zeros((halo.rows, x_TC.shape[1]))
        padded.index_copy_(0, halo.at_T, x_TC)
        return padded.index_copy_(0, halo.fetched, _exchanged(x_TC.index_select(0, halo.sent), halo, *halo.counts))

    @staticmethod
    def backward(ctx, grad_PC: Tensor) -> tuple[Any, ...]:
        halo = ctx.halo
        back = _exchanged(grad_PC.index_select(0, halo.fetched), halo, *reversed(halo.counts))
        return grad_PC.index_select(0, halo.at_T).index_add_(0, halo.sent, back), None


def _exchanged(message: Tensor, halo: Halo, sent: list[int], received: list[int]) -> Tensor:
    if halo.axis.group is None:
        return message
    return comm.exchange(message, sent, received, halo.axis, "convolution's halo")


def own(x_PC: Tensor, halo: Halo, taken: int = 0) -> Tensor:
    """The local tokens' rows [T, C] of what convolutions, which take `taken` rows off the start, made of padded ones."""
    return x_PC.index_select(0, halo.at_T - taken if taken else halo.at_T)


def convolve(x_TC: Tensor, weight: Tensor, bias_C: Tensor | None, groups: int, halo: Halo) -> Tensor:
    """Causal convolution of each document, [T, C]; every rank of the group must call it.

    Args:
        weight: [C, channels of a group, W], W - 1 at most the halo's width.
    """
    assert weight.shape[-1] <= halo.width + 1, (weight.shape, halo.width)
    out_CP = functional.conv1d(pad(x_TC, halo).T.unsqueeze(0), weight, bias_C, groups=groups).squeeze(0)
    return own(out_CP.T, halo, weight.shape[-1] - 1)
