"""Dao-AILab's flash-attn package in the newest version that is installed: 4 (CuTe), 3 (Hopper), 2.

    4  pip install --pre flash-attn-4        tried on Hopper (4.0.0b36); also for Blackwell
    3  the `hopper` folder, built from source  \\  called by the signatures of the released sources (2.8.3 and its
    2  pip install flash-attn                  /  hopper folder); not tried on a GPU here

Documents go through varlen calls (cu_seqlens); rectangles, a single document and documents of one length through dense ones. lse is
[B, N, T] or, varlen, [N, T]; fp32, natural log. Backward takes any (out, lse), so the merged ones. With
torch.use_deterministic_algorithms the kernels' deterministic backward is used. On Hopper, version 4's dense tiles are launched by
`kernels.flash4_hopper`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ds_cp.kernels.attention import Score, cuda_half_reason, high_band_reason
from ds_cp.kernels.flash4_hopper import FEWEST_TOKENS, HopperSums, Launcher
from ds_cp.kernels.sums import Backward, Sums
from ds_cp.tiles import Tile


class Mask(NamedTuple):
    """Who attends whom, as the package counts: from the last query on the last key, `left` keys and no more; None is all."""

    causal: bool
    left: int | None = None

    def unbounded(self, sign: int | None) -> dict[str, int | None]:
        """The window's arguments; `sign` is the package's for no bound."""
        if self.left is None:
            return {}
        return {"window_size_left": self.left, "window_size_right": 0 if self.causal else sign}


class Version(Protocol):
    """One version's calls. Dense: q, k, v are [B, T, N, H]; varlen: [T, N, H] with cum. lse as the package lays it out."""

    NUMBER: int
    CAPABILITIES: tuple[int, ...]

    def forward(self, q: Tensor, k: Tensor, v: Tensor, cum: Tensor | None, longest: int, mask: Mask, score: Score) -> Any:
        """(out, lse)."""

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        cum: Tensor | None,
        longest: int,
        mask: Mask,
        score: Score,
    ) -> Any:
        """(dq, dk, dv)."""


class _Four:
    NUMBER = 4
    CAPABILITIES: tuple[int, ...] = (9, 10, 11, 12)

    def __init__(self) -> None:
        from flash_attn.cute import interface

        self._forward, self._backward = interface._flash_attn_fwd, interface._flash_attn_bwd

    def forward(self, q, k, v, cum, longest, mask, score):
        options = {**_lengths(cum, longest), **mask.unbounded(None), **_softcap(score)}
        out, lse, *_ = self._forward(q, k, v, softmax_scale=score.scale, causal=mask.causal, return_lse=True, **options)
        return out, lse

    def backward(self, dout, q, k, v, out, lse, cum, longest, mask, score):
        options = {
            **_lengths(cum, longest),
            **mask.unbounded(None),
            **_softcap(score),
            "deterministic": torch.are_deterministic_algorithms_enabled(),
        }
        return self._backward(q, k, v, out, dout, lse, softmax_scale=score.scale, causal=mask.causal, **options)


class _Three:
    NUMBER = 3
    CAPABILITIES: tuple[int, ...] = (8, 9)

    def __init__(self) -> None:
        import flash_attn_interface

        self._forward = flash_attn_interface._flash_attn_forward
        self._backward = flash_attn_interface._flash_attn_backward

    def forward(self, q, k, v, cum, longest, mask, score):
        options = {**_lengths(cum, longest), **_softcap(score), **mask.unbounded(-1)}
        out, lse, *_ = self._forward(q, k, v, softmax_scale=score.scale, causal=mask.causal, **options)
        return out, lse

    def backward(self, dout, q, k, v, out, lse, cum, longest, mask, score):
        grads = _empty(q, k, v)
        options = {
            **_lengths(cum, longest),
            **_softcap(score),
            **mask.unbounded(-1),
            "deterministic": torch.are_deterministic_algorithms_enabled(),
        }
        into = dict(zip(("dq", "dk", "dv"), grads, strict=True))
        self._backward(dout, q, k, v, out, lse.contiguous(), softmax_scale=score.scale, is_causal=mask.causal, **into, **options)
        return grads


