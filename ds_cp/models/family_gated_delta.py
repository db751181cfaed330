"""Hybrids of attention and Gated DeltaNet layers: Qwen3.5, Qwen3-Next, OLMo-Hybrid."""

from __future__ import annotations

from typing import Any

from transformers import CONFIG_MAPPING, PretrainedConfig

from ds_cp.models.attention_only import halo, mixing, scan_heads
from ds_cp.models.gated_delta import TINY_EXPERTS, TINY_HYBRID, attach, mixers, settle

__all__ = ["APART", "HANDLES", "MODEL_TYPES", "attach", "halo", "mixers", "mixing", "refuse", "scan_heads", "settle", "tiny"]

MODEL_TYPES = frozenset({"qwen3_5_text", "qwen3_5_moe_text", "qwen3_next", "olmo_hybrid"})
APART = MODEL_TYPES
HANDLES = frozenset({"linear_attention", "experts"})

_TINY_OF: dict[str, dict[str, Any]] = {
    "qwen3_5_text": {"partial_rotary_factor": 0.5},
    "qwen3_5_moe_text": dict(TINY_EXPERTS),
    "qwen3_next": dict(TINY_EXPERTS),
    "olmo_hybrid": {"head_dim": None, "linear_num_key_heads": 8},
}


def tiny(model_type: str) -> PretrainedConfig:
    settings = {**TINY_HYBRID, **_TINY_OF[model_type]}
    return CONFIG_MAPPING[model_type](**{key: value for key, value in settings.items() if value is not None})


def refuse(config: PretrainedConfig) -> str | None:
    return None
