"""Models with short causal convolutions over tokens: layers of LFM2, LFM2-MoE and LFM3, and before the attention of ZAYA.

HF has no door into them, so forwards of instances are replaced: HF's own projections on local tokens, `ds_cp.convolution` between.
`SOURCES` says which forwards these are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import CONFIG_MAPPING, PretrainedConfig

from ds_cp import convolution
from ds_cp.batch import SequenceContext
from ds_cp.models.attention_only import TINY, mixing, scan_heads
from ds_cp.models.mixer import Map, Parameters, begin, convolved, parameters, replace
from ds_cp.models.relay import Relay

__all__ = ["APART", "HANDLES", "MODEL_TYPES", "attach", "halo", "mixers", "mixing", "refuse", "scan_heads", "settle", "tiny"]

MODEL_TYPES = frozenset({"lfm2", "lfm2_moe", "lfm3", "zaya"})
APART = MODEL_TYPES
HANDLES = frozenset({"conv", "hybrid", "hybrid_sliding", "experts"})

SHORT_CONV = ("Lfm2ShortConv", "Lfm2MoeShortConv", "Lfm3ShortConv")
ZAYA = "ZayaAttention"
"""Its projection mixes tokens and has no keywords; it is an attention layer all the same."""


def mixers(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if type(module).__name__ in (*SHORT_CONV, ZAYA)}


class ShortConv(Protocol):
    """What is read of such a module."""

    conv_kernel_size: int
    conv: Parameters
    in_proj: Map
    out_proj: Map


class Grouped(Protocol):
    """`Parameters` of a convolution in groups."""

    groups: int

    def __call__(self, hidden_states: Tensor, /) -> tuple[Tensor, Tensor | None]: ...


class Projection(Protocol):
    """What is read of ZAYA's."""

    conv_kernel_size: int
    hidden_size: int
    head_dim: int
    num_key_value_groups: int
    conv_qk_depthwise: Parameters
    conv_qk_grouped: Grouped
    q_proj: Map
    k_proj: Map
    v_proj_current: Map
    v_proj_delayed: Map


def halo(module: nn.Module) -> int:
    if type(module).__name__ == ZAYA:
        return max(cast(Projection, module.qkv_proj).conv_kernel_size, 1)  # values have a part of the token before
    return cast(ShortConv, module).conv_kernel_size - 1


def attach(module: nn.Module) -> Callable[[], None]:
    if type(module).__name__ != ZAYA:
        return replace([(module, _short_conv), (cast(nn.Module, module.conv), parameters)])
    inner = cast(nn.Module, module.qkv_proj)
    relay = Relay(module, inner)
    convolutions = cast(nn.Module, inner.conv_qk_depthwise), cast(nn.Module, inner.conv_qk_grouped)
    undo = replace([(inner, _zaya), *((conv, parameters) for conv in convolutions)])

    def restore() -> None:
        relay.remove()
        undo()

    return restore


def _short_conv(
    module: nn.Module,
    hidden_states: Tensor,
    past_key_values: Any = None,
    attention_mask: Tensor | None = None,
    cp: SequenceContext | None = None,
    **_: Any,
) -> Tensor:
    """[1, T, hidden] to the same, of this rank's tokens."""
    context, mixer = begin(module, cp, past_key_values, attention_mask), cast(ShortConv, module)
    b, c, x = mixer.in_proj(hidden_states).squeeze(0).chunk(3, dim=-1)
    return mixer.out_proj((c * convolved(mixer.conv, b * x, context)).unsqueeze(0))


