"""What families share: the start of their tiny configs, and all that models of attention layers alone have nothing to say about."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from transformers import PretrainedConfig

TINY: Mapping[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "max_position_embeddings": 512,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


APART: frozenset[str] = frozenset()


def settle(model: nn.Module) -> None:
    pass


def mixers(model: nn.Module) -> dict[str, nn.Module]:
    return {}


def attach(module: nn.Module) -> Callable[[], None]:
    raise AssertionError("a model of attention layers has no mixers")


def halo(module: nn.Module) -> int:
    return 0


def scan_heads(module: nn.Module) -> tuple[int, int] | None:
    return None


def mixing(config: PretrainedConfig) -> int:
    return getattr(config, "decoder_layers", config.num_hidden_layers)
