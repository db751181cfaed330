"""The door to a model's vision tower: whole images, shared out among the ranks of a row, and their features brought to the tokens.

    images of the row         rank 0: images 0, 3    rank 1: image 1    rank 2: image 2    rank 3: a blank one
      -- tower, merger, deepstack mergers -->  features of a rank's images                      [F, C]
      -- one exchange over seq -->             features of the image tokens that a rank holds   [V, C]
      -- keyword `mm_encoder_outputs` -->      the model puts them in the place of its local image tokens

The language model is cut before its embedding, as a text model is: no rank holds the row's embeddings. A rank whose tokens are all
text has V = 0 and still stands in the graph, so that every rank takes part in the exchange back. Where any replica of a step has
images, all others encode a blank one whose features nobody takes: ZeRO gathers the tower's parameters, and reduces their gradients,
on all ranks or on none.

MRoPE positions are computed by the model's own function from the whole row, before the cut; of a packed row document by document.

Shapes: F features of this rank's images, V local image tokens, C width of a feature and its deepstack features, B rows of S tokens,
D documents of at most L tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PretrainedConfig, PreTrainedModel

from ds_cp import batch as batches
from ds_cp import comm
from ds_cp.batch import BOUND_KEYS, DOCUMENT_KEYS, TOKEN_KEYS, SequenceContext
from ds_cp.mesh import Mesh
from ds_cp.models import family_of
from ds_cp.models.lm_head import CALL_KEYS
from ds_cp.models.replicas import any_replica

PIXELS: Mapping[str, str] = {"image": "pixel_values", "video": "pixel_values_videos"}
KEYS = (*PIXELS.values(), "image_grid_thw", "video_grid_thw", "second_per_grid_ts", "mm_token_type_ids", "mm_encoder_outputs")
PLACEHOLDERS = tuple(f"{kind}_token_{name}" for kind in ("image", "video", "audio") for name in ("id", "index"))
"""Fields of configs with the token that stands where an image or sound is put in."""
TEXT_IS_ZERO: Mapping[str, tuple[str, ...]] = {"gemma3": ("mm_token_type_ids", "token_type_ids")}
"""By model type the token types in which 0 is text; others' token_type_ids mean something else (PaliGemma: 0 is a prefix)."""


@dataclass(frozen=True)
class Encoded:
    """What became of the row's images and videos on this rank; features of images come before those of videos."""

    kinds: tuple[str, ...]
    """What the row has; of a row without either, images, of which it has none."""
    output: Any
    """The tower's output, whose type the model is given back."""
    features_FC: Tensor
    owners: Tensor
    """Of every feature of the row the rank that has it, and where it stands there."""
    places: Tensor


def has_vision(config: PretrainedConfig) -> bool:
    """Whether ds_cp shards the images of this type, and not only its text."""
    family = family_of(config)
    return family is not None and "vision" in family.HANDLES


def parts(config: PretrainedConfig) -> dict[str, PretrainedConfig]:
    """The configs of a model's parts beside its text (vision, audio), by key."""
    text = config.get_text_config()
    found = {key: getattr(config, key, None) for key in config.sub_configs}
    return {key: part for key, part in found.items() if isinstance(part, PretrainedConfig) and part is not text}


def has_parts(config: PretrainedConfig) -> bool:
    return bool(parts(config))


def refuse_parts(given: dict[str, Any], config: PretrainedConfig) -> None:
    """Raises a ValueError for pixels, sound and their tokens in a batch for a model of which the text alone is sharded.

    Token types that say "all text", as a processor gives them, are taken out: a model does the same without them.
    """
    for key in TEXT_IS_ZERO.get(config.model_type, ("mm_token_type_ids",)):
        if isinstance(types_BS := given.get(key), Tensor) and not types_BS.any():
            del given[key]
    known, ids_BS = (*TOKEN_KEYS, *DOCUMENT_KEYS, *CALL_KEYS), given.get("input_ids")
    other = next((key for key, x in given.items() if _has_tensors(x) and key not in known), None)
    if other is None and ids_BS is not None:
        places = {key: getattr(config, key, None) for key in PLACEHOLDERS}
        other = next((f"tokens of {key}" for key, token in places.items() if token is not None and (ids_BS == token).any()), None)
    if other is not None:
        raise ValueError(
            f"batch: {other}: of {config.model_type} only the text is sharded in this version, not images or sound; leave them "
            "out, or set sequence_parallel.size to 1"
        )


def _has_tensors(x: Any) -> bool:
    """With dimensions; of images that differ in size a processor gives a list."""
    return any(map(_has_tensors, x)) if isinstance(x, list | tuple) else isinstance(x, Tensor) and x.ndim > 0


