"""Two published zigzag rings, restated on ds_cp's kernels and hops so that only the algorithm differs. One document a row.

A rank holds chunks r and 2R - 1 - r of 2R. Both peers compute the same blocks, at step s with the keys of rank r - s:

    s = 0        all queries x all keys, causal
    s <= rank    all queries x first half of the keys
    s > rank     second half of the queries x all keys

`RingFlashAttention` (zhuzilin/ring-flash-attention, zigzag): out runs in fp32; every merge makes new tensors by a sigmoid of the
two lse, in a TorchScript function, and writes them back where it covers half of the queries. k and v hop as two tensors into new
buffers. Backward gives each block the merged out and lse; dq, dk, dv are summed in fp32, dk and dv hop in fp32.

`Recomputing` (modelscope/twinkle and ms-swift, zigzag): the same blocks, merged by single operations. Backward goes around the ring
twice. The first turn runs every block's forward and the merges again and keeps, for every step, the running out and lse and the
block's out, lse and weight in the merge, filled up to all queries. Then dout and the gradient of lse go back through the merges, in
fp32. The second turn runs every block's backward with its own share of dout; dk and dv are copied when they have been sent, and the
next are received in the copies. In every step the host waits for checks for NaN of the block's out, lse and dout, of dq, dk and dv.

As published its gradients are wrong: a block's backward gets the block's own out and lse, and the gradient of its lse is computed
and dropped. Here they are right, by the same operations: with w = exp(block_lse - lse), dout_block = w dout and the merged out in
place of the block's,

    p_block (dout_block . v - dout_block . out) = p (dout . v - dout . out)

is the whole softmax's, by the same call on the same shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ds_cp import comm
from ds_cp.kernels.attention import Kernel, Score
from ds_cp.tiles import Tile

Saved = tuple[Tensor, ...]
Grads = tuple[Tensor, Tensor, Tensor]


def merged(out: Tensor, lse: Tensor, block_out: Tensor, block_lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(out, lse, weight of the block); lse and weight are [T, N, 1]."""
    weight = torch.sigmoid(block_lse - lse)
    return out - weight * (out - block_out.to(out.dtype)), lse - torch.nn.functional.logsigmoid(lse - block_lse), weight


scripted = torch.jit.script(merged)


class Step(NamedTuple):
    """What a step of `Recomputing` leaves, each of all queries."""

    out: Tensor
    lse: Tensor
    block_out: Tensor
    block_lse: Tensor
    weight: Tensor


def filled(x: Tensor, tokens: int, value: float) -> Tensor:
    """Of the second half of the queries, or all."""
    return x if len(x) == tokens else torch.cat((torch.full_like(x, value), x))


def check(*tensors: Tensor) -> None:
    """The host waits for the answer."""
    if any(x.isnan().any() for x in tensors):
        raise RuntimeError("NaN")


