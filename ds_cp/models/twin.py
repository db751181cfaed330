"""A tiny twin of a model: its class and its config with every size small, so that what it computes can be compared in a second.

Sizes are found by name, because HF's configs name them so; everything else (norms, activations, windows' presence, kinds of layers,
scales, flags) stays as the user has it. One layer of each kind stays, two at least.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

HEADS, KV_HEADS, HEAD_SIZE, HIDDEN, VOCABULARY, EXPERTS, WINDOW = 8, 4, 8, 64, 96, 6, 11

QUERY = (
    *("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads", "decoder_attention_heads"),
    *("encoder_attention_heads", "num_decoder_attention_heads", "swa_num_attention_heads"),
)
FAINT = 0.02
"""A parameter that is nowhere larger has gradients that rounding drowns, its own or another's: it is made larger."""
EXACT = (HEADS, HIDDEN, VOCABULARY)
QUERY_BY_LAYER = ("num_attention_heads_per_layer",)

SIZES: Mapping[str, int] = {
    **dict.fromkeys(
        ("hidden_size", "d_model", "n_embd", "emb_dim", "embedding_size", "word_embed_proj_dim", "embedding_dim"), HIDDEN
    ),
    **dict.fromkeys(QUERY, HEADS),
    **dict.fromkeys(("head_dim", "qk_nope_head_dim", "kv_channels", "swa_head_dim", "global_head_dim", "rotary_dim"), HEAD_SIZE),
    **dict.fromkeys(("swa_v_head_dim", "index_head_dim", "qk_rope_head_dim"), HEAD_SIZE),
    "v_head_dim": 12,
    "qk_head_dim": 2 * HEAD_SIZE,
    **dict.fromkeys(("intermediate_size", "ffn_dim", "ffn_hidden_size", "decoder_ffn_dim", "encoder_ffn_dim"), 96),
    **dict.fromkeys(("n_inner", "intermediate_size_mlp", "dense_intermediate_size", "dff"), 96),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 32),
    **dict.fromkeys(("shared_intermediate_size", "shared_experts_intermediate_size", "moe_shared_expert_intermediate_size"), 32),
    **dict.fromkeys(("vocab_size", "unpadded_vocab_size", "decoder_vocab_size", "vocab_size_per_layer_input"), VOCABULARY),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_target_positions"), 512),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), EXPERTS),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts"), 2),
    **dict.fromkeys(("n_group", "num_expert_group"), 2),
    "topk_group": 1,
    "q_lora_rank": 24,
    "kv_lora_rank": 32,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 16,
    **dict.fromkeys(("hidden_size_per_layer_input", "laurel_rank", "router_hidden_size", "d_rel"), 16),
    "zero_expert_num": 2,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "n_shared_experts": 1,
    **dict.fromkeys(("index_topk", "keep_window_size"), 5),
    **dict.fromkeys(("floor_scale", "log_scaling_n_floor", "rel_extent", "index_block_size", "block_size"), 4),
    "index_topk_blocks": 2,
    "num_layers_per_stack": 1,
}
"""What a field of this name becomes where it is a larger number."""

OTHER = 16
"""The same for whole numbers of other names: what counts tokens must be reached by a short row."""
STAY = ("theta", "scal", "multiplier", "factor", "type_", "_per_", "num_kv_shared_layers")

LAYERS = (
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_layers",
    "decoder_layers",
    "encoder_layers",
    "num_decoder_layers",
    "depth",
)
KV = ("num_key_value_heads", "num_kv_heads", "swa_num_key_value_heads", "num_global_key_value_heads")
WINDOWS = ("sliding_window", "local_attention", "window_size", "sliding_window_size", "attention_chunk_size")
NOT_SIZES = (
    "model_type",
    "architectures",
    "transformers_version",
    "dtype",
    "torch_dtype",
    "_name_or_path",
    "auto_map",
    "attribute_map",
)


