"""Ulysses and ring a group of query heads at a time: gathered queries and outputs of one group only live at once.

    once        local k, v, all heads       -- all-to-all -->  this rank's key/value heads of the ring rank's tokens; they stay
    per group   local q of the group        -- all-to-all -->  ring over k, v  -- all-to-all -->  local out of the group
    backward    local q, out, dout of it    -- all-to-all -->  ring, backward  -- all-to-all -->  local dq;  dk, dv add up
    once        dk, dv                      -- all-to-all -->  local dk, dv

What waits for backward is local (q, out) but for k, v and the lse, so with U ulysses ranks and C groups a rank holds 1/C of the
gathered buffers. It costs q and out once more through the all-to-all. The idea is UPipe's (Untied Ulysses, 2026), written from its
description.

Shapes: T local tokens, S tokens of the ring rank (U * T), N query heads, M key/value heads, H head size; n, m heads per rank, g
query heads of a group on a rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from ds_cp import comm, ring
from ds_cp.batch import SequenceContext
from ds_cp.kernels.attention import Score
from ds_cp.reshard import by_receiver
from ds_cp.tiles import Plan
from ds_cp.timing import ATTENTION, timed
from ds_cp.topology import HeadSplit, head_chunks_illegal, split_heads


class AttentionByHeads(torch.autograd.Function):
    """Attention of this rank's local tokens to the whole row, in `context.methods.head_chunks` groups of query heads.

    Shards over ulysses and ring as `attention.attend`: q [T, N, H], k, v [T, M, H] and out [T, N, H] are local tokens with all
    heads, `sink` [n] is of this rank's heads. Every rank must call it.
    """

    @staticmethod
    def forward(
        ctx, q_TNH: Tensor, k_TMH: Tensor, v_TMH: Tensor, sink_n: Tensor | None, context: SequenceContext, plan: Plan, score: Score
    ) -> Tensor:
        split = split_heads(context.mesh.ulysses.size, q_TNH.shape[1], k_TMH.shape[1])
        k, v = _key_value_heads(k_TMH, v_TMH, split, context)
        out_TNH, lses, kept = torch.empty_like(q_TNH, memory_format=torch.contiguous_format), [], []
        for group in groups(split, context.methods.head_chunks):
            (q,) = _to_heads([q_TNH], group, context)
            with timed("ds_cp attention", context.mesh.ring.waits, ATTENTION):
                out, lse, blocks = ring.push(q, k[:, group.kv], v[:, group.kv], _of(sink_n, group), context, plan, score)
            _to_tokens(out, out_TNH, group, context)
            lses.append(lse)
            kept.append(blocks)
        ctx.save_for_backward(q_TNH, k, v, sink_n, out_TNH, *lses, *chain.from_iterable(kept))
        ctx.split, ctx.rest, ctx.kept = split, (context, plan, score), len(kept[0])
        return out_TNH

    @staticmethod
    def backward(ctx, dout_TNH: Tensor) -> tuple[Tensor | None, ...]:
        q_TNH, k, v, sink_n, out_TNH, *saved = ctx.saved_tensors
        (context, plan, score), split = ctx.rest, ctx.split
        parts = list(groups(split, context.methods.head_chunks))
        lses, kept = saved[: len(parts)], saved[len(parts) :]
        dtype = k.dtype if len({group.kv.start for group in parts}) == len(parts) else lses[0].dtype
        dk, dv = (torch.zeros_like(x, dtype=dtype, memory_format=torch.contiguous_format) for x in (k, v))
        dq_TNH, dsinks = torch.empty_like(out_TNH), []
        for number, (group, lse) in enumerate(zip(parts, lses, strict=True)):
            blocks = kept[number * ctx.kept : (number + 1) * ctx.kept]
            q, out, dout = _to_heads([q_TNH, out_TNH, dout_TNH], group, context)
            kv = k[:, group.kv], v[:, group.kv]
            given = dout, q, *kv, _of(sink_n, group), out, lse
            with timed("ds_cp attention backward", context.mesh.ring.waits, ATTENTION):
                dq, dk_part, dv_part, dsink = ring.pull(*given, context, plan, score, blocks)
            dk[:, group.kv] += dk_part
            dv[:, group.kv] += dv_part
            _to_tokens(dq, dq_TNH, group, context)
            dsinks += [] if dsink is None else [dsink]
        dk_TMH, dv_TMH = _key_value_tokens(dk.to(k.dtype), dv.to(v.dtype), split, context)
        return dq_TNH, dk_TMH, dv_TMH, None if sink_n is None else torch.cat(dsinks), None, None, None


@dataclass(frozen=True)
class Group:
    """Query heads of a rank, and the key/value heads that serve them."""

    query: slice
    kv: slice


def groups(split: HeadSplit, chunks: int) -> list[Group]:
    """In ascending order of heads."""
    assert head_chunks_illegal(split, chunks) is None
    each, served = split.query // chunks, split.query // split.kv
    starts = range(0, split.query, each)
    return [Group(slice(i, i + each), slice(i // served, (i + each - 1) // served + 1)) for i in starts]


def _of(sink_n: Tensor | None, group: Group) -> Tensor | None:
    return None if sink_n is None else sink_n[group.query]


def _by_rank(x_TNH: Tensor, group: Group, ranks: int) -> Tensor:
    """The view [T, U, g, H] of the group's heads of every rank."""
    return x_TNH.unflatten(1, (ranks, -1))[:, :, group.query]


def _to_heads(tensors: list[Tensor], group: Group, context: SequenceContext) -> tuple[Tensor, ...]:
    """One all-to-all: [S, g, H] of each of the tensors [T, N, H]."""
    ulysses = context.mesh.ulysses
    message = torch.cat([_by_rank(x, group, ulysses.size).transpose(0, 1) for x in tensors], dim=2)
    heads = message.shape[2] // len(tensors)
    return comm.all_to_all(message, ulysses).flatten(0, 1).split(heads, dim=1)


def _to_tokens(x_SgH: Tensor, into_TNH: Tensor, group: Group, context: SequenceContext) -> None:
    """The inverse for one tensor, into its heads' place."""
    ulysses = context.mesh.ulysses
    parts_UTgH = comm.all_to_all(x_SgH.unflatten(0, (ulysses.size, -1)), ulysses)
    _by_rank(into_TNH, group, ulysses.size).copy_(parts_UTgH.transpose(0, 1))


def _key_value_heads(k_TMH: Tensor, v_TMH: Tensor, split: HeadSplit, context: SequenceContext) -> tuple[Tensor, Tensor]:
    """(k, v) [S, m, H]."""
    ulysses = context.mesh.ulysses
    parts = [by_receiver(x, ulysses.size // split.sharing, split.sharing) for x in (k_TMH, v_TMH)]
    mixed = comm.all_to_all(torch.cat(parts, dim=3).flatten(0, 1), ulysses)
    return mixed.flatten(0, 1).split(split.kv, dim=1)


def _key_value_tokens(dk_SmH: Tensor, dv_SmH: Tensor, split: HeadSplit, context: SequenceContext) -> tuple[Tensor, Tensor]:
    """Their gradients [T, M, H]: those of heads that several ranks hold are summed."""
    ulysses = context.mesh.ulysses
    message = torch.cat([x.unflatten(0, (ulysses.size, -1)) for x in (dk_SmH, dv_SmH)], dim=2)
    mixed = comm.all_to_all(message, ulysses).unflatten(0, (-1, split.sharing)).sum(1)
    return tuple(x.transpose(0, 1).flatten(1, 2) for x in mixed.split(split.kv, dim=2))
