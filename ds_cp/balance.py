"""The layout `balanced`: chunks to ring ranks by what they cost. Integers only.

A query costs as many pairs as it attends keys; documents make that cost uneven along the row, so pairing early chunks with late
ones balances one document only. Here the row is cut into 2Rm chunks and the costliest chunk left goes to the least loaded rank
with a free place (Graham's longest-processing-time rule, 1969, with equal counts, so that every rank holds as many tokens). Then
the busiest rank swaps chunks with the idlest ones while that helps.

More chunks balance better and cost more kernel calls. Of the m from 1 to 4 that balance, the one whose busiest rank is predicted
to finish first is taken. One document gives m = 1, and that zigzag.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heappop, heapreplace
from itertools import accumulate, pairwise

CALL_PAIRS = 2**21
"""Pairs that take as long as one more kernel call, forward and backward with its merge: on an H200 with
flash-attn 4 a call adds some 0.2 ms (rows of 131,072 tokens on 8 ranks, 32 query heads of 128; a fit over 64 ranks and rows), and a
large tile computes 10 million a millisecond; with torch_flash and cuDNN half as many in that time."""

MORE_PADDING = 128
"""An m is left out where it pads the row by more than 1 / 128 of its tokens beyond m = 1: every layer computes them."""

LARGEST_M = 4
SLACK = 1.01
"""Of the mean: a busiest rank below it is left alone."""
EXCHANGED_WITH = 3
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
    return min((one for one in found if one.even >= wanted), key=lambda one: predict(documents, one, len(windows)))


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
    owner, work = owners(one.chunks), one.work
    for number, seen in enumerate(meets(padded(documents, one.length), one.chunk, owner)):
        others = seen & ~(1 << owner[number])
        work[owner[number]] += CALL_PAIRS * layers * others.bit_count()
    return max(work)


def owners(chunks: Sequence[Sequence[int]]) -> list[int]:
    """The ring rank of each chunk."""
    rank_of = [0] * sum(map(len, chunks))
    for rank, mine in enumerate(chunks):
        for chunk in mine:
            rank_of[chunk] = rank
    return rank_of


def meets(documents: Sequence[int], chunk: int, owner: Sequence[int]) -> list[int]:
    """For each chunk the ring ranks (as bits) that hold tokens before it of the document that reaches into it."""
    found, seen, first = [], 0, 0
    for number in range(len(owner)):
        start = documents[bisect_right(documents, number * chunk) - 1]
        if start == number * chunk:  # nothing reaches into it
            seen, first = 0, number
        elif start // chunk != first:
            seen, first = 1 << owner[number - 1], number - 1
        else:
            seen |= 1 << owner[number - 1]
        found.append(seen)
    return found
