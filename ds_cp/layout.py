"""Who holds which tokens of a row. Integers only.

A row of S tokens (padded at its end) is cut into equal chunks; a layout gives every ring rank the same number of them,
kept in ascending order; inside a ring rank the Ulysses ranks hold consecutive equal pieces. With R = 2, zigzag:

    row    | chunk 0 | chunk 1 | chunk 2 | chunk 3 |
    ring 0 | chunk 0 | chunk 3 |      causal work 1 + 4
    ring 1 | chunk 1 | chunk 2 |      causal work 2 + 3

`zigzag` pairs an early chunk with a late one (Zhu, ring-flash-attention, 2024; also Megatron-LM's context parallelism),
so every ring rank has the same causal work for one document. `balanced` does that for packed rows: `balance` has the rule.
`contiguous` gives rank r the r-th part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ds_cp import balance

NAMES = ("auto", "zigzag", "balanced", "contiguous")
"""Values of the config's `layout`."""

Range = tuple[int, int]
"""Half-open range of tokens [start, end) of the row."""


@dataclass(frozen=True)
class Layout:
    """Chunks of one row. `chunks[r]` are the chunk numbers of ring rank r, ascending."""

    chunk: int
    chunks: tuple[tuple[int, ...], ...]
    ulysses: int

    @property
    def ring(self) -> int:
        return len(self.chunks)

    @property
    def length(self) -> int:
        """Tokens of the padded row."""
        return self.chunk * sum(len(c) for c in self.chunks)

    def ring_ranges(self, ring_rank: int) -> tuple[Range, ...]:
        """The token ranges that ring rank `ring_rank` attends with, ascending, one a chunk."""
        return tuple((c * self.chunk, (c + 1) * self.chunk) for c in self.chunks[ring_rank])

    def local_ranges(self, ring_rank: int, ulysses_rank: int) -> tuple[Range, ...]:
        """The token ranges that one rank holds outside attention: its piece of the ring rank's tokens."""
        piece = self.length // self.ring // self.ulysses
        return _cut(self.ring_ranges(ring_rank), ulysses_rank * piece, (ulysses_rank + 1) * piece)


@dataclass(frozen=True)
class Route:
    """How tokens get from the rank that holds them to those that work on them, as one rank of the group sees it.

    `sent[j]` are the held tokens that rank j works on, `received[i]` where those that rank i holds stand among the tokens
    worked on; ranges of local indices. Both ends of a message list its tokens in the order of the row.
    """

    sent: tuple[tuple[Range, ...], ...]
    received: tuple[tuple[Range, ...], ...]

    @property
    def counts(self) -> tuple[list[int], list[int]]:
        """Tokens sent to and received from each rank."""
        sent, received = ([sum(end - start for start, end in spans) for spans in side] for side in (self.sent, self.received))
        return sent, received


def route(held: Sequence[Sequence[Range]], worked: Sequence[Sequence[Range]], rank: int) -> Route:
    """Rank `rank`'s route between two distributions of a row, each the ascending token ranges of every rank of a group."""
    sent = tuple(_common(held[rank], theirs)[0] for theirs in worked)
    received = tuple(_common(theirs, worked[rank])[1] for theirs in held)
    return Route(sent=sent, received=received)


def resolve(name: str, documents: Sequence[int]) -> str:
    """The layout of a row of these documents (cu_seqlens without the padding): "auto" is zigzag for one, balanced for several."""
    if name != "auto":
        return name
    return "zigzag" if len(documents) <= 2 else "balanced"


def describe(name: str) -> str:
    """What the config's layout means for a run, in a phrase."""
    return "zigzag; balanced for packed rows" if name == "auto" else name


def chunk_count(name: str, ring: int, m: int = 1) -> int:
    """Chunks that layout `name` cuts a row into; `m` is that of balanced."""
    return {"zigzag": 2, "auto": 2, "balanced": 2 * m}.get(name, 1) * ring if ring > 1 else 1


