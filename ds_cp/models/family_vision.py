"""Vision-language models of the Qwen line: a tower for images and videos, MRoPE, deepstack; some with DeltaNet layers or experts.

The language models are those of the other families; `vision` has the door to the tower.
"""

from __future__ import annotations

from typing import Any

from transformers import CONFIG_MAPPING, PretrainedConfig

from ds_cp.models.attention_only import TINY, halo, mixing, scan_heads
from ds_cp.models.gated_delta import TINY_EXPERTS, TINY_HYBRID, attach, mixers, settle

__all__ = ["APART", "HANDLES", "MODEL_TYPES", "attach", "halo", "mixers", "mixing", "refuse", "scan_heads", "settle", "tiny"]

MODEL_TYPES = frozenset({"qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe"})
APART = frozenset({"qwen3_5", "qwen3_5_moe"})
HANDLES = frozenset({"vision", "experts", "linear_attention"})

_TOKENS: dict[str, int] = {"image_token_id": 91, "video_token_id": 92, "vision_start_token_id": 93, "vision_end_token_id": 94}
_VISION: dict[str, Any] = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "out_hidden_size": TINY["hidden_size"],
    "initializer_range": 0.1,
}
_LEARNED: dict[str, Any] = {"num_position_embeddings": 16}
_TEXT: dict[str, Any] = {**TINY, "intermediate_size": 96, "num_key_value_heads": 4, "initializer_range": 0.1}
_EXPERTS: dict[str, Any] = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


def _mrope(*section: int, **more: Any) -> dict[str, Any]:
    """Rotary frequencies by time, height and width; their sum is half the rotated size of a head."""
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": list(section), **more}}


_VISION_OF: dict[str, dict[str, Any]] = {
    "qwen2_5_vl": {"fullatt_block_indexes": [1], "window_size": 16, "tokens_per_second": 2},
    "qwen3_vl": {**_LEARNED, "deepstack_visual_indexes": [0, 1]},
    "qwen3_vl_moe": {**_LEARNED, "deepstack_visual_indexes": [0, 1]},
    "qwen3_5": _LEARNED,
    "qwen3_5_moe": _LEARNED,
}
_TEXT_OF: dict[str, dict[str, Any]] = {
    "qwen2_5_vl": {**_TEXT, **_mrope(2, 1, 1)},
    "qwen3_vl": {**_TEXT, **_mrope(4, 2, 2), "head_dim": 16},
    "qwen3_vl_moe": {**_TEXT, **_mrope(4, 2, 2), **_EXPERTS, "head_dim": 16},
    "qwen3_5": {**TINY_HYBRID, **_mrope(2, 1, 1, partial_rotary_factor=0.5)},
    "qwen3_5_moe": {**TINY_HYBRID, **TINY_EXPERTS, **_mrope(2, 1, 1, partial_rotary_factor=0.5)},
}


def tiny(model_type: str) -> PretrainedConfig:
    vision, text = {**_VISION, **_VISION_OF[model_type]}, dict(_TEXT_OF[model_type])
    return CONFIG_MAPPING[model_type](vision_config=vision, text_config=text, **_TOKENS)


def refuse(config: PretrainedConfig) -> str | None:
    return None
