"""The trial of a tiny twin: what it accepts, and the ways in which an architecture goes wrong under sharding, each in a Llama."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, LlamaForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ds_cp.models import checks, model_types, trial
from ds_cp.models.twin import twin, twin_config
from scripts import models_map

LLAMA = CONFIG_MAPPING["llama"](hidden_size=4096, num_attention_heads=32, num_key_value_heads=8)


def planted(change: Callable[[nn.Module], None]) -> type[LlamaForCausalLM]:
    """A Llama whose every instance has been changed, as a user's own architecture would be another."""

    class Planted(LlamaForCausalLM):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            change(self)

    return Planted


def on_forward(path: str, change: Callable[..., Any]) -> Callable[[nn.Module], None]:
    """Wraps the forward of a module: change(forward, *args, **kwargs)."""

    def wrap(model: nn.Module) -> None:
        module = model.get_submodule(path)
        forward = module.forward
        module.forward = lambda *args, **kwargs: change(forward, *args, **kwargs)

    return wrap


def token_shift(forward: Any, x: Tensor) -> Tensor:
    return forward(x + 0.5 * nn.functional.pad(x, (0, 0, 1, -1)))


def cumulative(forward: Any, x: Tensor) -> Tensor:
    return forward(x + x.cumsum(1) / 10)


def pooled(forward: Any, x: Tensor) -> Tensor:
    return forward(x) * (1 + x.mean((1, 2), keepdim=True)).sigmoid()


def own_positions(forward: Any, x: Tensor, position_ids: Tensor) -> Any:
    return forward(x, torch.arange(x.shape[1]).unsqueeze(0))


def capacity(forward: Any, x: Tensor) -> Tensor:
    """An expert with room for 16 tokens; the others are dropped."""
    return forward(x) * (torch.arange(x.shape[1]) < 16).unsqueeze(-1)


def alibi(model: nn.Module) -> None:
    for layer in model.model.layers:
        attention = layer.self_attn
        forward = attention.forward

        def biased(hidden_states: Tensor, *args: Any, _forward: Any = forward, attention_mask: Any = None, **kwargs: Any) -> Any:
            tokens = torch.arange(hidden_states.shape[1])
            bias = -0.1 * (tokens.unsqueeze(1) - tokens).abs().float()
            mask = bias.masked_fill(tokens.unsqueeze(1) < tokens, float("-inf"))[None, None]
            return _forward(hidden_states, *args, attention_mask=mask, **kwargs)

        attention.forward = biased


def both_ways(model: nn.Module) -> None:
    def interface(forward: Any, *args: Any, **kwargs: Any) -> Any:
        if "cp" not in kwargs:
            kwargs["attention_mask"] = torch.zeros(1, 1, args[0].shape[1] if args else kwargs["hidden_states"].shape[1], 1)
        return forward(*args, **kwargs)

    for index in range(2):
        on_forward(f"model.layers.{index}.self_attn", interface)(model)


def own_loss(model: nn.Module) -> None:
    forward = model.forward

    def with_loss(*args: Any, labels: Tensor | None = None, **kwargs: Any) -> Any:
        out = forward(*args, **kwargs)
        if labels is not None:
            out["loss"] = nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return out

    model.forward = with_loss


def drops_keywords(forward: Any, *args: Any, cp: Any = None, **kwargs: Any) -> Any:
    return forward(*args, **kwargs)


def drawn(forward: Any, x: Tensor) -> Tensor:
    return forward(x * (1 + 0.1 * torch.rand(x.shape[:2]).unsqueeze(-1)))


