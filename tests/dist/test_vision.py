"""Vision-language models: every parameter's gradient of language model, tower, merger and deepstack mergers against one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.dist import jobs, pictures
from tests.dist.pictures import row, text
from tests.dist.pool import WorkerError
from tests.dist.test_moe import BALANCED, MESHES, SPLIT
from tests.dist.test_parity import assert_parity, block


def mixed(model_type: str) -> dict[str, Any]:
    """Images of several sizes, the largest last, and a video between text; shards of text alone on a ring of 4."""
    return row([5, (2, 2), 3, (1, 3), 2, (2, 1, 2), 26, (3, 2), 4], framed=model_type != "qwen2_5_vl")


@pytest.mark.parametrize("mesh", MESHES, ids=lambda m: f"u{m[0]}r{m[1]}")
def test_images_and_a_video_in_a_row(pool, mesh: tuple[int, int]) -> None:
    run = {"model_type": "qwen3_vl", "block": block(*mesh), "batches": [mixed("qwen3_vl")]}
    assert_parity(pool(MESHES[mesh]).run(jobs.parity, stage=3, zero=SPLIT if mesh == (2, 1) else None, **run))


OTHERS = {"qwen2_5_vl": (1, 2), "qwen3_vl_moe": (2, 1), "qwen3_5": (1, 2), "qwen3_5_moe": (2, 1)}
"""More meshes are in `scripts/bench/parity.py --vision`."""


@pytest.mark.parametrize("model_type", OTHERS)
def test_towers_before_other_language_models(pool, model_type: str) -> None:
    changes, mesh = BALANCED if "moe" in model_type else None, OTHERS[model_type]
    run = {"model_type": model_type, "block": block(*mesh), "batches": [mixed(model_type)], "changes": changes}
    assert_parity(pool(2).run(jobs.parity, stage=3, **run))


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_every_zero_stage(pool, stage: int) -> None:
    run = {"model_type": "qwen3_vl", "block": block(2, 2), "batches": [mixed("qwen3_vl")]}
    assert_parity(pool(4).run(jobs.parity, stage=stage, **run))


@pytest.mark.parametrize("model_type", ["qwen3_vl", "qwen2_5_vl"])
def test_packed_rows_with_one_token_documents(pool, model_type: str) -> None:
    documents = [row([5, (2, 2), 7]), text(1), row([(1, 3), (2, 1), 8], seed=3), text(1), text(19)]
    batch = pictures.packed(documents, pictures.positions(model_type, documents))
    assert_parity(pool(4).run(jobs.parity, model_type=model_type, block=block(2, 2), stage=2, batches=[batch]))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_of_which_one_has_no_image(pool, side: str) -> None:
    batch = pictures.batch_of([row([5, (2, 2), 7]), text(30), row([(1, 1), 3, (3, 1), 2])], side)
    assert_parity(pool(2).run(jobs.parity, model_type="qwen3_vl", block=block(1, 2), stage=1, batches=[batch]))


@pytest.mark.parametrize("stage", [2, 3])
def test_replicas_of_which_only_one_has_images_or_videos(pool, stage: int) -> None:
    """Images against text, text against text, and a video against an image: each rank must run the tower as often as the others."""
    batches = [row([5, (2, 2), 7]), text(21, 2), row([3, (2, 1, 2), 4]), text(30), text(22, 3), row([9, (1, 2)])]
    run = {"model_type": "qwen3_vl", "block": block(1, 2), "replicas": 2, "accumulation": 3, "batches": batches}
    zero = SPLIT if stage == 3 else None
    assert_parity(pool(4).run(jobs.parity, stage=stage, zero=zero, reduction="token_mean", **run))


@pytest.mark.parametrize("frozen", ["model.visual", "model.language_model"])
def test_a_part_that_is_frozen(pool, frozen: str) -> None:
    run = {"model_type": "qwen3_vl", "block": block(1, 2, loss_chunk=7), "batches": [mixed("qwen3_vl")], "frozen": frozen}
    assert_parity(pool(2).run(jobs.parity, stage=3, zero=SPLIT, **run))


@pytest.mark.parametrize("offload", [False, True])
def test_checkpointing(pool, offload: bool) -> None:
    run = {"model_type": "qwen3_vl", "block": block(1, 2, activation_offload=offload), "batches": [mixed("qwen3_vl")]}
    assert_parity(pool(2).run(jobs.parity, stage=3, zero=SPLIT, checkpointing=not offload, **run))


def test_image_tokens_without_pixels_in_one_replica_end_all(pool) -> None:
    """Else their placeholders' embeddings would be trained, and the other replica would wait in the tower."""
    bare = {key: value for key, value in row([9, (1, 2)]).items() if key not in ("pixel_values", "image_grid_thw")}
    run = {"model_type": "qwen3_vl", "block": block(1, 2), "replicas": 2, "batches": [row([5, (2, 2), 7]), bare]}
    with pytest.raises(WorkerError) as caught:
        pool(4).run(jobs.parity, stage=2, reduction="token_mean", **run)
    messages = [error[1] if error else "" for error in caught.value.errors]
    assert all("the row of another replica was refused" in text for text in messages[:2]), messages
    assert all("hold 2 image tokens, pixel_values make 0" in text for text in messages[2:]), messages


def test_pixels_to_a_model_of_text_in_one_replica_end_all(pool) -> None:
    """Else the other one would wait in ZeRO's collectives."""
    pixels = {**text(9), "pixel_values": torch.zeros(1, 3, 28, 28)}
    with pytest.raises(WorkerError) as caught:
        pool(2).run(pictures.to_a_model_of_text, of_replicas=[text(9), pixels])
    first, second = (error[1] if error else "" for error in caught.value.errors)
    assert "the row of another replica was refused" in first
    assert "pixel_values: of llava only the text is sharded" in second
