"""The selective scan against its recurrence, a token at a time, fp64."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from ds_cp.kernels import selective
from ds_cp.kernels.delta import Span

INPUTS = ("x", "dt", "a", "b", "c", "d")


def recurrence(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, documents: tuple[int, ...]) -> Tensor:
    repeats = x.shape[1] // b.shape[1]
    b, c = b.repeat_interleave(repeats, dim=1), c.repeat_interleave(repeats, dim=1)
    outs = []
    for start, end in pairwise(documents):
        state = torch.zeros_like(a)
        for t in range(start, end):
            state = state * (a * dt[t][:, None]).exp() + (dt[t] * x[t])[:, None] * b[t]
            outs.append((state * c[t]).sum(-1) + d * x[t])
    return torch.stack(outs)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("lengths", [[1], [7], [64], [13, 1, 1, 30, 1, 20, 2], [1] * 5], ids=lambda n: "-".join(map(str, n)))
def test_it_is_the_recurrence(lengths: list[int], groups: int) -> None:
    documents = (0, *torch.tensor(lengths).cumsum(0).tolist())
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    tokens, channels, states = documents[-1], 6, 5
    dt, a = torch.nn.functional.softplus(random(tokens, channels) - 1), -random(channels, states).mul(0.5).exp() * 0.2
    given = [random(tokens, channels), dt, a, random(tokens, groups, states), random(tokens, groups, states), random(channels)]
    given = [x.requires_grad_() for x in given]
    out, wanted = selective.scan(*given, Span(documents)), recurrence(*given, documents)
    torch.testing.assert_close(out, wanted, rtol=1e-10, atol=1e-10)
    found, due = (torch.autograd.grad(y, given, out.detach().cos()) for y in (out, wanted))
    for name, got, reference in zip(INPUTS, found, due, strict=True):
        error = float((got - reference).abs().max()) / max(float(reference.abs().max()), 1.0)
        assert error <= 1e-10, (name, error)
