"""FlashAttention-2 as PyTorch ships it for CUDA (`aten._flash_attention_forward/_backward`): varlen, GQA, fp16 and bf16.

Documents go through one varlen call (cum_seq tensors), rectangles through a dense one. lse is [1, N, T] or, varlen,
[N, T]; fp32, natural log.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ds_cp.kernels.attention import Score, cuda_half_reason, high_band_reason
from ds_cp.tiles import Tile

_forward = torch.ops.aten._flash_attention_forward
_backward = torch.ops.aten._flash_attention_backward


def unsupported(q_TNH: Tensor, k_SMH: Tensor, v_SMH: Tensor, tile: Tile, score: Score) -> str | None:
    if score.softcap is not None:
        return "it has no softcap; use flash_attn or reference"
    return cuda_half_reason(q_TNH, k_SMH, v_SMH) or high_band_reason(q_TNH, k_SMH, tile)


def forward(q_TNH: Tensor, k_SMH: Tensor, v_SMH: Tensor, tile: Tile, score: Score) -> tuple[Tensor, Tensor]:
    q, k, v = _batched(tile, q_TNH, k_SMH, v_SMH)
    cum, longest_q, longest_k = _documents(q_TNH, k_SMH, tile)
    out, lse, *_ = _forward(
        q, k, v, cum, cum, longest_q, longest_k, 0.0, tile.causal, False, scale=score.scale, **_window(q_TNH, k_SMH, tile)
    )
    return (out, lse.transpose(0, 1)) if tile.causal else (out[0], lse[0].transpose(0, 1))


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
    cum, longest_q, longest_k = _documents(q_TNH, k_SMH, tile)
    dout, q, k, v, out = _batched(tile, dout_TNH, q_TNH, k_SMH, v_SMH, out_TNH)
    lse = lse_TN.transpose(0, 1).contiguous()
    lse = lse if tile.causal else lse.unsqueeze(0)
    no_rng = torch.empty(0, device=q.device, dtype=torch.uint64)  # read only with dropout
    lengths, options = (cum, cum, longest_q, longest_k), {"scale": score.scale, **_window(q_TNH, k_SMH, tile)}
    grads = _backward(dout, q, k, v, out, lse, *lengths, 0.0, tile.causal, no_rng, no_rng, **options)
    dq, dk, dv = grads if tile.causal else (grad[0] for grad in grads)
    return dq, dk, dv


def _batched(tile: Tile, *tensors: Tensor) -> tuple[Tensor, ...]:
    return tensors if tile.causal else tuple(x.unsqueeze(0) for x in tensors)


def _window(q: Tensor, k: Tensor, tile: Tile) -> dict[str, int]:
    """The kernel counts from the last query on the last key; to the right causality bounds a document and nothing a rectangle."""
    if tile.window is None:
        return {}
    left = tile.window - 1 if tile.causal else tile.window - 1 - tile.ahead + k.shape[0] - q.shape[0]
    return {"window_size_left": left, "window_size_right": 0 if tile.causal else -1}


def _documents(q: Tensor, k: Tensor, tile: Tile) -> tuple[Tensor | None, int, int]:
    """cu_seqlens (those of the batch where it brought them) and the longest query and key sequence."""
    if tile.documents is None:
        return None, q.shape[0], k.shape[0]
    cum = tile.cu_seqlens
    if cum is None:
        cum = torch.tensor(tile.documents, dtype=torch.int32, device=q.device)
    return cum, tile.longest, tile.longest
