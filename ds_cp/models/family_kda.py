"""Models with Kimi delta attention beside latent attention, all with experts: Kimi Linear, Bailing (Ling 2.5) hybrids.

As for Gated DeltaNet the `forward` of each such layer is replaced: HF's own projections, forget gate and the convolution on local
tokens, `ds_cp.kda` for the delta rule, HF's own gated norm. `SOURCES` says which forwards these are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import CONFIG_MAPPING, PretrainedConfig

from ds_cp import kda
from ds_cp.batch import SequenceContext
from ds_cp.kernels.delta import ACTIVATIONS
from ds_cp.models.attention_only import TINY, mixing
from ds_cp.models.mixer import GatedNorm, Map, Parameters, begin, convolved, parameters, replace

__all__ = ["APART", "HANDLES", "MODEL_TYPES", "attach", "halo", "mixers", "mixing", "refuse", "scan_heads", "settle", "tiny"]

MODEL_TYPES = frozenset({"kimi_linear", "bailing_hybrid"})
APART = MODEL_TYPES
HANDLES = frozenset({"linear_attention", "experts"})

KIMI, BAILING = "KimiLinearDeltaAttention", "BailingHybridDeltaAttention"
SOURCES: Mapping[str, tuple[str, ...]] = {KIMI: ("e696ac62c104e9c6",), BAILING: ("cd86b9f6aaf59e3c",)}
"""As in `gated_delta`, of transformers 5.23."""


def mixers(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if type(module).__name__ in SOURCES}


class ForgetGate(Protocol):
    A_log: Tensor
    dt_bias: Tensor

    def __call__(self, hidden_states: Tensor, /) -> Tensor: ...


class Mixer(Protocol):
    """What is read of such a module; of the gate's projections it has one or two."""

    conv_kernel_size: int
    num_heads: int
    head_dim: int
    conv1d: Parameters
    q_proj: Map
    k_proj: Map
    v_proj: Map
    b_proj: Map
    g_proj: Map
    g_a_proj: Map
    g_b_proj: Map
    o_proj: Map
    forget_gate: ForgetGate
    o_norm: GatedNorm


def halo(module: nn.Module) -> int:
    return cast(Mixer, module).conv_kernel_size - 1


def scan_heads(module: nn.Module) -> tuple[int, int]:
    heads = cast(Mixer, module).num_heads
    return heads, heads


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
    by_head = (mixer.num_heads, mixer.head_dim)
    qkv = torch.cat([mixer.q_proj(hidden_states), mixer.k_proj(hidden_states), mixer.v_proj(hidden_states)], dim=-1)
    qkv = functional.silu(convolved(mixer.conv1d, qkv.squeeze(0), context))
    q, k, v = (x.unflatten(-1, by_head) for x in qkv.chunk(3, dim=-1))
    g, b = mixer.forget_gate(hidden_states).squeeze(0), mixer.b_proj(hidden_states).squeeze(0)
    out = kda.mix(q, k, v, g.to(torch.promote_types(g.dtype, torch.float32)), b, context).unsqueeze(0)
    gate = mixer.g_b_proj(mixer.g_a_proj(hidden_states)) if hasattr(module, "g_b_proj") else mixer.g_proj(hidden_states)
    return mixer.o_proj(mixer.o_norm(out, gate.unflatten(-1, by_head)).flatten(2))


_TINY: dict[str, Any] = {
    **TINY,
    "num_hidden_layers": 3,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "mlp_layer_types": ["dense", "sparse", "sparse"],
    "num_key_value_heads": 8,
    "intermediate_size": 48,
    "moe_intermediate_size": 32,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 12,
    "initializer_range": 0.1,
}
_TINY_OF: dict[str, dict[str, Any]] = {
    "kimi_linear": {"linear_head_dim": 8, "linear_num_heads": 8},
    "bailing_hybrid": {"head_dim": 8, "kda_lower_bound": -0.5},
}


def tiny(model_type: str) -> PretrainedConfig:
    return CONFIG_MAPPING[model_type](**{**_TINY, **_TINY_OF[model_type]})


def settle(model: nn.Module) -> None:
    """As in `gated_delta`: slow decay, and norms that divide by nothing small. (With a bound of -5 of its decays, and so next to no
    state, transformers in fp32 is 3e-5 off its gradients of the forget gate in fp64.)"""
    generator = torch.Generator().manual_seed(3)
    for mixer in (cast(Mixer, module) for module in mixers(model).values()):
        nn.init.uniform_(mixer.forget_gate.A_log, math.log(0.1), math.log(0.5), generator=generator)
        nn.init.uniform_(mixer.forget_gate.dt_bias, -2.0, 0.0, generator=generator)
        mixer.o_norm.variance_epsilon = 0.1


def refuse(config: PretrainedConfig) -> str | None:
    if config.hidden_act not in ACTIVATIONS:
        return f"the activation of its convolutions is {config.hidden_act!r}; it can be one of {list(ACTIVATIONS)}"
    return None
