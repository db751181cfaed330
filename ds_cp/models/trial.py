"""Whether a model can be sharded, tried before training on a tiny twin of it: what decides about model types that no family lists.

Two comparisons in one process, gradients of every parameter included:

- the twin under ds_cp's hooks on one rank against the twin as transformers runs it, a row of one document and packed ones. What its
  attention does (window, softcap, sinks, scale, a mask or a bias of its own, no causality) must come through the interface;
- the twin without attention, whose every token then sees itself alone: the shards of two ranks, one after another, against the
  whole row. What mixes tokens outside attention (convolutions, recurrence, token shifts, pooling), counts positions or makes masks
  from the length that it sees gives a shard other outputs.

Thresholds in tokens (windows, top-k of an indexer, position scales) are small in a twin, so that a short row reaches them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from ds_cp.batch import IGNORE, Methods
from ds_cp.kernels import attention as kernels
from ds_cp.loss import CausalLMLoss
from ds_cp.mesh import AxisGroup, Mesh
from ds_cp.models import attach, checks, counted, family_of, indexer, routers
from ds_cp.models.relay import relays
from ds_cp.models.twin import VOCABULARY, twin
from ds_cp.topology import Topology

LIMIT = 1e-3
"""Of |x - wanted| / max |wanted|: fp32 rounds to 1e-5 at most, and what is computed wrong is off by far more."""

IMPLEMENTATION = "ds_cp_trial"
TOKENS = 40
DOCUMENTS = (0, 21, 22, TOKENS)
SHARDS = ((*range(10), *range(30, 40)), tuple(range(10, 30)))  # of a zigzag ring of two

FLOOR = 1e-2
"""A gradient that is smaller than this share of the model's largest is zero but for rounding (a bias of keys)."""

Run = tuple[float, dict[str, Tensor]]
"""Loss and gradients."""


def refuse(model: PreTrainedModel) -> None:
    """Raises a ValueError for a model that cannot be sharded: by its properties, or, of a type that no family lists, by its twin.

    Raises:
        ValueError: one sentence that says what is wrong.
    """
    checks.refuse(model)
    if family_of(model.config) is None and (reason := wrong(type(model), model.config)) is not None:
        raise ValueError(
            f"model: {type(model).__name__} ({model.config.model_type}) cannot be trained under sequence parallelism: a tiny "
            f"twin of it was tried, and {reason}; change the model or set sequence_parallel.size to 1"
        )


def wrong(kind: type[PreTrainedModel], config: Any) -> str | None:
    """What goes wrong with the twin of a model of this class and config, or None."""
    try:
        model = twin(kind, config)
    except Exception as error:  # whatever its class says
        return f"none could be built ({_first_line(error)})"
    for batch, documents in rows():
        if len(documents) > 2 and getattr(model.config.get_text_config(), routers.KEY, False):
            setattr(model.config.get_text_config(), routers.KEY, False)  # a balance loss is one of whole rows
        try:
            wanted = alone(model, batch, documents)
        except Exception as error:
            return f"transformers itself could not run it ({_first_line(error)})"
        try:
            found = _attached(model, batch)
        except Exception as error:
            return _first_line(error).removeprefix("model: ")
        if (name := _differs(found, wanted)) is not None:
            what = "packed documents" if len(documents) > 2 else "a row"
            return f"with {what} ds_cp's attention in its place gave another {name} than its own"
    return mixes(model)


def rows() -> list[tuple[dict[str, Tensor], tuple[int, ...]]]:
    """Batches of one row and the bounds of its documents: one, and several."""
    found: list[tuple[dict[str, Tensor], tuple[int, ...]]] = []
    ids = torch.randint(3, VOCABULARY, (1, TOKENS), generator=torch.Generator().manual_seed(1))
    for documents in ((0, TOKENS), DOCUMENTS):
        positions = torch.cat([torch.arange(end - start) for start, end in pairwise(documents)]).unsqueeze(0)
        labels = ids.masked_fill(positions == 0, IGNORE)
        found.append(({"input_ids": ids, "position_ids": positions, "labels": labels}, documents))
    return found


def alone(model: PreTrainedModel, batch: dict[str, Tensor], documents: tuple[int, ...]) -> Run:
    """The mean loss over the row's targets and its gradients by transformers, each document a row of its own."""
    model.zero_grad()
    total, targets = 0.0, int((batch["labels"][:, 1:] != IGNORE).sum())
    for start, end in pairwise(documents):
        part = {key: value[:, start:end] for key, value in batch.items()}
        mine = int((part["labels"][:, 1:] != IGNORE).sum())
        if mine:
            loss = model(**part, use_cache=False).loss * (mine / targets)
            loss.backward()
            total += float(loss.detach())
    return total, gradients(model)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """A copy of every parameter's, zeros where it has none."""
    named = model.named_parameters()
    return {name: torch.zeros_like(p) if p.grad is None else p.grad.detach().clone() for name, p in named}


def _attached(model: PreTrainedModel, batch: dict[str, Tensor]) -> Run:
    axis = AxisGroup(group=None, ranks=(0,), rank=0)
    mesh = Mesh(topology=Topology(1, 1, 1), ulysses=axis, ring=axis, seq=axis, data=axis)
    methods = Methods(attention=kernels.load("reference"), layout="zigzag", windows=checks.windows(model))
    handle = attach.Handle(model, mesh, methods, CausalLMLoss("mean", divisor=lambda: 1))
    handle.apply()
    try:
        model.zero_grad()
        loss = model(**batch).loss
        if not isinstance(loss, Tensor):
            raise ValueError("it gave no loss for labels")
        loss.backward()
        return float(loss.detach()), gradients(model)
    finally:
        handle.remove()


