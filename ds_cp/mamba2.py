"""Mamba-2 layers over a row that is spread over ulysses x ring ranks, by heads. (Dao and Gu, Transformers are SSMs, 2024.)

The way is that of Gated DeltaNet by heads (`delta`): x, B, C and the step sizes go through one all-to-all over all ranks of the
row, each of which then has all tokens in natural order with 1/size of the heads; causal convolution and scan run there, document by
document; the inverse brings the output back. A group's B and C go wherever one of its heads goes, so the degree may be the number
of heads. State is not passed between ranks.

Elements that a rank sends, over P ranks, with k groups and V / P heads per rank (its own part included):
T * (2 k P N + V (X + 1)) there, T * V * X back; the same in backward.

Shapes: T local tokens, S tokens of the row, V heads, K groups, X head size, N state size, C channels of B, C and x, W taps.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from ds_cp.batch import SequenceContext
from ds_cp.delta import to_local_tokens, to_own_heads
from ds_cp.kernels import ssd
from ds_cp.kernels.delta.reference import convolve
from ds_cp.topology import split_heads


@dataclass(frozen=True)
class Layer:
    """What a layer has beside its projections and norm, whole; each rank uses, and gets gradients for, its heads."""

    conv_CW: Tensor
    """Depthwise, channels of x, then B, then C."""
    conv_bias_C: Tensor | None
    activation: str
    a_log_V: Tensor
    d_V: Tensor
    dt_bias_V: Tensor
    dt_limit: tuple[float, float]


def mix(x_TVX: Tensor, b_TKN: Tensor, c_TKN: Tensor, dt_TV: Tensor, layer: Layer, context: SequenceContext) -> Tensor:
    """Convolution and scan of the whole row for this rank's tokens; every rank of the row must call it.

    Args:
        x_TVX, b_TKN, c_TKN: projected local tokens, before the convolution. dt_TV: step sizes before their bias and softplus.

    Returns:
        [T, V, X], x's dtype.
    """
    held, axis = context.held, context.mesh.seq
    assert held.span is not None
    (_, heads, head_size), (_, groups, state) = x_TVX.shape, b_TKN.shape
    split = split_heads(axis.size, heads, groups)
    bcx_SC, dt_Sv = to_own_heads((b_TKN, c_TKN), x_TVX, (dt_TV,), split, axis, held.to_delta)
    key, value = axis.rank * split.kv // split.sharing, axis.rank * split.query
    sizes = [split.kv * state, split.kv * state, split.query * head_size]
    starts = [heads * head_size + key * state, heads * head_size + (groups + key) * state, value * head_size]
    own = [slice(start, start + size) for start, size in zip(starts, sizes, strict=True)]
    weight = torch.cat([layer.conv_CW[part] for part in own])
    bias = None if layer.conv_bias_C is None else torch.cat([layer.conv_bias_C[part] for part in own])
    b, c, x = convolve(bcx_SC, weight, bias, layer.activation, held.span).split(sizes, dim=1)
    of = slice(value, value + split.query)
    work = torch.promote_types(dt_Sv.dtype, torch.float32)
    dt_Sv = functional.softplus(dt_Sv.to(work) + layer.dt_bias_V[of].to(work)).clamp(*layer.dt_limit)
    a = -layer.a_log_V[of].to(work).exp()
    b, c, x = (each.unflatten(1, (n, -1)) for each, n in ((b, split.kv), (c, split.kv), (x, split.query)))
    return to_local_tokens(ssd.scan(x, dt_Sv, a, b, c, layer.d_V[of], held.span), axis, held.to_delta)
