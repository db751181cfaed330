"""Refusals, by the model's real properties: what it has that this version would train wrong, in one sentence each.

Every check reads the config or the modules; none runs the model. Order matters only for which reason is told first.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Protocol, cast

from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from ds_cp.balance import Chunks, Window
from ds_cp.kernels.delta import Shapes
from ds_cp.models import attention_only, counted, family_of, indexer, vision

RECURRENT = ("deltanet", "deltaattention", "mamba", "recurrent", "rwkv", "shortconv", "linearattention", "lightningattention")
LAYER_TYPES = ("full_attention", "sliding_attention")
CHUNKED = "chunked_attention"
INDEXED = "indexed_attention"
ENCODER_ATTENTION = "encoder_attn"
LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")


def attention_modules(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Modules of the language model whose forward looks its kernel up in HF's attention interface, by name, but those that attend
    an encoder's output: a causal language model has none, and the census ends a run in which one is called."""
    tower = other_modules(model)
    return {
        name: module
        for name, module in model.named_modules()
        if _uses_interface(type(module)) and id(module) not in tower and name.rpartition(".")[2] != ENCODER_ATTENTION
    }


def other_modules(model: PreTrainedModel) -> set[int]:
    """Ids of the modules that see images or sound, whole, and not the row: what stands beside the language model, and models inside
    it whose config is another part's."""
    others: set[int] = set()
    if vision.has_parts(model.config):
        text, base = {id(m) for m in model.get_decoder().modules()}, model.base_model
        others |= {id(m) for m in base.modules() if id(m) not in text and m is not base}
        kinds = tuple(type(part) for part in vision.parts(model.config).values())
        towers = [m for m in model.modules() if isinstance(m, PreTrainedModel) and isinstance(m.config, kinds)]
        others |= {id(m) for tower in towers for m in tower.modules()}
    return others


def token_mixers(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Every module that mixes tokens and runs under ds_cp, by name."""
    family = family_of(model.config)
    return {**attention_modules(model), **(family.mixers(model) if family else {})}


def windows(model: PreTrainedModel) -> tuple[Window, ...]:
    """Of each attention layer the number of keys that a query attends, or its chunks, None for all before it."""
    config = model.config.get_text_config()
    return tuple(window_of(module, config) for module in attention_modules(model).values()) or (None,)


def window_of(module: nn.Module, config: PretrainedConfig) -> Window:
    """The keys that a query of the layer attends; None for all before it, and for a window that its attention is never told."""
    kinds, index = getattr(config, "layer_types", None), getattr(module, "layer_idx", None)
    if kinds and index is not None and kinds[index] == CHUNKED:
        return Chunks(config.attention_chunk_size)
    window = window_said(module, config)
    return window if window is None or "sliding_window" in _keywords(module) else None


def window_said(module: nn.Module, config: PretrainedConfig) -> int | None:
    """The module's own window where it has one, else the config's; None for a layer that says it has none."""
    kinds, index = getattr(config, "layer_types", None), getattr(module, "layer_idx", None)
    if getattr(module, "is_sliding", True) is False or (kinds and index is not None and kinds[index] == "full_attention"):
        return None
    return getattr(module, "sliding_window", getattr(config, "sliding_window", None))


def linear_shapes(model: PreTrainedModel) -> list[Shapes]:
    """Of every Gated DeltaNet layer, with all its heads."""
    family = family_of(model.config)
    mixers = (family.mixers(model) if family else {}).values()
    return [_shapes(module) for module in mixers if hasattr(module, "head_v_dim")]


def linear_heads(model: PreTrainedModel) -> list[tuple[int, int]]:
    """(value heads, key heads) of every Gated DeltaNet layer, or (heads, groups) of every other recurrent layer."""
    return [(shapes.value_heads, shapes.key_heads) for shapes in linear_shapes(model)] or scan_heads(model)


def scan_heads(model: PreTrainedModel) -> list[tuple[int, int]]:
    """(heads, groups) of every recurrent layer that passes no state between ranks."""
    family = family_of(model.config)
    found = [family.scan_heads(module) for module in family.mixers(model).values()] if family else []
    return [each for each in found if each is not None]


class Delta(Protocol):
    """What is read of a Gated DeltaNet layer."""

    num_k_heads: int
    num_v_heads: int
    head_k_dim: int
    head_v_dim: int
    conv_kernel_size: int
    activation: str


class Latent(Protocol):
    """What is read of a layer of latent attention."""

    qk_nope_head_dim: int
    qk_rope_head_dim: int


def _shapes(module: nn.Module) -> Shapes:
    delta = cast(Delta, module)
    return Shapes(
        key_heads=delta.num_k_heads,
        value_heads=delta.num_v_heads,
        key_size=delta.head_k_dim,
        value_size=delta.head_v_dim,
        conv_width=delta.conv_kernel_size,
        activation=delta.activation,
    )


def halo(model: PreTrainedModel) -> int:
    """Tokens before its own that a token sees in the model's short convolutions; 0 for a model without."""
    family = family_of(model.config)
    return max((family.halo(module) for module in family.mixers(model).values()), default=0) if family else 0


def heads(model: PreTrainedModel) -> list[tuple[int, int]]:
    """(query heads, key/value heads) of the model's attention layers, each pair once."""
    config = model.config.get_text_config()
    query = _of_all_layers(config, "decoder_attention_heads") or _of_all_layers(config, "num_attention_heads")
    if query is None and not attention_modules(model):  # planned as if its recurrent heads were attention's
        return list(dict.fromkeys(scan_heads(model)))
    # The config has no number for all layers only where each layer tells its own.
    usual = cast(tuple[int, int], (query, _of_all_layers(config, "num_key_value_heads") or query))
    return list(dict.fromkeys(_heads_of(module, query) or usual for module in attention_modules(model).values())) or [usual]


def _of_all_layers(config: PretrainedConfig, key: str) -> int | None:
    """None also where layers differ in it, of which the config then tells only layer by layer."""
    try:
        return getattr(config, key, None)
    except RuntimeError:
        return None


def _heads_of(module: nn.Module, query: int | None) -> tuple[int, int] | None:
    """A layer's own, which may be others than the config's (Laguna, MiMo, JetMoe), where its parts tell."""
    width = getattr(getattr(module, "k_proj", None), "out_features", None)
    size, groups = getattr(module, "head_dim", None), getattr(module, "num_key_value_groups", None)
    own = getattr(module, "num_heads", None)
    query = own if isinstance(own, int) else query
    if not isinstance(groups, int) or query is None or query % groups:
        return None
    if not (isinstance(width, int) and isinstance(size, int)) or width % size:
        return query, query // groups
    return width // size * groups, width // size


def head_size(model: PreTrainedModel) -> int:
    """Of queries and keys, the largest; under latent attention values have another, which `attach` pads to it."""
    config = model.config.get_text_config()
    latent = [cast(Latent, module) for module in attention_modules(model).values() if _is_latent(module)]
    if latent:
        return max(module.qk_nope_head_dim + module.qk_rope_head_dim for module in latent)
    own = [getattr(module, "head_dim", None) for module in attention_modules(model).values()]
    sizes = [size for size in own if isinstance(size, int)]
    if own and len(sizes) == len(own):
        return max(sizes)
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _is_latent(module: nn.Module) -> bool:
    return all(isinstance(getattr(module, key, None), int) for key in ("qk_nope_head_dim", "qk_rope_head_dim"))


def refuse(model: nn.Module) -> None:
    """Raises a ValueError that names the first property of the model that this version cannot shard."""
    found = hugging_face(model)
    reason = next(_reasons(found), None)
    if reason is not None:
        raise ValueError(
            f"model: {type(found).__name__} ({found.config.model_type}) cannot be trained under sequence parallelism: "
            f"{reason}; change the model or set sequence_parallel.size to 1"
        )


def hugging_face(model: nn.Module) -> PreTrainedModel:
    """The model, or a ValueError where it is none of transformers."""
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"model: {type(model).__name__} is not a transformers PreTrainedModel, so ds_cp has no door into its attention; "
            "use a Hugging Face model or set sequence_parallel.size to 1"
        )
    return model


