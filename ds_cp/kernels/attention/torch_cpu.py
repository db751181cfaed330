"""PyTorch's own CPU flash attention (`aten._scaled_dot_product_flash_attention_for_cpu`), forward and backward.

It takes [1, heads, tokens, size] views with any strides, GQA included. It has no varlen form, so documents are one call
each. Its backward walks over keys in blocks of 512, and a block's scores stand in rows of as many numbers: in rows of 2 KiB a
column meets few sets of the L1 cache, and two of the five products read columns. So long keys are handed over in parts of fewer.
In fp32, one thread, that saves the backward a tenth to a sixth of its time at head size 32, up to a tenth at 64, little at 128.

It has no window either: a band is cut into blocks of queries, each a call with a mask over the keys that the block reaches.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from ds_cp.kernels.attention import Score
from ds_cp.tiles import Tile

LINE = 16
"""Scores that fill a line of the cache in fp32."""

KEYS = 31 * LINE
"""Most keys of one call of the backward: the most of whole lines below the kernel's own block of 512."""

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

FEWEST_QUERIES, MOST_QUERIES = 64, 512
"""Of a block of a band; as many as the window has keys, between these."""


def unsupported(q_TNH: Tensor, k_SMH: Tensor, v_SMH: Tensor, tile: Tile, score: Score) -> str | None:
    if q_TNH.device.type != "cpu":
        return f"it runs on CPU tensors, these are on {q_TNH.device.type}; use torch_flash"
    if score.softcap is not None:
        return "it has no softcap; use reference"
    if not q_TNH.shape[-1] == k_SMH.shape[-1] == v_SMH.shape[-1]:
        return f"query, key and value heads must have one size, got {q_TNH.shape[-1]}, {k_SMH.shape[-1]}, {v_SMH.shape[-1]}"
    return None


def forward(q_TNH: Tensor, k_SMH: Tensor, v_SMH: Tensor, tile: Tile, score: Score) -> tuple[Tensor, Tensor]:
    if tile.documents is None or len(tile.documents) == 2:
        return _any(q_TNH, k_SMH, v_SMH, tile, score)
    out, lse = torch.empty_like(q_TNH), q_TNH.new_empty(q_TNH.shape[:2], dtype=_lse_dtype(q_TNH))
    for start, end in _spans(tile.documents):
        part = slice(start, end)
        out[part], lse[part] = _any(q_TNH[part], k_SMH[part], v_SMH[part], tile, score)
    return out, lse


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
        return _any_backward(dout_TNH, q_TNH, k_SMH, v_SMH, out_TNH, lse_TN, tile, score)
    dq, dk, dv = torch.empty_like(q_TNH), torch.empty_like(k_SMH), torch.empty_like(v_SMH)
    for start, end in _spans(tile.documents):
        part = slice(start, end)
        tensors = (dout_TNH[part], q_TNH[part], k_SMH[part], v_SMH[part], out_TNH[part], lse_TN[part])
        dq[part], dk[part], dv[part] = _any_backward(*tensors, tile, score)
    return dq, dk, dv


