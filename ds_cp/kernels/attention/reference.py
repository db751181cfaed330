"""The specification: softmax attention written out, any dtype and device, memory T x S. Computes in fp32 (fp64 for fp64).

With scores s_ij = scale * q_i . k_j, capped if asked, of the allowed pairs, lse_i = log sum_j exp s_ij, p_ij = exp(s_ij - lse_i):

    out_i = sum_j p_ij v_j
    dv_j = sum_i p_ij dout_i;  ds_ij = p_ij (dout_i . v_j - dout_i . out_i);  dq_i = scale sum_j ds_ij k_j;  dk_j likewise

(Dao et al., FlashAttention-2, 2023, section 3.1). Backward uses the lse and out it is given: those of the whole row of
scores give this tile's share of the whole row's gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ds_cp.kernels.attention import Score
from ds_cp.tiles import Tile


def unsupported(q_TNH: Tensor, k_SMH: Tensor, v_SMH: Tensor, tile: Tile, score: Score) -> str | None:
    if q_TNH.shape[-1] != k_SMH.shape[-1]:
        return f"query heads of size {q_TNH.shape[-1]} and key heads of size {k_SMH.shape[-1]} have no dot product"
    return None


def forward(q_TNH: Tensor, k_SMH: Tensor, v_SMH: Tensor, tile: Tile, score: Score) -> tuple[Tensor, Tensor]:
    scores_NTS = _scores(q_TNH, k_SMH, tile, score)
    lse_NT = scores_NTS.logsumexp(-1)
    p_NTS = (scores_NTS - lse_NT.unsqueeze(-1)).exp().nan_to_num(nan=0.0)  # a row without keys: -inf minus -inf
    out_TNH = torch.einsum("nts,snh->tnh", p_NTS, _expand(v_SMH, q_TNH))
    return out_TNH.to(q_TNH.dtype), lse_NT.transpose(0, 1).contiguous()


def backward(
    dout_TNH: Tensor,
    q_TNH: Tensor,
    k_SMH: Tensor,
    v_SMH: Tensor,
    out_TNH: Tensor,
    lse_TN: Tensor,
    tile: Tile,
    score: Score,
) -> tuple[Tensor, Tensor, Tensor]:
    scores_NTS = _scores(q_TNH, k_SMH, tile, score)
    p_NTS = (scores_NTS - lse_TN.transpose(0, 1).unsqueeze(-1)).exp().nan_to_num(nan=0.0)
    dout, out = dout_TNH.to(p_NTS.dtype), out_TNH.to(p_NTS.dtype)
    k, v = _expand(k_SMH, q_TNH), _expand(v_SMH, q_TNH)
    dp_NTS = torch.einsum("tnh,snh->nts", dout, v)
    delta_NT = (dout * out).sum(-1).transpose(0, 1)
    ds_NTS = p_NTS * (dp_NTS - delta_NT.unsqueeze(-1)) * score.scale
    if score.softcap is not None:  # of c tanh(s / c): 1 - tanh^2, where p is zero of no matter
        ds_NTS = ds_NTS * (1 - (scores_NTS / score.softcap).nan_to_num(neginf=0.0).square())
    dq = torch.einsum("nts,snh->tnh", ds_NTS, k)
    dk = torch.einsum("nts,tnh->snh", ds_NTS, q_TNH.to(p_NTS.dtype))
    dv = torch.einsum("nts,tnh->snh", p_NTS, dout)
    return dq.to(q_TNH.dtype), _fold(dk, k_SMH), _fold(dv, v_SMH)


def _work_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _expand(x_SMH: Tensor, q_TNH: Tensor) -> Tensor:
    repeats = q_TNH.shape[1] // x_SMH.shape[1]
    return x_SMH.to(_work_dtype(x_SMH)).repeat_interleave(repeats, dim=1)


def _fold(d_SNH: Tensor, like_SMH: Tensor) -> Tensor:
    """Sums the gradients of the query heads that share a key/value head."""
    return d_SNH.unflatten(1, (like_SMH.shape[1], -1)).sum(2).to(like_SMH.dtype)


def _scores(q_TNH: Tensor, k_SMH: Tensor, tile: Tile, score: Score) -> Tensor:
    q = q_TNH.to(_work_dtype(q_TNH))
    scores_NTS = torch.einsum("tnh,snh->nts", q, _expand(k_SMH, q_TNH)) * score.scale
    if score.softcap is not None:
        scores_NTS = score.softcap * (scores_NTS / score.softcap).tanh()
    distance_TS = tile.ahead + _arange(scores_NTS, -2)[:, None] - _arange(scores_NTS, -1)[None, :]
    if tile.window is not None:
        scores_NTS = scores_NTS.masked_fill(distance_TS >= tile.window, float("-inf"))
    if tile.documents is None:
        return scores_NTS
    bounds = torch.tensor(tile.documents, device=q.device)
    document = torch.bucketize(_arange(scores_NTS, -1), bounds, right=True)
    allowed_TS = (document[:, None] == document[None, :]) & (distance_TS >= 0)
    return scores_NTS.masked_fill(~allowed_TS, float("-inf"))


def _arange(x: Tensor, dim: int) -> Tensor:
    return torch.arange(x.shape[dim], device=x.device)
