"""The backward of a ring's tiles: where the sums of (dk, dv) are added to, and how they get home.

Shapes as in `ds_cp.ring`: S tokens of the ring rank, M key/value heads, H head size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ds_cp import comm
from ds_cp.batch import SequenceContext
from ds_cp.kernels.sums import Sums
from ds_cp.lanes import Lanes
from ds_cp.ring_keys import Blocks, Sends, by_slot, own_slots, post
from ds_cp.tiles import Plan
from ds_cp.timing import each

RANGE = "ds_cp attention tile backward"


def backward_hops(sums: Sums, blocks: Blocks, k: Tensor, context: SequenceContext, plan: Plan, lanes: Lanes) -> Tensor:
    """(dk, dv) [2, S, M, H] of the own block, after a whole turn around the ring."""
    trip = _Trip(sums, len(k), context, plan, lanes)
    for step, block, tiles in blocks:
        with lanes.turn(step):
            into, starts = trip.sum(step), plan.starts[(context.mesh.ring.rank - step) % context.mesh.ring.size]
            for tile in each(tiles, RANGE):
                assert into is not None, "a step with tiles has a sum"
                sums.add(into, tile, block[0], block[1], starts)
        trip.leave(step)
        if sums.full:
            with lanes.alone():
                sums.settle()
    lanes.join()
    return sums.dkv(trip.home(), len(k), k.dtype, plan.starts[context.mesh.ring.rank])


class _Trip:
    """The sums of (dk, dv) that this rank holds: of a block's even steps and of its odd steps, each where its step is computed."""

    def __init__(self, sums: Sums, keys: int, context: SequenceContext, plan: Plan, lanes: Lanes) -> None:
        self._sums, self._keys, self._context, self._plan, self._lanes = sums, keys, context, plan, lanes
        self._here: dict[int, Tensor] = {}  # by step
        self._free: list[Tensor] = []
        self._home: list[Tensor] = []
        self._like: Tensor | None = None
        self._sent: Sends = []
        self._hop: comm.Hop | None = None

    def sum(self, step: int) -> Tensor | None:
        """What this step's tiles are added to: it begins in steps 0 and 1, then it is the one that came in."""
        if step < 2 and step <= self._reach(-step):
            self._here[step] = self._like = self._sums.new(self._keys, self._plan.starts)
        return self._here.get(step)

    def leave(self, step: int) -> None:
        """To the rank that adds to it two steps on, or home. The one for the next step has come in."""
        with self._lanes.turn(step + 1):
            self._wait(self._lanes.others(step + 1))
        self._lanes.order(step + 1, step)  # the buffers that were sent are free
        mine, sent, received = self._here.pop(step, None), [], []
        with self._lanes.turn(step):
            if mine is not None and step + 2 <= self._reach(-step):
                sent.append((mine, self._rank(2)))
            elif mine is not None and step:
                sent.append((mine, self._rank(-step)))
            elif mine is not None:
                self._home.append(mine)
            if step + 2 <= self._reach(-step - 2):
                self._here[step + 2] = self._buffer()
                received.append((self._here[step + 2], self._rank(-2)))
            if 0 < step <= self._reach(0) < step + 2:
                self._home.append(self._buffer())
                received.append((self._home[-1], self._rank(step)))
            self._hop, self._sent = post(sent, received, self._context, "gradient"), sent

    def home(self) -> list[Tensor]:
        self._wait()
        return self._home

    def _wait(self, streams: Sequence[torch.cuda.Stream] = ()) -> None:
        if self._hop is not None:
            self._hop.wait(streams)
            self._free += [x for x, _ in self._sent]

    def _buffer(self) -> Tensor:
        if self._free:
            return self._free.pop()
        assert self._like is not None, "step 0 has begun one"
        return torch.empty_like(self._like)

    def _rank(self, by: int) -> int:
        ring = self._context.mesh.ring
        return (ring.rank + by) % ring.size

    def _reach(self, by: int) -> int:
        return self._plan.reach[self._rank(by)]


def backward_gathered(sums: Sums, blocks: Blocks, k: Tensor, context: SequenceContext) -> Tensor:
    (_, own, (own_tile,)), *others = blocks
    mine = sums.plain(len(k))
    sums.add(mine, own_tile, own[0], own[1])
    row = sums.plain(context.layout.length)
    for _, block, tiles in others:
        for tile in each(tiles, RANGE):
            sums.add(row, tile, block[0], block[1])
            if sums.full:
                sums.settle()
    home = comm.reduce_scatter(by_slot(row, context), context.mesh.ring)
    for part, theirs in zip(own_slots(mine, context), home, strict=True):
        part += theirs
    return mine.to(k.dtype)


def backward_halo(sums: Sums, blocks: Blocks, k: Tensor, context: SequenceContext, plan: Plan) -> Tensor:
    assert plan.halo is not None, "a window's plan"
    (_, own, (own_tile,)), *others = blocks
    mine = sums.plain(len(k))
    sums.add(mine, own_tile, own[0], own[1])
    dhalo = mine.new_zeros((plan.halo.tokens, *mine.shape[:1], *mine.shape[2:]))
    for _, block, tiles in others:
        for tile in each(tiles, RANGE):
            sums.add(dhalo.transpose(0, 1), tile, block[0], block[1])
            if sums.full:
                sums.settle()
    home = [(dhalo.new_empty((end - start, *dhalo.shape[1:])), rank) for rank, start, end in plan.halo.sent]
    hop = post([(dhalo[start:end], rank) for rank, start, end in plan.halo.received], home, context, "halo gradient")
    for place, start, end in plan.halo.own:
        mine[:, start:end] += dhalo[place : place + end - start].transpose(0, 1)
    hop.wait()
    for (part, _), (_, start, end) in zip(home, plan.halo.sent, strict=True):
        mine[:, start:end] += part.transpose(0, 1)
    return mine.to(k.dtype)
