"""The layout `balanced`: chunks to ring ranks by what they cost. Integers only.

A query costs as many pairs as it attends keys; documents make that cost uneven along the row, so pairing early chunks with late
ones balances one document only. Here the row is cut into 2Rm chunks and the costliest chunk left goes to the least loaded rank
with a free place (Graham's longest-processing-time rule, 1969, with equal counts, so that every rank holds as many tokens). Then
the busiest rank swaps chunks with the idlest ones while that helps.

More chunks balance better and cost more kernel calls. Of the m from 1 to 4 that balance, the one whose busiest rank is predicted
to finish first is taken. One document gives m = 1, and that zigzag. Then ranks with many calls swap chunks for others that cost
about as many pairs: chunks of one document that one rank holds need no call between them.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from heapq import heappop, heapreplace
from itertools import accumulate, pairwise

CALL_PAIRS = 2**20
"""Pairs that take as long as one more kernel call, forward and backward with its merge: on an H200 with flash-attn 4 a call adds
0.08 ms and a million pairs take as long (a fit over 8 ranks and four rows of 131,072 tokens in three layouts, 32 heads of 128)."""

MORE_PADDING = 128
"""An m is left out where it pads the row by more than 1 / 128 of its tokens beyond m = 1: every layer computes them."""

LARGEST_M = 4
SLACK = 1.01
"""Of the mean: a busiest rank below it is left alone."""
EXCHANGED_WITH = 3
EVALUATIONS = 20_000
"""Chunks that are looked at for swaps that save calls, all candidates together: some 10 ms."""
SIMILAR = 16
"""Chunks next in cost that a chunk may be swapped with for it."""
STILL_BALANCED = 0.98
"""Mean over busiest rank, in pairs, that such swaps leave; where it is less already they leave it as it is."""
BALANCED = 0.97
"""Mean over busiest rank, in pairs: an m that stays below it is left out where another reaches it. Pairs are certain, the price of
a call is of one GPU and one number of heads."""


@dataclass(frozen=True)
class Chunks:
    """A query attends the keys before it in its own chunk, of which its document is cut into from its start."""

    size: int

    def of(self, documents: Sequence[int]) -> tuple[int, ...]:
        """Boundaries of the chunks of documents (cu_seqlens both): to attend a chunk is to attend a document of that size."""
        return tuple(sorted({*documents, *(at for start, end in pairwise(documents) for at in range(start, end, self.size))}))


Window = int | Chunks | None
"""A query attends this many keys at most, its own included; those of its chunk; None: all before it."""


class Pairs:
    """Pairs of a query and a key that it attends, by queries, summed over `windows`. Linear in the documents."""

    def __init__(self, documents: Sequence[int], windows: Sequence[Window] = (None,)) -> None:
        self._documents, self.tokens = documents, documents[-1]
        lengths = [end - start for start, end in pairwise(documents)]
        self._before = [
            (window, windows.count(window), [0, *accumulate(pairs_of_first(n, window) for n in lengths)]) for window in set(windows)
        ]

    def of_chunks(self, chunk: int, count: int) -> list[int]:
        """Of each chunk of the padded row; the padding is a document of its own."""
        total = [self._of_first(number * chunk) for number in range(count + 1)]
        return [b - a for a, b in pairwise(total)]

    def _of_first(self, tokens: int) -> int:
        document = bisect_right(self._documents, tokens) - 1
        rest = tokens - self._documents[document]
        return sum(times * (before[document] + pairs_of_first(rest, window)) for window, times, before in self._before)


def pairs_of_first(tokens: int, window: Window) -> int:
    """Pairs that a document's first `tokens` queries attend."""
    if isinstance(window, Chunks):
        return tokens // window.size * pairs_of_first(window.size, None) + pairs_of_first(tokens % window.size, None)
    if window is None or tokens <= window:
        return tokens * (tokens + 1) // 2
    return window * (window + 1) // 2 + (tokens - window) * window


