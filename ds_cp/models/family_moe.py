"""Decoder-only text models with mixtures of experts: tokens stay on their rank, experts are whole on each.

gpt-oss also has learned sinks and windows in every other layer, which attention takes as keywords (`ds_cp.ring`). A layer's
experts are parameters of one module (transformers 5), gathered and reduced as one by ZeRO-3 whoever is routed to.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, PretrainedConfig

from ds_cp.models.attention_only import TINY, attach, halo, mixers, mixing, scan_heads

__all__ = ["APART", "HANDLES", "MODEL_TYPES", "attach", "halo", "mixers", "mixing", "refuse", "scan_heads", "settle", "tiny"]

MODEL_TYPES = frozenset({"mixtral", "qwen3_moe", "olmoe", "deepseek_v3", "glm4_moe", "gpt_oss"})
APART = frozenset({"gpt_oss"})

HANDLES = frozenset({"experts"})

_TINY: dict[str, Any] = {
    **TINY,
    "intermediate_size": 48,
    "num_key_value_heads": 4,
    "num_experts_per_tok": 2,
    "initializer_range": 0.1,
}

_GROUPED: dict[str, Any] = {
    "n_routed_experts": 8,
    "moe_intermediate_size": 32,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}

_TINY_OF: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 6},
    "qwen3_moe": {"num_experts": 6, "head_dim": 16, "moe_intermediate_size": 32, "norm_topk_prob": True},
    "olmoe": {"num_experts": 6},
    "deepseek_v3": {
        **_GROUPED,
        "num_key_value_heads": 8,
        "q_lora_rank": 24,
        "kv_lora_rank": 32,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 16,
        "v_head_dim": 12,
    },
    "glm4_moe": {**_GROUPED, "head_dim": 16, "use_qk_norm": True},
    "gpt_oss": {
        "num_local_experts": 6,
        "head_dim": 16,
        "sliding_window": 11,
        "layer_types": ["sliding_attention", "full_attention"],
    },
}


def settle(model: nn.Module) -> None:
    """Biases of experts start at zero, where one that is left out would not show; sinks are put among the scores."""
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if name.endswith("proj_bias"):
            nn.init.normal_(parameter, std=0.1, generator=generator)
        elif name.endswith(".sinks"):
            nn.init.normal_(parameter, generator=generator)


def tiny(model_type: str) -> PretrainedConfig:
    return CONFIG_MAPPING[model_type](**{**_TINY, **_TINY_OF[model_type]})


def refuse(config: PretrainedConfig) -> str | None:
    noise = getattr(config, "router_jitter_noise", 0.0)
    if noise:
        return f"config.router_jitter_noise is {noise}: set it to 0, shards would draw other noise than one process"
    return None
