"""Layer inputs that wait in pinned host memory: the same gradients to the bit, and no more of them on the device than AT_ONCE."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ds_cp.offload import AT_ONCE, Offload

pytestmark = pytest.mark.gpu
SHAPE = (1, 16384, 1024)
LAYERS = 12


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(SHAPE[2], SHAPE[2]) for _ in range(LAYERS))

    def forward(self, x: Tensor, reentrant: bool) -> Tensor:
        for layer in self.layers:
            x = checkpoint(lambda y, layer=layer: torch.tanh(layer(y)) + y, x, use_reentrant=reentrant)
        return x


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradients_to_the_bit_and_the_memory_of_two_inputs(reentrant: bool) -> None:
    torch.manual_seed(0)
    model = Stack().to("cuda", torch.bfloat16)
    x = torch.randn(SHAPE, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    model(x, reentrant).square().sum().backward()
    wanted = [x.grad, *(p.grad for p in model.parameters())]
    offload = Offload()
    for _ in range(3):  # host memory is used again
        model.zero_grad()
        x.grad = None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        offload.begin(SHAPE, torch.bfloat16, x.device)
        y = model(x, reentrant)
        offload.end()
        forward = (torch.cuda.max_memory_allocated() - before) / x.nbytes
        y.square().sum().backward()
        del y
        for got, reference in zip((x, *model.parameters()), wanted, strict=True):
            assert torch.equal(got.grad, reference)
        assert offload.count == LAYERS
        assert forward <= AT_ONCE + 5, "inputs on the device because of copies, beside a layer's own tensors"
