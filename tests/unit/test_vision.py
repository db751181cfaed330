"""The door to a vision tower: what it takes out of a batch, how it shares images out, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText

from ds_cp import selftest
from ds_cp.batch import count_targets
from ds_cp.models import checks, family_vision, trial, vision
from tests.dist import pictures
from tests.dist.pictures import llava, row, text
from tests.unit.test_models import alone, attached, gemma3


@given(st.lists(st.integers(1, 500), max_size=40), st.integers(1, 9))
def test_images_are_dealt_by_size(patches: list[int], ranks: int) -> None:
    """Of a greedy deal the busiest has at most the mean and one image more."""
    owners = vision.deal(patches, ranks)
    assert len(owners) == len(patches)
    assert set(owners) <= set(range(ranks))
    load = [sum(p for p, owner in zip(patches, owners, strict=True) if owner == rank) for rank in range(ranks)]
    assert max(load) <= sum(patches) / ranks + max(patches, default=0)


@pytest.mark.parametrize("model_type", sorted(family_vision.MODEL_TYPES))
def test_one_rank_computes_what_hf_does_and_gives_the_model_back(model_type: str) -> None:
    model = selftest.tiny_model(model_type)
    batch = row([5, (2, 2), 7, (1, 3), 4])
    before = model(**batch)
    handle = attached(model)
    assert model.model.visual.config._attn_implementation == "sdpa", "the tower keeps its own"
    sharded = model(**batch)
    torch.testing.assert_close(sharded.loss, before.loss, rtol=1e-5, atol=0)
    handle.remove()
    assert torch.equal(model(**batch).logits, before.logits)


@pytest.mark.parametrize("model_type", ["qwen2_5_vl", "qwen3_vl"])
def test_positions_of_a_packed_row_are_those_of_its_documents(model_type: str) -> None:
    documents = [row([5, (2, 2), 7]), text(1), row([(1, 3), (2, 1), 8], seed=3)]
    wanted = torch.cat(pictures.positions(model_type, documents), -1)
    batch = pictures.packed(documents)
    keys = {key: batch.pop(key) for key in vision.KEYS if key in batch}
    door = vision.Door(selftest.tiny_model(model_type), alone())
    assert torch.equal(door._positions(batch, keys), wanted)


def test_only_the_language_model_is_sharded() -> None:
    model = selftest.tiny_model("qwen3_vl")
    assert list(checks.attention_modules(model)) == [f"model.language_model.layers.{i}.self_attn" for i in range(2)]


def test_of_other_towers_the_text_alone_is_sharded() -> None:
    model = llava()
    trial.refuse(model)
    ids = torch.arange(3, 40).unsqueeze(0)
    before = model(input_ids=ids, labels=ids)
    handle = attached(model)
    assert model.model.vision_tower.config._attn_implementation == "sdpa", "the tower keeps its own"
    assert list(checks.attention_modules(model)) == [f"model.language_model.layers.{i}.self_attn" for i in range(2)]
    torch.testing.assert_close(model(input_ids=ids, labels=ids).loss, before.loss, rtol=1e-5, atol=0)
    with pytest.raises(ValueError, match="pixel_values: of llava only the text is sharded"):
        model(input_ids=ids, labels=ids, pixel_values=torch.zeros(1, 3, 28, 28))
    for images in ([torch.zeros(3, 28, 28)], ([torch.zeros(3, 28, 28)],)):
        with pytest.raises(ValueError, match="pixel_values: of llava only the text is sharded"):
            model(input_ids=ids, labels=ids, pixel_values=images)
    with pytest.raises(ValueError, match="tokens of image_token_id: of llava only the text is sharded"):
        model(input_ids=torch.full_like(ids, 63), labels=ids)
    handle.remove()
    assert torch.equal(model(input_ids=ids, labels=ids).logits, before.logits)


@pytest.mark.parametrize("key", ["token_type_ids", "mm_token_type_ids"])
def test_types_that_say_all_text_are_let_through(key: str) -> None:
    """As Gemma 3's processor gives them."""
    model = AutoModelForImageTextToText.from_config(gemma3())
    ids = torch.arange(3, 40).unsqueeze(0)
    batch = {"input_ids": ids, "labels": ids, key: torch.zeros_like(ids)}
    before = model(**batch).loss
    attached(model)
    torch.testing.assert_close(model(**batch).loss, before, rtol=1e-5, atol=0)
    with pytest.raises(ValueError, match=f"batch: {key}: of gemma3 only the text is sharded"):
        model(**{**batch, key: torch.ones_like(ids)})


def test_types_whose_zeros_are_not_text_are_refused() -> None:
    """PaliGemma's prefix, whose tokens attend each other in both directions."""
    with pytest.raises(ValueError, match="batch: token_type_ids: of paligemma only the text is sharded"):
        vision.refuse_parts({"token_type_ids": torch.zeros(1, 8, dtype=torch.long)}, CONFIG_MAPPING["paligemma"]())


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no grid": ({"image_grid_thw": None}, "pixel_values without image_grid_thw"),
    "no types": ({"mm_token_type_ids": None}, "images without mm_token_type_ids"),
    "features of another run": ({"mm_encoder_outputs": {}}, "mm_encoder_outputs of a whole row cannot be sharded"),
    "an image cut off": ({"pixel_values": torch.zeros(4, 96), "image_grid_thw": torch.tensor([[1, 2, 2]])}, "hold 4 image tokens"),
    "no pixels": ({"pixel_values": None, "image_grid_thw": None}, "hold 4 image tokens, pixel_values make 0"),
    "embeddings": ({"input_ids": None, "inputs_embeds": torch.zeros(1, 18, 64)}, "give input_ids with images"),
}


@pytest.mark.parametrize("case", WRONG)
def test_images_that_do_not_fit_are_refused(case: str) -> None:
    changes, reason = WRONG[case]
    model = selftest.tiny_model("qwen3_vl")
    attached(model)
    batch = {key: value for key, value in {**row([5, (2, 2), 7]), **changes}.items() if value is not None}
    with pytest.raises(ValueError, match=reason):
        model(**batch)


def test_tokens_of_images_are_no_targets_of_the_drawn_rows() -> None:
    assert float(count_targets(row([5, (2, 2), 7]))) == 5 + 2 + 7 - 1
