"""Which rank holds what: ranks to axes, head splits, legality. Integers only, so one process can ask for any rank.

Ranks are laid out with `ulysses` fastest, then `ring`, then `data`:

    rank = (data_rank * ring + ring_rank) * ulysses + ulysses_rank

so that the ranks of one all-to-all are neighbours (one node, fast links), the ranks that share a row are
`rank // size`, and a ring crosses each pair of neighbouring nodes once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Axis = Literal["ulysses", "ring", "seq", "data"]
AXES: tuple[Axis, ...] = ("ulysses", "ring", "seq", "data")


@dataclass(frozen=True)
class Topology:
    """Degrees of one run. `ulysses * ring` ranks share a row; there are `data` such groups."""

    ulysses: int
    ring: int
    data: int

    @property
    def size(self) -> int:
        """Ranks that share one row."""
        return self.ulysses * self.ring

    @property
    def world(self) -> int:
        return self.size * self.data

    def coordinates(self, rank: int) -> tuple[int, int, int]:
        """(ulysses, ring, data) rank of a global rank."""
        return rank % self.ulysses, rank // self.ulysses % self.ring, rank // self.size

    def groups(self, axis: Axis) -> list[list[int]]:
        """All groups of an axis, each a list of global ranks in axis order; the same list on every rank."""
        u, r, d = self.ulysses, self.ring, self.data
        if axis == "ulysses":
            return [list(range(start, start + u)) for start in range(0, self.world, u)]
        if axis == "ring":
            return [[(i * r + j) * u + k for j in range(r)] for i in range(d) for k in range(u)]
        if axis == "seq":
            return [list(range(i * self.size, (i + 1) * self.size)) for i in range(d)]
        return [[i * self.size + k for i in range(d)] for k in range(self.size)]


@dataclass(frozen=True)
class HeadSplit:
    """What one Ulysses rank computes: `query` consecutive query heads and the key/value heads that serve them."""

    query: int
    kv: int
    sharing: int
    """Neighbouring Ulysses ranks that get the same key/value heads, whose gradients are summed; 1 where there are enough."""


def heads_illegal(ulysses: int, query_heads: int, kv_heads: int) -> str | None:
    """Why `ulysses` ranks cannot split these heads, or None. The one place that knows the rule."""
    if query_heads % ulysses:
        return f"it does not divide the {query_heads} query heads"
    if kv_heads % ulysses and ulysses % kv_heads:
        return f"it neither divides nor is a multiple of the {kv_heads} key/value heads"
    return None


def split_heads(ulysses: int, query_heads: int, kv_heads: int) -> HeadSplit:
    """Heads of each Ulysses rank; with fewer key/value heads than ranks each one is given to several ranks."""
    reason = heads_illegal(ulysses, query_heads, kv_heads)
    assert reason is None, reason
    sharing = max(ulysses // kv_heads, 1)
    return HeadSplit(query=query_heads // ulysses, kv=kv_heads * sharing // ulysses, sharing=sharing)


def head_chunks_illegal(split: HeadSplit, chunks: int) -> str | None:
    """Why a rank's query heads cannot go through the all-to-all in so many groups, or None."""
    if split.query % chunks:
        return f"it does not divide the {split.query} query heads of a rank"
    each, served = split.query // chunks, split.query // split.kv
    if each % served and served % each:
        return f"groups of {each} query heads do not match key/value heads that serve {served}"
    return None


def resolve_head_chunks(
    asked: int | Literal["auto"], degrees: Topology, heads: list[tuple[int, int]], passing: bool, least_memory: bool
) -> int:
    """Groups of query heads in the all-to-all.

    Args:
        asked: as written in the block. heads: (query heads, key/value heads) of every attention layer.
        passing: DeltaNet layers pass state, so attention fetches its tokens. least_memory: what "auto" is for.

    Raises:
        ValueError: there is nothing that heads could go through in groups, or they do not divide so.
    """
    splits = {split_heads(degrees.ulysses, *each) for each in heads}
    whole = "there is no all-to-all with ulysses_size 1" if degrees.ulysses == 1 else None
    whole = 'it is not available with linear_attention "state"' if passing else whole
    most = 1 if whole else min(split.query for split in splits)
    legal = [n for n in range(1, most + 1) if all(head_chunks_illegal(split, n) is None for split in splits)]
    if asked == "auto":
        return legal[-1] if least_memory else 1
    if asked not in legal:
        reason = whole or next(filter(None, (head_chunks_illegal(split, asked) for split in splits)))
        raise ValueError(f"sequence_parallel.attention_head_chunks: {asked}: {reason}; use one of {legal}")
    return asked


def resolve_ring_keep(
    asked: bool | Literal["auto"], degrees: Topology, local_world: int, head_chunks: int
) -> Literal["always", "checkpointing", "never"]:
    """When the ring's keys and values wait for backward; "auto" spares slow links, and head groups mean that memory is short."""
    if asked != "auto":
        return "always" if asked else "never"
    leaves = degrees.ring > 1 and (degrees.size > local_world or local_world % degrees.size != 0)
    return "checkpointing" if leaves and head_chunks == 1 else "never"