def _reasons(model: PreTrainedModel) -> Iterator[str]:
    """Each property's reason; the generic ones first, so that a model is refused for what it is and not for its name."""
    config = model.config.get_text_config()
    yield from _of_architecture(model, config)
    yield from _of_split_parameters(model)
    yield from _of_layers(model, config)
    yield from _of_scores(model, config)
    family = family_of(model.config)
    if family is not None and (reason := family.refuse(config)) is not None:
        yield reason
    yield from _of_interface(model, config)


def _of_architecture(model: PreTrainedModel, config: PretrainedConfig) -> Iterator[str]:
    if model.config.is_encoder_decoder:
        yield "encoder-decoder models are not in this version"
    if not hasattr(config, "num_hidden_layers"):
        yield f"it is not one stack of layers: its {type(config).__name__} counts none"
    if not model.can_generate():
        yield "it has no causal language modelling head (use an AutoModelForCausalLM)"
    if not getattr(config, "is_causal", True) or getattr(config, "use_bidirectional_attention", None) not in (
        None,
        False,
        "vision",
    ):
        yield "its attention is not causal"


def _of_split_parameters(model: PreTrainedModel) -> Iterator[str]:
    """Experts or heads that other ranks hold, which would have to be given this rank's tokens."""
    advice = "ZeRO-3 splits all experts over all ranks, and gathers a layer's for the time of its use"
    for name, module in model.named_modules():
        if getattr(module, "_is_expert_parallel", False):
            yield f"{name} is split by transformers' expert parallelism (load the model without ep_size: {advice})"
    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor):
            yield f"{name} is split over ranks by another kind of parallelism (load the model whole, ZeRO-3 splits it)"
        if getattr(parameter, "allreduce", True) is False:
            yield f"{name} is of an expert-parallel layer of DeepSpeed (take the model's own experts: {advice})"


