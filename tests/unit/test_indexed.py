"""Attention to chosen keys: against its definition, in fp64, and what an indexer is given to choose from."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ds_cp import batch as batches
from ds_cp import indexed
from ds_cp.batch import SequenceContext
from ds_cp.kernels import attention as kernels
from ds_cp.models import checks, indexer, trial
from tests.unit.test_counted import model_of
from tests.unit.test_models import alone, attached

DOCUMENTS = (0, 21, 22, 40)


def context() -> SequenceContext:
    methods = batches.Methods(attention=kernels.load("reference"), layout="zigzag")
    batch = {"input_ids": torch.zeros(1, 40, dtype=torch.long), "seq_lens": torch.tensor(DOCUMENTS).diff()}
    return batches.prepare(batch, alone(), methods, torch.device("cpu"))[1]


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def from_the_definition(q: Tensor, k: Tensor, v: Tensor, index: Tensor, scale: float, sink: Tensor | None) -> Tensor:
    token, bounds = torch.arange(40), torch.tensor(DOCUMENTS)
    document = torch.bucketize(token, bounds, right=True)
    allowed = (document[:, None] == document) & (token[:, None] >= token)
    chosen = torch.stack([torch.isin(token, each) for each in index[0]])
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    weights = (q @ k.transpose(2, 3) * scale).exp().masked_fill(~(allowed & chosen), 0.0)
    total = weights.sum(-1, keepdim=True) + (0.0 if sink is None else sink.exp()[:, None, None])
    return (weights / total @ v).transpose(1, 2)


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("scores", [indexed.TILE_SCORES, 40 * 4 * 7])
def test_chosen_keys_alone_are_attended(monkeypatch: pytest.MonkeyPatch, sinks: bool, kv_heads: int, scores: int) -> None:
    monkeypatch.setattr(indexed, "TILE_SCORES", scores)
    torch.manual_seed(0)
    q, k, v, sink = drawn(1, 4, 40, 8), drawn(1, kv_heads, 40, 8), drawn(1, kv_heads, 40, 8), drawn(4) if sinks else None
    index = torch.stack([torch.cat((torch.randperm(40)[:9], torch.tensor([at]))) for at in range(40)]).unsqueeze(0).int()
    inputs = [q, k, v, *([sink] if sinks else [])]
    out, wanted = indexed.attend_chosen(q, k, v, index, context(), 0.3, sink), from_the_definition(q, k, v, index, 0.3, sink)
    torch.testing.assert_close(out, wanted, rtol=1e-10, atol=1e-12)
    dout = torch.randn_like(out)
    for found, each in zip(torch.autograd.grad(out, inputs, dout), torch.autograd.grad(wanted, inputs, dout), strict=True):
        torch.testing.assert_close(found, each, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("scores", [indexed.TILE_SCORES, 3 * 40 * 7])
def test_keys_of_the_document_up_to_the_query_are_chosen_from(monkeypatch: pytest.MonkeyPatch, scores: int) -> None:
    monkeypatch.setattr(indexed, "TILE_SCORES", scores)
    seen = []

    def chosen(keys: Tensor, allowed: Tensor, tile: tuple[int, int]) -> Tensor:
        assert keys.shape == (1, 40, 5)
        seen.append(allowed[0])
        return torch.arange(*tile)[None, :, None]

    assert indexed.choose(torch.randn(40, 5), chosen, 3, context()).flatten().tolist() == list(range(40))
    token, document = torch.arange(40), torch.bucketize(torch.arange(40), torch.tensor(DOCUMENTS), right=True)
    assert torch.equal(torch.cat(seen), (document[:, None] == document) & (token[:, None] >= token))
    assert len(seen) == (6 if scores == 3 * 40 * 7 else 1)


@pytest.mark.parametrize("model_type", ["deepseek_v32", "hy_v4"])
def test_a_model_is_computed_tile_by_tile_and_given_back(monkeypatch: pytest.MonkeyPatch, model_type: str) -> None:
    monkeypatch.setattr(indexed, "TILE_SCORES", 40 * 8 * 7)
    model = model_of(model_type)
    batch, documents = trial.rows()[1]
    wanted, gradients = trial.alone(model, batch, documents)
    handle = attached(model, "reference")
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    assert float(loss.detach()) == pytest.approx(wanted, rel=1e-5)
    for name, found in trial.gradients(model).items():
        assert float((found - gradients[name]).abs().max()) <= 1e-4 * float(gradients[name].abs().max()) + 1e-7, name
    handle.remove()
    assert not any("forward" in vars(attention.indexer) for attention in indexer.indexers(model))
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert float(trial.alone(model, batch, documents)[0]) == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("model_type", ["glm_moe_dsa", "llama4_text"])
def test_checkpointed_layers_choose_and_count_the_same_again(model_type: str, reentrant: bool) -> None:
    model = model_of(model_type)
    batch, documents = trial.rows()[1]
    wanted, gradients = trial.alone(model, batch, documents)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    attached(model, "reference")
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    assert float(loss.detach()) == pytest.approx(wanted, rel=1e-5)
    for name, found in trial.gradients(model).items():
        assert float((found - gradients[name]).abs().max()) <= 1e-4 * float(gradients[name].abs().max()) + 1e-7, name


def test_layers_may_differ_in_heads_and_sizes() -> None:
    model = model_of("dots3_note_text")
    assert sorted(checks.heads(model)) == [(8, 8), (16, 16)]
    assert checks.head_size(model) == 16
