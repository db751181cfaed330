"""Gated DeltaNet layers under sequence parallelism, of the text hybrids and of the vision-language models over them.

A DeltaNet layer is one HF module without a door for its token mixing, so the `forward` of each instance is replaced: HF's own
projections, `ds_cp.delta` between them, HF's own gated norm and output projection. The convolution's weight is taken by a call of
its module, whose hooks (ZeRO-3) put the parameter together for the call and its backward. `SOURCES` says which forwards these are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from ds_cp.batch import SequenceContext
from ds_cp.delta import Layer, mix
from ds_cp.models.attention_only import TINY
from ds_cp.models.mixer import GatedNorm, Map, Parameters, begin, parameters, replace

Projected = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
"""q [1, T, K, H], k [1, T, K, H], v [1, T, V, G], the norm's gate [1, T, V * G], b [1, T, V], a [1, T, V]."""


class Mixer(Protocol):
    """What is read of such a module; each kind has its own projections."""

    key_dim: int
    value_dim: int
    head_k_dim: int
    head_v_dim: int
    activation: str
    A_log: Tensor
    dt_bias: Tensor
    conv1d: Parameters
    in_proj_qkv: Map
    in_proj_z: Map
    in_proj_b: Map
    in_proj_a: Map
    in_proj_qkvz: Map
    in_proj_ba: Map
    fix_query_key_value_ordering: Callable[[Tensor, Tensor], Projected]
    q_proj: Map
    k_proj: Map
    v_proj: Map
    g_proj: Map
    b_proj: Map
    a_proj: Map
    o_norm: GatedNorm
    norm: GatedNorm
    o_proj: Map
    out_proj: Map


def mixers(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if type(module).__name__ in _PROJECTIONS}


def attach(module: nn.Module) -> Callable[[], None]:
    return replace([(module, _forward), (cast(nn.Module, module.conv1d), parameters)])


def _forward(
    module: nn.Module,
    hidden_states: Tensor,
    cache_params: Any = None,
    attention_mask: Tensor | None = None,
    cp: SequenceContext | None = None,
    **_: Any,
) -> Tensor:
    """[1, T, hidden] to the same, of this rank's tokens."""
    context, mixer = begin(module, cp, cache_params, attention_mask), cast(Mixer, module)
    q, k, v, gate, b, a = _PROJECTIONS[type(module).__name__](mixer, hidden_states)
    weight, bias = mixer.conv1d(hidden_states)
    layer = Layer(
        conv_CW=weight.squeeze(1),
        conv_bias_C=bias,
        activation=mixer.activation,
        a_log_V=mixer.A_log,
        dt_bias_V=mixer.dt_bias,
        beta_scale=2.0 if getattr(module, "allow_neg_eigval", False) else 1.0,
    )
    q, k, v, b, a = (x.squeeze(0) for x in (q, k, v, b, a))
    out = mix(q, k, v, b, a, layer, context)
    project = mixer.o_proj if hasattr(module, "o_proj") else mixer.out_proj
    out = _norm(mixer)(out.reshape(-1, out.shape[-1]), gate.reshape(-1, out.shape[-1]))
    return project(out.reshape(*hidden_states.shape[:2], -1))


def _norm(mixer: Mixer) -> GatedNorm:
    return mixer.o_norm if hasattr(mixer, "o_norm") else mixer.norm


def _qwen3_5(mixer: Mixer, x: Tensor) -> Projected:
    sizes = (mixer.key_dim, mixer.key_dim, mixer.value_dim)
    q, k, v = mixer.in_proj_qkv(x).split(sizes, dim=-1)
    q, k, v = _by_head(mixer, q, k, v)
    return q, k, v, mixer.in_proj_z(x), mixer.in_proj_b(x), mixer.in_proj_a(x)


def _qwen3_next(mixer: Mixer, x: Tensor) -> Projected:
    q, k, v, z, b, a = mixer.fix_query_key_value_ordering(mixer.in_proj_qkvz(x), mixer.in_proj_ba(x))
    return q, k, v, z, b, a


def _olmo_hybrid(mixer: Mixer, x: Tensor) -> Projected:
    q, k, v = _by_head(mixer, mixer.q_proj(x), mixer.k_proj(x), mixer.v_proj(x))
    return q, k, v, mixer.g_proj(x), mixer.b_proj(x), mixer.a_proj(x)


def _by_head(mixer: Mixer, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    key, value = (-1, mixer.head_k_dim), (-1, mixer.head_v_dim)
    return q.unflatten(-1, key), k.unflatten(-1, key), v.unflatten(-1, value)


_PROJECTIONS: Mapping[str, Callable[[Mixer, Tensor], Projected]] = {
    "Qwen3_5GatedDeltaNet": _qwen3_5,
    "Qwen3_5MoeGatedDeltaNet": _qwen3_5,
    "Qwen3NextGatedDeltaNet": _qwen3_next,
    "OlmoHybridGatedDeltaNet": _olmo_hybrid,
}

SOURCES: Mapping[str, tuple[str, ...]] = {
    "Qwen3_5GatedDeltaNet": ("8f31ae7d35daf534", "bd25761e1031fff0"),
    "Qwen3_5MoeGatedDeltaNet": ("8f31ae7d35daf534", "bd25761e1031fff0"),
    "Qwen3NextGatedDeltaNet": ("177c5d3df989a7b4", "fc80496fd00b7992"),
    "OlmoHybridGatedDeltaNet": ("167004f14399b33e", "2cf524e0f1f4b609"),
}
"""Beginning of the SHA-256 of the source of each forward that this file restates, of transformers 5.23 and 5.17, which reach the
kernels in different ways and compute the same; a test tells when there is another."""

TINY_HYBRID: Mapping[str, Any] = {
    **TINY,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "layer_types": ["linear_attention", "full_attention", "linear_attention", "linear_attention"],
    "num_key_value_heads": 4,
    "head_dim": 16,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 16,
    "initializer_range": 0.1,
}
TINY_EXPERTS: Mapping[str, Any] = {
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
}


def settle(model: nn.Module) -> None:
    """Slow decay, and a gated norm that divides by nothing small.

    As initialised, a state is forgotten within a token or two, which would hide one that is not passed on, and outputs next to zero
    are divided by their size. Slower decay than this costs precision in one process: the decay's gradient is then a small
    difference of large sums.
    """
    generator = torch.Generator().manual_seed(3)
    for mixer in (cast(Mixer, module) for module in mixers(model).values()):
        nn.init.uniform_(mixer.A_log, math.log(0.1), math.log(0.5), generator=generator)
        nn.init.uniform_(mixer.dt_bias, -2.0, 0.0, generator=generator)
        _norm(mixer).variance_epsilon = 0.1
