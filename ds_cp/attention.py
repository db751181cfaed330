"""Exact causal attention over a row that is spread over ulysses x ring ranks.

    local tokens, all heads         [T, N + 2M, H]
      -- all-to-all over ulysses -->  ring rank's tokens, 1/U of the heads   [UT, n + 2m, H]
      -- ring over k, v -->           out of the same shape as q             [UT, n, H]
      -- all-to-all over ulysses -->  local tokens, all heads                [T, N, H]

Ulysses: Jacobs et al., 2023. The middle line is `ring.RingAttention`.

Copies of q, k, v that the all-to-all costs: one that packs them by receiving rank (heads of one rank lie apart in a token), none
after it; of the output none before it and one that puts a token's heads side by side.
In backward the same mirrored, and the gradients of q, k, v once more, to stand as q, k, v did.

Where ranks hold other tokens than the ring works on (state passing in Gated DeltaNet layers wants contiguous pieces), the same two
exchanges go over seq instead of ulysses and carry every token to the ring rank that works on it as well (`reshard`). With
`attention_head_chunks` all of it goes a group of heads at a time (`head_chunks`).

Shapes: T local tokens, S tokens of the ring rank (U * T), N query heads, M key/value heads, H head size; n, m heads per rank.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ds_cp import comm, reshard
from ds_cp.balance import Window
from ds_cp.batch import SequenceContext
from ds_cp.head_chunks import AttentionByHeads
from ds_cp.kernels.attention import Score
from ds_cp.layout import Route
from ds_cp.ring import RingAttention
from ds_cp.topology import HeadSplit, split_heads


def attend(
    q_1NTH: Tensor,
    k_1MTH: Tensor,
    v_1MTH: Tensor,
    context: SequenceContext,
    score: Score,
    window: Window = None,
    sink_N: Tensor | None = None,
) -> Tensor:
    """Attention of this rank's local tokens to the whole row, within documents.

    Args:
        q_1NTH, k_1MTH, v_1MTH: local tokens as HF's attention interface hands them over, positions already applied.
        score: what becomes of q . k.
        window: keys that a query attends at most, its own included, or its chunk's; one of `context.methods.windows`.
        sink_N: a learned score of every query head, of a key without value.

    Returns:
        [1, T, N, H], q's dtype, contiguous.

    Raises:
        ValueError: the kernel cannot compute these inputs (the same on every rank, before any communication).
    """
    q_TNH, k_TMH, v_TMH = (x.squeeze(0).transpose(0, 1) for x in (q_1NTH, k_1MTH, v_1MTH))
    plan = context.plans[window]
    if plan.kept and not torch.is_grad_enabled():  # evaluation, or a forward that reentrant checkpointing will repeat
        plan = replace(plan, kept=False)
    reason = context.methods.attention.unsupported(q_TNH, k_TMH, v_TMH, plan.steps[0][0], score)
    if reason is not None:
        name = context.methods.attention.__name__.split(".")[-1]
        raise ValueError(f"sequence_parallel.attention_kernel: {name}: {reason}")
    ulysses = context.mesh.ulysses
    if sink_N is not None and ulysses.size > 1:
        sink_N = sink_N.unflatten(0, (ulysses.size, -1))[ulysses.rank]
    rest = sink_N, context, plan, score
    if context.held.to_attention is not None:
        return _attend_elsewhere((q_TNH, k_TMH, v_TMH), context.held.to_attention, context, rest)
    if context.methods.head_chunks > 1:
        return AttentionByHeads.apply(q_TNH, k_TMH, v_TMH, *rest).unsqueeze(0)
    if ulysses.size == 1:
        return RingAttention.apply(q_TNH, k_TMH, v_TMH, *rest).unsqueeze(0)
    split = split_heads(ulysses.size, q_TNH.shape[1], k_TMH.shape[1])
    q, k, v = tokens_for_heads(q_TNH, k_TMH, v_TMH, split, context)
    return heads_for_tokens(RingAttention.apply(q, k, v, *rest), context)


def _attend_elsewhere(qkv: tuple[Tensor, Tensor, Tensor], route: Route, context: SequenceContext, rest: tuple[Any, ...]) -> Tensor:
    q_TNH, k_TMH, _ = qkv
    seq, ranks, size = context.mesh.seq, context.mesh.ulysses.size, q_TNH.shape[2]
    split = split_heads(ranks, q_TNH.shape[1], k_TMH.shape[1])
    by_group = [reshard.by_receiver(x, ranks // split.sharing, split.sharing).flatten(0, 1) for x in qkv]
    widths = [heads * size for heads in (split.query, split.kv, split.kv)]
    q, k, v = (x.unflatten(1, (-1, size)) for x in reshard.to_heads(by_group, widths, route, seq))
    out_SC = RingAttention.apply(q, k, v, *rest).flatten(1)
    parts_UTC = reshard.to_tokens(out_SC, ranks, route, seq)
    return parts_UTC.transpose(0, 1).reshape(1, len(q_TNH), -1, size)


def tokens_for_heads(
    q_TNH: Tensor, k_TMH: Tensor, v_TMH: Tensor, split: HeadSplit, context: SequenceContext
) -> tuple[Tensor, Tensor, Tensor]:
    """One all-to-all: all heads of the local tokens become this rank's heads of the ring rank's tokens."""
    tokens, _, size = q_TNH.shape
    ranks = context.mesh.ulysses.size
    parts = [reshard.by_receiver(x, ranks // split.sharing, split.sharing) for x in (q_TNH, k_TMH, v_TMH)]
    packed = torch.cat(parts, dim=3).flatten(0, 1)
    mixed = comm.all_to_all(packed, context.mesh.ulysses)
    return mixed.view(ranks * tokens, -1, size).split((split.query, split.kv, split.kv), dim=1)


def heads_for_tokens(out_SnH: Tensor, context: SequenceContext) -> Tensor:
    """The inverse all-to-all, of the output alone."""
    ulysses = context.mesh.ulysses
    parts_UTnH = comm.all_to_all(out_SnH.unflatten(0, (ulysses.size, -1)), ulysses)
    return parts_UTnH.transpose(0, 1).flatten(1, 2).unsqueeze(0)
