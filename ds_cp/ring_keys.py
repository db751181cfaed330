"""The keys and values that a ring rank's tiles read, block by block as they come in, or as they were kept.

What the next step needs is posted before a block is handed out, so that it travels behind that block's tiles. Shapes as in
`ds_cp.ring`: S tokens of the ring rank, M key/value heads, H head size, R ring ranks, 2 for (k, v).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ds_cp import comm
from ds_cp.batch import SequenceContext
from ds_cp.lanes import Lanes
from ds_cp.tiles import Halo, Plan, Tile

Block = Tensor | tuple[Tensor, ...]
"""[2, keys, M, H], or the pair (k, v); in a step without tiles perhaps nothing."""

Blocks = Iterator[tuple[int, Block, tuple[Tile, ...]]]
"""(turn, block, its tiles)."""

Sends = list[tuple[Tensor, int]]
"""Tensors with the ring rank that each goes to or comes from."""


def arriving(k: Tensor, v: Tensor, context: SequenceContext, plan: Plan, lanes: Lanes, kept: list[Tensor] | None = None) -> Blocks:
    """What the next step needs is posted before a block is handed out. What is read of others' goes into `kept`."""
    steps = plan.steps
    if len(steps) == 1:
        yield 0, (k, v), steps[0]
        return
    if plan.halo is not None:
        halo, hop = _post_halo(k, v, context, plan.halo)
        if kept is not None:
            kept.append(halo)
        yield 0, (k, v), steps[0]
        hop.wait()
        lanes.order(0, 1)
        for turn, tile in enumerate(steps[1], start=1):
            yield turn, halo.unbind(1), (tile,)
        return
    if plan.gathered:
        yield from _gathered(torch.stack((k, v)), context, plan, lanes, kept)
        return
    ring, reach = context.mesh.ring, plan.reach
    # k and v go out in two messages, as they are or from a copy of both, which then is the second buffer.
    copy = None if k.is_contiguous() and v.is_contiguous() else torch.stack((k, v))
    own = (k, v) if copy is None else copy.unbind()
    held = spare = k.new_empty((2, *k.shape))
    for step, tiles in enumerate(steps):
        here, coming = (ring.rank - step) % ring.size, (ring.rank - 1 - step) % ring.size
        out, into = (own, spare.unbind()) if step == 0 else ((held,), (spare,))
        sent = [(x, (ring.rank + 1) % ring.size) for x in out] if step < reach[here] else []
        received = [(x, (ring.rank - 1) % ring.size) for x in into] if step < reach[coming] else []
        lanes.order(step, step + 1)  # the block is here also for the other lane, whose last tile has read `spare`
        with lanes.turn(step + 1):
            hop = post(sent, received, context, "key/value")
        yield step, held if step else own, tiles
        with lanes.turn(step + 1):
            hop.wait(lanes.others(step + 1))
        free = held if step else copy
        if kept is not None and step and tiles:
            kept.append(held)
            free = None
        if free is None:
            free = torch.empty_like(spare) if step < len(steps) - 2 else held
        held, spare = spare, free


def _gathered(block: Tensor, context: SequenceContext, plan: Plan, lanes: Lanes, kept: list[Tensor] | None) -> Blocks:
    row = block.new_empty((2, context.layout.length, *block.shape[2:]))
    if kept is not None:
        kept.append(row)
    everyone = comm.Gather(own_slots(block, context), by_slot(row, context), context.mesh.ring)
    yield 0, block, plan.steps[0]
    everyone.wait()
    lanes.order(0, 1)
    for turn, tile in enumerate(plan.steps[1], start=1):
        yield turn, row, (tile,)


def kept_blocks(k: Tensor, v: Tensor, plan: Plan, lanes: Lanes, kept: Sequence[Tensor]) -> Blocks:
    """The same blocks and turns as `arriving` gives, from what it has kept: nothing is sent."""
    yield 0, (k, v), plan.steps[0]
    if plan.halo is not None or plan.gathered:
        others = kept[0].unbind(1 if plan.halo is not None else 0)
        for turn, tile in enumerate(plan.steps[1], start=1):
            yield turn, others, (tile,)
        return
    theirs = iter(kept)
    for step, tiles in enumerate(plan.steps[1:], start=1):
        lanes.order(step - 1, step)
        yield step, next(theirs) if tiles else (), tiles


def _post_halo(k: Tensor, v: Tensor, context: SequenceContext, halo: Halo) -> tuple[Tensor, comm.Hop]:
    """The keys and values [tokens, 2, M, H] that stand before the own runs, once the hop is done."""
    keys = k.new_empty((halo.tokens, 2, *k.shape[1:]))
    sent = [(torch.stack((k[start:end], v[start:end]), dim=1), rank) for rank, start, end in halo.sent]
    hop = post(sent, [(keys[start:end], rank) for rank, start, end in halo.received], context, "halo")
    for place, start, end in halo.own:
        keys[place : place + end - start, 0], keys[place : place + end - start, 1] = k[start:end], v[start:end]
    return keys, hop


def post(sent: Sends, received: Sends, context: SequenceContext, what: str) -> comm.Hop:
    return comm.Hop(sent, received, context.mesh.ring, what)


def own_slots(block: Tensor, context: SequenceContext) -> list[Tensor]:
    """The own chunks of [2, S, M, H], each [chunk, M, H], of keys and of values."""
    slots = len(context.layout.chunks[0])
    return list(block.unflatten(1, (slots, -1)).flatten(0, 1))


def by_slot(row: Tensor, context: SequenceContext) -> list[Tensor]:
    """Where `layout.gathered_places` has the ranks' chunks, in the order of `own_slots`: [R, chunk, M, H] each."""
    slots = len(context.layout.chunks[0])
    parts = row.unflatten(1, (slots, context.layout.ring, -1))
    return [of_kind[slot] for of_kind in parts for slot in reversed(range(slots))]
