"""One micro-batch: the user's rows become one stream of documents, of which this rank keeps its tokens.

    rows [B, S] (padding anywhere, documents inside) -> kept tokens, row after row (the stream)
        -> padded at the stream's end -> chunks -> this rank's local tokens [1, T]

Labels are shifted before the cut, as HF shifts them: inside a row, the target of column j is labels[j + 1].
Documents never attend each other. All planning is in host integers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ds_cp import layout as layouts
from ds_cp import tiles
from ds_cp.balance import Chunks, Window
from ds_cp.layout import Layout
from ds_cp.mesh import Mesh
from ds_cp.placement import Held, Methods, bounds_on, place

IGNORE = -100

TOKEN_KEYS = ("input_ids", "inputs_embeds", "labels", "shift_labels", "position_ids", "attention_mask", "loss_weights")
"""Keys that hold one value per token, [B, S, ...]; anything else of that size is refused rather than guessed at."""

BOUND_KEYS = ("cu_seq_lens_q", "cu_seq_lens_k", "seq_lens", "seq_idx")
"""Keys that give document boundaries; where several are given they must agree."""

DOCUMENT_KEYS = (*BOUND_KEYS, "max_length_q", "max_length_k")
"""Keys that describe documents; read here and not passed on, because they speak of the whole row."""


@dataclass(frozen=True)
class Rows:
    """How the stream stands in the user's rows. `kept` are flat indices into [B * S], None where nothing is dropped."""

    shape: tuple[int, int]
    kept: Tensor | None
    tokens: int


@dataclass(frozen=True)
class SequenceContext:
    """What a layer needs to know about the micro-batch; travels to every attention call as a keyword."""

    mesh: Mesh
    methods: Methods
    layout: Layout
    """Of attention."""
    plans: Mapping[Window, tiles.Plan]
    """This rank's tiles by the layer's window; None is full attention."""
    held: Held
    documents: tuple[int, ...]
    rows: Rows
    targets: Tensor | None
    """Number (or weight) of the targets of the whole micro-batch, 0-d fp64; None without labels."""
    weights: Tensor | None
    """Local loss weights [1, T], shifted; None for ones."""
    census: Any
    """What records the attention calls on the first step; None afterwards."""


def prepare(
    batch: Mapping[str, Any],
    mesh: Mesh,
    methods: Methods,
    device: torch.device,
    census: Any = None,
    keep: bool = False,
) -> tuple[dict[str, Any], SequenceContext]:
    """This rank's part of a batch of whole rows, and the context that goes with it.

    Args:
        batch: keyword arguments of a HF causal LM: `input_ids` or `inputs_embeds`, optionally `labels` or `shift_labels`,
            2-D `attention_mask`, `position_ids` [B, S] (of MRoPE [3 or 4, B, S]), `cu_seq_lens_q` or `seq_lens`, `loss_weights`
            [B, S]. The same on every rank of the seq group.
        keep: keys and values of other ranks wait for backward (`Plan.kept`). The same on every rank, too.

    Returns:
        Keyword arguments with local tensors on `device`, and the context.

    Raises:
        ValueError: a tensor has another length, a mask that is not 2-D, a key that is not known.
    """
    tokens = _tokens(batch)
    _check_shapes(batch, tokens)
    rows, documents = _stream(batch, tokens)
    plan = layouts.build(methods.layout, rows.tokens, mesh.ring.size, mesh.ulysses.size, documents, methods.windows)
    gathered = _is_gathered(plan, documents, methods)
    documents = _with_padding(documents, plan.length)
    held = place(plan, methods, mesh, documents, device)
    targets, weights = _targets(batch)
    _check_padding_has_no_targets(targets, batch, rows)

    def cut(x: Tensor, fill: float) -> Tensor:
        return shard(x, rows, held.layout, mesh, fill).to(device, non_blocking=True)

    out = {k: v for k, v in batch.items() if k not in TOKEN_KEYS and k not in DOCUMENT_KEYS}
    for key in ("input_ids", "inputs_embeds"):
        if batch.get(key) is not None:
            out[key] = cut(batch[key], 0)
    positions = _positions(batch, rows, documents, tokens)
    out["position_ids"] = cut(positions, 0) if positions.ndim == 2 else cut(positions.movedim(0, -1), 0).movedim(-1, 0)
    if targets is not None:
        out["labels"] = cut(targets, IGNORE)
    plans = _plans(plan, mesh, documents, methods, gathered, device)
    context = SequenceContext(
        mesh=mesh,
        methods=methods,
        layout=plan,
        held=held,
        plans={window: replace(found, kept=keep) for window, found in plans.items()},
        documents=documents,
        rows=rows,
        targets=None if targets is None else _count(targets, weights).to(device, non_blocking=True),
        weights=None if weights is None else cut(weights, 0),
        census=census,
    )
    return out, context