class RingFlashAttention:
    """One rank's forward and backward; shapes as in ds_cp.ring."""

    merged = staticmethod(scripted)

    def __init__(self, kernel: Kernel, axis: Any, tokens: int, device: str, score: Score) -> None:
        self._kernel, self._axis, self._score, self._half = kernel, axis, score, tokens // 2
        bounds = torch.tensor((0, tokens), dtype=torch.int32, device=device)
        self._tiles = [Tile(0, tokens, 0, tokens, (0, tokens), cu_seqlens=bounds)]
        for step in range(1, axis.size):
            front = step <= axis.rank
            self._tiles.append(Tile(0, tokens, 0, self._half) if front else Tile(self._half, tokens, 0, tokens))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Saved:
        """(q, k, v, out, lse) for backward."""
        out, lse = self._blockwise(q, k, v)
        return q, k, v, out.to(q.dtype), lse.squeeze(-1)

    def backward(self, dout: Tensor, saved: Saved) -> Grads:
        q, k, v, out, lse = saved

        def block(step: int, tile: Tile, k: Tensor, v: Tensor) -> Grads:
            part = slice(tile.q_start, tile.q_end)
            return self._kernel.backward(dout[part], q[part], k, v, out[part], lse[part], tile, self._score)

        return self._gradients(q, k, v, block)

    def _blockwise(self, q: Tensor, k: Tensor, v: Tensor, kept: list[Step] | None = None) -> tuple[Tensor, Tensor]:
        """Merged out in fp32 and lse [T, N, 1]; into `kept` what every step leaves."""
        out = lse = torch.empty(0)
        for step, tile, key, value in self._around(k, v):
            part = slice(tile.q_start, tile.q_end)
            block_out, block_lse = self._kernel.forward(q[part], key, value, tile, self._score)
            block_lse = block_lse.unsqueeze(-1)
            weight = block_lse
            if step == 0:
                out, lse = block_out.to(block_lse.dtype), block_lse.clone()
            elif tile.q_start == 0:
                out, lse, weight = self.merged(out, lse, block_out, block_lse)
            else:
                out[part], lse[part], weight = self.merged(out[part], lse[part], block_out, block_lse)
            if kept is not None:
                block = (block_out, 0.0), (block_lse, -1e5), (weight, 0.0)
                kept.append(Step(out, lse, *(filled(x, len(q), value) for x, value in block)))
        return out, lse

    def _gradients(self, q: Tensor, k: Tensor, v: Tensor, block: Callable[[int, Tile, Tensor, Tensor], Grads]) -> Grads:
        """Sums what `block(step, tile, its keys, its values)` gives; dk and dv travel with their keys."""
        work = torch.promote_types(q.dtype, torch.float32)
        dq = torch.empty(0)
        dkv: list[Tensor] = []
        spare: list[Tensor] = []
        hops: list[Callable[[], Tensor]] = []
        for step, tile, key, value in self._around(k, v):
            block_dq, *block_dkv = block(step, tile, key, value)
            if step == 0:
                dq, dkv = block_dq.to(work), [x.to(work) for x in block_dkv]
                spare = [torch.empty_like(x) for x in dkv]
            else:
                dq[tile.q_start : tile.q_end] += block_dq
                spare, dkv = self.sent(dkv), [hop() for hop in hops]
                for total, x in zip(dkv, block_dkv, strict=True):
                    total[tile.k_start : tile.k_end] += x
            self.step_done(dq, *dkv)
            hops = [self._hop(x, received, "gradient") for x, received in zip(dkv, spare, strict=True)]
        dk, dv = (hop().to(k.dtype) for hop in hops)
        return dq.to(q.dtype), dk, dv

    def sent(self, dkv: list[Tensor]) -> list[Tensor]:
        """Where the next dk and dv are received, from those that were sent."""
        return dkv

    def step_done(self, *grads: Tensor) -> None:
        """After a step of the backward."""

    def _around(self, k: Tensor, v: Tensor) -> Iterator[tuple[int, Tile, Tensor, Tensor]]:
        """step, tile, and the keys and values that it reads."""
        for step, tile in enumerate(self._tiles):
            more = step + 1 < len(self._tiles)
            hops = [self._hop(x, torch.empty_like(x), "key/value") for x in (k, v)] if more else []
            yield step, tile, k[: tile.k_end], v[: tile.k_end]
            if more:
                k, v = (hop() for hop in hops)

    def _hop(self, x: Tensor, received: Tensor, what: str) -> Callable[[], Tensor]:
        axis = self._axis
        before, after = (axis.rank - 1) % axis.size, (axis.rank + 1) % axis.size
        hop = comm.Hop([(x, after)], [(received, before)], axis, what)

        def wait() -> Tensor:
            hop.wait()
            return received

        return wait


class Recomputing(RingFlashAttention):
    merged = staticmethod(merged)

    def backward(self, dout: Tensor, saved: Saved) -> Grads:
        q, k, v, _, _ = saved
        steps: list[Step] = []
        out = self._blockwise(q, k, v, steps)[0].to(q.dtype)
        douts = through_merges(dout, steps)

        def block(step: int, tile: Tile, k: Tensor, v: Tensor) -> Grads:
            part, own_lse = slice(tile.q_start, tile.q_end), steps[step].block_lse.squeeze(-1)
            check(steps[step].block_out, own_lse)
            check(douts[step])
            given = douts[step][part].to(q.dtype), q[part], k, v, out[part], own_lse[part]
            return self._kernel.backward(*given, tile, self._score)

        return self._gradients(q, k, v, block)

    def sent(self, dkv: list[Tensor]) -> list[Tensor]:
        return [torch.empty_like(x).copy_(x) for x in dkv]

    def step_done(self, *grads: Tensor) -> None:
        check(*grads)


def through_merges(dout: Tensor, steps: list[Step]) -> list[Tensor]:
    """What reaches each block's out, by step: a merge gives the block its weight and the blocks before it the rest."""
    rest, rest_lse = dout, torch.zeros_like(steps[0].lse)
    douts: list[Tensor] = []
    lses: list[Tensor] = []  # the blocks' own, as published: computed and not used
    for step in reversed(steps[1:]):
        weight = step.weight
        change = (step.out - step.block_out) * (weight * (1 - weight))
        earlier = (rest * change).sum(-1, keepdim=True) + rest_lse * torch.sigmoid(step.lse - step.block_lse)
        douts.append(rest * weight)
        lses.append(rest_lse - earlier)
        rest, rest_lse = rest * (1 - weight), earlier
    return [rest, *reversed(douts)]


PEERS = {"ring-flash-attention": RingFlashAttention, "recomputing": Recomputing}