class _Two:
    NUMBER = 2
    CAPABILITIES: tuple[int, ...] = (8, 9, 10, 12)

    def __init__(self) -> None:
        from flash_attn import flash_attn_interface as interface

        self._forward, self._varlen_forward = interface._flash_attn_forward, interface._flash_attn_varlen_forward
        self._backward, self._varlen_backward = interface._flash_attn_backward, interface._flash_attn_varlen_backward

    @staticmethod
    def _options(mask: Mask, score: Score) -> dict[str, Any]:
        bounds = {"causal": mask.causal, "window_size_left": -1, "window_size_right": -1, **mask.unbounded(-1)}
        return {"dropout_p": 0.0, "softmax_scale": score.scale, **bounds, "softcap": score.softcap or 0.0, "alibi_slopes": None}

    def forward(self, q, k, v, cum, longest, mask, score):
        call = self._forward if cum is None else self._varlen_forward
        options = self._options(mask, score)
        out, lse, *_ = call(q, k, v, **_lengths(cum, longest), **options, return_softmax=False)
        return out, lse

    def backward(self, dout, q, k, v, out, lse, cum, longest, mask, score):
        call = self._backward if cum is None else self._varlen_backward
        grads = _empty(q, k, v)
        options = {**self._options(mask, score), "deterministic": torch.are_deterministic_algorithms_enabled()}
        call(dout, q, k, v, out, lse.contiguous(), *grads, **_lengths(cum, longest), **options)
        return grads


def _newest() -> Version:
    versions: tuple[type[Version], ...] = (_Four, _Three, _Two)
    for version in versions:
        try:
            return version()
        except (ImportError, AttributeError):
            continue
    raise ImportError("no flash-attn package; `pip install --pre flash-attn-4` brings wheels for Hopper and Blackwell")


def _launcher() -> Launcher | None:
    if VERSION != 4 or any(torch.cuda.get_device_capability(device)[0] != 9 for device in range(torch.cuda.device_count())):
        return None
    try:
        return Launcher()
    except ImportError:  # a version that it was not tried with: the front end computes the same, somewhat slower
        return None


_version = _newest()
VERSION = _version.NUMBER
_hopper = _launcher()
SUMS = None if _hopper is None else f"flash-attn {_hopper.version} on Hopper"
"""Whose form (dk, dv) have while they travel; None for the plain one."""


