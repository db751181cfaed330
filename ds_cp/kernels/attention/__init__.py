"""Attention kernels: one module each, with the three functions of `Kernel`; the config value is the module's name.

Shapes: T query tokens, S key tokens, N query heads, M key/value heads (M divides N; head n reads n * M // N), H head size.
"""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import Tensor

from ds_cp.tiles import Tile

MAX_HEAD_SIZE = 256
"""Of the CUDA kernels."""


@dataclass(frozen=True)
class Score:
    """What q . k becomes before the softmax: scale * (q . k), with a softcap c that s becomes c * tanh(s / c)."""

    scale: float
    softcap: float | None = None


class Kernel(Protocol):
    """What a kernel module offers. It gets slices, so of the tile it reads only its documents and lengths.

    One that sums gradients over tiles itself also has `sums(dout_TNH, q_TNH, out_TNH, lse_TN, kv_heads, tiles, score)`, with the
    merged out and lse and all tiles of a rank, which gives a
    `kernels.sums.Sums`, or None where it cannot: on every rank of a ring the same.
    """

    __name__: str

    def unsupported(self, q_TNH: Tensor, k_SMH: Tensor, v_SMH: Tensor, tile: Tile, score: Score) -> str | None:
        """Why this kernel cannot compute these inputs, or None. Must not launch anything."""

    def forward(self, q_TNH: Tensor, k_SMH: Tensor, v_SMH: Tensor, tile: Tile, score: Score) -> tuple[Tensor, Tensor]:
        """(out_TNH in q's dtype, lse_TN): lse fp32 (fp64 for fp64), natural log."""

    def backward(
        self,
        dout_TNH: Tensor,
        q_TNH: Tensor,
        k_SMH: Tensor,
        v_SMH: Tensor,
        out_TNH: Tensor,
        lse_TN: Tensor,
        tile: Tile,
        score: Score,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(dq, dk, dv) of this tile, given the merged out and lse of the whole row of scores."""


def cuda_half_reason(q_TNH: Tensor, k_SMH: Tensor, v_SMH: Tensor) -> str | None:
    """What every kernel for fp16 and bf16 on CUDA refuses."""
    size = q_TNH.shape[-1]
    if q_TNH.device.type != "cuda":
        return f"it runs on CUDA tensors, these are on {q_TNH.device.type}; use torch_cpu"
    if q_TNH.dtype not in (torch.float16, torch.bfloat16):
        return f"it computes in fp16 and bf16, got {q_TNH.dtype}; enable bf16 in the config or use reference"
    if not size == k_SMH.shape[-1] == v_SMH.shape[-1]:
        return f"query, key and value heads must have one size, got {size}, {k_SMH.shape[-1]}, {v_SMH.shape[-1]}"
    if size > MAX_HEAD_SIZE or size % 8:
        return f"head size must be a multiple of 8 up to {MAX_HEAD_SIZE}, got {size}"
    return None


def high_band_reason(q_TNH: Tensor, k_SMH: Tensor, tile: Tile) -> str | None:
    """What FlashAttention-2 and 3 compute wrong: they bound every window to the right, by the number of keys if by nothing else."""
    if tile.window is None or tile.causal or len(q_TNH) <= len(k_SMH) + 1:
        return None
    return (
        f"a window over a rectangle of {len(q_TNH)} queries and fewer keys, {len(k_SMH)}; cut it, or use flash_attn 4 or reference"
    )


def names() -> list[str]:
    """All kernels in the folder."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def load(name: str) -> Kernel:
    """The kernel module `name`.

    Raises:
        ValueError: there is no such module, or what it needs is not installed.
    """
    if name not in names():
        raise ValueError(f"sequence_parallel.attention_kernel: {name!r} is not in this version; available: {names()}")
    try:
        return cast(Kernel, importlib.import_module(f"{__name__}.{name}"))
    except ImportError as error:
        raise ValueError(f"sequence_parallel.attention_kernel: {name!r} cannot be loaded here: {error}") from error
