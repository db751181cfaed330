"""The head in tiles against PyTorch's cross entropy on whole logits, in fp64; what it allocates; what it refuses."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from deepspeed.profiling.flops_profiler import profiler
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from ds_cp import selftest, tiled_head, token_values
from ds_cp.batch import IGNORE
from ds_cp.models import lm_head
from ds_cp.tiled_head import Head, Terms
from ds_cp.token_values import TokenValues
from tests.unit.test_models import attached

T, D, V = 23, 8, 17
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2}
BATCH = {"input_ids": torch.arange(3, 40).unsqueeze(0), "labels": torch.arange(3, 40).unsqueeze(0)}


def whole(hidden: Tensor, layer: nn.Linear, head: Head, targets: Tensor, weights: Tensor | None, terms: Terms) -> Tensor:
    z = layer(hidden)[0] * head.scale
    z = z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)
    losses = functional.cross_entropy(z, targets[0], reduction="none", label_smoothing=terms.label_smoothing)
    losses = losses + terms.z_loss * z.logsumexp(-1) ** 2
    w = torch.ones_like(losses) if weights is None else weights[0].double()
    return (losses * w.masked_fill(targets[0] == IGNORE, 0)).sum()


@pytest.mark.parametrize("tile", [1, 7, 23, 100])
@pytest.mark.parametrize("linear", [True, False], ids=["formula", "graph"])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_loss_and_gradients_are_those_of_whole_logits(dtype: torch.dtype, linear: bool, tile: int) -> None:
    for bias, (scale, softcap), weighted, terms in product(
        (False, True), ((1.0, None), (0.5, 3.0)), (False, True), (Terms(), Terms(0.1, 1e-2))
    ):
        torch.manual_seed(0)
        layer, hidden = nn.Linear(D, V, bias=bias).to(dtype), torch.randn(1, T, D, dtype=dtype, requires_grad=True)
        targets, weights = torch.randint(0, V, (1, T)), torch.rand(1, T, dtype=torch.float64) if weighted else None
        targets[0, 3:12] = IGNORE
        alone, theirs = nn.Linear(D, V, bias=bias).double(), hidden.detach().double().requires_grad_()
        alone.load_state_dict({name: x.double() for name, x in layer.state_dict().items()})
        head = Head(layer.forward, tuple(layer.parameters()), linear, scale, softcap)
        wanted = whole(theirs, alone, head, targets, weights, terms)
        got, output = tiled_head.tiled_loss(hidden, head, tile, targets, weights, terms)
        for loss in (wanted, tiled_head.joined(got, output)):
            (loss * 0.3).backward()
        pairs = [(got.detach(), wanted.detach()), (hidden.grad, theirs.grad)]
        pairs += [(p.grad, q.grad) for p, q in zip(layer.parameters(), alone.parameters(), strict=True)]
        for ours, reference in pairs:
            assert float((ours.double() - reference).abs().max() / reference.abs().max()) <= TOLERANCE[dtype]
        assert {p.grad.dtype for p in (hidden, *layer.parameters())} == {dtype}


@pytest.mark.parametrize("tile", [1, 7, 100])
@pytest.mark.parametrize("entropies", [False, True])
def test_values_of_tokens_are_those_of_whole_logits(entropies: bool, tile: int) -> None:
    """The graph path draws its dropout again in backward."""
    asked, targets = TokenValues(entropies, temperature=0.7), torch.randint(0, V, (1, T))
    targets[0, 3:12] = IGNORE
    weights = torch.randn(1, T, 1 + entropies, dtype=torch.float64)
    for linear, dropout in ((True, 0.0), (False, 0.0), (False, 0.5)):
        layer, hidden = nn.Linear(D, V).double(), torch.randn(1, T, D, dtype=torch.float64, requires_grad=True)
        forward = layer.forward if linear else nn.Sequential(nn.Dropout(dropout), layer)
        head = Head(forward, tuple(layer.parameters()), linear, 0.5, 3.0)
        inputs = (hidden, *layer.parameters())
        torch.manual_seed(1)
        got, _ = token_values.token_values(hidden, head, T if dropout else tile, targets, asked)
        ours = torch.autograd.grad((got * weights).sum(), inputs)
        torch.manual_seed(1)
        z = head.softcap * torch.tanh(forward(hidden)[0] * head.scale / head.softcap)
        wanted = token_values.of_logits(z, targets[0], asked).unsqueeze(0)
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(ours, torch.autograd.grad((wanted * weights).sum(), inputs), rtol=1e-10, atol=1e-12)


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor made."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.elements = max([self.elements, *(x.numel() for x in torch.utils._pytree.tree_leaves(out) if isinstance(x, Tensor))])
        return out


@pytest.mark.parametrize("linear", [True, False], ids=["formula", "graph"])
def test_nothing_is_larger_than_a_tile_of_logits(linear: bool) -> None:
    tokens, vocabulary, tile = 512, 300, 16
    layer, hidden = nn.Linear(4, vocabulary, bias=False), torch.randn(1, tokens, 4, requires_grad=True)
    head = Head(layer.forward, tuple(layer.parameters()), linear)
    with Largest() as seen:
        value, output = tiled_head.tiled_loss(hidden, head, tile, torch.zeros(1, tokens, dtype=torch.long), None, Terms())
        tiled_head.joined(value, output).backward()
    assert seen.elements == tile * vocabulary


def test_a_second_backward_is_refused() -> None:
    layer = nn.Linear(D, V)
    head = Head(layer.forward, tuple(layer.parameters()), True)
    value, _ = tiled_head.tiled_loss(torch.randn(1, 4, D), head, 2, torch.zeros(1, 4, dtype=torch.long), None, Terms())
    value.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="was given backward twice"):
        value.backward()


@pytest.mark.parametrize(
    ("chunk", "vocabulary", "tokens", "tile"),
    [
        ("auto", 128_256, 16_384, 512),
        ("auto", 128_256, 512, 0),
        ("auto", 32_000, 8_192, 2_048),
        ("auto", 10**9, 5, 1),
        (0, 9, 9, 0),
        (7, 9, 3, 7),
    ],
)
def test_what_auto_is(chunk: Any, vocabulary: int, tokens: int, tile: int) -> None:
    assert lm_head.tile_of(chunk, vocabulary, tokens) == tile


def test_attached_in_tiles_is_undone_and_gives_the_same_loss() -> None:
    model = selftest.tiny_model("llama")
    before, forward = model(**BATCH), model.lm_head.forward
    handle = attached(model, loss_chunk=5)
    output = model(**BATCH)
    assert output.logits is None
    assert model(**BATCH, return_dict=False)[1] is None
    torch.testing.assert_close(output.loss, before.loss, rtol=1e-5, atol=0)
    assert model(**BATCH, return_logits=True).logits.shape == before.logits.shape
    assert model(input_ids=BATCH["input_ids"]).logits.shape == before.logits.shape
    handle.remove()
    assert model.lm_head.forward == forward
    assert "forward" not in vars(model.lm_head)
    assert torch.equal(model(**BATCH).logits, before.logits)


def test_what_a_model_does_to_its_logits_and_ds_cp_does_not_know_is_stopped() -> None:
    model = selftest.tiny_model("llama")
    model.lm_head.register_forward_hook(lambda module, args, output: output * 1.1)
    attached(model, loss_chunk=5)
    with pytest.raises(ValueError, match="does something to its logits before its loss"):
        model(**BATCH)


def test_logit_scaling_and_softcap_are_read_from_the_config() -> None:
    config = selftest.tiny_model("granite").config
    config.logits_scaling = 4.0
    assert lm_head.scaling(config) == (0.25, None)
    config = selftest.tiny_model("llama").config
    assert lm_head.scaling(config) == (1.0, None)
    config.final_logit_softcapping, config.logit_scale = 30.0, 0.5
    assert lm_head.scaling(config) == (0.5, 30.0)


@pytest.mark.parametrize("terms", [{"label_smoothing": 1.0}, {"label_smoothing": -0.1}, {"z_loss": -1.0}])
def test_impossible_terms_are_refused(terms: dict[str, float]) -> None:
    model = selftest.tiny_model("llama")
    attached(model)
    with pytest.raises(ValueError, match=r"label_smoothing must be in \[0, 1\)"):
        model(**BATCH, **terms)


def test_ligers_loss_is_refused_where_it_would_be_another() -> None:
    model = selftest.tiny_model("llama")
    with pytest.raises(ValueError, match=r"loss_kernel: liger: its kernel is Triton, for GPUs, and this run is on cpu; or set it"):
        lm_head.refuse_liger(model, "cpu")
    model.config.logit_scale = 0.5
    with pytest.raises(ValueError, match=r"scales its logits by 0\.5"):
        lm_head.refuse_liger(model, "cuda")
    model.lm_head = nn.Sequential(model.lm_head)
    with pytest.raises(ValueError, match="is no plain linear layer"):
        lm_head.refuse_liger(model, "cuda")


def test_ligers_loss_has_no_weights_of_tokens() -> None:
    model = selftest.tiny_model("llama")
    attached(model, loss_kernel="liger")
    with pytest.raises(ValueError, match="loss_weights: Liger's loss has none"):
        model(**BATCH, loss_weights=torch.ones(BATCH["input_ids"].shape))


def test_the_flops_profiler_of_deepspeed_does_not_reach_the_summed_product() -> None:
    """For a step it puts an addmm in torch's place that knows no `out_dtype`, on rank 0 alone."""
    x = torch.ones(2, 2)
    profiler._patch_tensor_methods()
    try:
        with pytest.raises(TypeError, match="out_dtype"):
            torch.addmm(x, x, x, out_dtype=torch.float32)
        assert torch.equal(tiled_head.ADDMM(x, x, x), x + x @ x)
        assert tiled_head.ADDMM is not torch.addmm
    finally:
        profiler._reload_tensor_methods()
    assert tiled_head.ADDMM is torch.addmm
