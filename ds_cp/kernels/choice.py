"""`attention_kernel: auto`: which kernel computes which tile, by figures measured on one H200 (docs/benchmarks.md).

    flash-attn 4 or 3 installed   it takes every tile but small ones, which torch_flash does faster
    else on Hopper                cuDNN for shapes that recur, torch_flash for the rest
    else                          torch_flash; on CPU torch_cpu, reference where scores have a softcap

cuDNN builds a plan for every new shape, longer than most calls take. A shape earns its plan: torch_flash computes it until the
time that cuDNN would have saved has reached the price of the plan (the ski-rental rule, so never more than twice the best).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Protocol, cast

from torch import Tensor

from ds_cp.kernels import attention
from ds_cp.kernels.attention import Kernel, Score
from ds_cp.kernels.sums import Sums
from ds_cp.tiles import Tile

PLAN_SECONDS = 0.058
"""A cuDNN plan, one shape and one direction."""

PICOSECONDS_SAVED: Mapping[int, tuple[float, float]] = {64: (0.9e-3, 0.7e-3), 128: (1.4e-3, 1.5e-3), 256: (1.8e-3, 1.3e-3)}
"""By head size (the next larger counts): forward, backward picoseconds a FLOP that cuDNN is faster than torch_flash."""

SMALL_FLOPS = 8e9
"""Forward FLOPs of a tile below which torch_flash is faster than flash-attn's front end (not than what flash4_hopper launches)."""

HOP_FLOPS = 40e9
"""Forward FLOPs of a hop's tile below which gathering a row's keys at once is faster than hops: their launches take longer."""


def gathered_tokens(query_heads: int, head_size: int, device: str) -> int:
    """Up to so many tokens of a ring rank, of one document, hops have fewer FLOPs than HOP_FLOPS. 0 where that was not measured."""
    return math.isqrt(int(HOP_FLOPS / (2 * query_heads * head_size))) if device == "cuda" else 0


def flops(q_TNH: Tensor, tile: Tile) -> float:
    """Of a tile's forward; the backward has 2.5 times as many."""
    return 4.0 * tile.pairs * q_TNH.shape[1] * q_TNH.shape[2]


class Flash(Kernel, Protocol):
    """What `kernels.attention.flash_attn` offers beside."""

    VERSION: int

    def launched(self, tile: Tile) -> bool: ...


class Auto:
    """A `Kernel` that hands each tile to one of two: `large` for what pays there, `plain` for the rest."""

    __name__ = "auto"

    def __init__(self, large: Kernel, plain: Kernel, plans: bool) -> None:
        self.large, self.plain = large, plain
        self.flash = None if plans else cast(Flash, large)  # with plans `large` is cuDNN
        self.saved_seconds: dict[tuple, float] = {}  # by shape and direction: what a plan would have saved so far

    def unsupported(self, q_TNH: Tensor, k_SMH: Tensor, v_SMH: Tensor, tile: Tile, score: Score) -> str | None:
        reason = self.plain.unsupported(q_TNH, k_SMH, v_SMH, tile, score)
        return reason and self.large.unsupported(q_TNH, k_SMH, v_SMH, tile, score)

    def forward(self, q_TNH: Tensor, k_SMH: Tensor, v_SMH: Tensor, tile: Tile, score: Score) -> tuple[Tensor, Tensor]:
        return self.choose(q_TNH, k_SMH, v_SMH, tile, score, 0).forward(q_TNH, k_SMH, v_SMH, tile, score)

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
        kernel = self.choose(q_TNH, k_SMH, v_SMH, tile, score, 1)
        return kernel.backward(dout_TNH, q_TNH, k_SMH, v_SMH, out_TNH, lse_TN, tile, score)

    def sums(
        self,
        dout_TNH: Tensor,
        q_TNH: Tensor,
        out_TNH: Tensor,
        lse_TN: Tensor,
        kv_heads: int,
        tiles: Sequence[Tile],
        score: Score,
    ) -> Sums | None:
        own = getattr(self.large, "sums", None)
        kv_TMH = q_TNH[:, :kv_heads]  # of the shape and kind that the ring has them in
        if own is None or self.large.unsupported(q_TNH, kv_TMH, kv_TMH, tiles[0], score) is not None:
            return None
        return own(dout_TNH, q_TNH, out_TNH, lse_TN, kv_heads, tiles, score, others=self.backward)

    def choose(self, q: Tensor, k: Tensor, v: Tensor, tile: Tile, score: Score, direction: int) -> Kernel:
        """The kernel of one call; direction 0 is forward, 1 backward."""
        if self.large.unsupported(q, k, v, tile, score) is not None:
            return self.plain
        if self.plain.unsupported(q, k, v, tile, score) is not None:
            return self.large
        work = flops(q, tile)
        if self.flash is None:
            pays = self._earned(q, k, tile, direction, work)
        else:
            pays = work >= SMALL_FLOPS or (direction == 0 and self.flash.launched(tile))
        return self.large if pays else self.plain

    def _earned(self, q: Tensor, k: Tensor, tile: Tile, direction: int, work: float) -> bool:
        if tile.window is not None or (tile.documents is not None and len(tile.documents) > 2):
            return False
        key = (q.shape, q.stride(), k.shape, k.stride(), tile.causal, direction)
        saved = self.saved_seconds.get(key, 0.0)
        if saved < PLAN_SECONDS:
            rate = next((r for size, r in PICOSECONDS_SAVED.items() if q.shape[-1] <= size), (0.0, 0.0))[direction]
            self.saved_seconds[key] = saved + rate * 1e-12 * work * (2.5 if direction else 1.0)
            return False
        return True


def resolve(name: str, device: str, capability: int | None, softcap: bool = False) -> Kernel:
    """The kernel of the config's `attention_kernel`.

    Args:
        device: "cuda" or "cpu". capability: major compute capability, None without CUDA. softcap: whether the
            model's scores have one.

    Raises:
        ValueError: it does not run on this device, or what it needs is not installed.
    """
    if name != "auto":
        here = {"torch_cpu": "cpu", "reference": device}.get(name, "cuda")
        if here != device:
            raise ValueError(f'sequence_parallel.attention_kernel: {name!r} does not run on {device}; use "auto" or "reference"')
        return attention.load(name)
    if device != "cuda":
        return attention.load("reference" if softcap else "torch_cpu")
    plain = attention.load("torch_flash")
    flash: Flash | None = None
    with suppress(ValueError):
        flash = cast(Flash, attention.load("flash_attn"))
    if flash is not None and flash.VERSION > 2:
        return Auto(flash, plain, plans=False)
    return Auto(attention.load("torch_cudnn"), plain, plans=True) if capability == 9 else plain


def identity(kernel: Kernel) -> str:
    """What all ranks must have alike: the kernel, and the form of the sums that travel from rank to rank."""
    form = getattr(getattr(kernel, "large", kernel), "SUMS", None)
    return describe(kernel) if form is None else f"{describe(kernel)}, with the sums of {form}"


def describe(kernel: Kernel) -> str:
    """One phrase for the table that is printed at the start."""
    if isinstance(kernel, Auto):
        name = kernel.large.__name__.split(".")[-1]
        large = kernel.flash and f"{kernel.flash.VERSION} for tiles above {SMALL_FLOPS:.0e} FLOPs"
        rule = large or "for shapes that recur"
        return f"{name} {rule}, {kernel.plain.__name__.split('.')[-1]} for the rest"
    return kernel.__name__.split(".")[-1]
