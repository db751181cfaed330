"""`RingAttention` of all ranks in lockstep against one kernel call on the whole row, where the kernel sums dq over tiles itself."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from ds_cp.kernels.attention import torch_cpu
from ds_cp.tiles import Tile
from tests.gpu import lockstep

FEWEST_KEYS = 9


class Sums:
    """dq of rectangles that share their queries, as `kernels.flash4_hopper.Queries` keeps it."""

    def __init__(self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, tile: Tile, scale: float) -> None:
        self._rest, self._given = (tile, scale), (dout, q, out, lse)
        self._dq: Tensor | None = torch.zeros_like(q)

    @staticmethod
    def takes(k: Tensor) -> bool:
        return len(k) >= FEWEST_KEYS

    def backward(self, k: Tensor, v: Tensor) -> Tensor:
        dout, q, out, lse = self._given
        dq, dk, dv = torch_cpu.backward(dout, q, k, v, out, lse, *self._rest)
        self._dq += dq
        return torch.stack((dk, dv))

    def dq(self) -> Tensor:
        dq, self._dq = self._dq, None  # once, and nothing may be added after it
        return dq


@pytest.mark.parametrize("gathered", [False, True], ids=["p2p", "allgather"])
@pytest.mark.parametrize("documents", [(0, 128), (0, 21, 22, 23, 70, 100, 128)], ids=["one", "packed"])
@pytest.mark.parametrize("ring", [2, 4])
def test_dq_summed_by_the_kernel_is_that_of_the_whole_row(ring: int, documents, gathered: bool, monkeypatch) -> None:
    generator = torch.Generator().manual_seed(ring)
    dout, q, k, v = (torch.randn(128, n, 16, generator=generator, dtype=torch.float64) for n in (8, 8, 2, 2))
    tile = Tile(0, 128, 0, 128, documents)
    out, lse = torch_cpu.forward(q, k, v, tile, 0.25)
    wanted = {"out": out, **dict(zip(("dq", "dk", "dv"), torch_cpu.backward(dout, q, k, v, out, lse, tile, 0.25), strict=True))}
    kernel = SimpleNamespace(forward=torch_cpu.forward, backward=torch_cpu.backward, accumulate=Sums)
    found = lockstep.ring(dout, q, k, v, documents, ring, kernel, 0.25, monkeypatch, gathered)
    for part, value in wanted.items():
        torch.testing.assert_close(found[part], value, rtol=1e-10, atol=1e-10, msg=part)
