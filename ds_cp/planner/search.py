"""Every legal choice for a model on a machine, judged; the fastest first."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ds_cp import layout
from ds_cp.planner import choice as choices
from ds_cp.planner import memory, times, traffic
from ds_cp.planner.choice import Choice
from ds_cp.planner.machine import GIB, Machine
from ds_cp.planner.memory import Memory
from ds_cp.planner.shape import Shape
from ds_cp.planner.times import Pairs, Times
from ds_cp.planner.traffic import Traffic
from ds_cp.topology import Topology

SAME, TIED = 1.01, 1.03
"""Of choices for the same degrees that are not slower than SAME times the fastest, the one with the fewest savings is taken, of
these what sends least, then what takes least memory (ZeRO 2 before 0 and 1, and 3 where it is needed). Those of different degrees
within TIED come in the order of their savings, then those whose all-to-all (which is waited for) stays inside a host, then by what
their links take, hidden or not: links are known least."""
MARGIN = 1.1
"""A choice fits when this times its predicted memory does."""


@dataclass(frozen=True)
class Row:
    """One choice, with what it takes."""

    choice: Choice
    tokens: int
    """Of one rank."""
    memory: Memory
    traffic: Traffic
    times: Times
    tokens_per_second: float
    """Of one GPU."""
    reason: str = ""


@dataclass(frozen=True)
class Plan:
    """What was found."""

    shape: Shape
    machine: Machine
    documents: tuple[int, ...]
    rows: tuple[Row, ...]
    """The best of each (ulysses, ring, data), best first."""
    fitting: int
    too_large: dict[Topology, float]
    """Degrees for which nothing fits, with the least memory (bytes) that a choice takes on a GPU."""
    illegal: dict[str, int]
    advice: str = ""
    """What to change where nothing fits."""


def judge(shape: Shape, choice: Choice, machine: Machine, documents: Sequence[int], pairs: Pairs | None = None) -> Row:
    """`pairs`: what `times.busiest` gives for the choice's degrees."""
    pairs = times.busiest(shape, choice.degrees, documents) if pairs is None else pairs
    length = _padded(documents, choice.degrees)
    tokens = length // choice.degrees.size
    sent = traffic.of(shape, choice, machine, tokens)
    took = times.of(shape, choice, machine, sent, tokens, pairs)
    speed = documents[-1] * choice.degrees.data / took.seconds / machine.gpus
    settings = memory.Settings(ring_kept=traffic.keeps(choice, machine))
    return Row(choice, tokens, memory.of(shape, choice, tokens, settings), sent, took, speed)


