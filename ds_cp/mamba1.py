"""Mamba layers over a row that is spread over ulysses x ring ranks, by channels. (Gu and Dao, 2023.)

Channels are independent in the scan but not before it: step sizes, B and C are projected from all of them after the convolution. So
the convolution and these projections run on local tokens, whose predecessors are fetched (`convolution`); x and the step sizes then
go through one all-to-all over all ranks of the row, as Mamba-2's do (`mamba2`), with channels in the place of heads, and the output
comes back by its inverse.

Elements that a rank sends, over P ranks, with k groups per rank (its own part included): T * (2 k P N + 2 V) there, T * V back; the
same in backward; and the convolution's halo.

Shapes: T local tokens, S tokens of the row, V channels, K groups that share B and C, N states.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from ds_cp.batch import SequenceContext
from ds_cp.delta import to_local_tokens, to_own_heads
from ds_cp.kernels import selective
from ds_cp.topology import split_heads


def mix(
    x_TV: Tensor,
    dt_TV: Tensor,
    b_TKN: Tensor,
    c_TKN: Tensor,
    a_VN: Tensor,
    d_V: Tensor,
    dt_bias_V: Tensor,
    context: SequenceContext,
) -> Tensor:
    """The scan of the whole row for this rank's tokens, [T, V]; every rank of the row must call it.

    Args:
        x_TV: after the convolution. dt_TV: step sizes before their bias and softplus. a_VN: decays < 0.
    """
    held, axis = context.held, context.mesh.seq
    assert held.span is not None
    groups, state = b_TKN.shape[1:]
    split = split_heads(axis.size, x_TV.shape[1], groups)
    bcx_SC, dt_Sv = to_own_heads((b_TKN, c_TKN), x_TV.unsqueeze(-1), (dt_TV,), split, axis, held.to_delta)
    b, c, x_Sv = bcx_SC.split((split.kv * state, split.kv * state, split.query), dim=1)
    own = slice(axis.rank * split.query, (axis.rank + 1) * split.query)
    work = torch.promote_types(dt_Sv.dtype, torch.float32)
    dt_Sv = functional.softplus(dt_Sv.to(work) + dt_bias_V[own].to(work))
    b, c = (each.unflatten(1, (split.kv, -1)) for each in (b, c))
    out_Sv = selective.scan(x_Sv, dt_Sv, a_VN[own], b, c, d_V[own], held.span)
    return to_local_tokens(out_Sv.unsqueeze(-1), axis, held.to_delta).squeeze(-1)
