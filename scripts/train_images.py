"""Pictures that are drawn here, with captions, as rows of a vision-language model: `--data shapes`.

    picture   one shape of one colour on a ground of another, of a size of its own
    row       <|vision_start|> tokens of the picture <|vision_end|> "a red disc on white.", again and again until it is full

Row i depends on i alone, so every rank draws the same. The image processor is transformers' own, made from the model's config.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.utils.data import Dataset, Subset
from train_data import IGNORE, byte_tokenizer
from transformers import PretrainedConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast

SHAPES = "shapes"
START, END, IMAGE, VIDEO = "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"
COLOURS = ("red", "green", "blue", "white", "black", "orange", "purple", "yellow")
FORMS = ("disc", "square", "triangle")
SIDES = (2, 3, 4)
"""Of a picture, in tokens of the language model."""
ROWS = 256
PIXELS = ("pixel_values", "image_grid_thw")

Row = dict[str, Tensor]


def tokenizer_for_images() -> PreTrainedTokenizerFast:
    """The byte tokenizer with the tokens around and in place of pictures."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [START, END, IMAGE, VIDEO]})
    return tokenizer


def token_ids(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """What a model's config calls these tokens.

    Raises:
        ValueError: the tokenizer does not have them.
    """
    names = {"vision_start_token_id": START, "vision_end_token_id": END, "image_token_id": IMAGE, "video_token_id": VIDEO}
    found = {name: tokenizer.convert_tokens_to_ids(token) for name, token in names.items()}
    missing = [names[name] for name, index in found.items() if index is None or index == tokenizer.unk_token_id]
    if missing:
        raise ValueError(f"--data {SHAPES}: the tokenizer has no {', '.join(missing)}; take one of a Qwen vision-language model")
    return found


class Shapes(Dataset):
    """Rows of pictures and captions for a model of this config."""

    def __init__(self, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, seq_length: int, count: int) -> None:
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        vision = getattr(config, "vision_config", None)
        if not hasattr(vision, "spatial_merge_size"):
            raise ValueError(f"--data {SHAPES}: {config.model_type} takes no such pictures; use a Qwen vision-language model")
        self._side = vision.patch_size * vision.spatial_merge_size
        patches = {"patch_size": vision.patch_size, "merge_size": vision.spatial_merge_size}
        limits = {"shortest_edge": 1, "longest_edge": 10**9}
        self._process = Qwen2VLImageProcessorPil(**patches, temporal_patch_size=vision.temporal_patch_size, size=limits)
        self._tokenizer, self._length, self._count = tokenizer, seq_length, count
        self._ids = token_ids(tokenizer)
        least = max(SIDES) ** 2 + 2 + len(self._words(caption("triangle", "orange", "yellow")))
        if seq_length < least:
            raise ValueError(f"--seq_length {seq_length}: one picture with its caption takes up to {least} tokens")

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Row:
        """input_ids, labels and mm_token_type_ids [S], pixel_values [patches, width], image_grid_thw [pictures, 3]."""
        chance, ids, pictures = random.Random(index), [], []
        while True:
            height, width = chance.choice(SIDES), chance.choice(SIDES)
            form, (colour, ground) = chance.choice(FORMS), chance.sample(COLOURS, 2)
            inside = [self._ids["vision_start_token_id"], *[self._ids["image_token_id"]] * (height * width)]
            more = [*inside, self._ids["vision_end_token_id"], *self._words(caption(form, colour, ground))]
            if len(ids) + len(more) > self._length:
                break
            ids += more
            pictures.append(draw(form, colour, ground, (width * self._side, height * self._side)))
        input_ids = torch.tensor(ids)
        image = input_ids == self._ids["image_token_id"]
        row = {"input_ids": input_ids, "labels": input_ids.masked_fill(image, IGNORE), "mm_token_type_ids": image.long()}
        return row | dict(self._process(images=pictures, return_tensors="pt"))

    def split(self, eval_rows: int) -> tuple[Subset, Subset | None]:
        """The rows to train on, and the last `eval_rows` to evaluate on (None without any)."""
        first = len(self) - eval_rows
        if first < 1:
            raise ValueError(f"--eval_rows {eval_rows}: there are {len(self)} rows, so none is left to train on")
        return Subset(self, range(first)), Subset(self, range(first, len(self))) if eval_rows else None

    def _words(self, text: str) -> list[int]:
        return self._tokenizer(text, add_special_tokens=False)["input_ids"]


def caption(form: str, colour: str, ground: str) -> str:
    return f"a {colour} {form} on {ground}.\n"


def draw(form: str, colour: str, ground: str, size: tuple[int, int]) -> Image.Image:
    picture = Image.new("RGB", size, ground)
    box = (size[0] // 8, size[1] // 8, size[0] - size[0] // 8 - 1, size[1] - size[1] // 8 - 1)
    pencil = ImageDraw.Draw(picture)
    if form == "disc":
        pencil.ellipse(box, fill=colour)
    elif form == "square":
        pencil.rectangle(box, fill=colour)
    else:
        pencil.polygon([(box[0], box[3]), (box[2], box[3]), ((box[0] + box[2]) // 2, box[1])], fill=colour)
    return picture


def collate(rows: Sequence[Row]) -> dict[str, Any]:
    """Rows of different length as one batch, padded on the right; pictures of all rows after each other."""
    longest = max(len(row["input_ids"]) for row in rows)

    def filled(key: str, fill: int) -> Tensor:
        return torch.stack([torch.nn.functional.pad(row[key], (0, longest - len(row[key])), value=fill) for row in rows])

    batch = {key: filled(key, fill) for key, fill in (("input_ids", 0), ("labels", IGNORE), ("mm_token_type_ids", 0))}
    lengths = torch.tensor([len(row["input_ids"]) for row in rows])
    batch["attention_mask"] = (torch.arange(longest) < lengths[:, None]).long()
    return batch | {key: torch.cat([row[key] for row in rows]) for key in PIXELS}
