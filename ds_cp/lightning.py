"""Lightning attention over a row that is spread over ulysses x ring ranks, by heads. (Qin et al., 2024; MiniMax-01.)

Linear attention whose heads forget at rates of their own, the same for every token:

    S_t = exp(-s) S_(t-1) + k_t v_t'        y_t = S_t' q_t

which is the scan of Mamba-2 with steps of 1, every head its own group, and nothing past the state. The way is that of `mamba2`,
without a convolution: one all-to-all over all ranks of the row there, one back.

Elements that a rank sends (its own part included): T * V * 3 X there, T * V * X back; the same in backward.

Shapes: T local tokens, S tokens of the row, V heads, X head size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ds_cp import reshard
from ds_cp.batch import SequenceContext
from ds_cp.delta import to_local_tokens
from ds_cp.kernels import ssd


def mix(q_TVX: Tensor, k_TVX: Tensor, v_TVX: Tensor, slope_V: Tensor, context: SequenceContext) -> Tensor:
    """Linear attention of the whole row for this rank's tokens, [T, V, X]; every rank of the row must call it.

    Args:
        slope_V: how fast each head forgets, > 0.
    """
    held, axis = context.held, context.mesh.seq
    assert held.span is not None
    heads = v_TVX.shape[1] // axis.size
    if held.to_delta is None:
        q, k, v = q_TVX, k_TVX, v_TVX
    else:
        parts = [reshard.by_receiver(x, axis.size, 1).flatten(0, 1) for x in (q_TVX, k_TVX, v_TVX)]
        widths = (heads * v_TVX.shape[2],) * 3
        q, k, v = (x.unflatten(1, (heads, -1)) for x in reshard.to_heads(parts, widths, held.to_delta, axis))
    own = slope_V[axis.rank * heads : (axis.rank + 1) * heads].to(torch.promote_types(v.dtype, torch.float32))
    steps = own.new_ones(v.shape[0], heads)
    out = ssd.scan(v, steps, -own, k, q, torch.zeros_like(own), held.span)
    return to_local_tokens(out, axis, held.to_delta)