def deal(patches: Sequence[int], ranks: int) -> list[int]:
    """The rank that encodes each image: the largest first, each to the rank with the least so far."""
    load, owners = [0] * ranks, [0] * len(patches)
    for image in sorted(range(len(patches)), key=lambda i: -patches[i]):
        owners[image] = min(range(ranks), key=lambda rank: load[rank])
        load[owners[image]] += patches[image]
    return owners


class Door:
    """The tower of one attached model; of a model whose text alone is sharded it lets in nothing else."""

    def __init__(self, model: PreTrainedModel, mesh: Mesh) -> None:
        self._model, self._mesh, self._on = model, mesh, has_vision(model.config)
        self._text_alone = has_parts(model.config) and not self._on

    def begin(self, given: dict[str, Any], device: torch.device) -> Encoded | None:
        """Takes what is meant for the tower out of a call's keywords, puts the positions in, and encodes this rank's share.

        Raises:
            ValueError: images that do not fit the tokens, or without what their positions are computed from; any, where the text
                alone is sharded.
        """
        if self._text_alone:
            self._refuse_parts(given, device)
        if not self._on:
            return None
        taken = {key: value for key in KEYS if (value := given.pop(key, None)) is not None}
        kinds = tuple(kind for kind, pixels in PIXELS.items() if pixels in taken)
        reason = None
        try:
            self._refuse(given, taken, kinds)
            if kinds and given.get("position_ids") is None:
                given["position_ids"] = self._positions(given, taken)
        except ValueError as error:
            reason = error
        encodes = any_replica(bool(kinds), reason, self._mesh, device)
        return self._encode(kinds, taken, device) if encodes else None

    def end(self, encoded: Encoded | None, ids_BS: Tensor | None, context: SequenceContext) -> dict[str, Any]:
        """Keywords for the model; every rank of the row must call it."""
        if encoded is None:
            return {}
        wanted = self._wanted(encoded.kinds, ids_BS, context)
        local_VC = self._exchange(encoded, [torch.cat(theirs) for theirs in wanted])
        width, outputs = encoded.output.pooler_output[0].shape[-1], {}
        of_kinds = local_VC.split([len(part) for part in wanted[self._mesh.seq.rank]])
        for kind, features_VC in zip(encoded.kinds, of_kinds, strict=True):
            first, *deeper = features_VC.split(width, dim=-1)
            more = {"deepstack_features": [(part,) for part in deeper]} if deeper else {}
            outputs[kind] = type(encoded.output)(pooler_output=(first,), **more)
        return {"mm_encoder_outputs": outputs}

    def _refuse_parts(self, given: dict[str, Any], device: torch.device) -> None:
        reason = None
        try:
            refuse_parts(given, self._model.config)
        except ValueError as error:
            reason = error
        any_replica(False, reason, self._mesh, device)

    def _refuse(self, given: dict[str, Any], taken: dict[str, Any], kinds: tuple[str, ...]) -> None:
        if "mm_encoder_outputs" in taken:
            raise ValueError("batch: mm_encoder_outputs of a whole row cannot be sharded; pass the pixels, ds_cp shares them out")
        if kinds and given.get("input_ids") is None:
            raise ValueError("batch: give input_ids with images: they say which tokens are of an image")
        for kind in PIXELS:
            grid, ids_BS = taken.get(f"{kind}_grid_thw"), given.get("input_ids")
            if kind in kinds and grid is None:
                raise ValueError(f"batch: {PIXELS[kind]} without {kind}_grid_thw; give what the processor returned")
            tokens = 0 if ids_BS is None else int(self._is_of(kind, ids_BS).sum())
            features = sum(self._features_of(grid)) if grid is not None and kind in kinds else 0
            if tokens != features:
                raise ValueError(f"batch: input_ids hold {tokens} {kind} tokens, {PIXELS[kind]} make {features}; truncate no image")
        if kinds and given.get("position_ids") is None and "mm_token_type_ids" not in taken:
            raise ValueError(
                "batch: images without mm_token_type_ids, from which positions are computed; give what the processor returned, "
                "or position_ids [4, B, S] of your own"
            )

    def _is_of(self, kind: str, ids_BS: Tensor) -> Tensor:
        return ids_BS == getattr(self._model.config, f"{kind}_token_id")

    def _features_of(self, grid: Tensor) -> list[int]:
        return (grid.prod(-1) // self._model.config.vision_config.spatial_merge_size**2).tolist()

    def _positions(self, given: dict[str, Any], taken: dict[str, Any]) -> Tensor:
        """[3, B, S]; where the batch names its documents, each starts at 0."""
        ids_BS, types_BS, mask = given["input_ids"], taken["mm_token_type_ids"], given.get("attention_mask")
        keywords = {key: taken[key] for key in ("image_grid_thw", "video_grid_thw", "second_per_grid_ts") if key in taken}
        index = self._model.base_model.get_rope_index
        if all(given.get(key) is None for key in BOUND_KEYS):
            return index(ids_BS, mm_token_type_ids=types_BS, attention_mask=mask, **keywords)[0]
        bounds = torch.tensor(batches.documents_of(given))
        ids_DL, types_DL, mask_DL = (
            pad_sequence(x.flatten().split(bounds.diff().tolist()), batch_first=True)
            for x in (ids_BS, types_BS, torch.ones_like(ids_BS))
        )
        positions_3DL, _ = index(ids_DL, mm_token_type_ids=types_DL, attention_mask=mask_DL, **keywords)
        return positions_3DL[:, mask_DL.bool()].unflatten(1, ids_BS.shape)

    def _encode(self, kinds: tuple[str, ...], taken: dict[str, Any], device: torch.device) -> Encoded:
        """One run of the tower, of images and videos together: under reentrant checkpointing DeepSpeed takes no second one."""
        seq = self._mesh.seq
        grids = [taken[f"{kind}_grid_thw"].cpu() for kind in kinds]
        patches = [n for grid in grids for n in grid.prod(-1).tolist()]
        owners = deal(patches, seq.size)
        own = [image for image, owner in enumerate(owners) if owner == seq.rank]
        if own:
            images = [x for kind in kinds for x in taken[PIXELS[kind]].split(taken[f"{kind}_grid_thw"].prod(-1).tolist())]
            pixels, grid = torch.cat([images[image] for image in own]), torch.cat(grids)[own]
        else:
            pixels, grid = self._blank()
        output = self._model.base_model.get_image_features(pixels.to(device), grid.to(device), return_dict=True)
        layers = (output.pooler_output, *(getattr(output, "deepstack_features", None) or ()))
        features_FC = torch.cat([torch.cat(images) for images in layers], -1)
        counts = [n for grid in grids for n in self._features_of(grid)]
        owner_F = torch.tensor(owners, dtype=torch.long).repeat_interleave(torch.tensor(counts, dtype=torch.long))
        place_F = torch.zeros_like(owner_F)
        for rank in range(seq.size):
            place_F[owner_F == rank] = torch.arange(int((owner_F == rank).sum()))
        return Encoded(kinds or ("image",), output, features_FC if own else features_FC[:0], owner_F, place_F)

    def _blank(self) -> tuple[Tensor, Tensor]:
        """Pixels and grid of the smallest image that the tower takes."""
        config = self._model.config.vision_config
        side = config.spatial_merge_size
        width = config.in_channels * config.temporal_patch_size * config.patch_size**2
        return torch.zeros(side * side, width), torch.tensor([[1, side, side]])

    def _wanted(self, kinds: tuple[str, ...], ids_BS: Tensor | None, context: SequenceContext) -> list[list[Tensor]]:
        """Of every rank of the row, by kind, the features that its tokens take, ascending."""
        if ids_BS is None:
            return [[torch.zeros(0, dtype=torch.long)] * len(kinds)] * self._mesh.seq.size
        found, start = [], 0
        for kind in kinds:
            is_of = self._is_of(kind, ids_BS.cpu())
            order_BS = torch.where(is_of, is_of.flatten().cumsum(0).view_as(is_of) - 1 + start, -1)
            found.append([here[here >= 0] for here in batches.by_rank(order_BS, context)])
            start += int(is_of.sum())
        return [list(parts) for parts in zip(*found, strict=True)]

    def _exchange(self, encoded: Encoded, wanted: list[Tensor]) -> Tensor:
        """[V, C]: the local tokens' features, from the ranks that have them."""
        seq, owners = self._mesh.seq, encoded.owners
        sent = [encoded.places[theirs[owners[theirs] == seq.rank]] for theirs in wanted]
        from_rank = owners[wanted[seq.rank]]
        received = torch.bincount(from_rank, minlength=seq.size).tolist()
        device = encoded.features_FC.device
        parts_FC = encoded.features_FC[torch.cat(sent).to(device)]
        arrived_VC = comm.exchange_rows(parts_FC, [len(part) for part in sent], received, seq)
        return arrived_VC[from_rank.argsort(stable=True).argsort().to(device)]
