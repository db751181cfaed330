"""Kimi delta attention over a row that is spread over ulysses x ring ranks, by heads. (Kimi Linear, 2025.)

Projections, the short convolution of q, k and v, whose predecessors are fetched (`convolution`), and every channel's decays run on
local tokens. One all-to-all over all ranks of the row then brings each rank all tokens of its heads, in natural order; the output
comes back by its inverse. The decays travel by themselves, in fp32.

Elements that a rank sends (its own part included): T * V * (3 H + 1) and T * V * H there, T * V * H back; the same in backward; and
the convolution's halo.

Shapes: T local tokens, S tokens of the row, V heads, H size of a head.
"""

from __future__ import annotations

from torch import Tensor

from ds_cp import reshard
from ds_cp.batch import SequenceContext
from ds_cp.delta import to_local_tokens
from ds_cp.kernels import kda


def mix(q_TVH: Tensor, k_TVH: Tensor, v_TVH: Tensor, g_TVH: Tensor, b_TV: Tensor, context: SequenceContext) -> Tensor:
    """The delta rule of the whole row for this rank's tokens, [T, V, H]; every rank of the row must call it.

    Args:
        q_TVH, k_TVH, v_TVH: after the convolution. g_TVH: logs of the decays, fp32 or fp64. b_TV: logits of beta.
    """
    held, axis = context.held, context.mesh.seq
    assert held.span is not None
    heads, size = v_TVH.shape[1] // axis.size, v_TVH.shape[2]
    if held.to_delta is None:
        q, k, v, g, b = q_TVH, k_TVH, v_TVH, g_TVH, b_TV
    else:
        qkvb, gs = (
            [reshard.by_receiver(x, axis.size, 1).flatten(0, 1) for x in part]
            for part in ((q_TVH, k_TVH, v_TVH, b_TV.unsqueeze(-1)), (g_TVH,))
        )
        *qkv, b = reshard.to_heads(qkvb, (*(heads * size,) * 3, heads), held.to_delta, axis)
        (g,) = reshard.to_heads(gs, (heads * size,), held.to_delta, axis)
        q, k, v, g = (x.unflatten(1, (heads, size)) for x in (*qkv, g))
    beta = b.to(g.dtype).sigmoid()
    return to_local_tokens(kda.delta_rule(q, k, v, g, beta, held.span), axis, held.to_delta)
