"""Models with Lightning attention beside softmax attention: MiniMax (Text-01, M1).

As for Gated DeltaNet the `forward` of each such layer is replaced: HF's own projection and activation, `ds_cp.lightning` between
them, HF's own norm, gate and output projection. `SOURCES` says which forward this is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, PretrainedConfig

from ds_cp import lightning
from ds_cp.batch import SequenceContext
from ds_cp.models.attention_only import TINY, halo, mixing
from ds_cp.models.mixer import begin, replace

__all__ = ["APART", "HANDLES", "MODEL_TYPES", "attach", "halo", "mixers", "mixing", "refuse", "scan_heads", "settle", "tiny"]

MODEL_TYPES = frozenset({"minimax"})
APART = MODEL_TYPES
HANDLES = frozenset({"linear_attention", "experts"})

SOURCES: Mapping[str, tuple[str, ...]] = {"MiniMaxLightningAttention": ("69bc3f622840097c",)}
"""As in `gated_delta`, of transformers 5.23."""


def mixers(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if type(module).__name__ in SOURCES}


class Layer(Protocol):
    """What is read of such a module."""

    num_attention_heads: int
    slope_rate: Tensor
    act_fn: Callable[[Tensor], Tensor]
    qkv_proj: Callable[[Tensor], Tensor]
    output_gate: Callable[[Tensor], Tensor]
    norm: Callable[[Tensor], Tensor]
    out_proj: Callable[[Tensor], Tensor]


def scan_heads(module: nn.Module) -> tuple[int, int]:
    heads = cast(Layer, module).num_attention_heads
    return heads, heads


def attach(module: nn.Module) -> Callable[[], None]:
    return replace([(module, _forward)])


def _forward(
    module: nn.Module,
    hidden_states: Tensor,
    position_embeddings: Any = None,
    attention_mask: Tensor | None = None,
    past_key_values: Any = None,
    cp: SequenceContext | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """[1, T, hidden] to the same, of this rank's tokens."""
    context, layer = begin(module, cp, past_key_values, attention_mask), cast(Layer, module)
    qkv = layer.act_fn(layer.qkv_proj(hidden_states)).squeeze(0).unflatten(-1, (layer.num_attention_heads, -1))
    q, k, v = qkv.chunk(3, dim=-1)
    out = lightning.mix(q, k, v, layer.slope_rate.flatten(), context).flatten(1).unsqueeze(0)
    return layer.out_proj(torch.sigmoid(layer.output_gate(hidden_states)) * layer.norm(out)), None


def tiny(model_type: str) -> PretrainedConfig:
    more = {
        "num_key_value_heads": 4,
        "intermediate_size": 48,
        "num_local_experts": 6,
        "num_hidden_layers": 3,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "block_size": 16,
        "initializer_range": 0.1,
        "linear_attn_beta_factor": 0.8,
        "full_attn_alpha_factor": 1.2,
    }
    return CONFIG_MAPPING[model_type](**{**TINY, **more})


def settle(model: nn.Module) -> None:
    pass


def refuse(config: PretrainedConfig) -> str | None:
    return None