def _is_gathered(layout: Layout, documents: tuple[int, ...], methods: Methods) -> bool:
    """Whether all keys and values of this row are gathered; with "auto" where hops are short, and only one document pairs chunks so
    that all keys before one are one tile. Two ranks have one hop, as many calls either way.
    """
    if methods.ring_impl != "auto":
        return methods.ring_impl == "allgather"
    return len(documents) == 2 and layout.ring > 2 and layout.length // layout.ring <= methods.gathered_tokens


def _plans(
    layout: Layout, mesh: Mesh, documents: tuple[int, ...], methods: Methods, gathered: bool, device: torch.device
) -> dict[Window, tiles.Plan]:
    """Once a window, not once a layer; one that no document of the row fills is none."""
    longest = max(end - start for start, end in pairwise(documents))
    full = tiles.plan_gathered if gathered else tiles.plan
    found: dict[Window, tiles.Plan] = {None: _on_device(full(layout, mesh.ring.rank, documents), device)}
    for window in set(methods.windows):
        if window is None:
            continue
        if (window.size if isinstance(window, Chunks) else window) >= longest:
            found[window] = found[None]
        elif isinstance(window, Chunks):
            found[window] = _on_device(full(layout, mesh.ring.rank, window.of(documents)), device)
        else:
            found[window] = _on_device(tiles.plan_window(layout, mesh.ring.rank, documents, window), device)
    return found


def _on_device(plan: tiles.Plan, device: torch.device) -> tiles.Plan:
    """Where kernels read document boundaries on a device, they are put there now, not in every layer."""
    if device.type == "cpu":
        return plan
    (own,), *rest = plan.steps
    assert own.documents is not None, "the own tokens are documents"
    own = replace(own, cu_seqlens=bounds_on(device, own.documents, torch.int32))
    return replace(plan, steps=((own,), *rest))


def shard(x_BS: Tensor, rows: Rows, plan: Layout, mesh: Mesh, fill: float) -> Tensor:
    """This rank's tokens of whole rows: [B, S, ...] to [1, T, ...]. `fill` stands in the padding at the stream's end."""
    flat = x_BS.flatten(0, 1)
    parts = []
    for start, end in plan.local_ranges(mesh.ring.rank, mesh.ulysses.rank):
        last = min(end, rows.tokens)
        if start < last:
            parts.append(flat[start:last] if rows.kept is None else flat[rows.kept[start:last].to(flat.device)])
        if max(last, start) < end:
            parts.append(flat.new_full((end - max(last, start), *flat.shape[1:]), fill))
    return torch.cat(parts).unsqueeze(0)


def by_rank(x_BS: Tensor, context: SequenceContext) -> list[Tensor]:
    """What each rank of the row holds of whole rows, [tokens, ...] without the padding at the stream's end; on x's device."""
    flat, kept = x_BS.flatten(0, 1), context.rows.kept
    stream = flat if kept is None else flat[kept.to(flat.device)]
    return [torch.cat([stream[start:end] for start, end in spans]) for spans in layouts.shards(context.held.layout)]


def unshard(gathered: Tensor, context: SequenceContext) -> Tensor:
    """Whole rows in the user's order from the seq group's shards: [size, 1, T, ...] to [B, S, ...]; zeros at padding."""
    flat = gathered.flatten(0, 2)
    offset, pieces = 0, []
    for start, end in layouts.gathered_order(context.held.layout):
        pieces.append((start, flat[offset : offset + end - start]))
        offset += end - start
    stream = torch.cat([piece for _, piece in sorted(pieces, key=lambda item: item[0])])[: context.rows.tokens]
    batch, length = context.rows.shape
    if context.rows.kept is None:
        return stream.unflatten(0, (batch, length))
    whole = stream.new_zeros((batch * length, *stream.shape[1:]))
    return whole.index_copy(0, context.rows.kept.to(stream.device), stream).unflatten(0, (batch, length))


def count_targets(batch: Mapping[str, Any]) -> Tensor:
    """Number (or weight) of the targets of a batch of whole rows, 0-d fp64, on its labels' device.

    The rule of the loss: what `num_items_in_batch` must be the sum of over the micro-batches of a step.
    """
    targets, weights = _targets(batch)
    assert targets is not None
    return _count(targets, weights)


def shifted_targets(batch: Mapping[str, Any]) -> Tensor:
    """The targets of whole rows [B, S]: column j holds what stands at j + 1, -100 where there is no target."""
    targets, _ = _targets(batch)
    assert targets is not None
    return targets


