"""Exact attention to keys that an indexer has chosen for each query (DeepSeek sparse attention), over a row spread over ranks.

    index keys of local tokens      [T, D]     -- gathered over seq, put in the order of the row -->   [S, D]
    q, k, v of local tokens         [T, N, H]  -- all-to-all over ulysses -->  1/U of the heads of the ring rank's tokens
                                               -- k, v gathered over the ring, put in the order of the row -->  [S, n, H]
    a tile of queries, chosen keys  -->  out   -- all-to-all over ulysses -->  local tokens, all heads

Source of the choice: DeepSeek-V3.2-Exp, 2025. It has no gradient, as in transformers. Which keys are near says nothing about which
are chosen, so each rank has those of the whole row while it is in the layer, for its share of the heads; scores are those of one
tile of queries, computed once more in backward. Memory is linear in the row. The work is that of full attention under a mask, as
transformers does it outside of its own sparse kernel, shared out evenly among all ranks whatever the layout.

Shapes: T local tokens, S tokens of the row, Q queries of a tile, N query heads, M key/value heads, H head size, K chosen keys, D
size of an index key; n, m heads per rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from ds_cp import comm
from ds_cp import layout as layouts
from ds_cp.attention import heads_for_tokens, tokens_for_heads
from ds_cp.batch import SequenceContext
from ds_cp.layout import Range
from ds_cp.topology import split_heads

if TYPE_CHECKING:
    from ds_cp.mesh import AxisGroup

TILE_SCORES = 2**27
"""Scores of a tile of queries: half a GiB of fp32, or a mask of an eighth."""


@dataclass(frozen=True)
class Allowed:
    """Which keys of the row queries may attend at all: of their document, none after them."""

    query_Q: Tensor
    """Where the queries stand in the row."""
    start_Q: Tensor
    """Where their documents start."""

    def mask(self, tokens: int) -> Tensor:
        """[Q, S]"""
        key_S = torch.arange(tokens, device=self.query_Q.device)
        return (key_S <= self.query_Q.unsqueeze(1)) & (key_S >= self.start_Q.unsqueeze(1))

    def tile(self, start: int, end: int) -> Allowed:
        return Allowed(self.query_Q[start:end], self.start_Q[start:end])


def allowed(spans: Sequence[Range], documents: Sequence[int], device: torch.device) -> Allowed:
    """Of the tokens in these ranges of the row. documents: cu_seqlens of the padded row."""
    query_Q = torch.cat([torch.arange(start, end) for start, end in spans])
    bounds = torch.tensor(documents)
    start_Q = bounds[torch.bucketize(query_Q, bounds, right=True) - 1]
    return Allowed(query_Q.to(device), start_Q.to(device))


def tiles_of(queries: int, scores: int) -> list[Range]:
    """Ranges of so many queries that a tile has at most TILE_SCORES scores; `scores` is what one query has."""
    size = max(1, TILE_SCORES // scores)
    return [(start, min(start + size, queries)) for start in range(0, queries, size)]


def in_order(x: Tensor, spans: Sequence[Sequence[Range]], axis: AxisGroup) -> Tensor:
    """[S, ...] in the order of the row from every rank's [T, ...], whose ranges of the row are `spans`; its gradient goes back.

    Every rank of the group must call it.
    """
    pieces, offset = [], 0
    for start, end in (span for theirs in spans for span in theirs):
        pieces.append((start, torch.arange(offset, offset + end - start)))
        offset += end - start
    order = torch.cat([places for _, places in sorted(pieces, key=lambda piece: piece[0])])
    return comm.all_gather(x, axis.group, axis.waits).flatten(0, 1)[order.to(x.device)]


def choose(key_TD: Tensor, chosen: Callable[[Tensor, Tensor, Range], Tensor], scores: int, context: SequenceContext) -> Tensor:
    """[1, T, K]: for every local token the places in the row of the keys that it attends; every rank of the row must call it.

    Args:
        key_TD: index keys of the local tokens.
        chosen: (index keys [1, S, D], allowed [1, Q, S], tile) -> [1, Q, K].
        scores: of a query with one key.
    """
    layout = context.held.layout
    key_SD = in_order(key_TD, layouts.shards(layout), context.mesh.seq)
    spans = layout.local_ranges(context.mesh.ring.rank, context.mesh.ulysses.rank)
    may, tokens = allowed(spans, context.documents, key_TD.device), len(key_SD)
    found = [
        chosen(key_SD.unsqueeze(0), may.tile(*tile).mask(tokens).unsqueeze(0), tile)
        for tile in tiles_of(len(key_TD), scores * tokens)
    ]
    return torch.cat(found, dim=1)


def attend_chosen(
    q_1NTH: Tensor,
    k_1MTH: Tensor,
    v_1MTH: Tensor,
    index_1TK: Tensor,
    context: SequenceContext,
    scale: float,
    sink_N: Tensor | None = None,
) -> Tensor:
    """Attention of this rank's local tokens to the chosen keys of their document, none after them.

    Args:
        q_1NTH, k_1MTH, v_1MTH: local tokens as HF's attention interface hands them over. index_1TK: from `choose`.
        sink_N: a learned score of every query head, of a key without value.

    Returns:
        [1, T, N, H], q's dtype, contiguous.
    """
    assert context.held.to_attention is None
    q, k, v = (x.squeeze(0).transpose(0, 1) for x in (q_1NTH, k_1MTH, v_1MTH))
    index_QK, mesh = index_1TK.squeeze(0), context.mesh
    if mesh.ulysses.size > 1:
        split = split_heads(mesh.ulysses.size, q.shape[1], k.shape[1])
        q, k, v = tokens_for_heads(q, k, v, split, context)
        index_QK = comm.all_gather(index_QK, mesh.ulysses.group, mesh.ulysses.waits).flatten(0, 1)
        sink_N = None if sink_N is None else sink_N.unflatten(0, (mesh.ulysses.size, -1))[mesh.ulysses.rank]
    spans = [context.layout.ring_ranges(rank) for rank in range(mesh.ring.size)]
    k_mSH, v_mSH = in_order(torch.cat((k, v), dim=2), spans, mesh.ring).transpose(0, 1).split(k.shape[2], dim=2)
    may = allowed(spans[mesh.ring.rank], context.documents, q.device)
    q_nQH, out = q.transpose(0, 1), []
    per_query = k_mSH.shape[1] * (1 if sink_N is None and q.is_cuda else q.shape[1])  # else of all heads at once
    for start, end in tiles_of(q.shape[0], per_query):
        rest = index_QK[start:end], may.tile(start, end), scale, sink_N
        out.append(checkpoint(_tile, q_nQH[:, start:end], k_mSH, v_mSH, *rest, use_reentrant=False, preserve_rng_state=False))
    out_QnH = torch.cat(out, dim=1).transpose(0, 1).contiguous()
    return out_QnH.unsqueeze(0) if mesh.ulysses.size == 1 else heads_for_tokens(out_QnH, context)


def _tile(
    q_nQH: Tensor, k_mSH: Tensor, v_mSH: Tensor, index_QK: Tensor, may: Allowed, scale: float, sink_n: Tensor | None
) -> Tensor:
    """[n, Q, H]"""
    mask_QS = may.mask(k_mSH.shape[1])
    mask_QS = mask_QS & torch.zeros_like(mask_QS).scatter(1, index_QK.long(), True)
    if sink_n is None:
        q, k, v = (x.unsqueeze(0) for x in (q_nQH, k_mSH, v_mSH))
        shared = len(q_nQH) != len(k_mSH)
        return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask_QS, scale=scale, enable_gqa=shared).squeeze(0)
    k_nSH, v_nSH = (x.repeat_interleave(len(q_nQH) // len(x), dim=0) for x in (k_mSH, v_mSH))
    score_nQS = (q_nQH @ k_nSH.transpose(1, 2)).mul(scale).masked_fill(~mask_QS, float("-inf"))
    sink_nQ1 = sink_n.to(score_nQS.dtype)[:, None, None].expand(-1, score_nQS.shape[1], 1)
    work = torch.float64 if score_nQS.dtype == torch.float64 else torch.float32
    share_nQS = torch.cat((score_nQS, sink_nQ1), dim=-1).softmax(-1, dtype=work)[..., :-1]
    return share_nQS.to(v_nSH.dtype) @ v_nSH
