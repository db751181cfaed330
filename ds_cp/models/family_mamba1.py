"""Models with Mamba layers beside attention: Jamba (with its experts), Zamba.

As for Gated DeltaNet the `forward` of each mixer is replaced: HF's own projections and norms and the convolution on local tokens,
`ds_cp.mamba1` for the scan. `SOURCES` says which forwards these are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import CONFIG_MAPPING, PretrainedConfig

from ds_cp import mamba1
from ds_cp.batch import SequenceContext
from ds_cp.kernels.delta import ACTIVATIONS
from ds_cp.models.attention_only import TINY
from ds_cp.models.mixer import Map, Parameters, begin, convolved, parameters, replace

__all__ = ["APART", "HANDLES", "MODEL_TYPES", "attach", "halo", "mixers", "mixing", "refuse", "scan_heads", "settle", "tiny"]

MODEL_TYPES = frozenset({"jamba", "zamba"})
APART = MODEL_TYPES
HANDLES = frozenset({"linear_attention", "hybrid", "experts"})

JAMBA, ZAMBA = "JambaMambaMixer", "ZambaMambaMixer"
SOURCES: Mapping[str, tuple[str, ...]] = {JAMBA: ("d633c6bef2ab8388",), ZAMBA: ("1fb6cba06fbe05e0",)}
"""As in `gated_delta`, of transformers 5.23."""


def mixers(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if type(module).__name__ in SOURCES}


class Mixer(Protocol):
    """What is read of such a module."""

    conv_kernel_size: int
    intermediate_size: int
    time_step_rank: int
    ssm_state_size: int
    A_log: Tensor
    D: Tensor
    act: Map
    conv1d: Parameters
    in_proj: Map
    out_proj: Map


class Jamba(Mixer, Protocol):
    x_proj: Map
    dt_proj: Parameters
    dt_layernorm: Map
    b_layernorm: Map
    c_layernorm: Map


class Zamba(Mixer, Protocol):
    n_mamba_heads: int
    x_proj_weight: Tensor
    dt_proj_weight: Tensor
    dt_proj_bias: Tensor


def halo(module: nn.Module) -> int:
    return cast(Mixer, module).conv_kernel_size - 1


def scan_heads(module: nn.Module) -> tuple[int, int]:
    """Channels are the heads; those of one of Zamba's heads have their B and C in common, all of Jamba's."""
    return cast(Mixer, module).intermediate_size, getattr(module, "n_mamba_heads", 1)


def mixing(config: PretrainedConfig) -> int:
    """A hybrid layer has both."""
    return sum(2 if kind == "hybrid" else 1 for kind in config.layer_types)


def attach(module: nn.Module) -> Callable[[], None]:
    if type(module).__name__ == ZAMBA:
        return replace([(module, _zamba), (cast(nn.Module, module.conv1d), parameters)])
    return replace([(module, _jamba), (cast(nn.Module, module.conv1d), parameters), (cast(nn.Module, module.dt_proj), parameters)])


def _jamba(
    module: nn.Module,
    hidden_states: Tensor,
    cache_params: Any = None,
    attention_mask: Tensor | None = None,
    cp: SequenceContext | None = None,
    **_: Any,
) -> Tensor:
    """[1, T, hidden] to the same, of this rank's tokens."""
    context, mixer = begin(module, cp, cache_params, attention_mask), cast(Jamba, module)
    x, gate = mixer.in_proj(hidden_states).squeeze(0).chunk(2, dim=-1)
    x = mixer.act(convolved(mixer.conv1d, x, context))
    dt, b, c = mixer.x_proj(x).split([mixer.time_step_rank, mixer.ssm_state_size, mixer.ssm_state_size], dim=-1)
    dt, b, c = mixer.dt_layernorm(dt), mixer.b_layernorm(b), mixer.c_layernorm(c)
    weight, bias = mixer.dt_proj(dt)
    assert bias is not None, "Jamba gives this projection a bias"
    a = -mixer.A_log.to(_work(x)).exp()
    out = mamba1.mix(x, functional.linear(dt, weight), b.unsqueeze(1), c.unsqueeze(1), a, mixer.D, bias, context)
    return mixer.out_proj((out * functional.silu(gate)).unsqueeze(0))


def _zamba(
    module: nn.Module,
    hidden_states: Tensor,
    cache_params: Any = None,
    attention_mask: Tensor | None = None,
    cp: SequenceContext | None = None,
    **_: Any,
) -> Tensor:
    """The same with a projection of each head's own, whose outputs x and gate take turns in that of the whole."""
    context, mixer = begin(module, cp, cache_params, attention_mask), cast(Zamba, module)
    x, gate = mixer.in_proj(hidden_states).squeeze(0).unflatten(-1, (-1, 2)).unbind(-1)
    x = mixer.act(convolved(mixer.conv1d, x, context))
    projected = torch.einsum("tgx,gcx->tgc", x.unflatten(-1, (mixer.n_mamba_heads, -1)), mixer.x_proj_weight)
    dt, b, c = projected.split([mixer.time_step_rank, mixer.ssm_state_size, mixer.ssm_state_size], dim=-1)
    dt = torch.einsum("tgr,gxr->tgx", dt, mixer.dt_proj_weight).flatten(1)
    a = -mixer.A_log.flatten(0, 1).to(_work(x)).exp()
    out = mamba1.mix(x, dt, b, c, a, mixer.D.flatten(), mixer.dt_proj_bias.flatten(), context)
    return mixer.out_proj((out * functional.silu(gate)).unsqueeze(0))


def _work(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


_MAMBA: dict[str, Any] = {
    **TINY,
    "num_hidden_layers": 4,
    "intermediate_size": 96,
    "initializer_range": 0.1,
    "mamba_d_state": 6,
    "mamba_dt_rank": 5,
    "mamba_proj_bias": True,
}
_TINY_OF: dict[str, dict[str, Any]] = {
    "jamba": {
        **_MAMBA,
        "num_key_value_heads": 4,
        "num_experts": 6,
        "attn_layer_period": 4,
        "attn_layer_offset": 1,
        "rms_norm_eps": 1e-3,  # with 1e-6 transformers' own fp32 gradients of these norms are 9e-6 from fp64
    },
    "zamba": {
        **_MAMBA,
        "num_key_value_heads": 8,
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
    },
}


def tiny(model_type: str) -> PretrainedConfig:
    return CONFIG_MAPPING[model_type](**_TINY_OF[model_type])


def settle(model: nn.Module) -> None:
    """Slow decay, and steps, biases, D and the projections of heads that are not what they start at."""
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if name.endswith(("bias", ".D")):
            nn.init.normal_(parameter, std=0.2, generator=generator)
        elif name.endswith(("x_proj_weight", "dt_proj_weight")):
            nn.init.normal_(parameter, std=0.3, generator=generator)
        elif name.endswith("A_log"):
            nn.init.uniform_(parameter, math.log(0.05), math.log(0.5), generator=generator)


def refuse(config: PretrainedConfig) -> str | None:
    activation = getattr(config, "hidden_mamba_act", None) or config.hidden_act
    if activation not in ACTIVATIONS:
        return f"the activation of its Mamba layers is {activation!r}; it can be one of {list(ACTIVATIONS)}"
    return None