def legal_ulysses(size: int, heads: list[tuple[int, int]]) -> list[int]:
    """Divisors of `size` that can split every (query heads, key/value heads) pair."""
    return [d for d in range(1, size + 1) if size % d == 0 and all(heads_illegal(d, n, m) is None for n, m in heads)]


def resolve(
    size: int | Literal["auto"],
    ulysses: int | Literal["auto"],
    ring: int | Literal["auto"],
    world: int,
    local_world: int,
    heads: list[tuple[int, int]],
    linear_heads: list[tuple[int, int]] | None = None,
    linear: str = "auto",
) -> Topology:
    """Turns the sizes of the config into degrees, or refuses.

    Args:
        size, ulysses, ring: as written in the block.
        world: ranks of the job. local_world: ranks on one node.
        heads: (query heads, key/value heads) of every attention layer, repeats welcome.
        linear_heads: (value heads, key heads) of every Gated DeltaNet layer. linear: `linear_attention` as written; where state
            is passed, ulysses splits these heads too.

    Raises:
        ValueError: no legal choice; the message names the legal ones.
    """
    if size == "auto":
        size = world
    if world % size:
        legal = [d for d in range(1, world + 1) if world % d == 0]
        raise ValueError(
            f"sequence_parallel.size: {size} does not divide the {world} ranks of this job; use one of {legal} or start "
            f"a multiple of {size} ranks"
        )
    choices = legal_ulysses(size, heads)
    if linear == "state" or (linear == "auto" and _heads_reason(size, linear_heads or []) is not None):
        choices = [d for d in choices if d in legal_ulysses(size, linear_heads or [])]
    if ulysses == "auto":
        if ring == "auto":
            # A node boundary inside an all-to-all group would put every layer's heads on the slow links.
            largest: int = max(d for d in choices if d <= local_world and local_world % d == 0)
            ulysses = largest
        else:
            ulysses = size // ring if size % ring == 0 else 0
    if ring == "auto":
        ring = size // ulysses if size % ulysses == 0 else 0
    for name, degree in (("ulysses_size", ulysses), ("ring_size", ring)):
        if degree and size % degree:
            legal = [d for d in range(1, size + 1) if size % d == 0]
            raise ValueError(f"sequence_parallel.{name}: {degree} does not divide size {size}; use one of {legal}")
    if ulysses * ring != size:
        raise ValueError(
            f'sequence_parallel: ulysses_size {ulysses} x ring_size {ring} is not size {size}; change one or leave it "auto"'
        )
    for query_heads, kv_heads in dict.fromkeys(heads):
        reason = heads_illegal(ulysses, query_heads, kv_heads)
        if reason is not None:
            raise ValueError(
                f"sequence_parallel.ulysses_size: {ulysses} is not possible for this model: {reason}; legal for size "
                f"{size}: {choices}, the rest goes into ring_size"
            )
    return Topology(ulysses=ulysses, ring=ring, data=world // size)


def resolve_linear(
    setting: str, topology: Topology, heads: list[tuple[int, int]], passes: bool = True
) -> Literal["heads", "state"]:
    """How recurrent layers are sharded.

    "auto" is heads where every rank of a row can have some: on one H200 they were faster than state at the one degree where both
    were measured (8, docs/benchmarks.md), and no state has to be passed.

    Args:
        setting: `linear_attention` as written. heads: (value heads, key heads) of every such layer. passes: whether their state can
            be passed between ranks: that of Gated DeltaNet can, those of others cannot.

    Raises:
        ValueError: too many ranks for the heads; the message gives the largest degree.
    """
    kind, value, key = ("Gated DeltaNet", "value heads", "key heads") if passes else ("this model's recurrent", "heads", "groups")
    if setting == "state" and not passes:
        raise ValueError(f'sequence_parallel.linear_attention: {kind} layers do not pass their state; use "heads" or "auto"')
    reason, way = _heads_reason(topology.size, heads, value, key), "over all ranks of a row"
    mode: Literal["heads", "state"] = "heads"
    if passes and (setting == "state" or (setting == "auto" and reason is not None)):
        reason, way, mode = _heads_reason(topology.ulysses, heads), "over ulysses, with state passed along the ring", "state"
    if reason is None:
        return mode
    degree = topology.size if mode == "heads" else topology.ulysses
    legal = [d for d in range(1, degree + 1) if _heads_reason(d, heads) is None]
    advice = 'or "linear_attention": "state"' if mode == "heads" else "and a larger ring_size"
    raise ValueError(
        f"sequence_parallel.linear_attention: {setting}: {kind} layers cannot share their heads {way} at degree {degree}: "
        f"{reason}; use {'size' if mode == 'heads' else 'ulysses_size'} {max(legal)} at most (legal: {legal})"
        f"{f', {advice}' if passes else ''}"
    )


def _heads_reason(degree: int, heads: list[tuple[int, int]], values: str = "value heads", keys: str = "key heads") -> str | None:
    """Why `degree` ranks cannot split the (value heads, key heads) of every layer, or None."""
    for value, key in dict.fromkeys(heads):
        if value % degree:
            return f"it does not divide the {value} {values}"
        if key % degree and degree % key:
            return f"it neither divides nor is a multiple of the {key} {keys}"
    return None
