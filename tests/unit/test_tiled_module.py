"""Modules in tiles and tensors on the host, in one process: gradients, random numbers, undoing, refusing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ds_cp import selftest
from ds_cp.models import mlp
from ds_cp.offload import Offload
from ds_cp.tiled_module import tiled
from tests.unit.test_models import attached, small

BATCH = {"input_ids": torch.randint(3, 90, (1, 150)), "labels": torch.randint(3, 90, (1, 150))}


@pytest.mark.parametrize("tile", [1, 7, 23, 100])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("frozen", ["nothing", "first", "input"])
def test_gradients_are_those_of_the_whole(rows: int, tile: int, frozen: str) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8, bias=False)).double()
    module[0].requires_grad_(frozen != "first")
    x = torch.randn(rows, 23, 8, dtype=torch.float64, requires_grad=frozen != "input")
    inputs = [t for t in (x, *module.parameters()) if t.requires_grad]
    dy = torch.randn_like(x)
    y = tiled(module, x, tile, tuple(module.parameters()))
    torch.testing.assert_close(y, module(x), rtol=1e-12, atol=1e-12)
    ours, wanted = torch.autograd.grad(y, inputs, dy), torch.autograd.grad(module(x), inputs, dy)
    torch.testing.assert_close(ours, wanted, rtol=1e-10, atol=1e-12)


def test_backward_draws_the_random_numbers_of_forward_again() -> None:
    layer = nn.Dropout(0.5)
    x = torch.ones(1, 40, 4, requires_grad=True)
    y = tiled(layer, x, 7, ())
    torch.rand(5)
    before = torch.get_rng_state()
    y.sum().backward()
    assert torch.equal(x.grad, y)
    assert torch.equal(torch.get_rng_state(), before)


def test_bf16_gradients_are_summed_in_fp32() -> None:
    """A thousand equal terms: in bf16 the sum would stop at 256."""
    layer = nn.Linear(1, 1, bias=False).bfloat16()
    x = torch.ones(1, 1024, 1, dtype=torch.bfloat16)
    tiled(layer, x, 1, tuple(layer.parameters())).sum().backward()
    assert layer.weight.grad.item() == 1024


def test_attached_in_tiles_is_undone_and_gives_the_same_loss() -> None:
    model = selftest.tiny_model("llama")
    before = model(**BATCH)
    handle = attached(model, tiled_mlp=True)
    assert all("forward" in vars(module) for module in [*mlp.mlps(model), *mlp.norms(model)])
    torch.testing.assert_close(model(**BATCH).loss, before.loss, rtol=1e-5, atol=0)
    handle.remove()
    assert not any("forward" in vars(module) for module in model.modules())
    assert torch.equal(model(**BATCH).logits, before.logits)


@pytest.mark.parametrize(("model_type", "of_a_layer"), [("llama", 2), ("qwen3", 2), ("gpt_neox", 2), ("gemma2", 4), ("olmo2", 2)])
def test_norms_over_the_hidden_size_are_found_and_no_others(model_type: str, of_a_layer: int) -> None:
    model = selftest.tiny_model(model_type)
    found = mlp.norms(model)
    assert len(found) == of_a_layer * model.config.num_hidden_layers + 1
    assert all(p.shape == (model.config.hidden_size,) for norm in found for p in norm.parameters())


def test_a_norm_in_tiles_keeps_its_input_alone() -> None:
    model, kept = selftest.tiny_model("llama").bfloat16(), []
    x = torch.randn(1, 150, 64, dtype=torch.bfloat16, requires_grad=True)
    handle = attached(model, tiled_mlp=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model.model.norm(x)
    handle.remove()
    assert [t.data_ptr() for t in kept] == [x.data_ptr()]


def test_what_has_no_dense_mlps_is_refused() -> None:
    for model in (small("mixtral", num_local_experts=2), selftest.tiny_model("gpt_oss")):
        with pytest.raises(ValueError, match=r"tiled_mlp: 0 of the 2 layers .* set it to false"):
            mlp.refuse(model)
    mlp.refuse(selftest.tiny_model("gpt_neox"))


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(4))

    def forward(self, x: Tensor, reentrant: bool) -> Tensor:
        for layer in self.layers:
            x = checkpoint(lambda y, layer=layer: torch.tanh(layer(y)) * y, x, use_reentrant=reentrant)
        return x


@pytest.mark.parametrize("piece", [1 << 26, 16])
@pytest.mark.parametrize("reentrant", [True, False])
def test_inputs_of_checkpointed_layers_come_back(reentrant: bool, piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ds_cp.offload.PIECE_BYTES", piece)
    model, x = Twice(), torch.randn(1, 5, 6, requires_grad=True)
    wanted = torch.autograd.grad(model(x, False).sum(), [x, *model.parameters()])
    offload = Offload()
    offload.begin((1, 5, 6), torch.float32, x.device)
    y = model(x, reentrant)
    offload.end()
    assert offload.count == 4
    y.sum().backward()
    for got, reference in zip((x, *model.parameters()), wanted, strict=True):
        assert torch.equal(got.grad, reference)
    assert offload.count == 4, "what backward saves again stays where it is"


def test_a_forward_that_fails_leaves_no_hook() -> None:
    model = selftest.tiny_model("llama").train()
    model.gradient_checkpointing_enable()
    handle = attached(model, activation_offload=True)
    bad = {**BATCH, "labels": torch.full((1, 150), 10**6)}
    with pytest.raises((IndexError, RuntimeError)):
        model(**bad)
    x = torch.randn(1, 150, 64, requires_grad=True)
    before = handle._offload.count
    (x * x).sum().backward()
    assert handle._offload.count == before
