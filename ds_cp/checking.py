"""What a ds_config becomes for a model and a number of ranks, or the sentence that refuses it, without starting anything.

Everything that `initialize` can refuse from the config, the model's config and the sizes is refused here, by the same functions.
What needs the machines is not: kernels, the weight of a gradient, packages that differ between hosts (`ds-cp selftest`).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from transformers import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedModel,
)

from ds_cp import config, layout, preflight, topology
from ds_cp.balance import Chunks, Window
from ds_cp.models import checks, mlp, trial

Heads = list[tuple[int, int]]


def check(
    source: str | os.PathLike[str], ranks: int, ranks_per_node: int, model: str = "", heads: tuple[int, int] | None = None
) -> dict[str, str]:
    """The settings of a run, "auto" resolved.

    Args:
        source: the ds_config.json. ranks_per_node: of one host; 0 means all.
        model: name or path of a model, whose weights are not read. heads: (query, key/value) heads where none is given.

    Raises:
        ValueError: the run would be refused before training, with this reason.
    """
    ds_config = config.load(source)
    block = config.parse(ds_config)
    loaded = read_model(model) if model else None
    if block.size != 1:
        preflight.refuse_sections(ds_config, "" if loaded is None else loaded.config.model_type)
    pairs: Heads = ([heads] if heads else []) if loaded is None else checks.heads(loaded)
    linear_heads = [] if loaded is None else checks.linear_heads(loaded)
    passes = loaded is None or not checks.scan_heads(loaded)
    degrees = topology.resolve(
        block.size,
        block.ulysses_size,
        block.ring_size,
        world=ranks,
        local_world=ranks_per_node or ranks,
        heads=pairs,
        linear_heads=linear_heads,
        linear=block.linear_attention if passes else "heads",
    )
    linear = topology.resolve_linear(block.linear_attention, degrees, linear_heads, passes)
    if loaded is not None and block.tiled_mlp is True:
        mlp.refuse(loaded)
    return {
        **_sizes(block, degrees),
        **({"linear_attention": linear} if linear_heads else {}),
        **(_chunks(block, degrees, pairs, linear == "state" and degrees.ring > 1 and bool(linear_heads)) if pairs else {}),
        **({"model": type(loaded).__name__, "sliding windows": _windows(loaded)} if loaded is not None else {}),
        **_batch(ds_config, degrees),
    }


def read_model(name: str) -> PreTrainedModel:
    """A model by name or path without its weights, if it can be sharded.

    Raises:
        ValueError: there is no such model, or it cannot be.
    """
    if name.startswith((".", "/", "~")) and not os.path.exists(name):
        raise ValueError(f"model: {name}: no such file or folder")
    try:
        with torch.device("meta"):
            read = AutoConfig.from_pretrained(name)
            seeing = type(read) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
            model = (AutoModelForImageTextToText if seeing else AutoModelForCausalLM).from_config(read)
    except OSError as error:
        raise ValueError(f"model: {name!r} cannot be read: {str(error).splitlines()[0]}") from error
    trial.refuse(model)
    return model


def _sizes(block: config.Config, degrees: topology.Topology) -> dict[str, str]:
    padding = layout.pad_multiple(block.layout, degrees.ring, degrees.ulysses)
    most = layout.most_padding(block.layout, degrees.ring, degrees.ulysses)
    return {
        "size": str(degrees.size),
        "ulysses_size": str(degrees.ulysses),
        "ring_size": str(degrees.ring),
        "data-parallel replicas": str(degrees.data),
        "layout": layout.describe(block.layout),
        "rows are padded to a multiple of": str(padding) if padding == most else f"{padding}; packed rows of up to {most}",
    }


def _chunks(block: config.Config, degrees: topology.Topology, heads: Heads, passing: bool) -> dict[str, str]:
    asked, least = block.attention_head_chunks, block.activation_offload
    chunks = topology.resolve_head_chunks(asked, degrees, heads, passing, least_memory=least)
    split = topology.split_heads(degrees.ulysses, *heads[0])
    return {"heads of one rank": f"{split.query} query, {split.kv} key/value", "attention_head_chunks": str(chunks)}


def _windows(model: PreTrainedModel) -> str:
    return ", ".join(map(_window, dict.fromkeys(checks.windows(model))))


def _window(window: Window) -> str:
    if window is None:
        return "full attention"
    return f"chunks of {window.size} tokens" if isinstance(window, Chunks) else f"{window} tokens"


def _batch(ds_config: Mapping[str, Any], degrees: topology.Topology) -> dict[str, str]:
    """DeepSpeed's batch arithmetic over replicas; "auto" (HF Trainer) is left to who fills it in.

    Raises:
        ValueError: the three numbers contradict each other.
    """
    names = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    total, micro, steps = (ds_config.get(name) for name in names)
    given = {name: value for name, value in zip(names, (total, micro, steps), strict=True) if value is not None}
    if any(not isinstance(value, int) or isinstance(value, bool) for value in given.values()) or not (total or micro):
        return {}
    rows = (micro or (total or 0) // ((steps or 1) * degrees.data)) * degrees.data
    steps = steps or (total // rows if total and rows else 1)
    if total not in (None, rows * steps) or not rows:
        numbers = ", ".join(f"{name}: {value}" for name, value in given.items())
        raise ValueError(
            f"{numbers} do not fit {degrees.data} replicas of {degrees.size} ranks: train_batch_size must be "
            f"train_micro_batch_size_per_gpu x gradient_accumulation_steps x {degrees.data}; change one of them or leave one out"
        )
    return {"rows of an optimizer step": str(rows * steps), "gradient_accumulation_steps": str(steps)}
