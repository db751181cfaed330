"""The gradients of a ring rank's tiles, summed over them: by the kernel itself where it can, else outside.

Shapes: T query tokens, S key tokens, N query heads, M key/value heads, H head size, 2 for (dk, dv).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ds_cp.kernels.merge import AT_ONCE, total
from ds_cp.tiles import Tile

Backward = Callable[..., tuple[Tensor, Tensor, Tensor]]
"""A kernel's `backward`."""

WAITING = 4
"""dq of so many tiles over all queries, or of more over fewer, is kept until one pass adds them all, in fp32."""
ONE_RUN = (0,)


class Sums(Protocol):
    """The gradients of a ring rank's tiles, summed. `PlainSums` makes them of any kernel's `backward`.

    `starts` are the keys of a block at which rectangles begin (`Plan.starts`): a form of the kernel's own may give each a place
    that suits it.
    """

    def new(self, keys: int, starts: Sequence[Sequence[int]] = (ONE_RUN,)) -> Tensor:
        """Zero (dk, dv) of so many keys, contiguous, to travel, in a form of the kernel's own; as large for all blocks."""

    def plain(self, keys: int) -> Tensor:
        """The same as [2, S, M, H] in fp32."""

    def add(self, into: Tensor, tile: Tile, k_SMH: Tensor, v_SMH: Tensor, starts: Sequence[int] = ONE_RUN) -> None:
        """A tile's (dk, dv), of its keys among these, to `into`; its dq to dq. The first tile covers every query."""

    @property
    def full(self) -> bool:
        """Whether `settle` should come before the next tile: on the stream that all tiles so far come before."""

    def settle(self) -> None:
        """Frees what tiles have left behind."""

    def dq(self) -> Tensor:
        """[T, N, H], q's dtype; once, at the end."""

    def dkv(self, sums: Sequence[Tensor], keys: int, dtype: torch.dtype, starts: Sequence[int] = ONE_RUN) -> Tensor:
        """One or two sums of one form together, [2, S, M, H]; they may be overwritten."""


def sums_of(
    kernel: Any,
    dout_TNH: Tensor,
    q_TNH: Tensor,
    out_TNH: Tensor,
    lse_TN: Tensor,
    kv_heads: int,
    tiles: Sequence[Tile],
    score: Any,
) -> Sums:
    """The kernel's own sums over these tiles where it has any, else plain ones; arguments as in `Kernel.sums`."""
    own = getattr(kernel, "sums", None)
    found = own(dout_TNH, q_TNH, out_TNH, lse_TN, kv_heads, tiles, score) if own else None
    return PlainSums(kernel.backward, dout_TNH, q_TNH, out_TNH, lse_TN, kv_heads, score) if found is None else found


class PlainSums:
    """(dk, dv) are [2, S, M, H] in fp32 (fp64 for fp64)."""

    def __init__(
        self, backward: Backward, dout_TNH: Tensor, q_TNH: Tensor, out_TNH: Tensor, lse_TN: Tensor, kv_heads: int, score: Any
    ) -> None:
        self._backward, self._score, self._kv_heads = backward, score, kv_heads
        self._dout, self._q, self._out, self._lse = dout_TNH, q_TNH, out_TNH, lse_TN
        self._dq: Tensor | None = None
        self._waiting: list[tuple[int, Tensor]] = []
        self.work = torch.promote_types(q_TNH.dtype, torch.float32)

    def new(self, keys: int, starts: Sequence[Sequence[int]] = (ONE_RUN,)) -> Tensor:
        return self.plain(keys)

    def plain(self, keys: int) -> Tensor:
        return self._q.new_zeros((2, keys, self._kv_heads, self._q.shape[-1]), dtype=self.work)

    def add(self, into: Tensor, tile: Tile, k_SMH: Tensor, v_SMH: Tensor, starts: Sequence[int] = ONE_RUN) -> None:
        keys = slice(tile.k_start, tile.k_end)
        self.add_plain(into, tile, *self.outside(tile, k_SMH[keys], v_SMH[keys]))

    def add_plain(self, into: Tensor, tile: Tile, dk_SMH: Tensor, dv_SMH: Tensor) -> None:
        for total_SMH, part in zip(into, (dk_SMH, dv_SMH), strict=True):
            total_SMH[tile.k_start : tile.k_end].add_(part)

    def outside(self, tile: Tile, k_SMH: Tensor, v_SMH: Tensor) -> tuple[Tensor, Tensor]:
        """(dk, dv) of a tile's keys, by the kernel's `backward`."""
        part = slice(tile.q_start, tile.q_end)
        given = self._dout[part], self._q[part], k_SMH, v_SMH, self._out[part], self._lse[part]
        dq, dk, dv = self._backward(*given, tile, self._score)
        self.add_dq(tile.q_start, dq)
        return dk, dv

    def add_dq(self, start: int, dq: Tensor) -> None:
        """The first covers every query."""
        if self._dq is None:
            self._dq = dq
        elif dq.is_cuda:
            self._waiting.append((start, dq))
        else:
            self._dq = self._dq.to(self.work)
            self._dq[start : start + len(dq)].add_(dq)

    @property
    def full(self) -> bool:
        return len(self._waiting) >= AT_ONCE or sum(len(dq) for _, dq in self._waiting) >= WAITING * len(self._q)

    def settle(self) -> None:
        """Adds up what waits."""
        assert self._dq is not None, "the first tile covers every query"
        self._dq = total(self._dq, self._waiting, self.work)
        self._waiting = []

    def dq(self) -> Tensor:
        assert self._dq is not None, "the first tile covers every query"
        return total(self._dq, self._waiting, self._q.dtype)

    def dkv(self, sums: Sequence[Tensor], keys: int, dtype: torch.dtype, starts: Sequence[int] = ONE_RUN) -> Tensor:
        first, *others = sums
        for other in others:
            first += other
        return first.to(dtype)
