"""Gated DeltaNet over a row that is spread over ulysses x ring ranks (Yang et al., Gated Delta Networks, 2024).

A state runs along the row, so a layer needs its tokens in natural order and each value head whole:

    local tokens, all heads       q, k [T, K, H], v [T, V, G], b, a [T, V]
      -- one all-to-all -->       tokens in natural order, 1/size of the heads: causal convolution, delta rule, per document
      -- its inverse, of out -->  local tokens, all heads                                                      [T, V, G]

`linear_attention: heads` does this over all ranks of the row, each of which gets the whole row. `state` does it over ulysses alone;
the ring ranks hold consecutive pieces of the row and pass the state on (`kernels/delta`). Value heads are the unit: a key head goes
wherever one of its value heads goes, so the degree may be the number of value heads.

Elements that a rank sends, over P ranks that share heads (its own part included), with k key and V / P value heads per rank:
T * (2 k P H + V (G + 2)) there, T * V * G back; the same in backward.

Shapes: T local tokens, S tokens worked on, K key heads, V value heads, H key head size, G value head size, C channels of q, k, v.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from ds_cp import reshard
from ds_cp.batch import SequenceContext
from ds_cp.layout import Route
from ds_cp.mesh import AxisGroup
from ds_cp.topology import HeadSplit, split_heads


@dataclass(frozen=True)
class Layer:
    """What a layer has beside its projections. The parameters are whole; each rank uses, and gets gradients for, its heads."""

    conv_CW: Tensor
    """Depthwise, channels of q, then k, then v."""
    conv_bias_C: Tensor | None
    activation: str
    a_log_V: Tensor
    dt_bias_V: Tensor
    beta_scale: float = 1.0


def mix(q_TKH: Tensor, k_TKH: Tensor, v_TVG: Tensor, b_TV: Tensor, a_TV: Tensor, layer: Layer, context: SequenceContext) -> Tensor:
    """Convolution and gated delta rule of the whole row for this rank's tokens; every rank of the row must call it.

    Args:
        q_TKH, k_TKH, v_TVG: projected local tokens, before the convolution. b_TV, a_TV: logits of beta and of the decay.

    Returns:
        [T, V, G], v's dtype.
    """
    held, mesh = context.held, context.mesh
    assert held.span is not None
    axis = mesh.seq if held.span.passing is None else mesh.ulysses
    split = split_heads(axis.size, v_TVG.shape[1], q_TKH.shape[1])
    qkv_SC, b_Sv, a_Sv = to_own_heads((q_TKH, k_TKH), v_TVG, (b_TV, a_TV), split, axis, held.to_delta)
    out_SvG = _rule(qkv_SC, b_Sv, a_Sv, q_TKH.shape[2], split, axis, layer, context)
    return to_local_tokens(out_SvG, axis, held.to_delta)


def to_own_heads(
    keys: Sequence[Tensor], values_TVG: Tensor, logits: Sequence[Tensor], split: HeadSplit, axis: AxisGroup, route: Route | None
) -> tuple[Tensor, ...]:
    """All tokens of the row with this rank's heads: channels of each of `keys` [T, K, H], then of the values, and each of `logits`.

    Shards: `reshard.to_heads`, of the heads that `split` gives to each rank of `axis`; `route` is None where that is one rank.

    Returns:
        [S, C], and [S, v] for each of `logits`.
    """
    if route is None:
        return torch.cat([x.flatten(1) for x in (*keys, values_TVG)], dim=1), *logits
    shared = [reshard.by_receiver(x, axis.size // split.sharing, split.sharing).flatten(0, 1) for x in keys]
    own = [reshard.by_receiver(x, axis.size, 1).flatten(0, 1) for x in (values_TVG, torch.stack(tuple(logits), dim=-1))]
    channels = split.kv * sum(x.shape[2] for x in keys) + split.query * values_TVG.shape[2]
    x_SC, parts = reshard.to_heads([*shared, *own], (channels, len(logits) * split.query), route, axis)
    return x_SC, *parts.unflatten(1, (-1, len(logits))).unbind(-1)


def to_local_tokens(out_SvG: Tensor, axis: AxisGroup, route: Route | None) -> Tensor:
    """The inverse for what the heads gave: [S, v, G] of this rank's heads to [T, V, G]."""
    if route is None:
        return out_SvG
    parts = reshard.to_tokens(out_SvG.flatten(1), axis.size, route, axis)
    return parts.unflatten(2, out_SvG.shape[1:]).transpose(0, 1).flatten(1, 2)


def _rule(
    qkv_SC: Tensor, b_Sv: Tensor, a_Sv: Tensor, size: int, split: HeadSplit, axis: AxisGroup, layer: Layer, context: SequenceContext
) -> Tensor:
    """This rank's heads: [S, v, G]."""
    kernel, span = context.methods.delta, context.held.span
    assert kernel is not None
    assert span is not None
    first, last = axis.rank * split.query, (axis.rank + 1) * split.query
    key_first = axis.rank * split.kv // split.sharing
    keys, values = split.kv * size, qkv_SC.shape[1] - 2 * split.kv * size
    ranges = _channels(layer.conv_CW.shape[0], axis, split, key_first * size, keys, values)
    bias = None if layer.conv_bias_C is None else _rows(layer.conv_bias_C, ranges)
    qkv_SC = kernel.convolve(qkv_SC, _rows(layer.conv_CW, ranges), bias, layer.activation, span)
    q_Sc, k_Sc, v_Sc = qkv_SC.split((keys, keys, values), dim=1)
    work = torch.promote_types(a_Sv.dtype, torch.float32)
    decay = functional.softplus(a_Sv.to(work) + layer.dt_bias_V[first:last])
    g = -layer.a_log_V[first:last].to(work).exp() * decay
    beta = b_Sv.sigmoid() * layer.beta_scale
    q, k = (x.unflatten(1, (split.kv, -1)) for x in (q_Sc, k_Sc))
    return kernel.delta_rule(q, k, v_Sc.unflatten(1, (split.query, -1)), g, beta, span)


def _channels(
    channels: int, axis: AxisGroup, split: HeadSplit, key_start: int, keys: int, values: int
) -> tuple[tuple[int, int], ...]:
    """Where this rank's q, k and v channels stand among all."""
    all_values = values * axis.size
    all_keys = (channels - all_values) // 2
    q, k, v = key_start, all_keys + key_start, 2 * all_keys + axis.rank * values
    return (q, q + keys), (k, k + keys), (v, v + values)


def _rows(x: Tensor, ranges: tuple[tuple[int, int], ...]) -> Tensor:
    return torch.cat([x[start:end] for start, end in ranges])
