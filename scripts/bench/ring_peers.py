"""Two published zigzag rings, restated on ds_cp's kernels and hops so that only the algorithm differs. One document a row.

A rank holds chunks r and 2R - 1 - r of 2R. Both peers compute the same blocks, at step s with the keys of rank r - s:

    s = 0        all queries x all keys, causal
    s <= rank    all queries x first half of the keys
    s > rank     second half of the queries x all keys

`RingFlashAttention` (zhuzilin/ring-flash-attention, zigzag): out runs in fp32; every merge makes new tensors by a sigmoid of the
two lse, in a TorchScript function, and writes them back where it covers half of the queries. k and v hop as two tensors into new
buffers. Backward gives each block the merged out and lse; dq, dk, dv are summed in fp32, dk and dv hop in fp32.

`Recomputing` (modelscope/twinkle and ms-swift, zigzag): the same forward. Backward goes around the ring twice: it runs every
block's forward and the merges again, sends dout back through the merges (fp32, kept for every step), then runs every block's
backward with that block's own lse. As published its gradients are wrong, because the gradient of the blocks' lse is dropped.
Here they are right: with w = exp(block_lse - lse), dout_block = w dout and the merged out in place of the block's,

    p_block (dout_block . v - dout_block . out) = p (dout . v - dout . out)

is the whole softmax's, by the same call on the same shapes. Left out, so that its time and memory are lower bounds: the lse's own
chain, the blocks' outs kept for every step, checks for NaN and other waits for the GPU, copies of received gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ds_cp import comm
from ds_cp.kernels.attention import Kernel, Score
from ds_cp.tiles import Tile

Saved = tuple[Tensor, ...]
Grads = tuple[Tensor, Tensor, Tensor]


@torch.jit.script
def merged(out: Tensor, lse: Tensor, block_out: Tensor, block_lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(out, lse, weight of the block); lse and weight are [T, N, 1]."""
    weight = torch.sigmoid(block_lse - lse)
    return out - weight * (out - block_out.to(out.dtype)), lse - torch.nn.functional.logsigmoid(lse - block_lse), weight


class RingFlashAttention:
    """One rank's forward and backward; shapes as in ds_cp.ring."""

    def __init__(self, kernel: Kernel, axis: Any, tokens: int, device: str, score: Score) -> None:
        self._kernel, self._axis, self._score, self._half = kernel, axis, score, tokens // 2
        bounds = torch.tensor((0, tokens), dtype=torch.int32, device=device)
        self._tiles = [Tile(0, tokens, 0, tokens, (0, tokens), cu_seqlens=bounds)]
        for step in range(1, axis.size):
            front = step <= axis.rank
            self._tiles.append(Tile(0, tokens, 0, self._half) if front else Tile(self._half, tokens, 0, tokens))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Saved:
        """(q, k, v, out, lse) for backward."""
        out, lse, _ = self._blockwise(q, k, v)
        return q, k, v, out.to(q.dtype), lse.squeeze(-1)

    def backward(self, dout: Tensor, saved: Saved) -> Grads:
        q, k, v, out, lse = saved

        def block(step: int, tile: Tile, k: Tensor, v: Tensor) -> Grads:
            part = slice(tile.q_start, tile.q_end)
            return self._kernel.backward(dout[part], q[part], k, v, out[part], lse[part], tile, self._score)

        return self._gradients(q, k, v, block)

    def _blockwise(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, list[tuple[Tensor, Tensor]]]:
        """Merged out in fp32 and lse [T, N, 1]; of every block its lse and its weight in the merge."""
        out = lse = torch.empty(0)
        blocks: list[tuple[Tensor, Tensor]] = []
        for step, tile, key, value in self._around(k, v):
            part = slice(tile.q_start, tile.q_end)
            block_out, block_lse = self._kernel.forward(q[part], key, value, tile, self._score)
            block_lse = block_lse.unsqueeze(-1)
            weight = block_lse
            if step == 0:
                out, lse = block_out.to(block_lse.dtype), block_lse.clone()
            elif tile.q_start == 0:
                out, lse, weight = merged(out, lse, block_out, block_lse)
            else:
                out[part], lse[part], weight = merged(out[part], lse[part], block_out, block_lse)
            blocks.append((block_lse.squeeze(-1), weight))
        return out, lse, blocks

    def _gradients(self, q: Tensor, k: Tensor, v: Tensor, block: Callable[[int, Tile, Tensor, Tensor], Grads]) -> Grads:
        """Sums what `block(step, tile, its keys, its values)` gives; dk and dv travel with their keys."""
        work = torch.promote_types(q.dtype, torch.float32)
        dq = torch.empty(0)
        dkv: list[Tensor] = []
        hops: list[Callable[[], Tensor]] = []
        for step, tile, key, value in self._around(k, v):
            block_dq, *block_dkv = block(step, tile, key, value)
            if step == 0:
                dq, dkv = block_dq.to(work), [x.to(work) for x in block_dkv]
                spare = [torch.empty_like(x) for x in dkv]
            else:
                dq[tile.q_start : tile.q_end] += block_dq
                spare, dkv = dkv, [hop() for hop in hops]
                for total, x in zip(dkv, block_dkv, strict=True):
                    total[tile.k_start : tile.k_end] += x
            hops = [self._hop(x, received, "gradient") for x, received in zip(dkv, spare, strict=True)]
        dk, dv = (hop().to(k.dtype) for hop in hops)
        return dq.to(q.dtype), dk, dv

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
        hop = comm.Hop([(x, after)], [(received, before)], axis.group, axis.ranks, axis.rank, what=what)

        def wait() -> Tensor:
            hop.wait()
            return received

        return wait


class Recomputing(RingFlashAttention):
    def backward(self, dout: Tensor, saved: Saved) -> Grads:
        q, k, v, _, _ = saved
        out, _, blocks = self._blockwise(q, k, v)
        out = out.to(q.dtype)
        douts = self._through_merges(dout, [weight for _, weight in blocks])

        def block(step: int, tile: Tile, k: Tensor, v: Tensor) -> Grads:
            part = slice(tile.q_start, tile.q_end)
            own_lse = blocks[step][0]
            return self._kernel.backward(douts[step][part].to(q.dtype), q[part], k, v, out[part], own_lse, tile, self._score)

        return self._gradients(q, k, v, block)

    def _through_merges(self, dout: Tensor, weights: list[Tensor]) -> list[Tensor]:
        """What reaches each block's out, by step: a merge gives the block its weight and the blocks before it the rest."""
        rest = dout.to(weights[0].dtype)
        douts: list[Tensor] = []
        for tile, weight in reversed(list(zip(self._tiles, weights, strict=True))[1:]):
            whole = weight if tile.q_start == 0 else torch.cat((torch.zeros_like(weight), weight))
            douts.append(rest * whole)
            rest = rest * (1 - whole)
        return [rest, *reversed(douts)]


PEERS = {"ring-flash-attention": RingFlashAttention, "recomputing": Recomputing}
