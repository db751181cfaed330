"""Kimi delta attention against its recurrence, a token at a time, fp64."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from ds_cp.kernels import kda
from ds_cp.kernels.delta import Span

INPUTS = ("q", "k", "v", "g", "beta")


def recurrence(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, documents: tuple[int, ...]) -> Tensor:
    q, k = (x / ((x * x).sum(-1, keepdim=True) + 1e-6).sqrt() for x in (q, k))
    q = q * q.shape[-1] ** -0.5
    outs = []
    for start, end in pairwise(documents):
        state = q.new_zeros(q.shape[1], q.shape[2], v.shape[2])
        for t in range(start, end):
            state = state * g[t].exp().unsqueeze(-1)
            read = torch.einsum("vhx,vh->vx", state, k[t])
            state = state + torch.einsum("vh,vx->vhx", k[t], beta[t].unsqueeze(-1) * (v[t] - read))
            outs.append(torch.einsum("vhx,vh->vx", state, q[t]))
    return torch.stack(outs)


@pytest.mark.parametrize("lengths", [[1], [16], [75], [13, 1, 1, 30, 1, 16, 2], [1] * 5], ids=lambda n: "-".join(map(str, n)))
def test_it_is_the_recurrence(lengths: list[int]) -> None:
    documents = (0, *torch.tensor(lengths).cumsum(0).tolist())
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> Tensor:
        return torch.randn(documents[-1], *shape, generator=generator, dtype=torch.float64)

    given = [random(3, 5), random(3, 5), random(3, 5), -random(3, 5).exp() * 0.3, random(3).sigmoid()]
    given = [x.requires_grad_() for x in given]
    out, wanted = kda.delta_rule(*given, Span(documents)), recurrence(*given, documents)
    torch.testing.assert_close(out, wanted, rtol=1e-10, atol=1e-10)
    found, due = (torch.autograd.grad(y, given, out.detach().cos()) for y in (out, wanted))
    for name, got, reference in zip(INPUTS, found, due, strict=True):
        error = float((got - reference).abs().max()) / max(float(reference.abs().max()), 1.0)
        assert error <= 1e-10, (name, error)
