"""The loss in tiles through its one kernel, and through Liger's, against fp64 and PyTorch's own loss of the same precision."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ds_cp.batch import IGNORE
from ds_cp.liger_head import liger_loss
from ds_cp.tiled_head import Head, Terms, tiled_loss, token_losses

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
T, D = 700, 256


def whole(layer: nn.Linear, hidden: Tensor, targets: Tensor, weights: Tensor | None, head: Head, terms: Terms) -> list[Tensor]:
    """Loss and the gradients of hidden states and parameters."""
    z = layer(hidden)[0].to(torch.float64 if hidden.dtype == torch.float64 else torch.float32) * head.scale
    z = z if head.softcap is None else head.softcap * (z / head.softcap).tanh()
    losses = token_losses(z, targets[0], terms)
    weights = torch.ones_like(losses) if weights is None else weights[0].to(losses.dtype)
    loss = (losses * weights.masked_fill(targets[0] == IGNORE, 0.0)).sum()
    return [loss.detach(), *torch.autograd.grad(loss, [hidden, *layer.parameters()])]


def drawn(vocabulary: int, bias: bool, dtype: torch.dtype) -> tuple[nn.Linear, Tensor, Tensor]:
    torch.manual_seed(0)
    layer = nn.Linear(D, vocabulary, bias=bias, device=DEVICE, dtype=dtype)
    hidden = torch.randn(1, T, D, device=DEVICE, dtype=dtype, requires_grad=True)
    targets = torch.randint(0, vocabulary, (1, T), device=DEVICE)
    targets[0, 100:300] = IGNORE
    return layer, hidden, targets


def assert_close_to_fp64(
    ours: list[Tensor],
    layer: nn.Linear,
    hidden: Tensor,
    targets: Tensor,
    weights: Tensor | None,
    head: Head,
    terms: Terms,
    of_loss: float = 1e-6,
) -> None:
    """Within twice the error that whole logits have in the same precision, and `of_loss` more for the loss alone."""
    exact = nn.Linear(D, layer.out_features, bias=layer.bias is not None, device=DEVICE, dtype=torch.float64)
    exact.load_state_dict(layer.state_dict())
    wanted = whole(exact, hidden.detach().double().requires_grad_(), targets, weights, head, terms)
    theirs = whole(layer, hidden, targets, weights, head, terms)
    for got, other, reference in zip(ours, theirs, wanted, strict=True):
        errors = [float((x.double() - reference).norm() / reference.norm()) for x in (got, other)]
        assert errors[0] <= 2 * errors[1] + (of_loss if got.ndim == 0 else 1e-6), errors


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("scale", "terms"), [(1.0, Terms()), (0.25, Terms(0.1, 1e-2))], ids=["plain", "all_terms"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("vocabulary", "tile", "bias"), [(1001, 256, False), (32000, 512, True), (70000, 333, False)])
def test_the_kernel(vocabulary: int, tile: int, bias: bool, dtype: torch.dtype, scale: float, terms: Terms, weighted: bool) -> None:
    layer, hidden, targets = drawn(vocabulary, bias, dtype)
    weights = torch.rand(1, T, device=DEVICE) if weighted else None
    head = Head(layer.forward, tuple(layer.parameters()), True, scale)
    loss, _ = tiled_loss(hidden, head, tile, targets, weights, terms)
    ours = [loss.detach(), *torch.autograd.grad(loss, [hidden, *layer.parameters()])]
    assert_close_to_fp64(ours, layer, hidden, targets, weights, head, terms)


@pytest.mark.parametrize(("softcap", "terms"), [(None, Terms()), (30.0, Terms(0.1, 1e-2))], ids=["plain", "all_terms"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("vocabulary", "bias"), [(1001, False), (32000, True)])
def test_ligers_loss(vocabulary: int, bias: bool, dtype: torch.dtype, softcap: float | None, terms: Terms) -> None:
    pytest.importorskip("liger_kernel")
    layer, hidden, targets = drawn(vocabulary, bias, dtype)
    head = Head(layer.forward, tuple(layer.parameters()), True, softcap=softcap)
    loss, first = liger_loss(hidden, head, targets, terms)
    torch.testing.assert_close(first[0], layer(hidden[0, :1]))
    ours = [loss.detach(), *torch.autograd.grad(loss, [hidden, *layer.parameters()])]
    # Whole logits may meet the one number of fp64 by chance; Liger rounds otherwise, and the number itself is in fp32.
    chance = torch.finfo(dtype).eps / T**0.5 + torch.finfo(torch.float32).eps
    assert_close_to_fp64(ours, layer, hidden, targets, None, head, terms, of_loss=chance)
