"""What scripts/bench/planner_check.py compares: points, the model of the benchmarks, where their figures lie."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a plain checkout needs no installation

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from ds_cp.planner import machine as machines
from ds_cp.planner import read as reading
from ds_cp.planner.choice import Choice
from ds_cp.planner.machine import Machine
from ds_cp.planner.shape import Shape

DATA = Path(__file__).resolve().parents[2] / "docs" / "data"
MEMORY_BAR, TIME_BAR, TRAFFIC_BAR = 0.10, 0.25, 0.10
LLAMA_8B = (4096, 14336, 128256, 32, 8, 128)
MIB = 2**20


@dataclass(frozen=True)
class Point:
    """One comparison. `beyond`: why it is not held to the bar."""

    section: str
    file: str
    what: str
    predicted: float
    measured: float
    unit: str
    bar: float
    beyond: str = ""
    state: float = 0.0
    """Measured between steps, where it was; the rest is what a step adds."""

    @property
    def error(self) -> float:
        return self.predicted / self.measured - 1

    @property
    def of_the_step(self) -> float | None:
        """The same error over what a step adds to the state."""
        return (self.predicted - self.measured) / (self.measured - self.state) if self.state else None


def llama(hidden: int, inner: int, vocabulary: int, heads: int, kv_heads: int, size: int, layers: int) -> Shape:
    mixers = 2 * hidden * (heads + kv_heads) * size
    mlp, table = 3 * hidden * inner, vocabulary * hidden
    return Shape(
        name="llama",
        hidden=hidden,
        layers=layers,
        vocabulary=vocabulary,
        heads=((heads, kv_heads),),
        head_size=size,
        windows=(None,) * layers,
        parameters=layers * (mixers + mlp + 2 * hidden) + 2 * table + hidden,
        embedding=table,
        head=table,
        mlp=layers * mlp,
        mixers=layers * mixers,
        matrix=max(hidden * inner, hidden * heads * size),
    )


def shape_of(config: PretrainedConfig) -> Shape:
    """As `ds-cp plan` reads it, from the model without weights."""
    with torch.device("meta"):
        return reading.of(AutoModelForCausalLM.from_config(config), config.model_type)


def read(name: str) -> dict[str, Any]:
    path = DATA / name
    return json.loads(path.read_text()) if path.is_file() else {"machine": {}, "rows": []}


def device(name: str, gpus: int) -> Machine:
    kind = "h200" if "H200" in name else "h100"
    return machines.build(gpus, gpus, kind, 0, "nvlink", "infiniband-400g", 2000)


def describe(choice: Choice) -> str:
    degrees = choice.degrees
    words = [f"{degrees.ulysses} x {degrees.ring}", f"ZeRO {choice.stage}"]
    words += ["optimizer on the host"] * (choice.offload_optimizer and not choice.offload_parameters)
    words += ["optimizer and parameters on the host"] * choice.offload_parameters
    words += ["no checkpointing"] * (not choice.checkpointing)
    words += ["whole logits"] * (not choice.tiled_loss)
    words += ["tiled_mlp"] * choice.tiled_mlp + ["activation_offload"] * choice.activation_offload
    words += [f"head chunks {choice.head_chunks}"] * (choice.head_chunks > 1)
    return ", ".join(words)
