"""Rows of text, drawn images and videos for tiny vision-language models, as their processors make them."""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image, ImageDraw
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText, PreTrainedModel
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from ds_cp import mesh, selftest
from ds_cp.batch import IGNORE
from ds_cp.models import vision
from ds_cp.topology import Topology
from tests.dist import jobs

IMAGE, VIDEO, START, END = 91, 92, 93, 94
PATCH, MERGE, WIDTH = 4, 2, 3 * 2 * 4 * 4
Part = int | tuple[int, int] | tuple[int, int, int]
"""So many tokens of text, an image of (height, width), or a video of (frames, height, width), both in tokens."""


def row(parts: list[Part], seed: int = 1, framed: bool = True) -> dict[str, Any]:
    """A row [1, S] of them. With `framed` a video's frames stand apart, as from Qwen3-VL on; before they were one block."""
    generator = torch.Generator().manual_seed(seed)
    ids: list[int] = []
    drawn, grids, films = [], [], []
    for part in parts:
        if isinstance(part, int):
            ids += torch.randint(3, 90, (part,), generator=generator).tolist()
        elif len(part) == 2:
            drawn.append(draw(*part, seed=len(drawn) + seed))
            ids += [START, *[IMAGE] * (part[0] * part[1]), END]
        else:
            frames, height, width = part
            grids.append([frames, height * MERGE, width * MERGE])
            films.append(torch.randn(frames * height * width * MERGE**2, WIDTH, generator=generator))
            blocks, size = (frames, height * width) if framed else (1, frames * height * width)
            for block in range(blocks):
                ids += [START, *[VIDEO] * size, END, 3 + block]
    input_ids = torch.tensor([ids])
    visual = (input_ids == IMAGE) | (input_ids == VIDEO)
    found = {"input_ids": input_ids, "labels": input_ids.masked_fill(visual, IGNORE)}
    found["mm_token_type_ids"] = (input_ids == IMAGE) + 2 * (input_ids == VIDEO)
    if drawn:
        found |= dict(processor()(images=drawn, return_tensors="pt"))
    if films:
        found |= {"pixel_values_videos": torch.cat(films), "video_grid_thw": torch.tensor(grids)}
    return found


class Pictures(torch.utils.data.Dataset):
    """Rows with one image, with two, and with none, in turn."""

    def __init__(self, count: int) -> None:
        kinds: list[list[Part]] = [[5, (2, 2), 9], [3, (1, 2), 4, (3, 1), 6], [17]]
        self.rows = [row(kinds[index % 3], seed=index + 1) for index in range(count)]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[index]


def processor() -> Any:
    """The real one, for the tiny towers; its limits on an image's size are out of the way."""
    size = {"shortest_edge": 1, "longest_edge": 10**9}
    return Qwen2VLImageProcessorPil(patch_size=PATCH, merge_size=MERGE, temporal_patch_size=2, size=size)


def draw(height: int, width: int, seed: int) -> Image.Image:
    """A disc on a ground, in colours of the seed, whose patches make height x width tokens."""
    side = PATCH * MERGE
    colours = [tuple(jobs.rows(1, 3, vocab=256, seed=10 * seed + i)[0]["input_ids"][0].tolist()) for i in range(2)]
    picture = Image.new("RGB", (width * side, height * side), colours[0])
    ImageDraw.Draw(picture).ellipse((2, 1, width * side - 3, height * side - 2), fill=colours[1])
    return picture


def text(length: int, seed: int = 1) -> dict[str, Any]:
    """A row without images, from the same processor."""
    return row([length], seed)


def batch_of(rows: list[dict[str, Any]], side: str = "right") -> dict[str, Any]:
    """Rows of different length as one padded batch."""
    longest = max(each["input_ids"].shape[1] for each in rows)
    out: dict[str, Any] = {}
    for key, fill in (("input_ids", 0), ("labels", IGNORE), ("mm_token_type_ids", 0)):
        padded = []
        for each in rows:
            filler = torch.full((1, longest - each[key].shape[1]), fill)
            padded.append(torch.cat((each[key], filler) if side == "right" else (filler, each[key]), 1))
        out[key] = torch.cat(padded)
    if side == "left":  # the first token would be predicted from padding
        out["labels"][torch.arange(len(rows)), [longest - each["input_ids"].shape[1] for each in rows]] = IGNORE
    lengths = torch.tensor([each["input_ids"].shape[1] for each in rows])[:, None]
    columns = torch.arange(longest)[None]
    out["attention_mask"] = ((columns < lengths) if side == "right" else (columns >= longest - lengths)).long()
    for key in ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw"):
        found = [each[key] for each in rows if key in each]
        out |= {key: torch.cat(found)} if found else {}
    return out


def packed(rows: list[dict[str, Any]], positions: list[torch.Tensor] | None = None) -> dict[str, Any]:
    """Rows as the documents of one packed row; with MRoPE positions [3, 1, S] of each as [4, 1, S] position_ids, or by seq_lens."""
    out: dict[str, Any] = {key: torch.cat([each[key] for each in rows], 1) for key in ("input_ids", "labels", "mm_token_type_ids")}
    for key in ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw"):
        found = [each[key] for each in rows if key in each]
        out |= {key: torch.cat(found)} if found else {}
    start = 0
    for each in rows:
        out["labels"][0, start] = IGNORE
        start += each["input_ids"].shape[1]
    lengths = [each["input_ids"].shape[1] for each in rows]
    if positions is None:
        return {**out, "seq_lens": torch.tensor(lengths)}
    text_row = torch.cat([torch.arange(n) for n in lengths])[None, None]
    return {**out, "position_ids": torch.cat((text_row, torch.cat(positions, -1)))}


def positions(model_type: str, rows: list[dict[str, Any]]) -> list[torch.Tensor]:
    """MRoPE positions [3, 1, S] of each row, from transformers' own function."""
    index = selftest.tiny_model(model_type).model.get_rope_index
    keys = ("input_ids", "mm_token_type_ids", "image_grid_thw", "video_grid_thw")
    return [index(**{key: each[key] for key in keys if key in each})[0] for each in rows]


def llava() -> PreTrainedModel:
    """A tower that no family lists, before a Llama."""
    tower = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28}
    text = {**tower, "hidden_size": 32, "num_key_value_heads": 2, "num_hidden_layers": 2, "vocab_size": 64, "model_type": "llama"}
    config = CONFIG_MAPPING["llava"](
        text_config=text, vision_config={"model_type": "siglip_vision_model", **tower}, image_token_id=63
    )
    return AutoModelForImageTextToText.from_config(config)


def to_a_model_of_text(of_replicas: list[dict[str, Any]]) -> None:
    """Each replica's row at the door of a model whose text alone is sharded."""
    axes = mesh.build(Topology(ulysses=1, ring=1, data=len(of_replicas)), timeout_s=60)
    try:
        vision.Door(llava(), axes).begin(of_replicas[axes.data.rank], torch.device("cpu"))
    finally:
        mesh.destroy(axes)
