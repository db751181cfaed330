"""Ring attention: a ring rank's queries meet every rank's keys and values.

Source: Liu et al., Ring Attention with Blockwise Transformers, 2023. At ring rank r of R, `ring_impl: p2p`:

    forward   step s: post hop of (k, v); tiles of block r - s; wait.  At the end merge every (out, lse) in fp32
    backward  step s: post hop of (k, v); tiles of block r - s with the MERGED out and lse;
              dq stays, (dk, dv) are added to the sum that came in from r - 2 after step s - 2; post its hop to r + 2, or home

A block travels no further than the last rank that needs any of it (`Plan.reach`, from integers, the same on every rank): with one
document that is R - 1 hops, with documents that no rank shares none.

A block has two sums of (dk, dv) on the way, of its even and of its odd steps, which meet at home: each has a whole step to travel,
so a kernel may add to it in place. Steps take turns on two streams (ds_cp.lanes): one fills the GPU where the other no longer does.

`ring_impl: allgather` (as in Llama 3's training, Dubey et al., 2024) has two steps: the own chunks, while everybody's (k, v) are
gathered, then each own chunk against all that stands before it; (dk, dv) go home in one reduce-scatter. Fewer and larger kernel
calls, for a whole row of keys and values in memory and less communication behind computation: for short rows.

A layer with a window has two steps: the own runs of chunks, while the window's keys before each run come straight from their
owners; then those (`Plan.halo`). Their (dk, dv) go straight back. Traffic is the window's, whatever the row.

Because every tile's backward gets the whole row's out and lse, p = exp(s - lse) and delta = dout . out are those of the whole
softmax: no forward is repeated and nothing is saved per step but q, k, v, out, lse. Blocks live in two buffers by turns, sums in
three.

With `Plan.kept` (`ring_keep`) the keys and values of others that this rank's tiles read are saved as well, each in a buffer of its
own, and backward sends only gradients: of 3 blocks' worth of bytes in fp32 it takes 2, for up to R times the memory of k and v.

Shapes: S tokens of the ring rank, N query heads, M key/value heads, H head size, 2 for (k, v).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ds_cp.batch import SequenceContext
from ds_cp.kernels.attention import Score
from ds_cp.kernels.merge import AT_ONCE, merge_
from ds_cp.kernels.sums import sums_of
from ds_cp.lanes import Lanes
from ds_cp.ring_keys import Block, arriving, kept_blocks
from ds_cp.ring_sums import backward_gathered, backward_halo, backward_hops
from ds_cp.tiles import Plan, Tile
from ds_cp.timing import ATTENTION, each, timed

WAITING = 7
"""Results of so many tiles over all queries are merged at once, or of more tiles over fewer; this bounds the memory."""
FEWER_WAITING = 5
"""Where there are more than WAITING in all, and the running result is in fp32."""


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
        with timed("ds_cp attention", context.mesh.ring.waits, ATTENTION):
            out, lse, kept = push(q_SNH, k_SMH, v_SMH, sink_N, context, plan, score)
        ctx.save_for_backward(q_SNH, k_SMH, v_SMH, sink_N, out, lse, *kept)
        ctx.rest = context, plan, score
        return out

    @staticmethod
    def backward(ctx, dout_SNH: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, sink, out, lse, *kept = ctx.saved_tensors
        context, plan, score = ctx.rest
        with timed("ds_cp attention backward", context.mesh.ring.waits, ATTENTION):
            return *pull(dout_SNH, q, k, v, sink, out, lse, context, plan, score, kept), None, None, None


def push(
    q_SNH: Tensor, k_SMH: Tensor, v_SMH: Tensor, sink_N: Tensor | None, context: SequenceContext, plan: Plan, score: Score
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Forward: (out [S, N, H] in q's dtype, lse [S, N], what `plan.kept` has wait for backward)."""
    tiles_of, lanes = _Push(q_SNH, context, plan, score), Lanes(context.methods.beside)
    kept: list[Tensor] = []
    for turn, block, tiles in arriving(k_SMH, v_SMH, context, plan, lanes, kept if plan.kept else None):
        with lanes.turn(turn):
            for tile in each(tiles, "ds_cp attention tile"):
                tiles_of.tile(block, tile)
        if tiles_of.full:
            with lanes.alone():
                tiles_of.merge()
    lanes.join()
    out, lse = tiles_of.result()
    return *((out, lse) if sink_N is None else _with_sink(out, lse, sink_N)), kept


