"""The `sequence_parallel` block of ds_config.json: one strict, frozen model, and the function that finds it.

The block is read from a path, a dict or a HF config object; unknown keys, impossible values and fields whose feature this
version does not have are one `ValueError` that names the field, the value, what is allowed and what to do.
"""

from __future__ import annotations

import base64
import binascii
import difflib
import json
import os
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

BLOCK = "sequence_parallel"

Auto = Literal["auto"]
Degree = Annotated[int, Field(ge=1, strict=True)]
Count = Annotated[int, Field(ge=0, strict=True)]


class Profile(BaseModel):
    """`profile` as an object."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)

    after: Degree = 3
    """Optimizer steps of this process before the first recorded one; in the last of them the profiler warms up."""
    steps: Degree = 2
    """Optimizer steps to record."""
    folder: Annotated[str, Field(min_length=1)] = "ds_cp_profile"
    """Where each rank writes its file, on its own host; made if it is not there."""


class Config(BaseModel):
    """The block, as the user wrote it; "auto" is resolved later, once, and printed."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)

    size: Degree | Auto = 1
    """Ranks that share one row. "auto" takes all ranks; 1 switches sequence parallelism off."""
    ulysses_size: Degree | Auto = "auto"
    """Degree of the heads-to-tokens all-to-all. "auto" takes the largest legal one that stays inside a node."""
    ring_size: Degree | Auto = "auto"
    """Degree of ring attention. ulysses_size * ring_size must be size."""
    layout: Literal["auto", "zigzag", "balanced", "contiguous"] = "auto"
    """How a row's chunks are given to ring ranks. zigzag balances one document, balanced any documents. "auto" is zigzag for a row
    of one document and balanced for packed rows."""
    linear_attention: Literal["auto", "heads", "state"] = "auto"
    """How Gated DeltaNet layers are sharded: `heads` over all ranks that share a row, or `state` passed along the ring with heads
    over ulysses, for more ranks than value heads. "auto" is heads where there are enough."""
    ring_impl: Literal["auto", "p2p", "allgather"] = "auto"
    """How key/value blocks reach the other ring ranks: hop by hop behind the computation, or gathered at once, which means
    fewer kernel calls and a whole row of keys and values in memory. "auto" gathers rows of one document that are so short that
    launching a hop's kernels takes longer than running them; on CPU none."""
    ring_keep: bool | Auto = "auto"
    """Keep the keys and values that came from other ring ranks from a layer's forward to its backward, which then sends only their
    gradients: a third less through the ring in fp32, a quarter in bf16 (with checkpointing a quarter and a fifth), for up to
    ring_size times the memory of a layer's keys and values.
    "auto" keeps them where the ring leaves a host and the model checkpoints its layers, so that those of one layer are there at a
    time, and heads go through the all-to-all at once."""
    attention_head_chunks: Degree | Auto = "auto"
    """Groups of a rank's query heads that go through the all-to-all one after another, so that gathered queries and outputs of one
    group only are in memory, for one more exchange of both in backward; 1 sends all at once. "auto" is as many as there are
    (a group serves whole key/value heads or is served by one) with activation_offload and an all-to-all, else 1."""
    comm_timeout_s: Annotated[int, Field(ge=1, strict=True)] = 1800
    """Seconds after which a hop or all-to-all that has not finished ends the run."""
    profile: bool | Profile = False
    """Write a trace of every rank with named ranges (docs/observability.md). true is `{"after": 3, "steps": 2, "folder":
    "ds_cp_profile"}`: of a process's first optimizer steps the first 3 are left out, the next 2 recorded, in files
    ds_cp_profile/rank*.json.gz of each host. Give an object to change any of them."""
    attention_kernel: Literal["auto", "flash_attn", "torch_cudnn", "torch_flash", "torch_cpu", "reference"] = "auto"
    """The attention kernel. "auto" on CUDA: flash-attn 4 or 3 where installed, else cuDNN on Hopper for shapes that recur, and
    torch_flash for the rest; on CPU torch_cpu, and reference for models with a softcap."""
    delta_kernel: Literal["auto", "fla", "reference"] = "auto"
    """The Gated DeltaNet kernel. "auto" is fla (flash-linear-attention) on CUDA and reference on CPU."""
    loss_reduction: Literal["auto", "mean", "token_mean", "sum"] = "auto"
    """What the gradient is the gradient of. "auto" is token_mean where `num_items_in_batch` is given, else mean."""
    loss_chunk: Count | Auto = "auto"
    """Tokens per logits tile: the loss is computed tile by tile and `out.logits` is None (`return_logits=True` keeps them); 0
    materialises the logits. "auto" takes tiles of 256 MiB of logits, and whole logits where a shard's are no larger."""
    loss_kernel: Literal["auto", "liger"] = "auto"
    """What computes a loss in tiles. "auto" is ds_cp's own; liger is the fused linear cross entropy of the package liger-kernel
    (GPUs), which picks its own tiles: for linear heads whose output the model does not scale, without weights of tokens."""
    tiled_mlp: bool | Auto = "auto"
    """Compute MLPs and the norms of layers in tiles of as many tokens as the hidden size, for one more forward of each. "auto" is
    off."""
    activation_offload: bool = False
    """Keep the inputs of checkpointed layers in pinned host memory until backward needs them."""

    @model_validator(mode="after")
    def _check_loss(self) -> Config:
        if self.loss_kernel == "liger" and self.loss_chunk != "auto":
            raise ValueError(f'loss_kernel: liger picks its own tiles; leave loss_chunk "auto" (got {self.loss_chunk})')
        return self

    @model_validator(mode="after")
    def _check_product(self) -> Config:
        ulysses, ring = degrees = (self.ulysses_size, self.ring_size)
        if self.size == "auto":
            return self
        if ulysses != "auto" and ring != "auto" and ulysses * ring != self.size:
            raise ValueError(
                f"ulysses_size {ulysses} x ring_size {ring} is {ulysses * ring}, not size {self.size}; "
                'change one of them or leave it "auto"'
            )
        for name, degree in zip(("ulysses_size", "ring_size"), degrees, strict=True):
            if degree != "auto" and self.size % degree:
                raise ValueError(f"{name}: {degree} does not divide size {self.size}; use one of {divisors(self.size)}")
        return self


