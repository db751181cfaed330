"""LoRA as peft makes it: the gradient of every adapter against one process, fp32; what is frozen does not move."""

from __future__ import annotations

from pathlib import Path

import pytest

from ds_cp import selftest
from tests.dist import peft_jobs, pictures
from tests.dist.test_parity import assert_parity, block

INNER = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.mark.parametrize("stage", [0, 2, 3])
@pytest.mark.parametrize("modules", [INNER, [*INNER, "lm_head"]], ids=["layers", "layers_and_head"])
@pytest.mark.parametrize("mesh", [(2, 1), (1, 2)], ids=lambda m: f"u{m[0]}r{m[1]}")
def test_adapters_with_a_tiled_loss(pool, mesh: tuple[int, int], modules: list[str], stage: int) -> None:
    assert_parity(pool(2).run(peft_jobs.lora, block=block(*mesh, loss_chunk=7), stage=stage, modules=modules))


@pytest.mark.parametrize("stage", [2, 3])
def test_adapters_on_the_language_model_of_a_vision_language_model(pool, stage: int) -> None:
    batches = [pictures.row([5, (2, 2), 7, (3, 1), 9]), pictures.text(40)]
    run = {"model_type": "qwen3_vl", "modules": r"model\.language_model\..*_proj", "batches": batches}
    assert_parity(pool(2).run(peft_jobs.lora, block=block(1, 2), stage=stage, **run))


@pytest.mark.parametrize("stage", [0, 3])
@pytest.mark.parametrize("reentrant", [True, False])
def test_adapters_with_everything_in_tiles_and_checkpointing(pool, reentrant: bool, stage: int) -> None:
    words = {"tiled_mlp": True, "loss_chunk": 37, "activation_offload": True}
    run = {"modules": [*INNER, "lm_head"], "checkpointing": reentrant, "length": 300}
    assert_parity(pool(2).run(peft_jobs.lora, block=block(2, 1, **words), stage=stage, **run))


@pytest.mark.parametrize(("stage", "mesh"), [(0, (2, 1)), (2, (1, 2)), (3, (1, 2))])
def test_adapters_on_quantized_weights(pool, tmp_path: Path, stage: int, mesh: tuple[int, int]) -> None:
    """QLoRA: bitsandbytes' 4-bit layers, against the same layers in one process."""
    selftest.tiny_model("llama").save_pretrained(tmp_path)
    assert_parity(pool(2).run(peft_jobs.qlora, folder=str(tmp_path), block=block(*mesh), stage=stage, modules=INNER))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_rank_of_a_row_drops_by_masks_of_its_own(pool, checkpointing: bool) -> None:
    masks, off_scale, after = pool(2).run(peft_jobs.dropped, block=block(1, 2), checkpointing=checkpointing)[0]
    assert off_scale == 0, "0, and 2 for a rate of a half"
    same = sum(a == b for a, b in zip(*masks, strict=True)) / len(masks[0])
    assert 0.4 < same < 0.6, "independent ones agree in half of their places"
    assert after[0] == after[1], "what all ranks must draw alike"
