"""cuDNN's attention as PyTorch ships it (`aten._scaled_dot_product_cudnn_attention`): fp16 and bf16, GQA, any strides.

On Hopper 1.8 times FlashAttention-2's speed at large tiles. It builds a plan of some 60 ms for every new shape and direction, so it
pays for shapes that recur. lse is [1, N, T, 1], fp32, natural log. Its varlen form is slow: documents are one call each. One query
against one key it refuses; that is written out here.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from ds_cp.kernels.attention import Score, cuda_half_reason
from ds_cp.tiles import Tile

_forward = torch.ops.aten._scaled_dot_product_cudnn_attention
_backward = torch.ops.aten._scaled_dot_product_cudnn_attention_backward


def unsupported(q_TNH: Tensor, k_SMH: Tensor, v_SMH: Tensor, tile: Tile, score: Score) -> str | None:
    if score.softcap is not None:
        return "it has no softcap; use flash_attn or reference"
    reason = cuda_half_reason(q_TNH, k_SMH, v_SMH)
    if reason is None and torch.cuda.get_device_capability(q_TNH.device)[0] < 9:
        return "it was tried on Hopper and later only; use torch_flash"
    if reason is None and tile.window is not None:
        return "it has no sliding windows; use torch_flash or flash_attn"
    return reason


def forward(q_TNH: Tensor, k_SMH: Tensor, v_SMH: Tensor, tile: Tile, score: Score) -> tuple[Tensor, Tensor]:
    if tile.documents is None or len(tile.documents) == 2:
        return _one(q_TNH, k_SMH, v_SMH, tile.causal, score.scale)
    out, lse_NT = torch.empty_like(q_TNH), q_TNH.new_empty(q_TNH.shape[1::-1], dtype=torch.float32)
    for start, end in pairwise(tile.documents):
        part = slice(start, end)
        out[part], lse_NT.T[part] = _one(q_TNH[part], k_SMH[part], v_SMH[part], True, score.scale)
    return out, lse_NT.T


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
    if tile.documents is None or len(tile.documents) == 2:
        return _one_backward(dout_TNH, q_TNH, k_SMH, v_SMH, out_TNH, lse_TN, tile.causal, score.scale)
    dq, dk, dv = torch.empty_like(q_TNH), torch.empty_like(k_SMH), torch.empty_like(v_SMH)
    for start, end in pairwise(tile.documents):
        part = slice(start, end)
        tensors = (dout_TNH[part], q_TNH[part], k_SMH[part], v_SMH[part], out_TNH[part], lse_TN[part])
        dq[part], dk[part], dv[part] = _one_backward(*tensors, True, score.scale)
    return dq, dk, dv


def _heads_first(x_TNH: Tensor) -> Tensor:
    return x_TNH.transpose(0, 1).unsqueeze(0)


def _tokens_first(x_1NTH: Tensor) -> Tensor:
    return x_1NTH.squeeze(0).transpose(0, 1)


def _one(q_TNH: Tensor, k_SMH: Tensor, v_SMH: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    if len(q_TNH) == len(k_SMH) == 1:
        lse_TN = scale * (q_TNH.float() * _expand(k_SMH, q_TNH).float()).sum(-1)
        return _expand(v_SMH, q_TNH), lse_TN
    q, k, v = map(_heads_first, (q_TNH, k_SMH, v_SMH))
    out, lse_1NT1, *_ = _forward(q, k, v, None, True, 0.0, causal, False, scale=scale)
    return _tokens_first(out), lse_1NT1[0, :, :, 0].transpose(0, 1)


def _one_backward(
    dout_TNH: Tensor,
    q_TNH: Tensor,
    k_SMH: Tensor,
    v_SMH: Tensor,
    out_TNH: Tensor,
    lse_TN: Tensor,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    if len(q_TNH) == len(k_SMH) == 1:
        return _single_backward(dout_TNH, q_TNH, k_SMH, v_SMH, out_TNH, lse_TN, scale)
    dout, q, k, v, out = map(_heads_first, (dout_TNH, q_TNH, k_SMH, v_SMH, out_TNH))
    lse_1NT1 = lse_TN.transpose(0, 1).contiguous()[None, :, :, None]
    no_rng = torch.empty(2, device=q.device, dtype=torch.int64)  # read only with dropout
    lengths = q.shape[2], k.shape[2]
    bias, cum = None, None
    grads = _backward(dout, q, k, v, out, lse_1NT1, no_rng[0], no_rng[1], bias, cum, cum, *lengths, 0.0, causal, scale=scale)
    dq, dk, dv = map(_tokens_first, grads)
    return dq, dk, dv


def _expand(x_SMH: Tensor, q_TNH: Tensor) -> Tensor:
    return x_SMH.repeat_interleave(q_TNH.shape[1] // x_SMH.shape[1], dim=1)


def _single_backward(
    dout_1NH: Tensor, q_1NH: Tensor, k_1MH: Tensor, v_1MH: Tensor, out_1NH: Tensor, lse_1N: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The formulas of `reference` for one score a head."""
    dout, q, k, v, out = (
        dout_1NH.float(),
        q_1NH.float(),
        _expand(k_1MH, q_1NH).float(),
        _expand(v_1MH, q_1NH).float(),
        out_1NH.float(),
    )
    p = (scale * (q * k).sum(-1) - lse_1N).exp().unsqueeze(-1)
    ds = scale * p * (dout * (v - out)).sum(-1, keepdim=True)

    def fold(d_1NH: Tensor) -> Tensor:
        return d_1NH.unflatten(1, (k_1MH.shape[1], -1)).sum(2).to(k_1MH.dtype)

    return (ds * k).to(q_1NH.dtype), fold(ds * q), fold(p * dout)
