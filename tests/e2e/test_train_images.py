"""scripts/train.py on pictures that it draws: one process, and two ranks that share every row."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText

from ds_cp.batch import IGNORE
from scripts import train_plot
from tests.e2e import test_train_script as texts
from tests.warm import Warm

TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
VISION = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 32, "patch_size": 4}
VISION |= {"deepstack_visual_indexes": "[0]", "num_position_embeddings": 64}
SIZES = [f"text_config.{key}={value}" for key, value in (TEXT | {"head_dim": 8}).items()]
SIZES += [f"vision_config.{key}={value}" for key, value in VISION.items()]
STEPS = 4


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(texts.ROOT / "scripts"))
    return importlib.import_module("train")


def save_model(script: Any, folder: Path) -> Path:
    tokenizer = script.tokenizer_for_images()
    tokenizer.save_pretrained(folder)
    arguments = script.ModelArguments(model_type="qwen3_vl", config_overrides=",".join(SIZES))
    torch.manual_seed(0)
    AutoModelForImageTextToText.from_config(script.load_config(arguments, tokenizer, True)).save_pretrained(folder)
    return folder


def test_two_ranks_give_the_curve_of_one_process(script: Any, tmp_path: Path, warm: Warm) -> None:
    model = save_model(script, tmp_path / "model")
    sizes = {"data": "shapes", "seq_length": 160, "max_rows": 12, "max_steps": STEPS, "save_strategy": "no"}
    sizes |= {"save_steps": 500, "eval_steps": STEPS}
    texts.forked(warm, 0, model, tmp_path / "one", **sizes)
    texts.forked(warm, 2, model, tmp_path / "two", deepspeed="ds_configs/ring.json", **sizes)
    for key in ("loss", "eval_loss", "grad_norm"):
        one, two = (train_plot.curve(texts.metrics(tmp_path / name), key) for name in ("one", "two"))
        assert len(one) == (1 if key == "eval_loss" else STEPS)
        assert two == pytest.approx(one, rel=1e-4), key


def test_a_row_is_pictures_and_captions(script: Any, tmp_path: Path) -> None:
    tokenizer = script.tokenizer_for_images()
    arguments = script.ModelArguments(model_type="qwen3_vl", config_overrides=",".join(SIZES))
    config = script.load_config(arguments, tokenizer, True)
    rows = script.Shapes(config, tokenizer, 160, 5)
    row = rows[3]
    image = row["input_ids"] == config.image_token_id
    assert len(row["input_ids"]) <= 160
    assert int(image.sum()) == int(row["image_grid_thw"].prod(1).sum()) // config.vision_config.spatial_merge_size**2
    assert bool((row["labels"][image] == IGNORE).all())
    assert " on " in tokenizer.decode(row["input_ids"], skip_special_tokens=True)
    assert torch.equal(row["pixel_values"], rows[3]["pixel_values"])
    with pytest.raises(ValueError, match=r"--seq_length 30: one picture with its caption takes up to \d+ tokens"):
        script.Shapes(config, tokenizer, 30, 5)
    with pytest.raises(ValueError, match="qwen3 takes no such pictures; use a Qwen vision-language model"):
        script.Shapes(script.AutoConfig.for_model("qwen3"), tokenizer, 160, 5)
