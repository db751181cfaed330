"""Sequence parallelism for DeepSpeed: ring attention, Ulysses and both together, with single-process gradients.

The names below are the public API. They are imported on first use, so that `import ds_cp` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ds_cp.config import Config as Config
    from ds_cp.engine import data_parallel_rank as data_parallel_rank
    from ds_cp.engine import data_parallel_size as data_parallel_size
    from ds_cp.engine import disabled as disabled
    from ds_cp.engine import initialize as initialize
    from ds_cp.engine import token_logprobs as token_logprobs
    from ds_cp.engine import unshard as unshard
    from ds_cp.launch import init_distributed as init_distributed
    from ds_cp.loader import data_loader as data_loader
    from ds_cp.meter import stats as stats
    from ds_cp.reliable import last_checkpoint as last_checkpoint
    from ds_cp.reliable import save_checkpoint as save_checkpoint
    from ds_cp.reliable import should_stop as should_stop
    from ds_cp.trainer import Trainer as Trainer
    from ds_cp.trainer import TrainerMixin as TrainerMixin

__version__ = "0.1.0"
__all__ = [
    "Config",
    "Trainer",
    "TrainerMixin",
    "data_loader",
    "data_parallel_rank",
    "data_parallel_size",
    "disabled",
    "init_distributed",
    "initialize",
    "last_checkpoint",
    "save_checkpoint",
    "should_stop",
    "stats",
    "token_logprobs",
    "unshard",
]

_HOME = {
    "Config": "config",
    "Trainer": "trainer",
    "TrainerMixin": "trainer",
    "data_loader": "loader",
    "init_distributed": "launch",
    "last_checkpoint": "reliable",
    "save_checkpoint": "reliable",
    "should_stop": "reliable",
    "stats": "meter",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'ds_cp' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(f"ds_cp.{_HOME.get(name, 'engine')}"), name)
