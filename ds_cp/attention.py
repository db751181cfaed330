"""Exact causal attention over a row that is spread over ulysses x ring ranks.

    local tokens, all heads         [T, N + 2M, H]
      -- all-to-all over ulysses -->  ring rank's tokens, 1/U of the heads   [UT, n + 2m, H]
      -- ring over k, v -->           out of the same shape as q             [UT, n, H]
      -- all-to-all over ulysses -->  local tokens, all heads                [T, N, H]

Ulysses: Jacobs et al. 2023. Ring: Liu et al. 2023; the schedule, at ring rank r with R ranks:

    forward   step s: post hop of (k, v); tiles of block r - s; merge (out, lse) in fp32; wait
    backward  step s: post hop of (k, v); tiles of block r - s with the MERGED out and lse;
              dq stays, (dk, dv) = mine + what came in, post hop of (dk, dv); after step R - 1 that hop brings it home

Because every tile's backward gets the whole row's out and lse, p = exp(s - lse) and delta = dout . out are those of the whole
softmax: no forward is repeated and nothing is saved per step.

Shapes: T local tokens, S tokens of the ring rank (U * T), N query heads, M key/value heads, H head size; n, m heads per rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ds_cp import comm
from ds_cp.batch import SequenceContext
from ds_cp.kernels.merge import merge_
from ds_cp.tiles import Tile
from ds_cp.topology import HeadSplit, split_heads


def attend(q_1NTH: Tensor, k_1MTH: Tensor, v_1MTH: Tensor, context: SequenceContext, scale: float) -> Tensor:
    """Attention of this rank's local tokens to the whole row, within documents.

    Args:
        q_1NTH, k_1MTH, v_1MTH: local tokens as HF's attention interface hands them over, positions already applied.
        scale: factor on the scores.

    Returns:
        [1, T, N, H], q's dtype, contiguous.

    Raises:
        ValueError: the kernel cannot compute these inputs (the same on every rank, before any communication).
    """
    q_TNH, k_TMH, v_TMH = (x.squeeze(0).transpose(0, 1) for x in (q_1NTH, k_1MTH, v_1MTH))
    reason = context.kernel.unsupported(q_TNH, k_TMH, v_TMH, context.tiles[0][0])
    if reason is not None:
        raise ValueError(f"sequence_parallel.attention_kernel: {context.kernel.__name__.split('.')[-1]}: {reason}")
    ulysses = context.mesh.ulysses
    if ulysses.size == 1:
        return RingAttention.apply(q_TNH, k_TMH, v_TMH, context, scale).unsqueeze(0)
    split = split_heads(ulysses.size, q_TNH.shape[1], k_TMH.shape[1])
    q, k, v = _tokens_for_heads(q_TNH, k_TMH, v_TMH, split, context)
    return _heads_for_tokens(RingAttention.apply(q, k, v, context, scale), context)


def _tokens_for_heads(
    q_TNH: Tensor, k_TMH: Tensor, v_TMH: Tensor, split: HeadSplit, context: SequenceContext
) -> tuple[Tensor, Tensor, Tensor]:
    """One all-to-all: all heads of the local tokens become this rank's heads of the ring rank's tokens."""
    tokens, _, size = q_TNH.shape
    ranks = context.mesh.ulysses.size
    if split.kv * ranks != k_TMH.shape[1]:  # fewer heads than ranks: index_select's backward sums the replicas
        source = torch.tensor(split.kv_source, device=k_TMH.device)
        k_TMH, v_TMH = k_TMH.index_select(1, source), v_TMH.index_select(1, source)
    parts = [x.unflatten(1, (ranks, -1)).transpose(0, 1) for x in (q_TNH, k_TMH, v_TMH)]
    mixed = comm.all_to_all(torch.cat(parts, dim=2), context.mesh.ulysses.group)
    return mixed.view(ranks * tokens, -1, size).split((split.query, split.kv, split.kv), dim=1)


def _heads_for_tokens(out_SnH: Tensor, context: SequenceContext) -> Tensor:
    """The inverse all-to-all, of the output alone."""
    ranks = context.mesh.ulysses.size
    parts_UTnH = comm.all_to_all(out_SnH.unflatten(0, (ranks, -1)), context.mesh.ulysses.group)
    return parts_UTnH.transpose(0, 1).flatten(1, 2).unsqueeze(0)


class RingAttention(torch.autograd.Function):
    """Attention of a ring rank's tokens to the whole row.

    Shards over the ring axis: q, k, v, out, dout and their gradients all hold this ring rank's tokens; every rank of the
    ring must call it. k and v have their own head count and are never expanded.
    """

    @staticmethod
    def forward(ctx, q_SNH: Tensor, k_SMH: Tensor, v_SMH: Tensor, context: SequenceContext, scale: float) -> Tensor:
        kernel, steps = context.kernel, context.tiles
        block = torch.stack((k_SMH, v_SMH)) if len(steps) > 1 else (k_SMH, v_SMH)
        out = lse = None
        for step, tiles in enumerate(steps):
            hop = _post(block, context, "key/value") if step + 1 < len(steps) else None
            for tile in tiles:
                part = slice(tile.q_start, tile.q_end)
                tile_out, tile_lse = kernel.forward(*_slices(q_SNH, block, tile), tile, scale)
                if out is None:
                    out, lse = _accumulators(tile_out, tile_lse, len(steps))
                else:
                    merge_(out[part], lse[part], tile_out, tile_lse)
            block = hop.wait() if hop else block
        out = out.to(q_SNH.dtype)
        ctx.save_for_backward(q_SNH, k_SMH, v_SMH, out, lse)
        ctx.context, ctx.scale = context, scale
        return out

    @staticmethod
    def backward(ctx, dout_SNH: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        context, kernel, steps = ctx.context, ctx.context.kernel, ctx.context.tiles
        work = torch.float64 if q.dtype == torch.float64 else torch.float32
        if len(steps) == 1:
            grads = kernel.backward(dout_SNH, q, k, v, out, lse, steps[0][0], ctx.scale)
            return *grads, None, None
        block, home = torch.stack((k, v)), None
        dq = torch.zeros_like(q, dtype=work)
        for step, tiles in enumerate(steps):
            hop = _post(block, context, "key/value") if step + 1 < len(steps) else None
            dkv = torch.zeros((2, *k.shape), dtype=work, device=k.device)
            for tile in tiles:
                part, keys = slice(tile.q_start, tile.q_end), slice(tile.k_start, tile.k_end)
                dq_, dk_, dv_ = kernel.backward(dout_SNH[part], *_slices(q, block, tile), out[part], lse[part], tile, ctx.scale)
                dq[part] += dq_
                dkv[0, keys] += dk_
                dkv[1, keys] += dv_
            if home is not None:
                dkv += home.wait()
            home = _post(dkv, context, "gradient")
            block = hop.wait() if hop else block
        dkv = home.wait()
        return dq.to(q.dtype), dkv[0].to(k.dtype), dkv[1].to(v.dtype), None, None


def _post(x: Tensor, context: SequenceContext, what: str) -> comm.Hop:
    ring = context.mesh.ring
    return comm.Hop(x, ring.group, ring.ranks, ring.rank, what=what)


def _slices(q: Tensor, block: tuple[Tensor, Tensor] | Tensor, tile: Tile) -> tuple[Tensor, Tensor, Tensor]:
    k, v = block[0], block[1]
    return q[tile.q_start : tile.q_end], k[tile.k_start : tile.k_end], v[tile.k_start : tile.k_end]


def _accumulators(out: Tensor, lse: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Step 0 covers every query, so its result starts the running one; without a ring it is the result."""
    if steps == 1:
        return out, lse
    return out.to(lse.dtype, copy=out.dtype != lse.dtype), lse.contiguous()