def _differs(found: Run, wanted: Run) -> str | None:
    """The name of the first value that is another than wanted, by more than rounding."""
    if not abs(found[0] - wanted[0]) <= LIMIT * abs(wanted[0]):
        return "loss"
    name = _other_gradient(found[1], wanted[1])
    return name and f"gradient of {name}"


def _other_gradient(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> str | None:
    least = FLOOR * max(float(x.abs().max()) for x in wanted.values() if x.numel())
    return next((name for name in wanted if not _same(found[name], wanted[name], least)), None)


def _same(found: Tensor, wanted: Tensor, least: float = 0.0) -> bool:
    if found.shape != wanted.shape or not wanted.numel():
        return found.shape == wanted.shape
    return float((found - wanted).abs().max()) <= LIMIT * max(float(wanted.abs().max()), least)


def mixes(model: PreTrainedModel) -> str | None:
    """What gives a token of a shard another output than the same token of the whole row, where no attention mixes them."""
    AttentionInterface.register(IMPLEMENTATION, own_token)
    model.set_attn_implementation(IMPLEMENTATION)
    heads: list[tuple[int, int]] = []
    positions = counted.Door(model)
    choices = indexer.Door(model)
    doors: list[Any] = [*relays(model, checks.attention_modules(model)), positions, choices]
    positions.apply()
    choices.apply()
    try:
        (whole,), wanted = _without_attention(model, (tuple(range(TOKENS)),), heads, positions)
        parts, found = _without_attention(model, SHARDS, heads, positions)
    except Exception as error:
        return f"a shard of it could not run ({_first_line(error)})"
    finally:
        for door in doors:
            door.remove()
    return _first_apart(model, whole, parts) or _first_gradient(found, wanted) or _other_heads(model, heads)


def _without_attention(
    model: PreTrainedModel, shards: tuple[tuple[int, ...], ...], heads: list[tuple[int, int]], counts: counted.Door
) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
    """Outputs of modules on each shard, and the gradients of a sum over all tokens of all shards; `heads` are added to."""
    ids, positions = rows()[0][0]["input_ids"], torch.arange(TOKENS).unsqueeze(0)
    model.zero_grad()
    seen = []
    for shard in shards:
        at = torch.tensor(shard)
        counts.begin(positions[:, at])
        with _noted(model, len(shard)) as outputs:
            logits = model(input_ids=ids[:, at], position_ids=positions[:, at], use_cache=False, cp=heads).logits
        seen.append({**outputs, "": logits.detach()})
        weight = torch.randn(TOKENS, logits.shape[-1], generator=torch.Generator().manual_seed(2))[at]
        (logits[0] * weight).sum().backward()
    return seen, gradients(model)


def _other_heads(model: PreTrainedModel, seen: list[tuple[int, int]]) -> str | None:
    known = checks.heads(model)
    other = next((pair for pair in seen if pair not in known), None)
    return other and (
        f"a layer has {other[0]} query and {other[1]} key/value heads, while its config and modules say {known}, which the ranks' "
        "shares of heads are planned by"
    )


def _first_apart(model: nn.Module, whole: dict[str, Tensor], parts: list[dict[str, Tensor]]) -> str | None:
    for name, wanted in whole.items():
        for shard, outputs in zip(SHARDS, parts, strict=True):
            if name not in outputs or not _same(outputs[name], wanted[:, list(shard)]):
                which = f"{name} ({type(model.get_submodule(name)).__name__})" if name else "something before its logits"
                return (
                    f"{which} gave a token of a shard another output than the same token in the whole row, with attention left "
                    "out: it mixes neighbouring tokens, or counts positions or makes a mask from the length that it sees"
                )
    return None


def _first_gradient(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> str | None:
    name = _other_gradient(found, wanted)
    return name and f"the gradients of {name} on two shards did not add up to that of the whole row, with attention left out"


@contextmanager
def _noted(model: nn.Module, tokens: int) -> Iterator[dict[str, Tensor]]:
    """Outputs of modules that have one entry a token, [1, T, ...], in the order in which modules were done."""
    outputs: dict[str, Tensor] = {}

    def note(name: str, output: Any) -> None:
        first = output[0] if isinstance(output, tuple) and output else output
        if isinstance(first, Tensor) and first.ndim > 1 and first.shape[:2] == (1, tokens) and first.is_floating_point():
            outputs.setdefault(name, first.detach())

    def hook(name: str) -> Any:
        return lambda module, args, output: note(name, output)

    hooks = [module.register_forward_hook(hook(name)) for name, module in model.named_modules() if name]
    try:
        yield outputs
    finally:
        for each in hooks:
            each.remove()


def own_token(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, cp: list[tuple[int, int]], **kwargs: Any
) -> tuple[Tensor, None]:
    """In attention's place: each token's value, weighted by its own query and key in a way that tells positions apart.

    A product of the two would not: rotated alike, they give the same whatever the position.
    """
    cp.append((query.shape[1], key.shape[1]))
    q, k = (_weigh(x).repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (query, key))
    v = value.repeat_interleave(query.shape[1] // value.shape[1], dim=1)
    return (v * (1 + q.tanh() + 0.5 * k.tanh())).transpose(1, 2).contiguous(), None


def _weigh(x: Tensor) -> Tensor:
    return (x * torch.arange(1, x.shape[-1] + 1, dtype=x.dtype, device=x.device).cos()).mean(-1, keepdim=True)


def _first_line(error: Exception) -> str:
    text = " ".join(str(error).split()).split("; change the model")[0]
    return (text if len(text) < 240 else f"{text[:236]} ...").rstrip(".") or type(error).__name__
