"""The tiled output head and offloaded activations on CUDA, where they take other paths than on the CPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from ds_cp import tiled_head
from ds_cp.offload import Offload
from ds_cp.tiled_head import Head, Terms

T, D, V = 777, 256, 4999


def whole(hidden: Tensor, layer: nn.Linear, head: Head, targets: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Loss and gradients through whole logits, the head in `dtype`, the loss in fp32."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in (hidden, *layer.parameters())]
    z = functional.linear(*leaves)[0].float() * head.scale
    z = z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)
    loss = functional.cross_entropy(z, targets[0], reduction="sum")
    return [loss.detach(), *torch.autograd.grad(loss * 0.3, leaves)]


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found.float() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("tile", [100, 1000])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("linear", [True, False], ids=["formula", "graph"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_tiled_head_gives_what_whole_logits_give(
    dtype: torch.dtype, linear: bool, softcap: float | None, bias: bool, tile: int
) -> None:
    """In bf16 within twice the error of whole logits in bf16 against fp32: of the parameters' sums less, they are in fp32."""
    torch.manual_seed(0)
    layer = nn.Linear(D, V, bias=bias, device="cuda", dtype=dtype)
    hidden = torch.randn(1, T, D, device="cuda", dtype=dtype, requires_grad=True)
    targets = torch.randint(0, V, (1, T), device="cuda")
    targets[0, 30:120] = -100
    head = Head(layer.forward, tuple(layer.parameters()), linear, 0.5, softcap)
    exact, plain = (whole(hidden, layer, head, targets, kind) for kind in (torch.float32, dtype))
    value, output = tiled_head.tiled_loss(hidden, head, tile, targets, None, Terms())
    (tiled_head.joined(value, output) * 0.3).backward()
    found = [value.detach(), *(x.grad for x in (hidden, *layer.parameters()))]
    for mine, yardstick, wanted in zip(found, plain, exact, strict=True):
        assert error(mine, wanted) <= (1e-5 if dtype == torch.float32 else 2 * error(yardstick, wanted) + 1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("tokens", [64, 2048])
def test_offloaded_activations_give_the_same_bits(tokens: int, reentrant: bool) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 6, "vocab_size": 1000}
    config = LlamaConfig(**sizes, num_attention_heads=8, num_key_value_heads=4, attn_implementation="eager")
    model = LlamaForCausalLM(config).to("cuda", torch.bfloat16).train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    offload, grads, kept = Offload(), [], []
    rows = torch.randint(0, 1000, (3, 1, tokens), device="cuda")

    def step(offloaded: bool) -> None:
        for row in rows:  # gradients add up; buffers of one pass are reused in the next
            before = torch.cuda.memory_allocated()
            if offloaded:
                offload.begin((1, tokens, 512), torch.bfloat16, row.device)
            loss = model(input_ids=row, labels=row, use_cache=False).loss
            offload.end()
            torch.cuda.synchronize()
            torch.empty(1, device="cuda")  # the allocator takes back what the side stream is done with
            after = torch.cuda.memory_allocated()
            loss.backward()
        kept.append(after - before)
        grads.append([p.grad for p in model.parameters()])
        model.zero_grad()

    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        for offloaded in (False, True):
            step(offloaded)
    finally:
        torch.use_deterministic_algorithms(False)
    assert offload.count >= 6
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    assert kept[0] - kept[1] >= 5 * tokens * 512 * 2, "the inputs of layers are still on the device"
