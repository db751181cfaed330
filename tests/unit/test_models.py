"""What is refused, by which property, and that attaching a model can be undone to the bit."""

from __future__ import annotations

import hashlib
import inspect
from typing import Any

import pytest
import torch
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    PretrainedConfig,
    PreTrainedModel,
)

from ds_cp import resolve, selftest, topology
from ds_cp.batch import IGNORE, Methods
from ds_cp.kernels import attention as kernels
from ds_cp.kernels import delta as deltas
from ds_cp.loss import CausalLMLoss
from ds_cp.mesh import AxisGroup, Mesh
from ds_cp.models import (
    attach,
    checks,
    families,
    family_dense,
    family_gated_delta,
    family_kda,
    family_lightning,
    family_mamba1,
    family_mamba2,
    family_short_conv,
    gated_delta,
    model_types,
    trial,
)

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}


def small(model_type: str, **changes: Any) -> PreTrainedModel:
    settings = {**SMALL, **changes}
    return AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**settings))


def with_config(model: PreTrainedModel, **changes: Any) -> PreTrainedModel:
    for name, value in changes.items():
        setattr(model.config, name, value)
    return model


def expert_parallel(by_deepspeed: bool = False) -> PreTrainedModel:
    """A model marked as transformers, or DeepSpeed, marks one whose experts are spread over ranks."""
    model = small("mixtral", num_local_experts=2)
    experts = model.model.layers[1].mlp.experts
    if by_deepspeed:
        experts.down_proj.allreduce = False
    else:
        experts._is_expert_parallel = True
    return model


def gemma3(**changes: Any) -> PretrainedConfig:
    text = {**SMALL, "layer_types": ["full_attention"] * 2, **changes}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28}
    return CONFIG_MAPPING["gemma3"](text_config=text, vision_config=vision, mm_tokens_per_image=4)


def blt() -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(CONFIG_MAPPING["blt"]())