def _of_layers(model: PreTrainedModel, config: PretrainedConfig) -> Iterator[str]:
    family = family_of(model.config)
    handled, mixers = (family.HANDLES, family.mixers(model)) if family else (frozenset(), {})
    inside = {id(part) for mixer in mixers.values() for part in mixer.modules()} | other_modules(model)
    for name, module in model.named_modules():
        kind = type(module).__name__
        if _is_recurrent(type(module)) and id(module) not in inside and not _holds(module, inside):
            yield f"{name} is a {kind}: recurrent layers of this kind are not in this version"
        if isinstance(module, nn.Conv1d) and id(module) not in inside:
            yield f"{name} is a convolution over tokens, which would not see the neighbouring shard"
        if name.rsplit(".", 1)[-1] == "mtp":
            yield f"{name} predicts several tokens at once, which is not in this version; load the model without it"
    for index, kind in enumerate(getattr(config, "layer_types", None) or ()):
        if kind == CHUNKED and family is None and isinstance(getattr(config, "attention_chunk_size", None), int):
            continue
        if kind == INDEXED and family is None and indexer.indexers(model):
            continue
        if kind not in LAYER_TYPES and kind not in handled:
            yield f"layer {index} is {kind}: only {' and '.join(LAYER_TYPES)} layers are in this version"
    for key in ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"):
        if getattr(config, key, None) and family is not None and "experts" not in handled:
            yield f"config.{key} is {getattr(config, key)}: mixtures of experts are not in this version"
    for name, module in attention_modules(model).items():
        if family is not None and not getattr(module, "is_causal", True):
            yield f"{name}.is_causal is False: its attention is not causal"
        window = window_said(module, config)
        if window is not None and (not isinstance(window, int) or window < 1):
            yield f"{name} has a sliding window of {window}: it must be a whole number from 1, or None for full attention"
        if family is not None and window is not None and "sliding_window" not in _keywords(module):
            yield f"{name} has a sliding window of {window} that it does not pass to its attention"


def _is_recurrent(kind: type[nn.Module]) -> bool:
    """By its name, but for attention of that name (Kimi Linear's)."""
    name = kind.__name__.lower()
    return "norm" not in name and any(word in name for word in RECURRENT) and not _uses_interface(kind)


def _holds(module: nn.Module, inside: set[int]) -> bool:
    """Whether a module is only the wrapping of supported ones (OLMo-Hybrid names its whole layer after its attention)."""
    return any(id(part) in inside for part in module.modules())


def _of_scores(model: PreTrainedModel, config: PretrainedConfig) -> Iterator[str]:
    if getattr(config, "attn_logit_softcapping", None):
        for name, module in attention_modules(model).items():
            if "softcap" not in _keywords(module):
                yield f"{name} has a softcap of {config.attn_logit_softcapping} that it does not pass to its attention"
    if getattr(config, "attn_temperature_tuning", False) and (family_of(config) or not counted.tempered(model)):
        yield "config.attn_temperature_tuning numbers positions from the start of every shard"
    for key, value in vars(config).items():
        if "drop" in key and ("att" in key or "layer" in key) and isinstance(value, float) and value:
            yield f"config.{key} is {value}: set it to 0, shards would draw other masks than one process"
    noise = getattr(config, "router_jitter_noise", None)
    if noise:
        yield f"config.router_jitter_noise is {noise}: set it to 0, shards would draw other noise than one process"
    for name, _ in model.named_parameters():
        owner, _, leaf = name.rpartition(".")
        if leaf == "sinks" and "s_aux" not in _keywords(model.get_submodule(owner)):
            yield f"{name} is an attention sink that its layer does not pass to its attention"
    for kind in _rope_types(config):
        if kind in LENGTH_DEPENDENT_ROPE:
            yield f"rope_type {kind} derives its frequencies from the longest position it sees, which differs between shards"


def _rope_types(config: PretrainedConfig) -> list[str]:
    parameters = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    nested = [parameters, *(value for value in parameters.values() if isinstance(value, dict))]
    return [str(entry.get("rope_type", entry.get("type", "default"))) for entry in nested]


def _of_interface(model: PreTrainedModel, config: PretrainedConfig) -> Iterator[str]:
    found = token_mixers(model)
    family = family_of(model.config)
    layers = (family or attention_only).mixing(config)
    made = sum(isinstance(module, GradientCheckpointingLayer) for module in model.get_decoder().modules())
    enough = family is None and len(found) >= (min(layers, made) or layers)  # HRM runs a layer several times, and counts its calls
    if len(found) != layers and not enough:
        yield (
            f"{len(found)} modules mix tokens through transformers' attention interface or in a way that ds_cp knows, in "
            f"{layers} layers, so others could not be sharded"
        )


def _keywords(module: nn.Module) -> set[str]:
    """Names of the keywords that its forward gives to what it calls."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    constants = code.co_consts if code is not None else ()
    return {name for names in constants if isinstance(names, tuple) for name in names}


def _uses_interface(kind: type[nn.Module]) -> bool:
    code = getattr(inspect.unwrap(kind.forward), "__code__", None)
    return code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names