def _tokens(batch: Mapping[str, Any]) -> Tensor:
    given = [(key, batch[key]) for key in ("input_ids", "inputs_embeds") if batch.get(key) is not None]
    if len(given) != 1:
        raise ValueError("batch: give exactly one of input_ids [B, S] and inputs_embeds [B, S, hidden]")
    key, tokens = given[0]
    if tokens.ndim != (2 if key == "input_ids" else 3) or not tokens.numel():
        shape = "[B, S]" if key == "input_ids" else "[B, S, hidden]"
        raise ValueError(f"batch: {key} has shape {tuple(tokens.shape)}, expected {shape} with at least one token")
    return tokens


def _check_shapes(batch: Mapping[str, Any], tokens: Tensor) -> None:
    rows, length = tokens.shape[:2]
    for key, value in batch.items():
        if not isinstance(value, Tensor) or key in DOCUMENT_KEYS:
            continue
        if key not in TOKEN_KEYS:
            if length > 1 and length in value.shape:
                raise ValueError(
                    f"batch: {key} {tuple(value.shape)} has the row's length {length}, but ds_cp does not know how to shard "
                    f"it; drop it from the batch (known: {', '.join(TOKEN_KEYS + DOCUMENT_KEYS)})"
                )
            continue
        if key == "position_ids" and value.ndim == 3 and value.shape[0] in (3, 4) and value.shape[1:] == (rows, length):
            continue
        fits = value.shape[:2] == (rows, length) or (key == "position_ids" and value.shape == (1, length))
        if not fits or (value.ndim != 2 and key != "inputs_embeds"):
            raise ValueError(f"batch: {key} has shape {tuple(value.shape)}, expected ({rows}, {length}) like the tokens")


def _stream(batch: Mapping[str, Any], tokens: Tensor) -> tuple[Rows, tuple[int, ...]]:
    """The kept tokens, and the documents they form (cu_seqlens without the padding at the end)."""
    rows, length = tokens.shape[:2]
    mask, kept = batch.get("attention_mask"), None
    if mask is not None:
        mask = mask.cpu()
        if not bool(((mask == 0) | (mask == 1)).all()):
            raise ValueError("batch: attention_mask holds values other than 0 and 1; give documents as position_ids that reset")
        kept = None if bool(mask.all()) else mask.flatten().nonzero().squeeze(1)
        if kept is not None and not len(kept):
            kept = torch.zeros(1, dtype=torch.long)  # a batch of padding alone: one token without a target
    stream = Rows(shape=(rows, length), kept=kept, tokens=rows * length if kept is None else len(kept))
    return stream, _documents(batch, stream)


def documents_of(batch: Mapping[str, Any]) -> tuple[int, ...]:
    """cu_seqlens of the kept tokens of a batch of whole rows."""
    return _stream(batch, _tokens(batch))[1]


def _documents(batch: Mapping[str, Any], rows: Rows) -> tuple[int, ...]:
    """Boundaries from the keys that give them, which must agree; without such a key from positions that reset."""
    given = {key: _bounds(key, batch[key], rows) for key in BOUND_KEYS if batch.get(key) is not None}
    resets = _resets(_text_positions(batch.get("position_ids")), rows)
    if not given:
        return resets
    key, bounds = next(iter(given.items()))
    for other, also in {**given, **({"position_ids": tuple(sorted({*bounds, *resets}))})}.items():
        if also != bounds:
            raise ValueError(f"batch: {key} and {other} describe different documents ({_short(bounds)}, {_short(also)})")
    return bounds


def _text_positions(positions: Tensor | None) -> Tensor | None:
    """The positions [B, S] that tell documents apart, as in transformers: of MRoPE's the first of four rows; time, height and
    width, the other three, repeat inside an image.
    """
    if positions is None or positions.ndim == 2:
        return positions
    return positions[0] if len(positions) == 4 else None


def _resets(positions: Tensor | None, rows: Rows) -> tuple[int, ...]:
    """Boundaries of rows, and where positions do not go on: neither by one nor by as many columns as were dropped between."""
    batch_size, length = rows.shape
    if rows.kept is None:
        starts = range(0, rows.tokens + 1, length)
        if positions is None or length == 1:
            return tuple(starts)
        row, column = (positions.cpu().expand(batch_size, -1).diff(dim=1) != 1).nonzero().unbind(1)
        return tuple(sorted({*starts, *(row * length + column + 1).tolist()}))
    begun = rows.kept.div(length, rounding_mode="floor").diff() != 0
    if positions is not None:
        step = positions.cpu().expand(batch_size, -1).flatten()[rows.kept].diff()
        begun |= (step != 1) & (step != rows.kept.diff())
    return (0, *(begun.nonzero().squeeze(1) + 1).tolist(), rows.tokens)