def pad_multiple(name: str, ring: int, ulysses: int, m: int = 1) -> int:
    """A row's length is padded up to a multiple of this."""
    return chunk_count(name, ring, m) * ulysses


def most_padding(name: str, ring: int, ulysses: int) -> int:
    """The largest such multiple that a packed row may get."""
    return pad_multiple("balanced" if name == "auto" else name, ring, ulysses, balance.LARGEST_M)


def build(
    name: str, tokens: int, ring: int, ulysses: int, documents: Sequence[int] = (), windows: Sequence[balance.Window] = (None,)
) -> Layout:
    """The layout of a row of `tokens` tokens, padded up at its end; a row shorter than the ranks is padded too.

    Args:
        documents: cu_seqlens of the row without its padding; none given: one document.
        windows: of the model's attention layers, as `balance.assign` takes them.
    """
    documents = documents or (0, tokens)
    assert documents[-1] == tokens
    name = resolve(name, documents)
    if name == "balanced" and ring > 1:
        found = balance.assign(documents, ring, ulysses, windows)
        return Layout(chunk=found.chunk, chunks=found.chunks, ulysses=ulysses)
    count = chunk_count(name, ring)
    multiple = count * ulysses
    chunk = max(-(-tokens // multiple), 1) * ulysses
    chunks = tuple((r, count - 1 - r) for r in range(ring)) if count == 2 * ring else tuple((r,) for r in range(ring))
    return Layout(chunk=chunk, chunks=chunks, ulysses=ulysses)


def shards(layout: Layout) -> tuple[tuple[Range, ...], ...]:
    """`local_ranges` of every rank of the seq group, in its order."""
    return tuple(layout.local_ranges(r, u) for r in range(layout.ring) for u in range(layout.ulysses))


def gathered_order(layout: Layout) -> tuple[Range, ...]:
    """The token ranges of the whole row in the order in which the seq group's shards stand one after another."""
    return tuple(span for spans in shards(layout) for span in spans)


def gathered_places(layout: Layout) -> list[int]:
    """Where each chunk stands, counted in chunks, when every rank's chunks are gathered slot by slot, the last slot first.

    Under zigzag the later slot has the row's second half backwards and the first slot its first half forwards:

        2R-1  2R-2 ... R+1  R | 0  1 ... R-1

    so that all chunks before a given one stand side by side, whichever it is.
    """
    slots = len(layout.chunks[0])
    places = [0] * (slots * layout.ring)
    for rank, mine in enumerate(layout.chunks):
        for slot, chunk in enumerate(mine):
            places[chunk] = (slots - 1 - slot) * layout.ring + rank
    return places


def _common(ours: Sequence[Range], theirs: Sequence[Range]) -> tuple[tuple[Range, ...], tuple[Range, ...]]:
    """The tokens in both, as local ranges of either, in the order of the row."""
    here: list[Range] = []
    there: list[Range] = []
    i = j = our_offset = their_offset = 0
    while i < len(ours) and j < len(theirs):
        (a, b), (c, d) = ours[i], theirs[j]
        low, high = max(a, c), min(b, d)
        if low < high:
            _extend(here, our_offset + low - a, our_offset + high - a)
            _extend(there, their_offset + low - c, their_offset + high - c)
        if b <= d:
            i, our_offset = i + 1, our_offset + b - a
        if d <= b:
            j, their_offset = j + 1, their_offset + d - c
    return tuple(here), tuple(there)


def _extend(ranges: list[Range], start: int, end: int) -> None:
    """Appends [start, end), to the last range where that ends at its start."""
    if ranges and ranges[-1][1] == start:
        start = ranges.pop()[0]
    ranges.append((start, end))


def _cut(ranges: tuple[Range, ...], start: int, end: int) -> tuple[Range, ...]:
    """The part [start, end) of the concatenation of `ranges`."""
    parts, offset = [], 0
    for a, b in ranges:
        low, high = max(start - offset, 0), min(end - offset, b - a)
        if low < high:
            parts.append((a + low, a + high))
        offset += b - a
    return tuple(parts)
