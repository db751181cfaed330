"""Models with Mamba-2 layers: beside attention in Bamba, GraniteMoeHybrid, Nemotron-H, Falcon-H1, Zamba2; Mamba-2 itself.

As for Gated DeltaNet the `forward` of each mixer is replaced: HF's own projections, `ds_cp.mamba2` between them, HF's own gated
norm. `SOURCES` says which forwards these are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import CONFIG_MAPPING, PretrainedConfig

from ds_cp import mamba2
from ds_cp.batch import SequenceContext
from ds_cp.kernels.delta import ACTIVATIONS
from ds_cp.models.attention_only import TINY, halo
from ds_cp.models.mixer import GatedNorm, Map, Parameters, begin, parameters, replace

__all__ = ["APART", "HANDLES", "MODEL_TYPES", "attach", "halo", "mixers", "mixing", "refuse", "scan_heads", "settle", "tiny"]

MODEL_TYPES = frozenset({"bamba", "granitemoehybrid", "nemotron_h", "falcon_h1", "zamba2", "mamba2"})
APART = MODEL_TYPES
HANDLES = frozenset({"linear_attention", "hybrid", "moe", "mlp", "experts"})

SOURCES: Mapping[str, tuple[str, ...]] = {
    "BambaMixer": ("691f3ca98636d473",),
    "GraniteMoeHybridMambaLayer": ("691f3ca98636d473",),
    "NemotronHMamba2Mixer": ("691f3ca98636d473",),
    "FalconH1Mixer": ("8274bd4cb6961bb4",),
    "Zamba2MambaMixer": ("691f3ca98636d473",),
    "Mamba2Mixer": ("691f3ca98636d473",),
}
"""As in `gated_delta`, of transformers 5.23."""


def mixers(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if type(module).__name__ in SOURCES}


class Mixer(Protocol):
    """What is read of such a module."""

    num_heads: int
    n_groups: int
    ssm_state_size: int
    intermediate_size: int
    activation: str
    time_step_limit: tuple[float, float]
    A_log: Tensor
    D: Tensor
    dt_bias: Tensor
    conv1d: Parameters
    in_proj: Map
    norm: GatedNorm
    out_proj: Map


def scan_heads(module: nn.Module) -> tuple[int, int]:
    mixer = cast(Mixer, module)
    return mixer.num_heads, mixer.n_groups


def mixing(config: PretrainedConfig) -> int:
    """A hybrid layer has both."""
    return sum({"linear_attention": 1, "full_attention": 1, "hybrid": 2}.get(kind, 0) for kind in config.layer_types)


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
    projected = mixer.in_proj(hidden_states * getattr(module, "ssm_in_multiplier", 1.0))
    projected = projected * getattr(module, "mup_vector", 1.0)
    of_groups = mixer.n_groups * mixer.ssm_state_size
    sizes = (mixer.intermediate_size, mixer.intermediate_size, of_groups, of_groups, mixer.num_heads)
    gate, x, b, c, dt = projected.split(sizes, dim=-1)
    weight, bias = mixer.conv1d(hidden_states)
    layer = mamba2.Layer(
        conv_CW=weight.squeeze(1),
        conv_bias_C=bias,
        activation=mixer.activation,
        a_log_V=mixer.A_log,
        d_V=mixer.D,
        dt_bias_V=mixer.dt_bias,
        dt_limit=mixer.time_step_limit,
    )
    x, b, c = (part.squeeze(0).unflatten(-1, (n, -1)) for part, n in zip((x, b, c), _heads(mixer), strict=True))
    out = mamba2.mix(x, b, c, dt.squeeze(0), layer, context).flatten(1).unsqueeze(0)
    normed = mixer.norm(out, gate) if getattr(module, "mamba_rms_norm", True) else out * functional.silu(gate)
    return mixer.out_proj(normed.to(hidden_states.dtype))


def _heads(mixer: Mixer) -> tuple[int, int, int]:
    return mixer.num_heads, mixer.n_groups, mixer.n_groups


_MAMBA: dict[str, Any] = {
    **TINY,
    "num_key_value_heads": 4,
    "intermediate_size": 96,
    "initializer_range": 0.1,
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_n_groups": 2,
    "mamba_d_state": 8,
    "mamba_chunk_size": 16,
}
_LAYERS = ["linear_attention", "full_attention", "linear_attention"]
_TINY_OF: dict[str, dict[str, Any]] = {
    "bamba": {**_MAMBA, "num_hidden_layers": 3, "attn_layer_indices": [1], "mamba_proj_bias": True, "time_step_limit": (0.2, 0.6)},
    "granitemoehybrid": {
        **_MAMBA,
        "num_hidden_layers": 3,
        "layer_types": _LAYERS,
        "num_local_experts": 6,
        "shared_intermediate_size": 32,
        "attention_multiplier": 0.3,
        "residual_multiplier": 0.7,
        "mamba_n_groups": 1,
    },
    "falcon_h1": {
        **_MAMBA,
        "mamba_d_ssm": 128,
        "ssm_multipliers": [0.7, 1.2, 0.8, 1.1, 0.9],
        "ssm_in_multiplier": 1.3,
        "ssm_out_multiplier": 0.8,
        "attention_in_multiplier": 0.9,
        "lm_head_multiplier": 0.7,
        "embedding_multiplier": 1.4,
    },
    "nemotron_h": {
        **TINY,
        "num_hidden_layers": None,
        "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp", "linear_attention"],
        "num_key_value_heads": 4,
        "head_dim": 16,
        "intermediate_size": 96,
        "initializer_range": 0.1,
        "mamba_num_heads": 8,
        "mamba_head_dim": 16,
        "n_groups": 2,
        "ssm_state_size": 8,
        "chunk_size": 16,
        "time_step_min": 0.3,
        "n_routed_experts": 6,
        "moe_intermediate_size": 32,
        "moe_shared_expert_intermediate_size": 32,
        "rescale_prenorm_residual": False,
    },
    "mamba2": {
        **{key: value for key, value in TINY.items() if key not in ("num_attention_heads", "max_position_embeddings")},
        "num_heads": 8,
        "head_dim": 16,
        "n_groups": 2,
        "state_size": 8,
        "chunk_size": 16,
        "initializer_range": 0.1,
    },
    "zamba2": {
        **TINY,
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
        "num_key_value_heads": 8,
        "intermediate_size": 96,
        "initializer_range": 0.1,
        "n_mamba_heads": 8,
        "mamba_ngroups": 2,
        "mamba_d_state": 8,
        "chunk_size": 16,
        "use_mem_rope": True,
        "use_shared_attention_adapter": True,
        "adapter_rank": 4,
    },
}


def tiny(model_type: str) -> PretrainedConfig:
    return CONFIG_MAPPING[model_type](**{key: value for key, value in _TINY_OF[model_type].items() if value is not None})


def settle(model: nn.Module) -> None:
    """As in `gated_delta`: slow decay, norms that divide by nothing small; and biases and D that are not what they start at."""
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if name.endswith(("bias", ".D")):
            nn.init.normal_(parameter, std=0.2, generator=generator)
    for mixer in (cast(Mixer, module) for module in mixers(model).values()):
        nn.init.uniform_(mixer.A_log, math.log(0.1), math.log(0.5), generator=generator)
        nn.init.uniform_(mixer.dt_bias, -2.0, 0.0, generator=generator)
        if hasattr(mixer.norm, "variance_epsilon"):
            mixer.norm.variance_epsilon = 0.1


def refuse(config: PretrainedConfig) -> str | None:
    activation = getattr(config, "mamba_hidden_act", None) or getattr(config, "hidden_act", None)
    if config.model_type != "zamba2" and activation not in ACTIVATIONS:  # of Zamba2's config it is that of its MLPs
        return f"the activation of its Mamba-2 layers is {activation!r}; it can be one of {list(ACTIVATIONS)}"
    if getattr(config, "z_loss_coefficient", None):
        return f"z_loss_coefficient is {config.z_loss_coefficient}: set it to 0, and give z_loss to the call, of all tokens"
    return None