def unsupported(q_TNH: Tensor, k_SMH: Tensor, v_SMH: Tensor, tile: Tile, score: Score) -> str | None:
    reason = cuda_half_reason(q_TNH, k_SMH, v_SMH)
    if reason is not None:
        return reason
    size, capability = q_TNH.shape[-1], torch.cuda.get_device_capability(q_TNH.device)[0]
    if capability not in _version.CAPABILITIES:
        return f"flash-attn {VERSION} is not for GPUs of compute capability {capability}.x; use torch_flash"
    if VERSION == 4 and capability == 9 and size <= 128 and -(-size // 16) % 2:
        return f"flash-attn 4's dq is wrong on Hopper for head sizes like {size}, that fill an odd number of 16s; use torch_flash"
    if VERSION == 4 and capability in (10, 11) and size > 128 and size != 256:
        return f"flash-attn 4 on Blackwell takes head sizes up to 128 and 256, got {size}; use torch_flash"
    return high_band_reason(q_TNH, k_SMH, tile) if VERSION < 4 else None


def forward(q_TNH: Tensor, k_SMH: Tensor, v_SMH: Tensor, tile: Tile, score: Score) -> tuple[Tensor, Tensor]:
    cum, longest = _documents(q_TNH, tile)
    q, k, v = _batched(tile, cum, q_TNH, k_SMH, v_SMH)
    if cum is None and tile.window is None and score.softcap is None and _launchable(q, k):
        assert _hopper is not None
        out, lse = _hopper.forward(q, k, v, tile.causal, score.scale)
    else:
        out, lse = _version.forward(q, k, v, cum, longest, _mask(q_TNH, k_SMH, tile), score)
    return (out, lse.transpose(0, 1)) if cum is not None else (out.flatten(0, 1), _flat_lse(lse).transpose(0, 1))


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
    cum, longest = _documents(q_TNH, tile)
    dout, q, k, v, out = _batched(tile, cum, dout_TNH, q_TNH, k_SMH, v_SMH, out_TNH)
    lse, mask = lse_TN.transpose(0, 1), _mask(q_TNH, k_SMH, tile)
    if cum is not None:
        return _version.backward(dout, q, k, v, out, lse, cum, longest, mask, score)
    lse = lse.unflatten(1, (q.shape[0], -1)).transpose(0, 1)
    dq, dk, dv = _version.backward(dout, q, k, v, out, lse, cum, longest, mask, score)
    return dq.flatten(0, 1), dk.flatten(0, 1), dv.flatten(0, 1)


def sums(
    dout_TNH: Tensor,
    q_TNH: Tensor,
    out_TNH: Tensor,
    lse_TN: Tensor,
    kv_heads: int,
    tiles: Sequence[Tile],
    score: Score,
    others: Backward | None = None,
) -> Sums | None:
    """None where flash4_hopper does not go. `others` computes the tiles that it does not take; by default `backward`."""
    usable = score.softcap is None and _launchable(q_TNH.unsqueeze(0), q_TNH.unsqueeze(0))
    if not usable or torch.are_deterministic_algorithms_enabled():
        return None
    assert _hopper is not None
    return HopperSums(_hopper, others or backward, dout_TNH, q_TNH, out_TNH, lse_TN, kv_heads, tiles, score)


def launched(tile: Tile) -> bool:
    """Whether the forward of a tile of ordinary size goes past the package's front end."""
    return _hopper is not None and tile.window is None and _dense(tile)


def _launchable(q_BTNH: Tensor, k_BSMH: Tensor) -> bool:
    return _hopper is not None and min(q_BTNH.shape[1], k_BSMH.shape[1]) >= FEWEST_TOKENS and q_BTNH.stride(-1) == 1


def _documents(q: Tensor, tile: Tile) -> tuple[Tensor | None, int]:
    """cu_seqlens of a varlen call (those of the batch where it brought them), None for a dense one; the longest document."""
    if _dense(tile):
        return None, 0
    if tile.cu_seqlens is not None:
        return tile.cu_seqlens, tile.longest
    return torch.tensor(tile.documents, dtype=torch.int32, device=q.device), tile.longest


def _softcap(score: Score) -> dict[str, float]:
    return {} if score.softcap is None else {"softcap": score.softcap}


def _mask(q: Tensor, k: Tensor, tile: Tile) -> Mask:
    if tile.window is None:
        return Mask(tile.causal)
    return Mask(tile.causal, tile.window - 1 if tile.causal else tile.window - 1 - tile.ahead + k.shape[0] - q.shape[0])


def _dense(tile: Tile) -> bool:
    """A rectangle, one document, or several of one length, which are a batch."""
    return tile.documents is None or tile.longest * (len(tile.documents) - 1) == tile.documents[-1]


def _batched(tile: Tile, cum: Tensor | None, *tensors: Tensor) -> tuple[Tensor, ...]:
    """[T, N, H] for a varlen call, [B, T, N, H] for a dense one."""
    if cum is not None:
        return tensors
    if tile.documents is None or len(tile.documents) == 2:
        return tuple(x.unsqueeze(0) for x in tensors)
    return tuple(x.unflatten(0, (len(tile.documents) - 1, -1)) for x in tensors)


def _flat_lse(lse_BNT: Tensor) -> Tensor:
    """[N, B * T]; a view where there is one sequence."""
    return lse_BNT.transpose(0, 1).flatten(1)


def _lengths(cum: Tensor | None, longest: int) -> dict[str, Any]:
    if cum is None:
        return {}
    return {"cu_seqlens_q": cum, "cu_seqlens_k": cum, "max_seqlen_q": longest, "max_seqlen_k": longest}


def _empty(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in tensors)
