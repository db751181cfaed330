"""The door to HF models. A family is a module here: its `MODEL_TYPES`, a `tiny()` config for the tests, and its reasons."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from typing import Protocol, cast

from torch import nn
from transformers import PretrainedConfig

FAMILY_PREFIX = "family_"


class Family(Protocol):
    """What a family module offers."""

    MODEL_TYPES: frozenset[str]
    """`config.model_type` values whose gradients were compared with HF's own, one by one."""

    @staticmethod
    def tiny(model_type: str) -> PretrainedConfig:
        """A config of a few thousand parameters for the tests."""

    @staticmethod
    def settle(model: nn.Module) -> None:
        """Weights of a fresh tiny model under which the tests would miss nothing; no change where any will do."""

    APART: frozenset[str]
    """Of these types HF's own run in one process does not see where the documents of a packed row end (on CPU, in eager or SDPA
    attention): what it gives for a packed row is no reference, what it gives for each document is."""

    HANDLES: frozenset[str]
    """What its models may have although not every model may: mixtures of "experts", kinds of layers by their name in a config."""

    @staticmethod
    def mixers(model: nn.Module) -> dict[str, nn.Module]:
        """Modules that mix tokens past HF's attention interface, by name; `attach` puts each under sequence parallelism."""

    @staticmethod
    def attach(module: nn.Module) -> Callable[[], None]:
        """Replaces what one mixer computes, and returns what undoes it."""

    @staticmethod
    def halo(module: nn.Module) -> int:
        """Tokens before its own that a token needs in one mixer's short convolutions, where `attach` runs them on local tokens."""

    @staticmethod
    def scan_heads(module: nn.Module) -> tuple[int, int] | None:
        """(heads, groups) of a mixer whose heads all ranks of a row share, and which passes no state; None for others."""

    @staticmethod
    def mixing(config: PretrainedConfig) -> int:
        """How many attention layers and mixers a model of this config has."""

    @staticmethod
    def refuse(config: PretrainedConfig) -> str | None:
        """Why this config of the family cannot be sharded, beyond what every model is checked for."""


def families() -> list[Family]:
    """All family modules of the folder."""
    found = sorted(m.name for m in pkgutil.iter_modules(__path__) if m.name.startswith(FAMILY_PREFIX))
    return [cast(Family, importlib.import_module(f"{__name__}.{name}")) for name in found]


def family_of(config: PretrainedConfig) -> Family | None:
    """The family that lists this model type."""
    return next((family for family in families() if config.model_type in family.MODEL_TYPES), None)


def model_types() -> list[str]:
    """Every supported model type."""
    return sorted(name for family in families() for name in family.MODEL_TYPES)


def family_of_type(model_type: str) -> Family:
    """The family of a model type that is known to be supported."""
    return next(family for family in families() if model_type in family.MODEL_TYPES)