@dataclass(frozen=True)
class Cut:
    """A row in chunks, and what they cost."""

    chunk: int
    chunks: tuple[tuple[int, ...], ...]
    """Of every ring rank, ascending."""
    cost: tuple[int, ...]

    @property
    def length(self) -> int:
        """Tokens of the padded row."""
        return self.chunk * len(self.cost)

    @property
    def work(self) -> list[int]:
        """Pairs of each rank."""
        return [sum(self.cost[c] for c in mine) for mine in self.chunks]

    @property
    def even(self) -> float:
        """Pairs of the mean rank over those of the busiest: 1 is perfect."""
        work = self.work
        return sum(work) / len(work) / max(work)


def assign(documents: Sequence[int], ring: int, ulysses: int, windows: Sequence[Window] = (None,)) -> Cut:
    """The row's chunks and their ranks, m chosen by `predict` among those that balance.

    Args:
        documents: cu_seqlens of the row without its padding.
        windows: one for each attention layer, or for each kind of layer with as many repeats as there are layers of it.
    """
    largest, pairs = 1 if len(documents) == 2 else LARGEST_M, Pairs(documents, windows)
    found = [cut(pairs, ring, ulysses, m) for m in range(1, largest + 1)]
    found = [one for one in found if one.length <= found[0].length + documents[-1] // MORE_PADDING]
    wanted = min(BALANCED, max(one.even for one in found))
    best = min((one for one in found if one.even >= wanted), key=lambda one: predict(documents, one, len(windows)))
    return fewer_calls(padded(documents, best.length), best, len(windows))


def cut(pairs: Pairs, ring: int, ulysses: int, m: int) -> Cut:
    """`assign` with a given m."""
    count = 2 * ring * m
    chunk = max(-(-pairs.tokens // (count * ulysses)), 1) * ulysses
    cost = pairs.of_chunks(chunk, count)
    return Cut(chunk, tuple(longest_first(cost, ring)), tuple(cost))


def padded(documents: Sequence[int], length: int) -> Sequence[int]:
    """The padding at the row's end is a document of its own."""
    return documents if documents[-1] == length else (*documents, length)


def longest_first(cost: Sequence[int], ring: int) -> list[tuple[int, ...]]:
    """Chunks to ranks, the same number each."""
    places = len(cost) // ring
    chunks: list[list[int]] = [[] for _ in range(ring)]
    loads = [(0, rank) for rank in range(ring)]
    for chunk in sorted(range(len(cost)), key=lambda c: (-cost[c], -c)):
        load, rank = loads[0]
        chunks[rank].append(chunk)
        if len(chunks[rank]) < places:
            heapreplace(loads, (load + cost[chunk], rank))
        else:
            heappop(loads)
    _exchange(chunks, cost)
    return [tuple(sorted(mine)) for mine in chunks]


def _exchange(chunks: list[list[int]], cost: Sequence[int]) -> None:
    """Swaps chunks of the busiest rank for cheaper ones of the idlest ranks while that brings the busiest down."""
    loads = [sum(cost[c] for c in mine) for mine in chunks]
    enough = SLACK * sum(loads) / len(loads)
    for _ in range(len(chunks)):
        order = sorted(range(len(chunks)), key=lambda rank: (loads[rank], rank))
        busiest = order[-1]
        if loads[busiest] <= enough:
            return
        most, swaps = loads[busiest], []
        for other in order[:EXCHANGED_WITH]:
            least = loads[other]
            for i, a in enumerate(chunks[busiest]):
                highest, lowest = most - cost[a], least + cost[a]
                swaps += [(max(highest + cost[b], lowest - cost[b]), other, i, j) for j, b in enumerate(chunks[other])]
        load, other, i, j = min(swaps)
        if load >= most:
            return
        a, b = chunks[busiest][i], chunks[other][j]
        chunks[busiest][i], chunks[other][j] = b, a
        loads[busiest] += cost[b] - cost[a]
        loads[other] += cost[a] - cost[b]


def predict(documents: Sequence[int], one: Cut, layers: int) -> int:
    """Pairs of the busiest rank, kernel calls counted as pairs."""
    begins = _begins(padded(documents, one.length), one.chunk, len(one.cost))
    return max(map(sum, zip(*_loads(begins, one, owners(one.chunks), layers), strict=True)))


def _loads(begins: Sequence[int], one: Cut, owner: Sequence[int], layers: int) -> tuple[list[int], list[int]]:
    """Of each rank: pairs; kernel calls as pairs, an estimate: neighbours may become one. `begins` are those of the padded row."""
    work, calls = [0] * len(one.chunks), [0] * len(one.chunks)
    for rank, cost, seen in zip(owner, one.cost, _met(begins, owner), strict=True):
        work[rank] += cost
        calls[rank] += CALL_PAIRS * layers * (seen & ~(1 << rank)).bit_count()
    return work, calls


def fewer_calls(documents: Sequence[int], one: Cut, layers: int) -> Cut:
    """Swaps chunks of the rank that is predicted to finish last, the best swap each time, until none brings the last ones down.

    No swap makes blocks travel further. A row of so many chunks that one rank's swaps cannot all be looked at is left as it is.

    Args:
        documents: of the padded row.
    """
    ring, left = len(one.chunks), EVALUATIONS // len(one.cost)
    if left < 2 * SIMILAR * len(one.chunks[0]):
        return one
    ascending = sorted(range(len(one.cost)), key=lambda c: (one.cost[c], c))
    place = {c: i for i, c in enumerate(ascending)}
    owner, begins = owners(one.chunks), _begins(documents, one.chunk, len(one.cost))
    work, calls = _loads(begins, one, owner, layers)
    most, furthest = max(max(work), int(sum(work) / ring / STILL_BALANCED)), sum(hops(_met(begins, owner), owner, ring))
    while True:
        ends = [a + b for a, b in zip(work, calls, strict=True)]
        last, best = ends.index(max(ends)), (sorted(ends, reverse=True), owner, work, calls)
        for a in (c for c, rank in enumerate(owner) if rank == last):
            for b in ascending[max(place[a] - SIMILAR, 0) : place[a] + SIMILAR + 1]:
                more = one.cost[a] - one.cost[b]
                if owner[b] == last or max(work[last] - more, work[owner[b]] + more) > most:
                    continue
                if (left := left - 1) < 0:
                    break
                swapped = list(owner)
                swapped[a], swapped[b] = owner[b], last
                then = _loads(begins, one, swapped, layers)
                ends = sorted(map(sum, zip(*then, strict=True)), reverse=True)
                if ends < best[0] and sum(hops(_met(begins, swapped), swapped, ring)) <= furthest:
                    best = ends, swapped, *then
        if best[1] is owner:
            return replace(one, chunks=tuple(tuple(c for c, rank in enumerate(owner) if rank == r) for r in range(ring)))
        _, owner, work, calls = best


def hops(met: Sequence[int], owner: Sequence[int], ring: int) -> tuple[int, ...]:
    """Of each rank: hops that its block makes until no later rank needs it. `met` is that of `meets`."""
    needed = [0] * ring
    for rank, seen in zip(owner, met, strict=True):
        needed[rank] |= seen
    return tuple(max((s for s in range(1, ring) if needed[(r + s) % ring] >> r & 1), default=0) for r in range(ring))


def owners(chunks: Sequence[Sequence[int]]) -> list[int]:
    """The ring rank of each chunk."""
    rank_of = [0] * sum(map(len, chunks))
    for rank, mine in enumerate(chunks):
        for chunk in mine:
            rank_of[chunk] = rank
    return rank_of


def meets(documents: Sequence[int], chunk: int, owner: Sequence[int]) -> list[int]:
    """For each chunk the ring ranks (as bits) that hold tokens before it of the document that reaches into it."""
    return _met(_begins(documents, chunk, len(owner)), owner)


def _begins(documents: Sequence[int], chunk: int, count: int) -> list[int]:
    """For each chunk the one in which the document begins that its first token is of."""
    return [documents[bisect_right(documents, number * chunk) - 1] // chunk for number in range(count)]


def _met(begins: Sequence[int], owner: Sequence[int]) -> list[int]:
    found, seen, first = [], 0, 0
    for number, begun in enumerate(begins):
        if begun == number:  # nothing reaches into it
            seen, first = 0, number
        elif begun != first:
            seen, first = 1 << owner[number - 1], number - 1
        else:
            seen |= 1 << owner[number - 1]
        found.append(seen)
    return found
