"""Dense decoder-only text models whose layers mix tokens through HF's attention interface alone."""

from __future__ import annotations

from typing import Any

from transformers import CONFIG_MAPPING, PretrainedConfig

from ds_cp.models.attention_only import APART, TINY, attach, halo, mixers, mixing, scan_heads, settle

__all__ = ["APART", "HANDLES", "MODEL_TYPES", "attach", "halo", "mixers", "mixing", "refuse", "scan_heads", "settle", "tiny"]

MODEL_TYPES = frozenset(
    {
        "llama",
        "mistral",
        "qwen2",
        "qwen3",
        "phi3",
        "gemma",
        "gpt_neox",
        "olmo",
        "olmo2",
        "granite",
        "smollm3",
        "seed_oss",
        "gemma2",
        "gemma3_text",
        "cohere2",
        "olmo3",
        "starcoder2",
    }
)

HANDLES: frozenset[str] = frozenset()

_TINY: dict[str, Any] = {
    **TINY,
    "intermediate_size": 96,
    "initializer_range": 0.2,
}

_SLIDING: dict[str, Any] = {"sliding_window": 11, "layer_types": ["sliding_attention", "full_attention"]}

_TINY_OF: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 11},
    "starcoder2": {"sliding_window": 11, "residual_dropout": 0.0, "embedding_dropout": 0.0},
    "gemma2": {"head_dim": 16, "query_pre_attn_scalar": 24, "attn_logit_softcapping": 3.0, **_SLIDING},
    "gemma3_text": {"head_dim": 16, "query_pre_attn_scalar": 24, **_SLIDING},
    "cohere2": {"head_dim": 8, **_SLIDING},
    "olmo3": _SLIDING,
    "gpt_neox": {"hidden_dropout": 0.0, "num_key_value_heads": None},
    "phi3": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "sliding_window": 11},
    "gemma": {"head_dim": 8},
    "qwen3": {"head_dim": 16},
    "smollm3": {"head_dim": 8},
    "seed_oss": {"head_dim": 8, "residual_dropout": 0.0},
}


def tiny(model_type: str) -> PretrainedConfig:
    settings = {**_TINY, "num_key_value_heads": 4, **_TINY_OF.get(model_type, {})}
    return CONFIG_MAPPING[model_type](**{k: v for k, v in settings.items() if v is not None or k == "sliding_window"})


def refuse(config: PretrainedConfig) -> str | None:
    return None
