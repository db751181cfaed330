"""Who holds which tokens of a row. Integers only.

A row of S tokens (padded at its end) is cut into equal chunks; a layout gives every ring rank the same number of them,
kept in ascending order; inside a ring rank the Ulysses ranks hold consecutive equal pieces. With R = 2, zigzag:

    row    | chunk 0 | chunk 1 | chunk 2 | chunk 3 |
    ring 0 | chunk 0 | chunk 3 |      causal work 1 + 4
    ring 1 | chunk 1 | chunk 2 |      causal work 2 + 3

`zigzag` pairs an early chunk with a late one (Zhu, ring-flash-attention, 2024; also Megatron-LM's context parallelism),
so every ring rank has the same causal work for one document. `contiguous` gives rank r the r-th part.
"""

from __future__ import annotations

from dataclasses import dataclass

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


def resolve(name: str) -> str:
    """The layout that "auto" stands for."""
    return "zigzag" if name == "auto" else name


def chunk_count(name: str, ring: int) -> int:
    """Chunks that layout `name` cuts a row into."""
    return 2 * ring if name == "zigzag" and ring > 1 else ring


def pad_multiple(name: str, ring: int, ulysses: int) -> int:
    """A row's length is padded up to a multiple of this."""
    return chunk_count(name, ring) * ulysses


def build(name: str, tokens: int, ring: int, ulysses: int) -> Layout:
    """The layout of a row of `tokens` tokens, padded up at its end; a row shorter than the ranks is padded too."""
    count = chunk_count(name, ring)
    multiple = count * ulysses
    chunk = max(-(-tokens // multiple), 1) * ulysses
    chunks = tuple((r, count - 1 - r) for r in range(ring)) if count == 2 * ring else tuple((r,) for r in range(ring))
    return Layout(chunk=chunk, chunks=chunks, ulysses=ulysses)


def gathered_order(layout: Layout) -> tuple[Range, ...]:
    """The token ranges of the whole row in the order in which the seq group's shards stand one after another."""
    return tuple(span for r in range(layout.ring) for u in range(layout.ulysses) for span in layout.local_ranges(r, u))


def gathered_place(layout: Layout, chunk: int) -> int:
    """Where `chunk` stands, counted in chunks, when every rank's chunks are gathered slot by slot, the last slot first.

    Under zigzag the later slot has the row's second half backwards and the first slot its first half forwards:

        2R-1  2R-2 ... R+1  R | 0  1 ... R-1

    so that all chunks before a given one stand side by side, whichever it is.
    """
    rank = next(rank for rank, mine in enumerate(layout.chunks) if chunk in mine)
    slots = len(layout.chunks[rank])
    return (slots - 1 - layout.chunks[rank].index(chunk)) * layout.ring + rank


def _cut(ranges: tuple[Range, ...], start: int, end: int) -> tuple[Range, ...]:
    """The part [start, end) of the concatenation of `ranges`."""
    parts, offset = [], 0
    for a, b in ranges:
        low, high = max(start - offset, 0), min(end - offset, b - a)
        if low < high:
            parts.append((a + low, a + high))
        offset += b - a
    return tuple(parts)