WRONG = {
    "token shift": (on_forward("model.layers.0.mlp", token_shift), r"with packed documents|model\.layers\.0\.mlp"),
    "cumulative sum": (on_forward("model.layers.1.mlp", cumulative), "gave another|mixes neighbouring"),
    "pooling over the row": (on_forward("model.layers.0.mlp", pooled), "gave another|mixes neighbouring"),
    "positions of its own": (on_forward("model.rotary_emb", own_positions), "rotary_emb|something before its logits|gave another"),
    "experts with a capacity": (on_forward("model.layers.0.mlp", capacity), "gave another|model.layers.0.mlp"),
    "alibi as a mask": (alibi, "passes a mask of its own"),
    "attention both ways": (both_ways, "gave another"),
    "a loss of its own": (own_loss, "gave another loss"),
    "keywords dropped": (on_forward("model.layers.0.self_attn", drops_keywords), "without ds_cp's context"),
    "random numbers": (on_forward("model.layers.0.mlp", drawn), "gave another"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_goes_wrong_under_sharding_is_found_and_named(case: str) -> None:
    change, reason = WRONG[case]
    found = trial.wrong(planted(change), LLAMA)
    assert found is not None
    assert re.search(reason, found), found


@pytest.mark.parametrize("change", [token_shift, cumulative, pooled, capacity])
def test_what_mixes_tokens_outside_attention_is_found_without_attention(change: Callable[..., Any]) -> None:
    model = twin(planted(on_forward("model.layers.1.mlp", change)), LLAMA)
    assert "model.layers.1.mlp" in (trial.mixes(model) or "")


def test_positions_counted_from_the_length_are_found_without_attention() -> None:
    model = twin(planted(on_forward("model.rotary_emb", own_positions)), LLAMA)
    assert "counts positions" in (trial.mixes(model) or "")


def test_a_plain_model_is_accepted() -> None:
    assert trial.wrong(LlamaForCausalLM, LLAMA) is None


ACCEPTED = (
    "gpt2",
    "opt",
    "phi",
    "cohere",
    "glm4",
    "helium",
    "exaone4",
    "laguna",
    "qwen2_moe",
    "mimo_v2_flash",
    "stablelm",
    "bert",
    "bart",
)
REFUSED = {"doge": "passes a mask of its own"}


@pytest.mark.parametrize("model_type", ACCEPTED)
def test_types_that_no_family_lists_are_accepted_by_what_they_do(model_type: str) -> None:
    assert model_type not in model_types()
    config = models_map.config_of(model_type)
    trial.refuse(twin(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)], config))


@pytest.mark.parametrize("model_type", REFUSED)
def test_and_refused_by_what_they_do(model_type: str) -> None:
    config = models_map.config_of(model_type)
    with pytest.raises(ValueError, match=REFUSED[model_type]) as caught:
        trial.refuse(twin(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)], config))
    assert str(caught.value).count(". ") == 0, "one sentence"


def test_a_twin_is_small_and_keeps_one_layer_of_each_kind() -> None:
    kinds = ["sliding_attention"] * 5 + ["full_attention"]
    config = CONFIG_MAPPING["gemma3_text"](num_hidden_layers=12, layer_types=kinds * 2, query_pre_attn_scalar=256)
    small = twin_config(config)
    assert (small.layer_types, small.num_hidden_layers) == (["sliding_attention", "full_attention"], 2)
    assert small.query_pre_attn_scalar == 256
    model = twin(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)], config)
    assert sum(p.numel() for p in model.parameters()) < 200_000
    assert checks.windows(model) == (11, None)


def test_a_twin_is_the_same_every_time_and_leaves_the_random_state_alone() -> None:
    before = torch.random.get_rng_state()
    first, second = (twin(LlamaForCausalLM, LLAMA) for _ in range(2))
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(p, q) for p, q in zip(first.parameters(), second.parameters(), strict=True))


def test_the_map_names_every_architecture_and_none_is_different() -> None:
    text = models_map.PAGE.read_text(encoding="utf-8")
    found = models_map.read(text)
    assert {state for state, *_ in found.values()} == {"exact", "refused"}
    if f"transformers {transformers.__version__}:" in text:  # another version has other architectures
        assert found.keys() == MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys()


def test_the_readme_has_the_counts_of_the_map() -> None:
    found = models_map.read(models_map.PAGE.read_text(encoding="utf-8"))
    exact = sum(state == "exact" for state, *_ in found.values())
    readme = (models_map.ROOT / "README.md").read_text(encoding="utf-8")
    assert f"{exact} of the {len(found)} causal language models" in readme
    through = [state == "exact" for state, _, through in found.values() if through]
    assert f"({sum(through) / len(through):.1%} of those that go through its attention interface)" in readme
