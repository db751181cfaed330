"""The balance loss of a mixture of experts over a row that is spread over ranks, as transformers defines it (Fedus et al., Switch
Transformers, 2021, equations 4 to 6, over all layers together):

    aux = E * sum_e (C_e / R) (P_e / R)

C_e counts how often expert e is among a token's top k, P_e sums its probabilities, both over all layers and all tokens but padding;
R = layers * tokens. C has no gradient. So with C and R of the whole row, rank r's part

    aux_r = E / R^2 * sum_e C_e P_re            sum_r aux_r = aux

is linear in what the rank holds, and its gradient is that of aux. One all-reduce of C, P and R, 2 E + 1 numbers for all layers
and tokens together, where gathering logits would move layers * tokens * E of them.

Shapes: T local tokens, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ds_cp import comm
from ds_cp.batch import SequenceContext, shard


def balance_loss(logits_TE: Sequence[Tensor], top_k: int, context: SequenceContext) -> tuple[Tensor, Tensor]:
    """(this rank's part, the row's loss without gradient), 0-d fp32; every rank of the row must call it.

    Args:
        logits_TE: of each layer with experts, what its router gave for the local tokens.
    """
    real_T = _real_tokens(context, logits_TE[0].device)
    experts = logits_TE[0].shape[1]
    sums = torch.zeros(2 * experts + 1, dtype=torch.float64, device=logits_TE[0].device)
    for layer_TE in logits_TE:
        probabilities_TE = _probabilities(layer_TE.detach())
        chosen_TK = probabilities_TE.topk(top_k, dim=-1).indices
        sums[:experts].index_add_(0, chosen_TK.flatten(), real_T.double().repeat_interleave(top_k))
        sums[experts:-1] += (probabilities_TE * real_T.unsqueeze(1)).sum(0)
        sums[-1] += real_T.sum()
    own_E = sums[experts:-1]
    sums = comm.all_sum(sums, context.mesh.seq.group)
    counts_E, probabilities_E, rows = sums[:experts], sums[experts:-1], sums[-1]
    weight_E = counts_E * (experts / rows**2)
    return _Weighted.apply((weight_E @ own_E).float(), weight_E.float(), real_T, *logits_TE), (weight_E @ probabilities_E).float()


def _real_tokens(context: SequenceContext, device: torch.device) -> Tensor:
    """1 for each local token of the rows, 0 for padding at the stream's end; fp32 [T]."""
    ones = torch.ones(context.rows.shape, device=device)
    return shard(ones, context.rows, context.held.layout, context.mesh, 0).squeeze(0)


def _probabilities(logits_TE: Tensor) -> Tensor:
    return torch.softmax(logits_TE, -1, dtype=torch.float32)


class _Weighted(torch.autograd.Function):
    """y = sum over layers and tokens of real_t sum_e w_e p_te, p = softmax(z);  dz_te = dy real_t p_te (w_e - sum_f w_f p_tf).

    y is given. Keeps the logits, which the router's own backward keeps too, and no probabilities.
    """

    @staticmethod
    def forward(ctx, y: Tensor, weight_E: Tensor, real_T: Tensor, *logits_TE: Tensor) -> Tensor:
        ctx.save_for_backward(weight_E, real_T, *logits_TE)
        return y.clone()

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight_E, real_T, *logits_TE = ctx.saved_tensors
        grads = []
        for layer_TE in logits_TE:
            p_TE = _probabilities(layer_TE)
            grads.append((p_TE * (weight_E - (p_TE @ weight_E).unsqueeze(1)) * (grad * real_T).unsqueeze(1)).to(layer_TE.dtype))
        return None, None, None, *grads
