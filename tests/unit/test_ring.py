"""`RingAttention` of all ranks in lockstep against one kernel call on the whole row; the sums of kernels that keep their own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ds_cp import tiles
from ds_cp.kernels import blocked, flash4_hopper
from ds_cp.kernels.attention import Score, reference, torch_cpu
from ds_cp.kernels.flash4_hopper import HopperSums
from ds_cp.layout import Layout
from ds_cp.tiles import Tile
from tests.gpu import lockstep

HEADS = {"MHA": (4, 4), "GQA": (8, 2), "MQA": (4, 1)}
DOCUMENTS = {"one": (0, 144), "packed": (0, 21, 22, 23, 70, 104, 144)}
FEWEST_TOKENS = 9
SCORE = Score(0.25)


class Launcher:
    """The formulas of `flash4_hopper.Launcher` in PyTorch, in any dtype; a block of keys stands in an order drawn at random."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, int, bool]] = []

    def plan(self, size: int, causal: bool = False) -> SimpleNamespace:
        return SimpleNamespace(m_block_size=4 if causal else 5, n_block_size=8)

    def multiple(self, size: int) -> int:
        return 12

    def block_elements(self, size: int) -> int:
        return 8 * 24

    def place(self, like: Tensor) -> Tensor:
        order = torch.randperm(self.block_elements(16), generator=torch.Generator().manual_seed(1))
        return order.view(8, 24)[:, : like.shape[-1]].contiguous()

    def preprocess(self, out: Tensor, dout: Tensor, lse: Tensor, into: Sequence[Tensor], causal: bool) -> None:
        delta, lse_log2, dq_sum = into
        tokens = lse.shape[2]
        delta[..., :tokens] = (out * dout).sum(-1).transpose(1, 2)
        lse_log2[..., :tokens] = lse / math.log(2)
        dq_sum.zero_()

    def backward(self, tensors: Sequence[Tensor], causal: bool, scale: float) -> None:
        q, k, v, dout, lse_log2, delta, dq_sum, dk, dv = (x.squeeze(0) for x in tensors)
        self.calls.append((len(q), len(k), causal))
        group = q.shape[1] // k.shape[1]
        keys, values = (x.repeat_interleave(group, 1) for x in (k, v))
        scores = torch.einsum("tnh,snh->nts", q, keys) * scale
        if causal:
            scores.masked_fill_(torch.ones(len(q), len(k), dtype=torch.bool).triu(1), -math.inf)
        p = torch.exp2(scores / math.log(2) - lse_log2[:, : len(q), None])
        ds = p * (torch.einsum("tnh,snh->nts", dout, values) - delta[:, : len(q), None])
        dq_sum.view(len(dq_sum), -1, 24)[:, : len(q), :16] += torch.einsum("nts,snh->nth", ds, keys)
        parts = [torch.einsum("nts,tnh->snh", p, x).unflatten(1, (-1, group)).sum(2) for p, x in ((ds, q), (p, dout))]
        if dk.ndim == 3:  # heads that share nothing: stored, not added
            dk.copy_(parts[0] * scale)
            dv.copy_(parts[1])
        else:
            both = torch.stack((dk, dv))
            blocked.add_(both, self.place(q), self.block_elements(16), (0,), 0, *parts, 1.0)
            for into, x in zip((dk, dv), both, strict=True):
                into.copy_(x)

    def finish_dq(self, dq_sum: Tensor, dq: Tensor, causal: bool, scale: float) -> None:
        dq.copy_(scale * dq_sum.view(1, dq.shape[2], -1, 24)[:, :, : dq.shape[1], :16].transpose(1, 2))

    def finish_dkv(self, sums: Tensor, into: Tensor, scale: float) -> None:
        both = torch.stack((sums, sums)).squeeze(1)
        form = self.place(into), self.block_elements(16), (0,)
        into.copy_(blocked.plain([both], *form, into.shape[1], scale, into.dtype)[0])


def with_sums() -> SimpleNamespace:
    """torch_cpu with sums of its own, by the code that drives flash-attn 4."""
    launcher = Launcher()

    def sums(*given) -> HopperSums:
        return HopperSums(launcher, torch_cpu.backward, *given)

    return SimpleNamespace(forward=torch_cpu.forward, backward=torch_cpu.backward, sums=sums, launcher=launcher)