def profile_of(block: Config) -> Profile | None:
    """What is to be recorded; None for nothing."""
    return (Profile() if block.profile else None) if isinstance(block.profile, bool) else block.profile


def divisors(n: int) -> list[int]:
    """All divisors of `n` in ascending order."""
    return [d for d in range(1, n + 1) if n % d == 0]


def load(source: str | os.PathLike[str] | Mapping[str, Any]) -> dict[str, Any]:
    """A whole ds_config as a dict, from what `deepspeed.initialize` and TrainingArguments take.

    Args:
        source: a path to a JSON (or HJSON) file, a dict, or the base64 text that DeepSpeed's launcher passes on.

    Raises:
        ValueError: `source` is none of these, or not valid JSON.
    """
    if isinstance(source, Mapping):
        return dict(source)
    if not isinstance(source, str | os.PathLike):
        raise ValueError(f"config: got {type(source).__name__}, expected a path, a dict or base64 JSON")
    text = os.fspath(source)
    if os.path.isfile(text):
        with open(text, encoding="utf-8") as file:
            return _parse_json(file.read(), text)
    try:
        decoded = base64.urlsafe_b64decode(text).decode("utf-8")
    except (binascii.Error, UnicodeDecodeError, ValueError):
        raise ValueError(f"config: {text!r} is neither a file, nor a dict, nor base64 JSON; pass one of these") from None
    return _parse_json(decoded, "the base64 config")


def parse(source: str | os.PathLike[str] | Mapping[str, Any]) -> Config:
    """The `sequence_parallel` block of a ds_config; a config without the block gives size 1, which is off.

    Raises:
        ValueError: the block is not an object, has an unknown key, or a value that is not allowed.
    """
    block = load(source).get(BLOCK, {})
    if not isinstance(block, Mapping):
        raise ValueError(f'{BLOCK}: expected an object like {{"size": 2}}, got {block!r}')
    try:
        return Config.model_validate({str(key): value for key, value in block.items()})
    except ValidationError as error:
        raise ValueError(_explain(error)) from None


def idle(block: Config) -> str | None:
    """One sentence about what a block of size 1 sets for nothing; None where it sets nothing."""
    keys = sorted(block.model_fields_set - {"size", "ulysses_size", "ring_size"})
    if block.size != 1 or not keys:
        return None
    does = "do" if len(keys) > 1 else "does"
    return f"{BLOCK}.size is 1, which is off, so {', '.join(keys)} {does} nothing; set size to 2 or more"


def _parse_json(text: str, name: str) -> dict[str, Any]:
    import hjson  # DeepSpeed's own parser: a file that it accepts with comments is accepted here too

    try:
        value = hjson.loads(text, object_pairs_hook=_without_duplicates)
    except hjson.HjsonDecodeError as error:
        raise ValueError(f"config: {name} is not valid JSON: {error}") from None
    if not isinstance(value, Mapping):
        raise ValueError(f"config: {name} holds {type(value).__name__}, expected a JSON object")
    return dict(value)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """As in DeepSpeed: a key that stands twice would silently lose one of its values."""
    twice = sorted({key for key, _ in pairs if sum(key == other for other, _ in pairs) > 1})
    if twice:
        raise ValueError(f"config: {', '.join(map(repr, twice))} stands more than once in one object; keep one of them")
    return dict(pairs)


def _explain(error: ValidationError) -> str:
    sentences = []
    for entry in error.errors():
        path = entry["loc"]
        inside = len(path) > 2  # profile, the kind of its value, the key
        model: type[BaseModel] = Profile if inside else Config
        where, field = f"{BLOCK}.profile" if inside else BLOCK, str(path[-1 if inside else 0]) if path else ""
        if entry["type"] == "extra_forbidden":
            near = difflib.get_close_matches(field, model.model_fields, n=1, cutoff=0.0)[0]
            known = ", ".join(model.model_fields)
            sentences.append(f"{where}.{field}: unknown key; did you mean {near!r}? Known keys: {known}")
        elif entry["type"] == "value_error":
            sentences.append(f"{where}.{entry['ctx']['error']}")
        elif not (field == "profile" and isinstance(entry["input"], Mapping)):  # else its own fields say what is wrong
            sentences.append(f"{where}.{field}: got {entry['input']!r}, allowed: {_allowed(model, field)}")
    return "; ".join(dict.fromkeys(sentences))


def _allowed(model: type[BaseModel], field: str) -> str:
    schema = model.model_json_schema()["properties"][field]
    parts = []
    for option in schema.get("anyOf", [schema]):
        if "enum" in option:
            parts.append(" | ".join(json.dumps(v) for v in option["enum"]))
        elif "const" in option:
            parts.append(json.dumps(option["const"]))
        elif "$ref" in option:
            parts.append(f"an object of {', '.join(Profile.model_fields)}")
        else:
            least = f" >= {option['minimum']}" if "minimum" in option else ""
            parts.append(f"{option['type']}{least}")
    return " | ".join(parts)
