"""Bytes that a training step sends, and how long they take on the links of a machine.

    all-to-all   a layer: q, k, v to heads, the output back, T (Q + K) + T Q elements, of which 1 / U stay; once in forward, once
                 in a recomputation, once in backward; with head groups q and the output once more in backward
    ring         a layer: R - 1 hops of the ring rank's k, v in forward and recomputation and again in backward (unless `ring_keep`
                 "auto" keeps them), where their gradients (fp32) take R hops, two ranks at a time (one hop where R is 2); a
                 window's keys alone where there is one
    ZeRO         0: an all-reduce; 1, 2: gradients scattered, parameters gathered; 3: parameters gathered in forward and in
                 backward, gradients scattered. Every rank passes on all but its own part

Ulysses ranks are neighbours, so U up to the GPUs of a host stay inside it; `leaves` is what one host sends to others, at most.
"""

from __future__ import annotations

from dataclasses import dataclass

from ds_cp import topology
from ds_cp.planner.choice import Choice
from ds_cp.planner.machine import Link, Machine
from ds_cp.planner.shape import Shape


@dataclass(frozen=True)
class Flow:
    """One kind of traffic of a step."""

    sent: float
    """Bytes that a rank sends."""
    leaves: float
    """Bytes that a host sends to other hosts."""
    seconds: float
    """If nothing hides it."""


@dataclass(frozen=True)
class Traffic:
    all_to_all: Flow
    ring: Flow
    zero: Flow

    @property
    def sent(self) -> float:
        return self.all_to_all.sent + self.ring.sent + self.zero.sent

    @property
    def leaves(self) -> float:
        return self.all_to_all.leaves + self.ring.leaves + self.zero.leaves

    @property
    def seconds(self) -> float:
        return self.all_to_all.seconds + self.ring.seconds + self.zero.seconds


NOTHING = Flow(0.0, 0.0, 0.0)


def of(shape: Shape, choice: Choice, machine: Machine, tokens: int, element: int = 2) -> Traffic:
    """Of a rank with so many tokens; `element`: bytes of an activation, a parameter and a gradient."""
    return Traffic(
        all_to_all=_all_to_all(shape, choice, machine, tokens, element),
        ring=_ring(shape, choice, machine, tokens, element),
        zero=_zero(shape, choice, machine, element),
    )


def _all_to_all(shape: Shape, choice: Choice, machine: Machine, tokens: int, element: int) -> Flow:
    ranks, host = choice.degrees.ulysses, machine.per_host
    split = topology.split_heads(ranks, *shape.heads[0])
    query, kv = shape.query_width, 2.0 * split.kv * ranks * shape.head_size
    passes = 3 if choice.checkpointing else 2
    width = passes * (2.0 * query + kv) + (2.0 * query if choice.head_chunks > 1 else 0.0)
    count = passes * 2.0 * choice.head_chunks
    flow = _exchange(width * tokens * element * len(shape.windows), count * len(shape.windows), ranks, machine, host)
    if not shape.linear:
        return flow
    ranks = choice.degrees.size if choice.linear == "heads" else ranks
    each = shape.linear[0]
    keys = 2.0 * max(each.key_heads, ranks) * each.key_size
    width = passes * (keys + each.value_heads * (2.0 * each.value_size + 2.0))
    more = _exchange(width * tokens * element * len(shape.linear), passes * 2.0 * len(shape.linear), ranks, machine, host)
    return Flow(flow.sent + more.sent, flow.leaves + more.leaves, flow.seconds + more.seconds)


def _exchange(size: float, count: float, ranks: int, machine: Machine, host: int) -> Flow:
    """An all-to-all of `size` bytes a rank over neighbours, in `count` calls."""
    if ranks == 1:
        return NOTHING
    near = _inside(ranks, host)
    away = size * (1.0 - near / ranks)
    inside = size * (near - 1) / ranks
    slow = machine.between.latency_us if near < ranks else machine.inside.latency_us
    seconds = max(inside / machine.inside.gb_per_s, away / _of_one(machine.between, host)) / 1e9 + count * slow * 1e-6
    return Flow(inside + away, away * host, seconds)


def _inside(ranks: int, host: int) -> int:
    """Of so many neighbours those that every rank has on its host, itself included."""
    return ranks if ranks <= host and host % ranks == 0 else max(n for n in range(1, host + 1) if ranks % n == 0 and host % n == 0)


def _of_one(link: Link, sharing: int) -> float:
    """GB/s of each of so many GPUs of a host that send at once."""
    return link.gb_per_s / sharing if link.shared else link.gb_per_s


def _ring(shape: Shape, choice: Choice, machine: Machine, tokens: int, element: int) -> Flow:
    ulysses, ring, host = choice.degrees.ulysses, choice.degrees.ring, machine.per_host
    if ring == 1:
        return NOTHING
    split = topology.split_heads(ulysses, *shape.heads[0])
    token = 2.0 * split.kv * shape.head_size * element
    mine, forwards = ulysses * tokens, 2 if choice.checkpointing else 1
    hops, twice = ring - 1, 0 if ring == 2 else ring - 1  # hops of gradients two ranks on; one more goes home to the next rank
    crossing, far = (min(ulysses, host), min(2 * ulysses, host)) if ulysses * ring > host else (0, 0)
    link = machine.between if crossing else machine.inside
    speed = _of_one(link, crossing) * 1e9
    passes = forwards if keeps(choice, machine) else forwards + 1
    sent = leaves = seconds = 0.0
    for window in shape.windows:
        share = 1.0 if window is None else min(2.0 * window / (mine * hops), 1.0)  # two runs of chunks, a window before each
        keys, sums = passes * hops * token * mine * share, token * mine * (4 / element) * share
        sent += keys + sums * (twice + 1)
        leaves += keys * crossing + sums * (twice * far + crossing)
        seconds += (keys + sums * (twice + 1)) / speed + (passes * hops + twice + 1) * link.latency_us * 1e-6
    return Flow(sent, leaves, seconds)


def keeps(choice: Choice, machine: Machine) -> bool:
    """Whether `ring_keep` "auto" keeps what the ring brought until backward."""
    kept = topology.resolve_ring_keep("auto", choice.degrees, machine.per_host, choice.head_chunks)
    return kept == "checkpointing" and choice.checkpointing


def _zero(shape: Shape, choice: Choice, machine: Machine, element: int) -> Flow:
    world, host = choice.degrees.world, machine.per_host
    if world == 1:
        return NOTHING
    times = 3 if choice.stage == 3 else 2
    sent = times * shape.parameters * element * (world - 1) / world
    if machine.hosts == 1:
        return Flow(sent, 0.0, sent / machine.inside.gb_per_s / 1e9)
    away = sent / host  # several rings, each over another GPU's link
    seconds = max(sent / machine.inside.gb_per_s, away / _of_one(machine.between, host)) / 1e9
    return Flow(sent, sent, seconds)