def _spans(documents: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    return itertools.pairwise(documents)


def _lse_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _heads_first(x_TNH: Tensor) -> Tensor:
    # A head's tokens side by side: 5 % faster at 6,144 tokens than the strides that the all-to-all leaves.
    return x_TNH.transpose(0, 1).contiguous().unsqueeze(0)


def _tokens_first(x_1NTH: Tensor) -> Tensor:
    return x_1NTH.squeeze(0).transpose(0, 1)


def _any(q_TNH: Tensor, k_SMH: Tensor, v_SMH: Tensor, tile: Tile, score: Score) -> tuple[Tensor, Tensor]:
    """One document or rectangle."""
    if _fits(tile, q_TNH, k_SMH):
        return _one(q_TNH, k_SMH, v_SMH, tile.causal, None, score)
    out, lse = torch.empty_like(q_TNH), q_TNH.new_empty(q_TNH.shape[:2], dtype=_lse_dtype(q_TNH))
    for queries, keys, mask in _band(tile, q_TNH, k_SMH):
        out[queries], lse[queries] = _one(q_TNH[queries], k_SMH[keys], v_SMH[keys], False, mask, score)
    return out, lse


def _any_backward(
    dout_TNH: Tensor,
    q_TNH: Tensor,
    k_SMH: Tensor,
    v_SMH: Tensor,
    out_TNH: Tensor,
    lse_TN: Tensor,
    tile: Tile,
    score: Score,
) -> tuple[Tensor, Tensor, Tensor]:
    if _fits(tile, q_TNH, k_SMH):
        return _one_backward((dout_TNH, q_TNH, k_SMH, v_SMH, out_TNH, lse_TN), tile.causal, None, score)
    dq, dk, dv = torch.empty_like(q_TNH), torch.zeros_like(k_SMH), torch.zeros_like(v_SMH)
    for queries, keys, mask in _band(tile, q_TNH, k_SMH):
        k, v, rest = k_SMH[keys], v_SMH[keys], (out_TNH[queries], lse_TN[queries])
        dq[queries], *dkv = _one_backward((dout_TNH[queries], q_TNH[queries], k, v, *rest), False, mask, score)
        dk[keys] += dkv[0]
        dv[keys] += dkv[1]
    return dq, dk, dv


def _fits(tile: Tile, q_TNH: Tensor, k_SMH: Tensor) -> bool:
    """Whether no query is too far from a key for the tile's window."""
    return tile.window is None or tile.ahead + len(q_TNH) <= tile.window


def _band(tile: Tile, q_TNH: Tensor, k_SMH: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
    """Blocks of queries, the keys that any of them attends, and the mask between them."""
    window, ahead = tile.window, tile.ahead
    assert window is not None
    step = min(max(window, FEWEST_QUERIES), MOST_QUERIES)
    for first in range(0, len(q_TNH), step):
        last = min(first + step, len(q_TNH))
        low, high = max(first + ahead - window + 1, 0), min(last + ahead, len(k_SMH))
        query, key = torch.arange(first + ahead, last + ahead), torch.arange(low, high)
        distance = query[:, None] - key[None, :]
        mask = torch.zeros(distance.shape, dtype=q_TNH.dtype)
        mask.masked_fill_((distance < 0) | (distance >= window), float("-inf"))
        yield slice(first, last), slice(low, high), mask


def _one(q_TNH: Tensor, k_SMH: Tensor, v_SMH: Tensor, causal: bool, mask: Tensor | None, score: Score) -> tuple[Tensor, Tensor]:
    out, lse = _forward(*map(_heads_first, (q_TNH, k_SMH, v_SMH)), 0.0, causal, attn_mask=mask, scale=score.scale)
    return _tokens_first(out), _tokens_first(lse)


def _one_backward(tensors: tuple[Tensor, ...], causal: bool, mask: Tensor | None, score: Score) -> tuple[Tensor, Tensor, Tensor]:
    """Of (dout, q, k, v, out, lse), [tokens, heads, ...]."""
    _, q_TNH, k_SMH, v_SMH, *_ = tensors
    dout, q, k, v, out, lse = map(_heads_first, tensors)
    # In low precision dq would be rounded once a part; a band's calls are short.
    if mask is not None or len(k_SMH) <= KEYS or lse.dtype != q.dtype:
        dq, dk, dv = _backward(dout, q, k, v, out, lse, 0.0, causal, attn_mask=mask, scale=score.scale)
        return _tokens_first(dq), _tokens_first(dk), _tokens_first(dv)
    dq_TNH, dk_SMH, dv_SMH = torch.empty(0), k_SMH.new_empty(k_SMH.shape), v_SMH.new_empty(v_SMH.shape)
    for start, end in _parts(len(k_SMH)):
        keys, first = slice(start, end), start if causal else 0  # causal: more queries than keys, queries after the last see all
        dout, q, out, lse = (x[:, :, first - len(q_TNH) :] for x in (dout, q, out, lse))
        dq, dk, dv = _backward(dout, q, k[:, :, keys], v[:, :, keys], out, lse, 0.0, causal, scale=score.scale)
        dk_SMH[keys], dv_SMH[keys] = _tokens_first(dk), _tokens_first(dv)
        if start == 0:
            dq_TNH = _tokens_first(dq)
        else:
            dq_TNH[first:] += _tokens_first(dq)
    return dq_TNH, dk_SMH, dv_SMH


def _parts(keys: int) -> list[tuple[int, int]]:
    """Spans of at most KEYS keys, about equal, of whole cache lines."""
    count = -(-keys // KEYS)
    size = LINE * -(-keys // (count * LINE))
    return [(start, min(start + size, keys)) for start in range(0, keys, size)]
