"""The loss in tiles through its one kernel, against fp64 and PyTorch's own loss of the same precision."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ds_cp.batch import IGNORE
from ds_cp.tiled_head import Head, Terms, tiled_loss, token_losses

pytestmark = pytest.mark.gpu
T, D = 700, 256


def whole(layer: nn.Linear, hidden: Tensor, targets: Tensor, weights: Tensor | None, scale: float, terms: Terms) -> list[Tensor]:
    """Loss and the gradients of hidden states and parameters."""
    z = layer(hidden)[0].to(torch.float64 if hidden.dtype == torch.float64 else torch.float32) * scale
    losses = token_losses(z, targets[0], terms)
    weights = torch.ones_like(losses) if weights is None else weights[0].to(losses.dtype)
    loss = (losses * weights.masked_fill(targets[0] == IGNORE, 0.0)).sum()
    return [loss.detach(), *torch.autograd.grad(loss, [hidden, *layer.parameters()])]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("scale", "terms"), [(1.0, Terms()), (0.25, Terms(0.1, 1e-2))], ids=["plain", "all_terms"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("vocabulary", "tile", "bias"), [(1001, 256, False), (32000, 512, True), (70000, 333, False)])
def test_within_twice_the_error_of_whole_logits(
    vocabulary: int, tile: int, bias: bool, dtype: torch.dtype, scale: float, terms: Terms, weighted: bool
) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(D, vocabulary, bias=bias, device="cuda", dtype=dtype)
    hidden = torch.randn(1, T, D, device="cuda", dtype=dtype, requires_grad=True)
    targets = torch.randint(0, vocabulary, (1, T), device="cuda")
    targets[0, 100:300] = IGNORE
    weights = torch.rand(1, T, device="cuda") if weighted else None
    exact = nn.Linear(D, vocabulary, bias=bias, device="cuda", dtype=torch.float64)
    exact.load_state_dict(layer.state_dict())
    wanted = whole(exact, hidden.detach().double().requires_grad_(), targets, weights, scale, terms)
    theirs = whole(layer, hidden, targets, weights, scale, terms)
    loss, _ = tiled_loss(hidden, Head(layer.forward, tuple(layer.parameters()), True, scale), tile, targets, weights, terms)
    ours = [loss.detach(), *torch.autograd.grad(loss, [hidden, *layer.parameters()])]
    for got, other, reference in zip(ours, theirs, wanted, strict=True):
        errors = [float((x.double() - reference).norm() / reference.norm()) for x in (got, other)]
        assert errors[0] <= 2 * errors[1] + 1e-6, errors