def _bounds(key: str, given: Any, rows: Rows) -> tuple[int, ...]:
    """cu_seqlens from one of BOUND_KEYS, checked against the rows it must describe."""
    values = torch.as_tensor(given).cpu()
    if rows.kept is not None:
        raise ValueError(f"batch: {key} and an attention_mask with zeros contradict each other; give one of them")
    if values.is_floating_point() or values.dtype == torch.bool or not values.numel():
        raise ValueError(f"batch: {key} must hold whole numbers, got {values.dtype} of shape {tuple(values.shape)}")
    if key == "seq_idx":
        if values.shape != rows.shape:
            raise ValueError(f"batch: seq_idx has shape {tuple(values.shape)}, expected {rows.shape} like the tokens")
        bounds = [0, *(values.flatten().diff().nonzero().squeeze(1) + 1).tolist(), rows.tokens]
    elif key == "seq_lens":
        bounds = [0, *values.flatten().cumsum(0).tolist()]
    else:
        bounds = values.flatten().tolist()
    if bounds[0] != 0 or bounds[-1] != rows.tokens or any(a > b for a, b in pairwise(bounds)):
        raise ValueError(f"batch: {key} must ascend from 0 to the {rows.tokens} tokens of the batch, got {_short(bounds)}")
    return tuple(sorted({*bounds, *range(0, rows.tokens + 1, rows.shape[1])}))


def _short(values: Sequence[int]) -> str:
    return str(list(values)) if len(values) <= 8 else f"[{', '.join(map(str, values[:4]))}, ..., {values[-1]}]"


def _with_padding(documents: tuple[int, ...], length: int) -> tuple[int, ...]:
    """The padding at the stream's end is a document of its own: nothing real attends it."""
    return documents if documents[-1] == length else (*documents, length)


def _positions(batch: Mapping[str, Any], rows: Rows, documents: tuple[int, ...], tokens: Tensor) -> Tensor:
    """position_ids [B, S] (MRoPE: [3 or 4, B, S]): the user's; else columns as HF counts them, or from each document's start."""
    batch_size, length = rows.shape
    given = batch.get("position_ids")
    if given is not None:
        return given if given.ndim == 3 else given.expand(batch_size, -1)
    columns = torch.arange(length, device=tokens.device).expand(batch_size, -1)
    if all(batch.get(key) is None for key in BOUND_KEYS):
        return columns
    flat = torch.arange(rows.tokens, device=tokens.device)
    starts = torch.tensor(documents, device=tokens.device)
    return (flat - starts[torch.bucketize(flat, starts, right=True) - 1]).view(batch_size, length)


def _targets(batch: Mapping[str, Any]) -> tuple[Tensor | None, Tensor | None]:
    """Shifted targets [B, S] and loss weights [B, S] (or None): column j holds what stands at j + 1."""
    targets, weights = batch.get("shift_labels"), batch.get("loss_weights")
    if targets is None and batch.get("labels") is not None:
        targets = _shift(batch["labels"], IGNORE)
        weights = None if weights is None else _shift(weights, 0)
    mask = batch.get("attention_mask")
    if targets is not None and mask is not None:  # a left-padded row's first token would be predicted from padding
        targets = targets.masked_fill(mask.to(targets.device) == 0, IGNORE)
    return targets, None if targets is None else weights


def _shift(x_BS: Tensor, fill: float) -> Tensor:
    return torch.cat((x_BS[:, 1:], x_BS.new_full((x_BS.shape[0], 1), fill)), dim=1)


def _count(targets: Tensor, weights: Tensor | None) -> Tensor:
    valid = targets != IGNORE
    return valid.sum().double() if weights is None else torch.where(valid, weights.double(), 0.0).sum()


def _check_padding_has_no_targets(targets: Tensor | None, batch: Mapping[str, Any], rows: Rows) -> None:
    labels = batch["labels"] if batch.get("labels") is not None else batch.get("shift_labels")
    if targets is None or labels is None or rows.kept is None:
        return
    padding = torch.ones(labels.numel(), dtype=torch.bool)
    padding[rows.kept] = False
    wrong = int((labels.flatten().cpu()[padding] != IGNORE).sum())
    if wrong:
        raise ValueError(
            f"batch: labels hold {wrong} targets at positions that attention_mask marks as padding; set them to {IGNORE}, "
            "else the model would train on padding"
        )