def _zaya(
    module: nn.Module,
    hidden_states: Tensor,
    past_key_values: Any = None,
    conv_mask: Tensor | None = None,
    cp: SequenceContext | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """[1, T, hidden] to queries [1, T, N, H], keys and values [1, T, M, H].

    What precedes a document is zero before the convolutions, and what `v_proj_delayed` makes of zero.
    """
    if cp is None or past_key_values is not None or conv_mask is not None:
        raise ValueError("model: ZayaCCAProjection was called without ds_cp's context, or with a cache or a mask")
    assert cp.held.halo is not None, "planned without the convolution"
    inner = cast(Projection, module)
    q, k = inner.q_proj(hidden_states), inner.k_proj(hidden_states)
    nothing = inner.v_proj_delayed(hidden_states.new_zeros(1, 1, inner.hidden_size))
    delayed = inner.v_proj_delayed(hidden_states) - nothing
    mixed, delayed = _before_attention(inner, torch.cat([q, k], dim=-1), delayed, cp.held.halo)
    heads, groups = (-1, inner.head_dim), inner.num_key_value_groups
    q, k = q.unflatten(-1, heads), k.unflatten(-1, heads)
    q = (q + k.repeat_interleave(groups, dim=2)) * 0.5
    k = q.unflatten(2, (-1, groups)).mean(dim=3)
    q_mixed, k_mixed = mixed.unsqueeze(0).unflatten(-1, heads).split([q.shape[2], k.shape[2]], dim=2)
    v = torch.cat([inner.v_proj_current(hidden_states), delayed + nothing], dim=-1).unflatten(-1, heads)
    return q + q_mixed, k + k_mixed, v


def _before_attention(inner: Projection, qk: Tensor, delayed: Tensor, at: convolution.Halo) -> tuple[Tensor, Tensor]:
    """q and k through both convolutions [T, C]; the values of the tokens before [T, C]. They travel as one."""
    padded = convolution.pad(torch.cat([qk, delayed], dim=-1).squeeze(0), at)
    qk_PC, delayed_PC = padded.split([qk.shape[-1], delayed.shape[-1]], dim=-1)
    depthwise, grouped = inner.conv_qk_depthwise(qk), inner.conv_qk_grouped(qk)
    x = functional.conv1d(qk_PC.T.unsqueeze(0), *depthwise, groups=qk.shape[-1])
    x = functional.conv1d(x, *grouped, groups=inner.conv_qk_grouped.groups)
    return convolution.own(x.squeeze(0).T, at, inner.conv_kernel_size), convolution.own(delayed_PC, at, 1)


SOURCES: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(SHORT_CONV, ("dd9e0a8c046f3cb6",)),
    "ZayaCCAProjection": ("2fd9c7ef16bf0d69",),
}
"""As in `gated_delta`, of transformers 5.23."""

_CONVOLUTIONS: dict[str, Any] = {"conv_bias": True, "num_key_value_heads": 4, "initializer_range": 0.2}
_TINY_OF: dict[str, dict[str, Any]] = {
    "lfm2": {**_CONVOLUTIONS, "block_multiple_of": 16, "layer_types": ["conv", "full_attention", "conv"]},
    "lfm2_moe": {
        **_CONVOLUTIONS,
        "layer_types": ["conv", "full_attention", "conv"],
        "num_dense_layers": 1,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
    },
    "lfm3": {
        **_CONVOLUTIONS,
        "head_dim": 16,
        "sliding_window": 11,
        "layer_types": ["conv", "sliding_attention", "conv", "full_attention"],
    },
    "zaya": {
        "num_key_value_heads": 4,
        "head_dim": 16,
        "num_experts": 4,
        "moe_intermediate_size": 32,
        "router_hidden_size": 16,
        "sliding_window": 11,
        "layer_types": ["hybrid", "hybrid_sliding"],
        "cca_time0": 3,
        "attention_bias": True,
        "initializer_range": 0.2,
    },
}


def tiny(model_type: str) -> PretrainedConfig:
    settings = {**TINY, "intermediate_size": 96, **_TINY_OF[model_type]}
    return CONFIG_MAPPING[model_type](**{**settings, "num_hidden_layers": len(settings["layer_types"])})


def settle(model: nn.Module) -> None:
    """Biases start at zero, where one that is left out would not show."""
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1, generator=generator)


def refuse(config: PretrainedConfig) -> str | None:
    return None