def _padded(documents: Sequence[int], degrees: Topology) -> int:
    multiple = layout.pad_multiple("auto", degrees.ring, degrees.ulysses)
    return -(-documents[-1] // multiple) * multiple


def fits(row: Row, machine: Machine) -> bool:
    return row.memory.peak * MARGIN <= machine.memory and row.memory.host * machine.per_host <= machine.host_memory_gib * GIB


def plan(shape: Shape, machine: Machine, documents: tuple[int, ...]) -> Plan:
    """
    Args:
        documents: cu_seqlens of a row.
    """
    illegal: Counter[str] = Counter()
    best: list[Row] = []
    fitting, too_large = 0, {}
    for degrees, linear in choices.degrees(shape, machine, documents[-1], illegal):
        pairs = times.busiest(shape, degrees, documents)
        rows = [judge(shape, one, machine, documents, pairs) for one in choices.variants(shape, degrees, linear)]
        possible = [row for row in rows if fits(row, machine)]
        fitting += len(possible)
        if possible:
            best.append(_with_reason(_best(possible), shape, machine, documents, pairs))
        else:
            too_large[degrees] = min(row.memory.peak for row in rows)
    found = Plan(shape, machine, documents, tuple(_ranked(best)), fitting, too_large, dict(illegal))
    return found if best else replace(found, advice=_advice(found))


def _best(rows: list[Row]) -> Row:
    fastest = min(row.times.seconds for row in rows)
    same = [row for row in rows if row.times.seconds <= SAME * fastest]
    return min(same, key=lambda row: (row.choice.savings, row.traffic.sent, row.memory.peak))


def _ranked(rows: list[Row]) -> list[Row]:
    left, found = sorted(rows, key=lambda row: -row.tokens_per_second), []
    while left:
        same = [row for row in left if row.tokens_per_second * TIED >= left[0].tokens_per_second]
        found += sorted(same, key=lambda row: (row.choice.savings, bool(row.traffic.all_to_all.leaves), row.traffic.seconds))
        left = left[len(same) :]
    return found


def _with_reason(row: Row, shape: Shape, machine: Machine, documents: Sequence[int], pairs: Pairs) -> Row:
    """Why it does what it does, and what it waits for."""
    degrees, words = row.choice.degrees, []
    if degrees.size > 1:
        words.append(_where(degrees, machine))
    waits = {name: seconds for name, seconds in row.times.waits.items() if seconds > 0.02 * row.times.seconds}
    words += [f"waits {100 * seconds / row.times.seconds:.0f} % for {name}" for name, seconds in waits.items()]
    for name, other in _less(row.choice):
        words.append(f"{name}: {_without(row, judge(shape, other, machine, documents, pairs), machine)}")
    return replace(row, reason="; ".join(words))


def _where(degrees: Topology, machine: Machine) -> str:
    inside = degrees.ulysses <= machine.per_host and machine.per_host % degrees.ulysses == 0
    parts = []
    if degrees.ulysses > 1:
        parts.append("all-to-all inside a host" if inside else "all-to-all leaves the host")
    if degrees.ring > 1:
        parts.append("ring inside a host" if degrees.size <= machine.per_host else "ring over hosts")
    return ", ".join(parts)


def _less(choice: Choice) -> list[tuple[str, Choice]]:
    """What it does for memory, with the choice that leaves it out."""
    found = []
    if choice.offload_parameters:
        found.append(("parameters on the host", replace(choice, offload_parameters=False)))
    elif choice.offload_optimizer:
        found.append(("optimizer on the host", replace(choice, offload_optimizer=False)))
    if choice.activation_offload:
        found.append(("layer inputs on the host", replace(choice, activation_offload=False)))
    elif choice.checkpointing:
        found.append(("checkpointing", replace(choice, checkpointing=False)))
    if choice.tiled_mlp:
        found.append(("tiled_mlp", replace(choice, tiled_mlp=False)))
    if choice.head_chunks > 1:
        found.append((f"attention_head_chunks {choice.head_chunks}", replace(choice, head_chunks=1)))
    return found


def _without(row: Row, without: Row, machine: Machine) -> str:
    if not fits(without, machine):
        return f"without it {memory.gib(without.memory.peak):,.0f} GiB"
    return f"without it {without.times.seconds / row.times.seconds - 1:+.0%} time"


def _advice(found: Plan) -> str:
    """The least change that would help, in one sentence."""
    machine, length = found.machine, found.documents[-1]
    if not found.too_large:
        reason = next(iter(found.illegal), "")
        return f"no legal way to share a row of {length:,} tokens over {machine.gpus} GPUs ({reason}); use another number of GPUs"
    degrees, least = min(found.too_large.items(), key=lambda item: item[1])
    if least * MARGIN <= machine.memory:
        return (
            f"the GPUs would do, but not the hosts' memory of {machine.host_memory_gib:,.0f} GiB (--host-memory): use more "
            "hosts, or a shorter row"
        )
    shorter = _longest(found)
    more = f"use at most {shorter:,} tokens a row" if shorter else "no length fits these GPUs"
    return (
        f"a row of {length:,} tokens does not fit: the least that a choice takes is {memory.gib(least):,.1f} GiB of the "
        f"{memory.gib(machine.memory / MARGIN):,.1f} that a GPU has for it (ulysses {degrees.ulysses} x ring {degrees.ring}); "
        f"{more}, or more GPUs"
    )


def _longest(found: Plan) -> int:
    """Tokens of one document that do fit, a power of two."""
    length = 1 << (found.documents[-1].bit_length() - 1)
    while length >= 1024:
        if plan_fits(found.shape, found.machine, length):
            return length
        length //= 2
    return 0


def plan_fits(shape: Shape, machine: Machine, length: int) -> bool:
    """Whether any choice fits a row of one document."""
    for degrees, linear in choices.degrees(shape, machine, length, Counter()):
        for one in choices.variants(shape, degrees, linear):
            if fits(judge(shape, one, machine, (0, length)), machine):
                return True
    return False
