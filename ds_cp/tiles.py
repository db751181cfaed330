"""Which slice of the local queries attends which slice of a ring rank's keys. Integers only.

Documents are contiguous in the row and local order is ascending, so the tokens of one document are contiguous in every
rank's memory. Therefore

- step 0 (own keys) is one varlen causal call over all local tokens, documents at their local boundaries;
- in every later step a local chunk c = [a, b) meets only the one document that reaches into it from before a, and of the
  other rank's keys those of that document before a: one rectangle without a mask, at most one per local chunk.

A windowed layer has tiles of its own (`plan_window`): positions inside a document count there, so chunks that do not follow one
another are not one local document, and only the window before each of them travels.

Neighbouring rectangles with the same keys become one. Slices that share no document never appear.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

from ds_cp.balance import hops, meets, owners, pairs_of_first
from ds_cp.layout import Layout, Range, gathered_places


@dataclass(frozen=True)
class Tile:
    """Local queries [q_start, q_end) attend keys [k_start, k_end) of the step's block.

    `documents` are the boundaries (cu_seqlens, from 0 to the slice's length, the same for queries and keys) of a causal
    varlen call; None is a rectangle, whose keys all stand before its queries. With a window a query attends of these the keys that
    are fewer than `window` tokens before it: query x stands `ahead + x - y` tokens after key y.
    """

    q_start: int
    q_end: int
    k_start: int
    k_end: int
    documents: tuple[int, ...] | None = None
    window: int | None = None
    ahead: int = 0
    """Tokens from the first key to the first query; 0 for a causal tile."""
    cu_seqlens: Any = field(default=None, compare=False, repr=False)
    """`documents` as an int32 tensor on the kernel's device, put there once a batch; None where no kernel needs it."""

    @property
    def causal(self) -> bool:
        return self.documents is not None

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest document."""
        assert self.documents is not None
        return max(end - start for start, end in pairwise(self.documents))

    @cached_property
    def pairs(self) -> int:
        """Pairs of a query and a key that it attends."""
        queries, keys = self.q_end - self.q_start, self.k_end - self.k_start
        if self.documents is not None:
            return sum(pairs_of_first(end - start, self.window) for start, end in pairwise(self.documents))
        if self.window is None:
            return queries * keys
        return sum(min(keys, self.window - 1 - self.ahead - x + keys) for x in range(queries))


@dataclass(frozen=True)
class Halo:
    """The keys that a windowed layer's queries attend beyond their own chunks: only these travel, straight from owner to reader.

    `tokens` of them stand side by side in the order of the row; the keys of the second step. A key that the own rank holds in
    another chunk is among them.
    """

    tokens: int
    sent: tuple[tuple[int, int, int], ...]
    """(ring rank, own tokens [start, end)) of what others need, for each of them in the order of the row."""
    received: tuple[tuple[int, int, int], ...]
    """(ring rank, [start, end) among the halo's tokens)."""
    own: tuple[tuple[int, int, int], ...]
    """(start among the halo's tokens, own tokens [start, end))."""


@dataclass(frozen=True)
class Plan:
    """What a ring rank computes, step by step, and how far blocks travel. The first step is one tile over all own tokens."""

    steps: tuple[tuple[Tile, ...], ...]
    reach: tuple[int, ...] = ()
    """By ring rank: hops that its block makes until no later rank needs it. The same on every rank."""
    starts: tuple[tuple[int, ...], ...] = ()
    """By ring rank: the keys of its block at which rectangles begin, ascending from 0. The same on every rank."""
    halo: Halo | None = None
    """Of a windowed layer with neighbours: what travels instead of blocks."""
    gathered: bool = False
    """Two steps: the own tokens, then everybody's keys and values at once (`ring_impl: allgather`)."""
    kept: bool = False
    """Keys and values that came in forward wait for backward, which then receives none (`ring_keep`). The same on every rank."""


def plan(layout: Layout, ring_rank: int, documents: Sequence[int]) -> Plan:
    """The tiles of ring rank `ring_rank`; at step s it holds the block of rank r - s. Ends with the last step that any rank needs.

    Args:
        documents: cu_seqlens of the padded row: 0, every boundary, the row's length; strictly ascending.
    """
    reach = _reach(layout, documents)
    mine = layout.ring_ranges(ring_rank)
    reaching = _reaching(mine, documents)
    steps: list[tuple[Tile, ...]] = [(_own(mine, documents),)]
    for step in range(1, max(reach) + 1):
        theirs = layout.ring_ranges((ring_rank - step) % layout.ring)
        steps.append(_rectangles(reaching, theirs))
    return Plan(tuple(steps), reach, tuple(_starts(layout.ring_ranges(rank), documents) for rank in range(layout.ring)))


def plan_gathered(layout: Layout, ring_rank: int, documents: Sequence[int]) -> Plan:
    """The tiles of `ring_impl: allgather`: the own chunks, each by itself; then each against its document's tokens before it.

    The keys of the second step are the whole row, its chunks where `layout.gathered_places` puts them. A rectangle has no order
    among its keys: pieces that stand side by side there are one tile. Where no rank needs another's keys there is one step.
    """
    reach = _reach(layout, documents)
    if not any(reach):
        return plan(layout, ring_rank, documents)
    mine = layout.ring_ranges(ring_rank)
    everywhere = sorted({*documents, *(edge for span in mine for edge in span)})
    places = [place * layout.chunk for place in gathered_places(layout)]
    before = [
        Tile(q_start, q_end, a, b)
        for q_start, q_end, first, start in _reaching(mine, documents)
        for a, b in _gathered_keys(first, start, layout.chunk, places)
    ]
    return Plan(((_own(mine, everywhere),), tuple(before)), reach, gathered=True)


def plan_window(layout: Layout, ring_rank: int, documents: Sequence[int], window: int) -> Plan:
    """The tiles of a layer in which a query attends `window` keys, its own included: own runs of chunks, then what is before each.

    A run is of chunks that follow one another. Its first `window - 1` queries of a document that reaches into it meet the last
    `window - 1` tokens of that document before it: one banded rectangle a run, and a plain one before it where there are fewer.
    """
    mine = layout.ring_ranges(ring_rank)
    runs = _runs(mine)
    own = replace(_own(mine, sorted({*documents, *(start for start, _ in runs)})), window=window)
    needed = _union(_before_runs(runs, documents, window))
    tiles, offset = [], 0
    for start, end in runs:
        for first, last in _before_runs([(start, end)], documents, window):
            k_start = _place(needed, first)
            queries = min(end, documents[_document_of(start, documents) + 1], start + window - 1) - start
            tiles += _bands(offset, queries, k_start, last - first, window)
        offset += end - start
    halo = _halo(layout, ring_rank, documents, window, needed)
    return Plan(((own,), tuple(tiles)), halo=halo) if tiles or halo.sent else Plan(((own,),))


def _bands(q_start: int, queries: int, k_start: int, keys: int, window: int) -> list[Tile]:
    """The first queries see all of few keys, and FlashAttention-2 and 3 cannot be told that of a band of more queries than keys."""
    seeing_all = min(window - keys, queries) if queries > keys else 0
    cut, q_end, k_end = q_start + seeing_all, q_start + queries, k_start + keys
    plain = [Tile(q_start, cut, k_start, k_end)] if seeing_all else []
    return plain + ([Tile(cut, q_end, k_start, k_end, window=window, ahead=keys + seeing_all)] if cut < q_end else [])


def _halo(layout: Layout, ring_rank: int, documents: Sequence[int], window: int, needed: list[Range]) -> Halo:
    owner = owners(layout.chunks)
    mine = layout.ring_ranges(ring_rank)
    sent = [
        (rank, _local(mine, start), _local(mine, end))
        for rank in range(layout.ring)
        if rank != ring_rank
        for number, start, end in _pieces(layout, _union(_before_runs(_runs(layout.ring_ranges(rank)), documents, window)))
        if owner[number] == ring_rank
    ]
    received, own = [], []
    for number, start, end in _pieces(layout, needed):
        place = _place(needed, start)
        if owner[number] == ring_rank:
            own.append((place, _local(mine, start), _local(mine, end)))
        else:
            received.append((owner[number], place, place + end - start))
    return Halo(sum(end - start for start, end in needed), tuple(sent), tuple(received), tuple(own))


def _pieces(layout: Layout, ranges: list[Range]) -> Iterator[tuple[int, int, int]]:
    """(chunk, start, end): the ranges cut at the chunks' edges."""
    for start, end in ranges:
        for number in range(start // layout.chunk, -(-end // layout.chunk)):
            yield number, max(start, number * layout.chunk), min(end, (number + 1) * layout.chunk)


def _runs(mine: Sequence[Range]) -> list[Range]:
    """Ranges that follow one another as one."""
    runs: list[Range] = []
    for start, end in mine:
        if runs and runs[-1][1] == start:
            start = runs.pop()[0]
        runs.append((start, end))
    return runs


def _before_runs(runs: Sequence[Range], documents: Sequence[int], window: int) -> list[Range]:
    """The tokens before each run that its first query attends."""
    found = [(max(documents[_document_of(start, documents)], start - window + 1), start) for start, _ in runs]
    return [(first, last) for first, last in found if first < last]


def _union(ranges: Sequence[Range]) -> list[Range]:
    """Ranges whose starts and ends ascend, those that meet or overlap as one."""
    union: list[Range] = []
    for start, end in ranges:
        if union and start <= union[-1][1]:
            start = union.pop()[0]
        union.append((start, end))
    return union


def _place(ranges: Sequence[Range], token: int) -> int:
    """How many tokens of ascending `ranges`, of any length, stand before `token`."""
    return sum(min(max(token - start, 0), end - start) for start, end in ranges)


def _reach(layout: Layout, documents: Sequence[int]) -> tuple[int, ...]:
    owner = owners(layout.chunks)
    return hops(meets(documents, layout.chunk, owner), owner, layout.ring)


def _reaching(mine: tuple[Range, ...], documents: Sequence[int]) -> list[tuple[int, int, int, int]]:
    """Of each local chunk that a document reaches into: (first and last local query, first token of the document, of the chunk)."""
    found, offset = [], 0
    for start, end in mine:
        document = _document_of(start, documents)
        if documents[document] < start:
            found.append((offset, offset + min(end, documents[document + 1]) - start, documents[document], start))
        offset += end - start
    return found


def _gathered_keys(start: int, end: int, chunk: int, places: Sequence[int]) -> list[Range]:
    """Where the row's tokens [start, end) stand after a gather, as few ranges as possible; `end` is a chunk's edge."""
    pieces = sorted((places[c] + max(start - c * chunk, 0), places[c] + chunk) for c in range(start // chunk, end // chunk))
    ranges: list[Range] = []
    for a, b in pieces:
        if ranges and ranges[-1][1] == a:
            a = ranges.pop()[0]
        ranges.append((a, b))
    return ranges


def _own(mine: tuple[Range, ...], documents: Sequence[int]) -> Tile:
    """All local tokens on themselves: a document's pieces in several chunks are one local document."""
    bounds, offset, last = [0], 0, None
    for start, end in mine:
        document = _document_of(start, documents)
        if document == last:  # its earlier piece ends where this one begins
            bounds.pop()
        while documents[document + 1] < end:
            document += 1
            bounds.append(offset + documents[document] - start)
        offset += end - start
        bounds.append(offset)
        last = document
    return Tile(0, offset, 0, offset, tuple(bounds))


def _starts(theirs: tuple[Range, ...], documents: Sequence[int]) -> tuple[int, ...]:
    """The first key here of every document that goes on after one of the chunks: those that later queries attend."""
    on = (_document_of(end - 1, documents) for _, end in theirs if documents[bisect_right(documents, end - 1)] > end)
    return tuple(sorted({0, *(_local(theirs, documents[number]) for number in on)}))


def _rectangles(reaching: list[tuple[int, int, int, int]], theirs: tuple[Range, ...]) -> tuple[Tile, ...]:
    tiles: list[Tile] = []
    for q_start, q_end, first, start in reaching:
        k_start, k_end = _local(theirs, first), _local(theirs, start)
        if k_start == k_end:
            continue
        tile = Tile(q_start, q_end, k_start, k_end)
        if tiles and (tiles[-1].q_end, tiles[-1].k_start, tiles[-1].k_end) == (q_start, k_start, k_end):
            tile = Tile(tiles.pop().q_start, q_end, k_start, k_end)
        tiles.append(tile)
    return tuple(tiles)


def _document_of(token: int, documents: Sequence[int]) -> int:
    return bisect_right(documents, token) - 1


def _local(ranges: tuple[Range, ...], token: int) -> int:
    """How many tokens of `ranges` (ascending, of one length) stand before `token` of the row."""
    whole = bisect_right(ranges, (token, token)) - 1  # the last range that starts no later
    if whole < 0:
        return 0
    start, end = ranges[whole]
    return whole * (end - start) + min(token, end) - start
