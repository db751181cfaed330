"""`RingAttention` of all ranks in lockstep against one kernel call on the row, also where it sums dq over tiles itself."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ds_cp.kernels.attention import Score, reference, torch_cpu
from ds_cp.layout import Layout
from ds_cp.tiles import Tile
from tests.gpu import lockstep

FEWEST_KEYS = 9
SCORE = Score(0.25)


class Sums:
    """dq of rectangles that share their queries, as `kernels.flash4_hopper.Queries` keeps it."""

    def __init__(self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, tile: Tile, score: Score) -> None:
        self._rest, self._given = (tile, score), (dout, q, out, lse)
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
    tensors = [torch.randn(128, n, 16, generator=generator, dtype=torch.float64) for n in (8, 8, 2, 2)]
    kernel = SimpleNamespace(forward=torch_cpu.forward, backward=torch_cpu.backward, accumulate=Sums)
    found = lockstep.ring(*tensors, documents, ring, kernel, SCORE, monkeypatch, gathered)
    assert_whole_row(found, tensors, documents)


def assert_whole_row(found: dict[str, Tensor], tensors: list[Tensor], documents: Sequence[int], window: int | None = None) -> None:
    dout, q, k, v = tensors
    tile = Tile(0, documents[-1], 0, documents[-1], tuple(documents), window)
    out, lse = reference.forward(q, k, v, tile, SCORE)
    wanted = {"out": out, **dict(zip(("dq", "dk", "dv"), reference.backward(dout, q, k, v, out, lse, tile, SCORE), strict=True))}
    for part, value in wanted.items():
        torch.testing.assert_close(found[part], value, rtol=1e-10, atol=1e-10, msg=part)


@st.composite
def any_layout(draw: st.DrawFn) -> tuple[Layout, tuple[int, ...]]:
    """Chunks given to ranks in any way, and documents."""
    ring, slots, chunk = draw(st.integers(2, 4)), draw(st.integers(1, 4)), draw(st.integers(1, 5))
    count = ring * slots
    order = draw(st.one_of(st.just(range(count)), st.permutations(range(count))))
    plan = Layout(chunk, tuple(tuple(sorted(order[r * slots : (r + 1) * slots])) for r in range(ring)), 1)
    cuts = draw(st.sets(st.integers(1, count * chunk - 1), max_size=2 * count))
    return plan, (0, *sorted(cuts), count * chunk)


@settings(max_examples=60)
@given(row=any_layout(), gathered=st.booleans())
def test_any_layout_gives_what_one_kernel_gives(row: tuple[Layout, tuple[int, ...]], gathered: bool) -> None:
    plan, documents = row
    generator = torch.Generator().manual_seed(documents[-1])
    tensors = [torch.randn(documents[-1], n, 8, generator=generator, dtype=torch.float64) for n in (4, 4, 2, 2)]
    with pytest.MonkeyPatch.context() as patch:
        found = lockstep.ring(*tensors, documents, plan.ring, reference, SCORE, patch, gathered, plan)
    assert_whole_row(found, tensors, documents)


@settings(max_examples=60)
@given(row=any_layout(), window=st.integers(1, 30), kernel=st.sampled_from([reference, torch_cpu]))
def test_a_window_gives_what_one_kernel_gives(row: tuple[Layout, tuple[int, ...]], window: int, kernel: Any) -> None:
    plan, documents = row
    generator = torch.Generator().manual_seed(documents[-1])
    tensors = [torch.randn(documents[-1], n, 8, generator=generator, dtype=torch.float64) for n in (4, 4, 2, 2)]
    with pytest.MonkeyPatch.context() as patch:
        found = lockstep.ring(*tensors, documents, plan.ring, kernel, SCORE, patch, plan=plan, window=window)
    assert_whole_row(found, tensors, documents, window)


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("documents", [(0, 64), (0, 5, 6, 40, 64)], ids=["one", "packed"])
@pytest.mark.parametrize("ring", [1, 2, 4])
def test_a_sink_is_one_more_score_of_the_whole_row(ring: int, documents, window: int | None, monkeypatch) -> None:
    """Against PyTorch's softmax over the written-out scores with a column for the sink, dropped after it, and its autograd."""
    generator = torch.Generator().manual_seed(ring)
    dout, q, k, v = (torch.randn(64, n, 8, generator=generator, dtype=torch.float64) for n in (4, 4, 2, 2))
    sink = torch.randn(4, generator=generator, dtype=torch.float64)
    leaves = [x.clone().requires_grad_() for x in (q, k, v, sink)]
    token = torch.arange(64)
    document = torch.bucketize(token, torch.tensor(documents), right=True)
    distance = token[:, None] - token[None, :]
    mask = (document[:, None] == document[None, :]) & (distance >= 0) & (distance < (window or 64))
    scores = torch.einsum("tnh,snh->nts", leaves[0], leaves[1].repeat_interleave(2, 1)) * 0.25
    column = leaves[3][:, None, None].expand(-1, 64, 1)
    p = torch.cat((scores.masked_fill(~mask, -torch.inf), column), dim=-1).softmax(-1)[..., :-1]
    out = torch.einsum("nts,snh->tnh", p, leaves[2].repeat_interleave(2, 1))
    wanted = dict(zip(("dq", "dk", "dv", "dsink"), torch.autograd.grad(out, leaves, dout), strict=True))
    found = lockstep.ring(dout, q, k, v, documents, ring, reference, SCORE, monkeypatch, window=window, sink=sink)
    for part, value in {"out": out.detach(), **wanted}.items():
        torch.testing.assert_close(found[part], value, rtol=1e-10, atol=1e-10, msg=part)