REFUSED = {
    "a window of nothing (mistral)": (lambda: small("mistral", sliding_window=0), "sliding window of 0: it must be"),
    "chunked layers (llama)": (
        lambda: with_config(small("llama"), layer_types=["chunked_attention", "full_attention"]),
        "layer 0 is chunked_attention",
    ),
    "temperature by position of another form (llama)": (
        lambda: with_config(small("llama"), attn_temperature_tuning=True),
        "attn_temperature_tuning numbers positions from the start of every shard",
    ),
    "softcap that is not passed on (llama)": (
        lambda: with_config(small("llama"), attn_logit_softcapping=30.0),
        "has a softcap of 30.0 that it does not pass",
    ),
    "router noise (phimoe)": (lambda: small("phimoe", num_local_experts=2), "router_jitter_noise is 0.01"),
    "experts on other ranks, transformers (mixtral)": (lambda: expert_parallel(), "experts is split by transformers' expert par"),
    "experts on other ranks, DeepSpeed (mixtral)": (lambda: expert_parallel(by_deepspeed=True), "of an expert-parallel layer of"),
    "router noise (mixtral)": (
        lambda: small("mixtral", num_local_experts=2, router_jitter_noise=0.1),
        "router_jitter_noise is 0.1",
    ),
    "recurrent (mamba)": (lambda: small("mamba", state_size=4), "recurrent layers of this kind are not in this version"),
    "dropout (llama)": (lambda: small("llama", attention_dropout=0.1), "attention_dropout is 0.1: set it to 0"),
    "length-dependent rope (llama)": (
        lambda: small("llama", rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}),
        "rope_type dynamic",
    ),
    "layers left out at random (opt)": (lambda: small("opt", ffn_dim=32, layerdrop=0.1), "config.layerdrop is 0.1: set it to 0"),
    "dropout of another name (gpt2)": (lambda: small("gpt2", attn_pdrop=0.1), "config.attn_pdrop is 0.1: set it to 0"),
    "a mask of its own (doge)": (lambda: small("doge"), "a tiny twin of it was tried, and DogeAttention passes a mask of its own"),
    "no interface (bloom)": (lambda: small("bloom", n_head=4, attention_dropout=0.0), "0 modules mix tokens through"),
    "encoder-decoder (t5)": (
        lambda: AutoModelForSeq2SeqLM.from_config(CONFIG_MAPPING["t5"](d_model=32, d_kv=8, d_ff=32, num_layers=1, vocab_size=64)),
        "encoder-decoder",
    ),
    "no language modelling head": (lambda: small("llama").model, "no causal language modelling head"),
    "both directions (gemma3)": (
        lambda: AutoModelForImageTextToText.from_config(gemma3(use_bidirectional_attention=True)),
        "its attention is not causal",
    ),
    "several stacks (blt)": (lambda: blt(), "it is not one stack of layers"),
    "bidirectional (llama)": (lambda: small("llama", is_causal=False), "its attention is not causal"),
    "not a transformers model": (lambda: torch.nn.Linear(2, 2), "not a transformers PreTrainedModel"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_the_property_that_would_be_trained_wrong(case: str) -> None:
    build, reason = REFUSED[case]
    with pytest.raises(ValueError, match=r"sequence_parallel\.size to 1") as caught:
        trial.refuse(build())
    assert reason in str(caught.value), str(caught.value)
    assert str(caught.value).count(". ") == 0, "one sentence"


@pytest.mark.parametrize("model_type", model_types())
def test_every_listed_type_is_accepted(model_type: str) -> None:
    checks.refuse(selftest.tiny_model(model_type))


def test_a_sink_parameter_is_refused_on_any_model() -> None:
    model = small("llama")
    model.model.layers[0].self_attn.sinks = torch.nn.Parameter(torch.zeros(4))
    with pytest.raises(ValueError, match="attention sink"):
        checks.refuse(model)


def test_families_do_not_share_model_types() -> None:
    assert len(model_types()) == len(set(model_types())) == sum(len(f.MODEL_TYPES) for f in families())
    assert family_dense.refuse(selftest.tiny_model("llama").config) is None


def alone() -> Mesh:
    axis = AxisGroup(group=None, ranks=(0,), rank=0)
    return Mesh(topology=topology.Topology(1, 1, 1), ulysses=axis, ring=axis, seq=axis, data=axis)


def attached(model: PreTrainedModel, kernel: str = "torch_cpu", **settings: Any) -> attach.Handle:
    delta = deltas.load("reference") if checks.linear_shapes(model) else None
    methods = Methods(
        attention=kernels.load(kernel),
        layout="zigzag",
        delta=delta,
        windows=checks.windows(model),
        scans=bool(checks.scan_heads(model)),
        halo=checks.halo(model),
    )
    handle = attach.Handle(model, alone(), methods, CausalLMLoss("mean", divisor=lambda: 1), **settings)
    handle.apply()
    return handle


@pytest.mark.parametrize("model_type", ["llama", "gpt_neox"])
def test_attaching_is_undone_to_the_bit(model_type: str) -> None:
    model = selftest.tiny_model(model_type)
    batch = {"input_ids": torch.arange(3, 40).unsqueeze(0), "labels": torch.arange(3, 40).unsqueeze(0)}
    before_state = {k: v for k, v in vars(model).items() if not k.startswith("_")}, model.config._attn_implementation
    before = model(**batch)
    handle = attached(model)
    sharded = model(**batch)
    assert not torch.equal(sharded.logits, before.logits) or model.config._attn_implementation == attach.IMPLEMENTATION
    torch.testing.assert_close(sharded.loss, before.loss, rtol=1e-5, atol=0)
    handle.remove()
    after = model(**batch)
    assert torch.equal(after.logits, before.logits)
    assert torch.equal(after.loss, before.loss)
    assert ({k: v for k, v in vars(model).items() if not k.startswith("_")}, model.config._attn_implementation) == before_state
    assert not model._forward_pre_hooks
    assert not model._forward_hooks


def test_an_attached_model_saves_a_config_without_our_implementation(tmp_path: Any) -> None:
    model = selftest.tiny_model("llama")
    attached(model)
    model.save_pretrained(tmp_path)
    assert attach.IMPLEMENTATION not in (tmp_path / "config.json").read_text()


def test_a_model_whose_attention_is_set_while_attached_is_refused_in_the_next_pass() -> None:
    model = selftest.tiny_model("llama")
    handle = attached(model)
    batch = {"input_ids": torch.arange(3, 40).unsqueeze(0), "labels": torch.arange(3, 40).unsqueeze(0)}
    wanted = model(**batch).loss
    model.set_attn_implementation("sdpa")  # as a callback does that generates
    with pytest.raises(ValueError, match="its attention was set to sdpa under ds_cp"):
        model(**batch)
    model.set_attn_implementation(attach.IMPLEMENTATION)
    with handle.disabled():
        model.set_attn_implementation("eager")
    torch.testing.assert_close(model(**batch).loss, wanted)


def test_a_model_that_is_compiled_while_attached_is_refused_in_the_next_pass() -> None:
    model = selftest.tiny_model("llama")
    attached(model)
    model.compile(backend="eager")
    with pytest.raises(ValueError, match="the model was compiled under ds_cp"):
        model(input_ids=torch.arange(3, 40).unsqueeze(0))


SOURCES = (
    gated_delta.SOURCES
    | family_short_conv.SOURCES
    | family_mamba2.SOURCES
    | family_lightning.SOURCES
    | family_mamba1.SOURCES
    | family_kda.SOURCES
)
OTHERS = (
    family_short_conv.MODEL_TYPES
    | family_mamba2.MODEL_TYPES
    | family_lightning.MODEL_TYPES
    | family_mamba1.MODEL_TYPES
    | family_kda.MODEL_TYPES
)
RESTATED = sorted(family_gated_delta.MODEL_TYPES | OTHERS)


@pytest.mark.parametrize("model_type", RESTATED)
def test_forwards_that_are_restated_are_those_that_were_read(model_type: str) -> None:
    seen = {type(module) for module in selftest.tiny_model(model_type).modules() if type(module).__name__ in SOURCES}
    assert seen
    for kind in seen:
        source = inspect.getsource(inspect.unwrap(kind.forward))
        found = hashlib.sha256(source.encode()).hexdigest()[:16]
        assert found in SOURCES[kind.__name__], f"{kind.__name__} has changed: re-read this forward, then note {found}"


@pytest.mark.parametrize("model_type", RESTATED)
def test_one_rank_of_a_hybrid_computes_what_hf_does_and_gives_the_model_back(model_type: str) -> None:
    model = selftest.tiny_model(model_type)
    batch = {"input_ids": torch.arange(3, 70).unsqueeze(0), "labels": torch.arange(3, 70).unsqueeze(0)}
    before = model(**batch)
    handle = attached(model)
    sharded = model(**batch)
    assert handle._checked, "the census has counted recurrent layers too"
    torch.testing.assert_close(sharded.loss, before.loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(sharded.logits, before.logits, rtol=1e-4, atol=1e-5)
    handle.remove()
    assert torch.equal(model(**batch).logits, before.logits)
    assert not any("forward" in module.__dict__ or module._forward_pre_hooks for module in model.modules())


def test_a_recurrent_layer_called_past_the_hooks_is_stopped() -> None:
    model = selftest.tiny_model("qwen3_5_text")
    attached(model)
    with pytest.raises(ValueError, match="without ds_cp's context"):
        model.model.layers[0].linear_attn(torch.zeros(1, 4, 64))


def test_decoding_a_hybrid_with_a_cache_is_refused() -> None:
    model = selftest.tiny_model("qwen3_5_text")
    attached(model)
    with pytest.raises(ValueError, match="decoding with a cache is not sharded"):
        model(input_ids=torch.arange(3, 40).unsqueeze(0), use_cache=True)


def test_a_model_that_drops_the_context_is_stopped() -> None:
    model = selftest.tiny_model("llama")
    attached(model)
    layer = model.model.layers[1].self_attn
    inner = layer.forward
    layer.forward = lambda *args, cp=None, **kwargs: inner(*args, **kwargs)
    with pytest.raises(ValueError, match="drops unknown keywords"):
        model(input_ids=torch.arange(3, 40).unsqueeze(0))


def test_a_layer_that_never_calls_the_interface_is_stopped_by_the_census() -> None:
    model = selftest.tiny_model("llama")
    attached(model)
    model.model.layers[1].self_attn.forward = lambda hidden_states, **kwargs: (hidden_states, None)
    with pytest.raises(ValueError, match=r"of 2 layers that mix tokens 1 ran under ds_cp; model\.layers\.1\.self_attn"):
        model(input_ids=torch.arange(3, 40).unsqueeze(0))


def test_a_listed_type_whose_layer_runs_twice_is_stopped_by_the_census() -> None:
    model = selftest.tiny_model("llama")
    attached(model)
    layer = model.model.layers[1].self_attn
    inner = layer.forward
    layer.forward = lambda *args, **kwargs: (inner(*args, **kwargs), inner(*args, **kwargs))[1]
    with pytest.raises(ValueError, match=r"model\.layers\.1\.self_attn ran 2 times under ds_cp in one pass, and 1 is"):
        model(input_ids=torch.arange(3, 40).unsqueeze(0))


@pytest.mark.parametrize(
    ("keyword", "value", "reason"),
    [
        ("use_cache", True, "decoding with a cache"),
        ("output_attentions", True, "output_attentions"),
        ("logits_to_keep", 1, "logits_to_keep"),
    ],
)
def test_keywords_that_need_the_whole_row_are_refused(keyword: str, value: Any, reason: str) -> None:
    model = selftest.tiny_model("llama")
    attached(model)
    with pytest.raises(ValueError, match=reason):
        model(input_ids=torch.arange(3, 40).unsqueeze(0), **{keyword: value})


def test_a_window_that_the_batch_was_not_planned_for_is_refused_at_the_call() -> None:
    q = torch.zeros(1, 4, 8, 8)
    context: Any = type("Context", (), {"census": None, "plans": {None: None}})()
    with pytest.raises(ValueError, match="sliding_window=3; its layers were found to have None"):
        attach.attention_forward(torch.nn.Identity(), q, q, q, cp=context, sliding_window=3)


def test_windows_are_found_layer_by_layer() -> None:
    assert checks.windows(selftest.tiny_model("gemma3_text")) == (11, None)
    assert checks.windows(selftest.tiny_model("mistral")) == (11, 11)
    assert checks.windows(selftest.tiny_model("llama")) == (None, None)


@pytest.mark.parametrize("keyword", ["dropout", "head_mask"])
def test_what_only_shows_at_the_call_is_refused_there(keyword: str) -> None:
    q = torch.zeros(1, 4, 8, 8)
    context: Any = type("Context", (), {"census": None})()
    with pytest.raises(ValueError, match=f"{keyword}=3"):
        attach.attention_forward(torch.nn.Identity(), q, q, q, cp=context, **{keyword: 3})


def test_loss_weights_weigh_targets() -> None:
    model = selftest.tiny_model("llama")
    ids = torch.arange(3, 40).unsqueeze(0)
    weights = torch.rand(ids.shape, generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, 5:9] = IGNORE
    logits = model(input_ids=ids).logits[:, :-1].flatten(0, 1)
    losses = torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="none")
    kept = (labels[:, 1:] != IGNORE).flatten()
    wanted = (losses * weights[:, 1:].flatten()).sum() / weights[:, 1:].flatten()[kept].sum()
    attached(model)
    got = model(input_ids=ids, labels=labels, loss_weights=weights).loss
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=0)


