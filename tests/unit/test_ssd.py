"""The scan of Mamba-2 against its recurrence, a token at a time, fp64."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from ds_cp.kernels import ssd
from ds_cp.kernels.delta import Span

INPUTS = ("x", "dt", "a", "b", "c", "d")


def recurrence(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, documents: tuple[int, ...]) -> Tensor:
    repeats = x.shape[1] // b.shape[1]
    b, c = b.repeat_interleave(repeats, dim=1), c.repeat_interleave(repeats, dim=1)
    outs = []
    for start, end in pairwise(documents):
        state = x.new_zeros(x.shape[1], b.shape[2], x.shape[2])
        for t in range(start, end):
            state = state * (a * dt[t]).exp()[:, None, None] + torch.einsum("vn,vx->vnx", b[t] * dt[t][:, None], x[t])
            outs.append(torch.einsum("vnx,vn->vx", state, c[t]) + d[:, None] * x[t])
    return torch.stack(outs)


def inputs(tokens: int, heads: int, groups: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    dt, a = torch.nn.functional.softplus(random(tokens, heads) - 1), -random(heads).mul(0.5).exp() * 0.2
    found = [random(tokens, heads, 3), dt, a, random(tokens, groups, 5), random(tokens, groups, 5), random(heads)]
    return [x.requires_grad_() for x in found]


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("lengths", [[7], [64], [150], [13, 1, 1, 70, 64, 1, 90, 2], [1] * 5], ids=lambda n: "-".join(map(str, n)))
@pytest.mark.parametrize("block", [1, 2, 64])
def test_it_is_the_recurrence(monkeypatch: pytest.MonkeyPatch, block: int, lengths: list[int], groups: int) -> None:
    monkeypatch.setattr(ssd, "BLOCK", block)  # how chunks are paired changes nothing
    documents = (0, *torch.tensor(lengths).cumsum(0).tolist())
    given = inputs(documents[-1], 4, groups)
    out, wanted = ssd.scan(*given, Span(documents)), recurrence(*given, documents)
    torch.testing.assert_close(out, wanted, rtol=1e-10, atol=1e-10)
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=out.dtype)
    found, due = (torch.autograd.grad(y, given, dout) for y in (out, wanted))
    for name, got, reference in zip(INPUTS, found, due, strict=True):
        error = float((got - reference).abs().max()) / max(float(reference.abs().max()), 1.0)
        assert error <= 1e-10, (name, error)


def test_low_precision_is_computed_in_fp32() -> None:
    given = [x.detach() for x in inputs(100, 4, 2)]
    low = [x.bfloat16() if name in "xbc" else x.float() for name, x in zip(INPUTS, given, strict=True)]
    out = ssd.scan(*low, Span((0, 40, 100)))
    exact = ssd.scan(*(x.double() for x in low), Span((0, 40, 100)))
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), exact, rtol=2**-8, atol=1e-5)