def twin_config(config: PretrainedConfig) -> PretrainedConfig:
    """The config of a model's twin.

    Raises:
        Exception: whatever the config's class says of the values.
    """
    values = {key: value for key, value in copy.deepcopy(config.to_dict()).items() if key not in NOT_SIZES}
    parts = {key: part for key in config.sub_configs if isinstance(part := getattr(config, key, None), PretrainedConfig)}
    kept = _kept_layers(config, values)
    if values.get("num_kv_shared_layers"):  # the last layers take keys and values of an earlier one of their kind
        kept, values["num_kv_shared_layers"] = kept * 2, len(kept)
    given = dict(values)
    query = next((values[key] for key in QUERY if isinstance(values.get(key), int)), None)
    for key, value in values.items():
        if key in parts:
            values[key] = twin_config(parts[key]).to_dict()
        elif key in LAYERS:
            values[key] = len(kept) or 2
        elif isinstance(value, list) and kept and len(value) == config.num_hidden_layers:
            values[key] = [value[index] for index in kept]
            if key in QUERY_BY_LAYER:
                values[key] = [HEADS * (1 + values[key].index(each)) for each in values[key]]
        elif "drop" in key and isinstance(value, float):
            values[key] = 0.0
        elif isinstance(value, dict) and value and all(str(name).isdigit() for name in value):
            values[key] = {
                kept.index(int(name)): _of_layer(part, given, query) for name, part in value.items() if int(name) in kept
            }
        elif isinstance(value, dict) and "original_max_position_embeddings" in value:
            values[key] = {**value, "original_max_position_embeddings": OTHER}
        elif isinstance(value, bool) or not isinstance(value, int | float) or value is None:
            continue
        elif key in KV:
            values[key] = HEADS if value == query else min(value, KV_HEADS)
        elif key in WINDOWS:
            values[key] = min(value, WINDOW)
        elif key in SIZES:
            values[key] = SIZES[key] if SIZES[key] in EXACT else min(value, SIZES[key])
        elif key.endswith(("_token_id", "_token_index")):
            values[key] = min(value, 2)
        elif isinstance(value, int) and not any(part in key for part in STAY):
            values[key] = min(value, OTHER)
    if isinstance(values.get("eos_token_id"), list):
        values["eos_token_id"] = 2
    values |= {key: 0.2 for key in ("initializer_range", "init_std") if key in values}
    return type(config)(**values)


def _of_layer(values: Any, given: Mapping[str, Any], query: int | None) -> Any:
    """What one layer has for itself beside what is given for all, made small; other numbers of heads stay others."""
    if not isinstance(values, dict):
        return values
    small = {key: min(value, SIZES[key]) if key in SIZES and isinstance(value, int) else value for key, value in values.items()}
    small |= {key: HEADS if values[key] == query else 2 * HEADS for key in (*QUERY, *KV) if isinstance(values.get(key), int)}
    if given.get("head_dim") == values.get("qk_nope_head_dim", 0) + (given.get("qk_rope_head_dim") or 0):
        small["head_dim"] = 2 * HEAD_SIZE
    return small


def _kept_layers(config: PretrainedConfig, values: dict[str, Any]) -> list[int]:
    """Indices of the first layer of each kind, as the config's lists by layer tell kinds apart."""
    layers = getattr(config, "num_hidden_layers", 0)
    if not layers:  # of a model of several parts: each has its own
        return []
    lists = [value for value in values.values() if isinstance(value, list) and len(value) == layers]
    kinds = [repr([value[index] for value in lists]) for index in range(layers)]
    kept = sorted({kinds.index(kind) for kind in kinds})[:6]
    return kept if len(kept) > 1 else [*kept, *(index for index in range(layers) if index not in kept)][:2]


def twin(model: type[PreTrainedModel], config: PretrainedConfig, seed: int = 0) -> PreTrainedModel:
    """A seeded twin, fp32, on the CPU, whose biases, norms and the like are not what they are initialised to."""
    small = twin_config(config)
    small._attn_implementation = "eager"
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the user's GPUs too
        built = model(small).float()
        for module in built.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        for parameter in built.parameters():
            x = parameter.data
            faint = 0.0 < float(x.abs().max()) < FAINT
            x.mul_(0.1 / x.abs().max() if faint else 1.0)
            x.copy_(torch.randn_like(x) * 0.1 if not x.any() else x * (1 + 0.2 * torch.rand_like(x)))
    return built
