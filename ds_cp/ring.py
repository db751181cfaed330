"""Ring attention: a ring rank's queries meet every rank's keys and values.

Source: Liu et al., Ring Attention with Blockwise Transformers, 2023. At ring rank r of R, `ring_impl: p2p`:

    forward   step s: post hop of (k, v); tiles of block r - s; merge (out, lse) in fp32; wait
    backward  step s: post hop of (k, v); tiles of block r - s with the MERGED out and lse;
              dq stays, (dk, dv) = mine + what came in, post hop of (dk, dv); from the block's last step it goes home

A block travels no further than the last rank that needs any of it (`Plan.reach`, from integers, the same on every rank): with one
document that is R - 1 hops, with documents that no rank shares none.

`ring_impl: allgather` (as in Llama 3's training, Dubey et al., 2024) has two steps: the own chunks, while everybody's (k, v) are
gathered, then each own chunk against all that stands before it; (dk, dv) go home in one reduce-scatter. Fewer and larger kernel
calls, for a whole row of keys and values in memory and less communication behind computation: for short rows.

A layer with a window has two steps: the own runs of chunks, while the window's keys before each run come straight from their
owners; then those (`Plan.halo`). Their (dk, dv) go straight back. Traffic is the window's, whatever the row.

Because every tile's backward gets the whole row's out and lse, p = exp(s - lse) and delta = dout . out are those of the whole
softmax: no forward is repeated and nothing is saved per step but q, k, v, out, lse. Blocks live in two buffers by turns.

Shapes: S tokens of the ring rank, N query heads, M key/value heads, H head size, 2 for (k, v).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import torch
from torch import Tensor

from ds_cp import comm
from ds_cp.batch import SequenceContext
from ds_cp.kernels.attention import Accumulator, Score
from ds_cp.kernels.merge import AT_ONCE, merge_, total
from ds_cp.tiles import Halo, Plan, Tile

Block = Tensor | tuple[Tensor, Tensor]
"""[2, keys, M, H], or the pair (k, v)."""

Sends = list[tuple[Tensor, int]]
"""Tensors with the ring rank that each goes to or comes from."""


class RingAttention(torch.autograd.Function):
    """Attention of a ring rank's tokens to the whole row.

    Shards over the ring axis: q, k, v, out, dout and their gradients all hold this ring rank's tokens; every rank of the
    ring must call it. k and v have their own head count and are never expanded. A sink is a learned score of each query head, of a
    key whose value is zero (gpt-oss): every query attends it once, so it enters after the merge and every kernel supports it. Its
    gradient is that of the own tokens.
    """

    @staticmethod
    def forward(
        ctx,
        q_SNH: Tensor,
        k_SMH: Tensor,
        v_SMH: Tensor,
        sink_N: Tensor | None,
        context: SequenceContext,
        plan: Plan,
        score: Score,
    ) -> Tensor:
        push = _Push(q_SNH, context, score)
        for block, tiles in _blocks(k_SMH, v_SMH, context, plan):
            for tile in tiles:
                push.tile(block, tile)
        out, lse = push.result()
        if sink_N is not None:
            out, lse = _with_sink(out, lse, sink_N)
        ctx.save_for_backward(q_SNH, k_SMH, v_SMH, sink_N, out, lse)
        ctx.context, ctx.plan, ctx.score = context, plan, score
        return out

    @staticmethod
    def backward(ctx, dout_SNH: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, sink, out, lse = ctx.saved_tensors
        context, plan = ctx.context, ctx.plan
        dsink = None if sink is None else _sink_gradient(dout_SNH, out, lse, sink)
        if len(plan.steps) == 1:
            grads = context.methods.attention.backward(dout_SNH, q, k, v, out, lse, plan.steps[0][0], ctx.score)
            return *grads, dsink, None, None, None
        pull = _Pull(dout_SNH.contiguous(), q, out, lse, context, plan, ctx.score)
        if plan.halo is not None:
            dkv = _backward_halo(pull, k, v, context, plan)
        else:
            dkv = (_backward_gathered if context.methods.gathered else _backward_hops)(pull, k, v, context, plan)
        return pull.dq(), dkv[0].to(k.dtype), dkv[1].to(v.dtype), dsink, None, None, None


def _with_sink(out_SNH: Tensor, lse_SN: Tensor, sink_N: Tensor) -> tuple[Tensor, Tensor]:
    """(out, lse) of the same queries with one more score each, whose value is zero; once for a whole row of scores."""
    whole_SN = torch.logaddexp(lse_SN, sink_N.to(lse_SN.dtype))
    weight_SN1 = (lse_SN - whole_SN).exp().unsqueeze(-1)
    return (out_SNH.to(weight_SN1.dtype) * weight_SN1).to(out_SNH.dtype), whole_SN


def _sink_gradient(dout_SNH: Tensor, out_SNH: Tensor, lse_SN: Tensor, sink_N: Tensor) -> Tensor:
    """ds of `kernels.attention.reference` for that score: p (dout . 0 - dout . out), summed over queries."""
    p_SN = (sink_N.to(lse_SN.dtype) - lse_SN).exp()
    delta_SN = (dout_SNH.to(lse_SN.dtype) * out_SNH.to(lse_SN.dtype)).sum(-1)
    return -(p_SN * delta_SN).sum(0).to(sink_N.dtype)


class _Push:
    """The forward of tiles, merged in fp32. The first tile must cover every query."""

    def __init__(self, q: Tensor, context: SequenceContext, score: Score) -> None:
        self._q, self._kernel, self._score = q, context.methods.attention, score
        self._out: Tensor | None = None
        self._lse: Tensor | None = None
        self._span = (0, 0)
        self._waiting: list[tuple[Tensor, Tensor]] = []  # results for the queries of `_span`, to be merged at once

    def tile(self, block: Block, tile: Tile) -> None:
        out, lse = self._kernel.forward(*_slices(self._q, block, tile), tile, self._score)
        if self._out is None:
            self._out, self._lse = out, lse
            return
        span = tile.q_start, tile.q_end
        if span != self._span or len(self._waiting) == AT_ONCE:
            self._merge()
        self._span = span
        self._waiting.append((out, lse))

    def _merge(self) -> None:
        if not self._waiting:
            return
        part, into, work = slice(*self._span), None, self._lse.dtype
        whole = self._span == (0, len(self._q))
        if self._out.dtype != work and whole:
            into = torch.empty_like(self._out, dtype=work)
        elif self._out.dtype != work:
            self._out = self._out.to(work)
        merge_(self._out[part], self._lse[part], self._waiting, into)
        self._out = self._out if into is None else into
        self._waiting = []

    def result(self) -> tuple[Tensor, Tensor]:
        """(out in q's dtype, lse)."""
        self._merge()
        return self._out.to(self._q.dtype), self._lse


class _Pull:
    """The backward of tiles: sums dq, hands dk and dv back. The first tile must cover every query."""

    def __init__(
        self, dout: Tensor, q: Tensor, out: Tensor, lse: Tensor, context: SequenceContext, plan: Plan, score: Score
    ) -> None:
        self._dout, self._q, self._out, self._lse = dout, q, out, lse
        self._kernel, self._score = context.methods.attention, score
        self.work = torch.float64 if q.dtype == torch.float64 else torch.float32
        self._dq: Tensor | None = None
        self._parts: list[tuple[int, Tensor]] = []
        self._sums: dict[tuple[int, int], Accumulator | None] = {}
        self._left = Counter((tile.q_start, tile.q_end) for tiles in plan.steps[1:] for tile in tiles)

    def tile(self, block: Block, tile: Tile) -> Block:
        """(dk, dv) of one tile."""
        q, k, v = _slices(self._q, block, tile)
        part = slice(tile.q_start, tile.q_end)
        given = self._dout[part], q, k, v, self._out[part], self._lse[part], tile, self._score
        if self._dq is None:
            self._dq, dk, dv = self._kernel.backward(*given)
            return dk, dv
        sums = self._accumulator(tile, given)
        if sums is not None and sums.takes(k):
            dkv = sums.backward(k, v)
        else:
            self._dq = self._dq.to(self.work)
            dq, *dkv = self._kernel.backward(*given)
            self._dq[part] += dq
        self._finish(tile)
        return dkv

    def _accumulator(self, tile: Tile, given: tuple) -> Accumulator | None:
        """Where the kernel sums dq itself: one for all tiles of the same queries."""
        span = tile.q_start, tile.q_end
        if span not in self._sums:
            accumulate = getattr(self._kernel, "accumulate", None)
            self._sums[span] = accumulate(*given) if accumulate else None
        return self._sums[span]

    def _finish(self, tile: Tile) -> None:
        """After the last tile of these queries their sum in fp32 gives way to dq in q's dtype."""
        span = tile.q_start, tile.q_end
        self._left[span] -= 1
        if self._left[span] == 0 and (sums := self._sums.pop(span)) is not None:
            self._parts.append((tile.q_start, sums.dq()))

    def dq(self) -> Tensor:
        """In q's dtype; once, at the end."""
        assert self._dq is not None
        assert not self._sums
        return total(self._dq, self._parts, self._q.dtype)


def _backward_hops(pull: _Pull, k: Tensor, v: Tensor, context: SequenceContext, plan: Plan) -> Tensor:
    """(dk, dv) [2, S, M, H] of the own block, which is with the rank that needs it last and then comes home."""
    ring, reach = context.mesh.ring, plan.reach
    home = hop = None
    dkv = spare = torch.empty(0)
    for step, (block, tiles) in enumerate(_blocks(k, v, context, plan)):
        parts = [(tile, pull.tile(block, tile)) for tile in tiles]
        if hop is None:  # step 0: one tile over all own keys
            [(_, (dk, dv))] = parts
            dkv = torch.empty((2, *k.shape), dtype=pull.work, device=k.device)
            dkv[0], dkv[1] = dk, dv
            home = None if reach[ring.rank] else dkv
            spare = torch.empty_like(dkv)
        else:
            hop.wait()
            # What is at home for good is not received into.
            dkv, spare = spare, torch.empty_like(dkv) if dkv is home else dkv
            for tile, part in parts:
                _add(dkv, tile, part)
        here, coming = (ring.rank - step) % ring.size, (ring.rank - 1 - step) % ring.size
        sent, received = [], []
        if step < reach[here]:
            sent.append((dkv, (ring.rank + 1) % ring.size))
        elif step == reach[here] and step:
            sent.append((dkv, here))
        if step < reach[coming]:
            received.append((spare, (ring.rank - 1) % ring.size))
        if step == reach[ring.rank] and step:
            home = torch.empty_like(dkv) if received else spare
            received.append((home, (ring.rank + step) % ring.size))
        hop = _post(sent, received, context, "gradient")
    hop.wait()
    return home


def _backward_gathered(pull: _Pull, k: Tensor, v: Tensor, context: SequenceContext, plan: Plan) -> Tensor:
    (own, (own_tile,)), (row, tiles) = _blocks(k, v, context, plan)
    dkv = torch.empty_like(own, dtype=pull.work)
    dkv[0], dkv[1] = pull.tile(own, own_tile)
    drow = torch.zeros_like(row, dtype=pull.work)
    for tile in tiles:
        _add(drow, tile, pull.tile(row, tile))
    home = comm.reduce_scatter(_by_slot(drow, context), context.mesh.ring.group)
    for mine, theirs in zip(_own_slots(dkv, context), home, strict=True):
        mine += theirs
    return dkv


def _backward_halo(pull: _Pull, k: Tensor, v: Tensor, context: SequenceContext, plan: Plan) -> Tensor:
    (own, (own_tile,)), (halo, tiles) = _blocks(k, v, context, plan)
    dkv = torch.empty((2, *k.shape), dtype=pull.work, device=k.device)
    dkv[0], dkv[1] = pull.tile(own, own_tile)
    dhalo = torch.zeros((plan.halo.tokens, 2, *k.shape[1:]), dtype=pull.work, device=k.device)
    for tile in tiles:
        _add(dhalo.transpose(0, 1), tile, pull.tile(halo, tile))
    home = [(dhalo.new_empty((end - start, *dhalo.shape[1:])), rank) for rank, start, end in plan.halo.sent]
    hop = _post([(dhalo[start:end], rank) for rank, start, end in plan.halo.received], home, context, "halo gradient")
    for place, start, end in plan.halo.own:
        dkv[:, start:end] += dhalo[place : place + end - start].transpose(0, 1)
    hop.wait()
    for (part, _), (_, start, end) in zip(home, plan.halo.sent, strict=True):
        dkv[:, start:end] += part.transpose(0, 1)
    return dkv


def _post_halo(k: Tensor, v: Tensor, context: SequenceContext, halo: Halo) -> tuple[Tensor, comm.Hop]:
    """The keys and values [tokens, 2, M, H] that stand before the own runs, once the hop is done."""
    keys = k.new_empty((halo.tokens, 2, *k.shape[1:]))
    sent = [(torch.stack((k[start:end], v[start:end]), dim=1), rank) for rank, start, end in halo.sent]
    hop = _post(sent, [(keys[start:end], rank) for rank, start, end in halo.received], context, "halo")
    for place, start, end in halo.own:
        keys[place : place + end - start, 0], keys[place : place + end - start, 1] = k[start:end], v[start:end]
    return keys, hop


def _blocks(k: Tensor, v: Tensor, context: SequenceContext, plan: Plan) -> Iterator[tuple[Block, tuple[Tile, ...]]]:
    """Every step's block with its tiles. What the next step needs is posted before a block is handed out."""
    steps = plan.steps
    if len(steps) == 1:
        yield (k, v), steps[0]
        return
    if plan.halo is not None:
        halo, hop = _post_halo(k, v, context, plan.halo)
        yield (k, v), steps[0]
        hop.wait()
        yield halo.unbind(1), steps[1]
        return
    block = torch.stack((k, v))
    if context.methods.gathered:
        row = block.new_empty((2, context.layout.length, *block.shape[2:]))
        everyone = comm.Gather(_own_slots(block, context), _by_slot(row, context), context.mesh.ring.group)
        yield block, steps[0]
        everyone.wait()
        yield row, steps[1]
        return
    ring, reach, spare = context.mesh.ring, plan.reach, torch.empty_like(block)
    for step, tiles in enumerate(steps):
        here, coming = (ring.rank - step) % ring.size, (ring.rank - 1 - step) % ring.size
        sent = [(block, (ring.rank + 1) % ring.size)] if step < reach[here] else []
        received = [(spare, (ring.rank - 1) % ring.size)] if step < reach[coming] else []
        hop = _post(sent, received, context, "key/value")
        yield block, tiles
        hop.wait()
        block, spare = spare, block


def _post(sent: Sends, received: Sends, context: SequenceContext, what: str) -> comm.Hop:
    ring = context.mesh.ring
    return comm.Hop(sent, received, ring.group, ring.ranks, ring.rank, what=what)


def _slices(q: Tensor, block: Block, tile: Tile) -> tuple[Tensor, Tensor, Tensor]:
    k, v = block[0], block[1]
    return q[tile.q_start : tile.q_end], k[tile.k_start : tile.k_end], v[tile.k_start : tile.k_end]


def _add(dkv: Tensor, tile: Tile, part: Block) -> None:
    keys = slice(tile.k_start, tile.k_end)
    if isinstance(part, Tensor):
        dkv[:, keys] += part
    else:
        dkv[0, keys] += part[0]
        dkv[1, keys] += part[1]


def _own_slots(block: Tensor, context: SequenceContext) -> list[Tensor]:
    """The own chunks of [2, S, M, H], each [chunk, M, H], of keys and of values."""
    slots = len(context.layout.chunks[0])
    return list(block.unflatten(1, (slots, -1)).flatten(0, 1))


def _by_slot(row: Tensor, context: SequenceContext) -> list[Tensor]:
    """Where `layout.gathered_place` has the ranks' chunks, in the order of `_own_slots`: [R, chunk, M, H] each."""
    slots = len(context.layout.chunks[0])
    parts = row.unflatten(1, (slots, context.layout.ring, -1))
    return [of_kind[slot] for of_kind in parts for slot in reversed(range(slots))]