@pytest.fixture
def kernel(monkeypatch) -> SimpleNamespace:
    monkeypatch.setattr(flash4_hopper, "FEWEST_TOKENS", FEWEST_TOKENS)
    return with_sums()


def row(documents: Sequence[int], heads: tuple[int, int]) -> tuple[list[Tensor], dict[str, Tensor]]:
    """dout, q, k, v, and what one kernel makes of them."""
    generator = torch.Generator().manual_seed(documents[1])
    counts = (heads[0], heads[0], heads[1], heads[1])
    tensors = [torch.randn(documents[-1], n, 16, generator=generator, dtype=torch.float64) for n in counts]
    dout, q, k, v = tensors
    tile = Tile(0, len(q), 0, len(q), tuple(documents))
    out, lse = torch_cpu.forward(q, k, v, tile, SCORE)
    grads = torch_cpu.backward(dout, q, k, v, out, lse, tile, SCORE)
    return tensors, {"out": out, **dict(zip(("dq", "dk", "dv"), grads, strict=True))}


def assert_close(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    for part, value in wanted.items():
        torch.testing.assert_close(found[part], value, rtol=1e-10, atol=1e-10, msg=part)


@pytest.mark.parametrize("gathered", [False, True], ids=["p2p", "allgather"])
@pytest.mark.parametrize("documents", DOCUMENTS.values(), ids=DOCUMENTS)
@pytest.mark.parametrize("ring", [2, 3, 4, 8, 12])
def test_the_ring_is_the_whole_row(ring: int, documents: tuple[int, ...], gathered: bool, monkeypatch) -> None:
    tensors, wanted = row(documents, HEADS["GQA"])
    assert_close(lockstep.ring(*tensors, documents, ring, torch_cpu, SCORE, monkeypatch, gathered), wanted)


@st.composite
def any_layout(draw: st.DrawFn) -> tuple[Layout, tuple[int, ...]]:
    """Chunks given to ranks in any way, and documents."""
    ring, slots, chunk = draw(st.integers(2, 6)), draw(st.integers(1, 4)), draw(st.integers(1, 5))
    count = ring * slots
    order = draw(st.one_of(st.just(range(count)), st.permutations(range(count))))
    plan = Layout(chunk, tuple(tuple(sorted(order[r * slots : (r + 1) * slots])) for r in range(ring)), 1)
    cuts = draw(st.sets(st.integers(1, count * chunk - 1), max_size=2 * count))
    return plan, (0, *sorted(cuts), count * chunk)


@settings(max_examples=100)
@given(layout=any_layout(), gathered=st.booleans(), own_sums=st.booleans(), kept=st.booleans())
def test_any_layout_gives_what_one_kernel_gives(
    layout: tuple[Layout, tuple[int, ...]], gathered: bool, own_sums: bool, kept: bool
) -> None:
    plan, documents = layout
    tensors, wanted = row(documents, HEADS["GQA"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flash4_hopper, "FEWEST_TOKENS", FEWEST_TOKENS)
        kernel = with_sums() if own_sums else torch_cpu
        found = lockstep.ring(*tensors, documents, plan.ring, kernel, SCORE, patch, gathered, plan, kept=kept)
    assert_close(found, wanted)


@pytest.mark.parametrize("gathered", [False, True], ids=["p2p", "allgather"])
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("documents", DOCUMENTS.values(), ids=DOCUMENTS)
@pytest.mark.parametrize("ring", [2, 3, 4])
def test_sums_that_a_kernel_keeps_are_those_of_the_whole_row(
    ring: int, documents: tuple[int, ...], heads: tuple[int, int], gathered: bool, kernel: SimpleNamespace, monkeypatch
) -> None:
    tensors, wanted = row(documents, heads)
    assert_close(lockstep.ring(*tensors, documents, ring, kernel, SCORE, monkeypatch, gathered), wanted)
    assert any(not causal for _, _, causal in kernel.launcher.calls)
    assert any(causal for _, _, causal in kernel.launcher.calls) == (len(documents) == 2 and not gathered)


@pytest.mark.parametrize("starts", [(0,), (0, 5, 9, 33), tuple(range(12))], ids=str)
@pytest.mark.parametrize("count", [1, 2])
def test_a_blocked_sum_gives_back_what_was_added_to_it(count: int, starts: tuple[int, ...]) -> None:
    place, elements = Launcher().place(torch.empty(0, 16)), Launcher().block_elements(16)
    blocks = blocked.blocks(starts, 37, 8)
    sums, wanted = torch.zeros(count, 2, 3, blocks * elements, dtype=torch.float64), torch.zeros(2, 37, 3, 16, dtype=torch.float64)
    for number, (start, keys) in enumerate([(0, 37), (5, 20), (36, 1)]):
        dk, dv = torch.randn(2, keys, 3, 16, dtype=torch.float64)
        blocked.add_(sums[number % count], place, elements, starts, start, dk, dv, 4.0)
        wanted[:, start : start + keys] += torch.stack((dk, dv))
    form, last = (place, elements, starts), (37, 0.25, torch.float64)
    torch.testing.assert_close(blocked.plain(list(sums), *form, *last), wanted, rtol=1e-12, atol=1e-12)
    own = torch.randn(2, 37, 3, 16, dtype=torch.float64)
    torch.testing.assert_close(blocked.plain(list(sums), *form, *last, tuple(own)), wanted + own, rtol=1e-12, atol=1e-12)


def test_every_start_begins_a_block() -> None:
    starts = (0, 5, 9, 33)  # places 0, 8, 16, 40
    assert blocked.blocks(starts, 37, 8) == 6
    assert [blocked.first_block(start, start + 1, starts, 8) for start in starts] == [0, 1, 2, 5]
    assert blocked.first_block(17, 30, starts, 8) == 3
    assert blocked.first_block(6, 8, starts, 8) is None
    assert blocked.first_block(5, 10, starts, 8) is None, "keys of two runs"
    assert blocked.blocks(tuple(range(12)), 37, 8) == 5, "more starts than a kernel is told of"


@settings(max_examples=100)
@given(layout=any_layout())
def test_every_rectangle_is_added_in_place(layout: tuple[Layout, tuple[int, ...]]) -> None:
    plan, documents = layout
    plans = [tiles.plan(plan, rank, documents) for rank in range(plan.ring)]
    for rank, found in enumerate(plans):
        assert found.starts == plans[0].starts
        for step, rectangles in enumerate(found.steps[1:], start=1):
            starts = found.starts[(rank - step) % plan.ring]
            for tile in rectangles:
                assert blocked.first_block(tile.k_start, tile.k_end, starts, 8) is not None


def assert_whole_row(found: dict[str, Tensor], tensors: list[Tensor], documents: Sequence[int], window: int | None = None) -> None:
    dout, q, k, v = tensors
    tile = Tile(0, documents[-1], 0, documents[-1], tuple(documents), window)
    out, lse = reference.forward(q, k, v, tile, SCORE)
    wanted = {"out": out, **dict(zip(("dq", "dk", "dv"), reference.backward(dout, q, k, v, out, lse, tile, SCORE), strict=True))}
    for part, value in wanted.items():
        torch.testing.assert_close(found[part], value, rtol=1e-10, atol=1e-10, msg=part)


@settings(max_examples=60)
@given(case=any_layout(), window=st.integers(1, 30), kernel=st.sampled_from([reference, torch_cpu]), kept=st.booleans())
def test_a_window_gives_what_one_kernel_gives(case: tuple[Layout, tuple[int, ...]], window: int, kernel: Any, kept: bool) -> None:
    plan, documents = case
    generator = torch.Generator().manual_seed(documents[-1])
    tensors = [torch.randn(documents[-1], n, 8, generator=generator, dtype=torch.float64) for n in (4, 4, 2, 2)]
    with pytest.MonkeyPatch.context() as patch:
        found = lockstep.ring(*tensors, documents, plan.ring, kernel, SCORE, patch, plan=plan, window=window, kept=kept)
    assert_whole_row(found, tensors, documents, window)


@pytest.mark.parametrize("kept", [False, True], ids=["sent", "kept"])
@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("documents", [(0, 64), (0, 5, 6, 40, 64)], ids=["one", "packed"])
@pytest.mark.parametrize("ring", [1, 2, 4])
def test_a_sink_is_one_more_score_of_the_whole_row(ring: int, documents, window: int | None, kept: bool, monkeypatch) -> None:
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
    found = lockstep.ring(dout, q, k, v, documents, ring, reference, SCORE, monkeypatch, window=window, sink=sink, kept=kept)
    for part, value in {"out": out.detach(), **wanted}.items():
        torch.testing.assert_close(found[part], value, rtol=1e-10, atol=1e-10, msg=part)
