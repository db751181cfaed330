"""Whether a kernel computes, on this machine, what the reference does: asked once, before training, of what the model will ask it.

CUDA kernels come from packages of many versions, and a head size or a window that one of them gets wrong trains wrong without a
word (flash-attn 4 has such a head size). A few tiles of some hundred tokens tell; what they compile is used later anyway.

Shapes: T query tokens, S key tokens, N query heads, M key/value heads, H head size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ds_cp.kernels.attention import Kernel, Score, reference
from ds_cp.tiles import Tile

LIMIT = 0.05
"""Of |x - reference| / |reference|: bf16 rounds to 0.01 at most, and what is computed wrong is off by far more."""

TOKENS = 300  # more than one block of any kernel
WINDOW = 100  # at most, so that some keys are outside


@dataclass(frozen=True)
class Asked:
    """What one rank will ask of its kernel."""

    query_heads: int
    kv_heads: int
    head_size: int
    windows: tuple[int | None, ...]
    softcap: float | None
    rectangles: bool
    """Whether keys of other ring ranks will come."""


def trouble(kernel: Kernel, asked: Asked, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why no model may be trained with this kernel here, and what to do about it; None if one may."""
    reason = refused(kernel, asked, dtype, device)
    if reason is not None:
        return reason
    found = wrong(kernel, asked, dtype, device)
    return found and f"{found}; name another kernel, or install another version of its package"


def wrong(kernel: Kernel, asked: Asked, dtype: torch.dtype, device: torch.device) -> str | None:
    """The first thing that the kernel computes wrong, or None. What it refuses by itself is not asked.

    Args:
        kernel: of "auto" each of the two. dtype: of q, k and v.
    """
    score = Score(asked.head_size**-0.5, asked.softcap)
    for part in _parts(kernel):
        for tile in _tiles(asked):
            dout, q, k, v = _inputs(asked, tile, dtype, device)
            if part.unsupported(q, k, v, tile, score) is not None:
                continue
            for name, error in _errors(part, dout, q, k, v, tile, score).items():
                if not error <= LIMIT:  # NaN is not either
                    found = f"{part.__name__.split('.')[-1]} computes {name} wrong on this machine, off by {error:.2g} of its size"
                    return f"{found} ({_what(asked, tile, dtype)})"
    return None


def _parts(kernel: Any) -> tuple[Kernel, ...]:
    return (kernel.large, kernel.plain) if hasattr(kernel, "large") else (kernel,)


def refused(kernel: Kernel, asked: Asked, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why the kernel will not compute a document of a layer of the model, or None."""
    score = Score(asked.head_size**-0.5, asked.softcap)
    for window in dict.fromkeys(asked.windows):
        tile = Tile(0, 1, 0, 1, (0, 1), window=window)
        reason = kernel.unsupported(*_inputs(asked, tile, dtype, device)[1:], tile, score)
        if reason is not None:
            return f"{kernel.__name__.split('.')[-1]}: {reason}"
    return None


def _what(asked: Asked, tile: Tile, dtype: torch.dtype) -> str:
    kind = "documents" if tile.documents and len(tile.documents) > 2 else "causal" if tile.causal else "rectangle"
    parts = [kind, f"{asked.query_heads}/{asked.kv_heads} heads of {asked.head_size}", str(dtype)]
    parts += [f"window {tile.window}"] if tile.window else []
    parts += [f"softcap {asked.softcap}"] if asked.softcap else []
    return ", ".join(parts)


def _tiles(asked: Asked) -> Iterator[Tile]:
    for window in dict.fromkeys(asked.windows):
        near = None if window is None else min(window, WINDOW)
        yield Tile(0, TOKENS, 0, TOKENS, (0, TOKENS), window=near)
        yield Tile(0, TOKENS, 0, TOKENS, (0, 1, 101, TOKENS), window=near)
        if not asked.rectangles:
            continue
        if near is None:
            yield Tile(0, TOKENS, 0, TOKENS)
        elif near > 1:  # the window before a run of queries, of which the later ones meet none of its keys
            yield Tile(0, near - 1, 0, near - 1, window=near, ahead=near - 1)


def _inputs(asked: Asked, tile: Tile, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    queries, keys = (tile.q_end, asked.query_heads), (tile.k_end, asked.kv_heads)
    dout, q, k, v = (
        torch.randn(*shape, asked.head_size, generator=generator, device=device).to(dtype)
        for shape in (queries, queries, keys, keys)
    )
    return dout, q, k, v


def _errors(kernel: Kernel, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, tile: Tile, score: Score) -> dict[str, float]:
    """Of out, lse, dq, dk and dv, each relative to its size; backward gets the reference's out and lse."""
    dout_, q_, k_, v_ = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (dout, q, k, v))
    out, lse = reference.forward(q_, k_, v_, tile, score)
    found_out, found_lse = kernel.forward(q, k, v, tile, score)
    wanted = reference.backward(dout_, q_, k_, v_, out, lse, tile, score)
    found = kernel.backward(dout, q, k, v, out.to(q.dtype), lse, tile, score)
    errors = {name: _error(x, y) for name, x, y in zip(("dq", "dk", "dv"), found, wanted, strict=True)}
    return errors | {"out": _error(found_out, out), "lse": _error(found_lse, lse)}


def _error(x: Tensor, wanted: Tensor) -> float:
    """A share of the wanted norm; where that is zero (one key, whose score has no gradient), of the size of one entry each."""
    size = float(wanted.norm())
    return float((x.to(wanted.dtype) - wanted).norm()) / max(size, 1e-3 * wanted.numel() ** 0.5)