def pull(
    dout_SNH: Tensor,
    q_SNH: Tensor,
    k_SMH: Tensor,
    v_SMH: Tensor,
    sink_N: Tensor | None,
    out_SNH: Tensor,
    lse_SN: Tensor,
    context: SequenceContext,
    plan: Plan,
    score: Score,
    kept: Sequence[Tensor] = (),
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Backward, from what `push` gave: the gradients of q, k, v and the sink."""
    dsink = None if sink_N is None else _sink_gradient(dout_SNH, out_SNH, lse_SN, sink_N)
    rest = q_SNH, k_SMH, v_SMH, out_SNH, lse_SN
    if len(plan.steps) == 1:
        return *context.methods.attention.backward(dout_SNH, *rest, plan.steps[0][0], score), dsink
    tiles = [tile for step in plan.steps for tile in step]
    attention, kv_heads = context.methods.attention, k_SMH.shape[1]
    sums = sums_of(attention, dout_SNH.contiguous(), q_SNH, out_SNH, lse_SN, kv_heads, tiles, score)
    lanes = Lanes(None if plan.gathered or plan.halo else context.methods.beside)
    blocks = kept_blocks(k_SMH, v_SMH, plan, lanes, kept) if plan.kept else arriving(k_SMH, v_SMH, context, plan, lanes)
    if plan.halo is not None:
        dkv = backward_halo(sums, blocks, k_SMH, context, plan)
    elif plan.gathered:
        dkv = backward_gathered(sums, blocks, k_SMH, context)
    else:
        dkv = backward_hops(sums, blocks, k_SMH, context, plan, lanes)
    dk, dv = dkv.unbind()
    return sums.dq(), dk, dv, dsink


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
    """The forward of tiles. The first tile must cover every query."""

    def __init__(self, q: Tensor, context: SequenceContext, plan: Plan, score: Score) -> None:
        self._q, self._kernel, self._score = q, context.methods.attention, score
        self._out: Tensor | None = None
        self._lse: Tensor | None = None
        self._waiting: list[tuple[int, Tensor, Tensor]] = []
        later = [tile.q_end - tile.q_start for step in plan.steps[1:] for tile in step]
        self._left, self._queries = len(later), 0
        self._most = len(q) * (WAITING if sum(later) <= WAITING * len(q) else FEWER_WAITING)

    def tile(self, block: Block, tile: Tile) -> None:
        out, lse = self._kernel.forward(*_slices(self._q, block, tile), tile, self._score)
        if self._out is None:
            self._out, self._lse = out, lse
        else:
            self._waiting.append((tile.q_start, out, lse))
            self._queries += len(lse)

    @property
    def full(self) -> bool:
        return len(self._waiting) >= AT_ONCE or self._queries >= self._most

    def merge(self) -> None:
        """What waits into the running result, which stays in fp32 until the last tile is in."""
        while some := self._waiting[:AT_ONCE]:
            self._waiting = self._waiting[AT_ONCE:]
            self._left -= len(some)
            assert self._out is not None
            assert self._lse is not None
            last, work = self._left == 0, self._lse.dtype
            dtype = self._q.dtype if last else work
            into = self._out if self._out.dtype == dtype else torch.empty_like(self._out, dtype=dtype)
            merge_(self._out, self._lse, some, into)
            self._out = into
        self._queries = 0

    def result(self) -> tuple[Tensor, Tensor]:
        """(out in q's dtype, lse)."""
        self.merge()
        assert self._out is not None, "the first tile covers every query"
        assert self._lse is not None
        return self._out, self._lse


def _slices(q: Tensor, block: Block, tile: Tile) -> tuple[Tensor, Tensor, Tensor]:
    k, v = block[0], block[1]
    return q[tile.q_start : tile.q_end], k[tile.k_start : tile.k_end], v[tile.k_start : tile.k_end]