def test_a_row_without_targets_has_a_loss_and_a_gradient_of_zero() -> None:
    model = selftest.tiny_model("llama")
    attached(model)
    ids = torch.arange(3, 40).unsqueeze(0)
    loss = model(input_ids=ids, labels=torch.full_like(ids, IGNORE)).loss
    loss.backward()
    assert loss.item() == 0.0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize(
    ("section", "wanted"),
    [
        ({}, torch.float32),
        ({"bf16": {"enabled": True}}, torch.bfloat16),
        ({"bf16": {"enabled": "auto"}, "fp16": {"enabled": False}}, torch.float32),
        ({"fp16": {"enabled": True}}, torch.float16),
        ({"torch_autocast": {"enabled": True, "dtype": "torch.bfloat16"}}, torch.bfloat16),
    ],
)
def test_kernels_are_asked_for_the_dtype_that_deepspeed_will_make(section: dict[str, Any], wanted: torch.dtype) -> None:
    assert resolve.compute_dtype(section, torch.nn.Linear(2, 2)) == wanted


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_layer_that_is_run_again_in_backward_has_the_context_of_its_own_row(reentrant: bool) -> None:
    """Jamba's layers keep keywords from their mixers. Two rows of other documents go forward before either goes back."""
    positions = [torch.arange(30), torch.cat([torch.arange(11), torch.arange(19)])]
    ids = torch.arange(3, 33).unsqueeze(0)
    rows = [{"input_ids": ids, "labels": ids, "position_ids": each.unsqueeze(0)} for each in positions]
    found = []
    for checkpointing in (False, True):
        model = selftest.tiny_model("jamba").train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        handle = attached(model)
        sum(model(**row).loss for row in rows).backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
        handle.remove()
    for name, wanted in found[0].items():
        torch.testing.assert_close(found[1][name], wanted, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")
