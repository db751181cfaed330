"""`ds-cp check`: what a config becomes, or the sentence that refuses it, with an exit code for CI."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import CONFIG_MAPPING
from typer.testing import CliRunner, Result

from ds_cp import selftest
from ds_cp.cli import app


def check(tmp_path: Path, block: dict[str, Any], *arguments: str) -> Result:
    path = tmp_path / "ds_config.json"
    path.write_text(json.dumps({"sequence_parallel": block}))
    return CliRunner().invoke(app, ["check", str(path), *arguments])


def test_a_legal_config_shows_what_auto_becomes(tmp_path: Path) -> None:
    result = check(tmp_path, {"size": 16}, "--ranks", "32", "--ranks-per-node", "8", "--heads", "32", "--kv-heads", "8")
    assert result.exit_code == 0, result.output
    shown = {cells[1].strip(): cells[2].strip() for line in result.output.splitlines() if len(cells := line.split("│")) == 4}
    assert shown == {
        "size": "16",
        "ulysses_size": "8",
        "ring_size": "2",
        "data-parallel replicas": "2",
        "layout": "zigzag; balanced for packed rows",
        "rows are padded to a multiple of": "32; packed rows of up to 128",
        "heads of one rank": "4 query, 1 key/value",
        "attention_head_chunks": "1",
    }


@pytest.mark.parametrize(
    ("block", "ranks", "reason"),
    [
        ({"size": 3}, "4", "3 does not divide the 4 ranks"),
        ({"sise": 2}, "4", "did you mean 'size'"),
        ({"profile": 1}, "4", "profile"),
        ({"size": 4, "attention_head_chunks": 3}, "4", "use one of [1, 2"),
    ],
)
def test_an_illegal_config_is_one_sentence_and_exit_code_1(tmp_path: Path, block: dict[str, Any], ranks: str, reason: str) -> None:
    result = check(tmp_path, block, "--ranks", ranks, "--heads", "32", "--kv-heads", "8")
    assert result.exit_code == 1
    assert reason in " ".join(result.output.split())


def test_a_model_is_checked_without_weights(tmp_path: Path) -> None:
    selftest.tiny_model("llama").config.save_pretrained(tmp_path / "good")
    assert check(tmp_path, {"size": 4}, "--ranks", "4", "--model", str(tmp_path / "good")).exit_code == 0
    selftest.tiny_model("llama", attention_dropout=0.5).config.save_pretrained(tmp_path / "bad")
    result = check(tmp_path, {"size": 4}, "--ranks", "4", "--model", str(tmp_path / "bad"))
    assert result.exit_code == 1
    assert "attention_dropout is 0.5" in " ".join(result.output.split())
    missing = check(tmp_path, {"size": 4}, "--ranks", "4", "--model", str(tmp_path / "nowhere"))
    assert missing.exit_code == 1
    assert "no such file or folder" in " ".join(missing.output.split())


def test_recurrent_layers_are_checked_too(tmp_path: Path) -> None:
    selftest.tiny_model("qwen3_5_text").config.save_pretrained(tmp_path / "hybrid")
    arguments = ("--ranks", "16", "--model", str(tmp_path / "hybrid"))
    shown = " ".join(check(tmp_path, {"size": "auto"}, *arguments).output.split())
    assert "linear_attention │ state" in shown
    result = check(tmp_path, {"size": "auto", "linear_attention": "heads"}, *arguments)
    assert result.exit_code == 1
    assert "use size 8 at most" in " ".join(result.output.split())


def test_a_type_that_nobody_has_listed_is_tried(tmp_path: Path) -> None:
    CONFIG_MAPPING["gpt2"](attn_pdrop=0.0).save_pretrained(tmp_path / "gpt2")
    CONFIG_MAPPING["doge"]().save_pretrained(tmp_path / "doge")
    shown = check(tmp_path, {"size": 4}, "--ranks", "4", "--model", str(tmp_path / "gpt2"))
    assert (shown.exit_code, "GPT2LMHeadModel" in shown.output) == (0, True), shown.output
    refused = check(tmp_path, {"size": 4}, "--ranks", "4", "--model", str(tmp_path / "doge"))
    assert refused.exit_code == 1
    assert "a tiny twin of it was tried, and DogeAttention passes a mask of its own" in " ".join(refused.output.split())


@pytest.mark.parametrize(
    ("batch", "rows"),
    [
        ({"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 3}, "12"),
        ({"train_batch_size": 12, "train_micro_batch_size_per_gpu": 2}, "12"),
        ({"train_batch_size": 12}, "12"),
        ({"train_batch_size": 13, "train_micro_batch_size_per_gpu": 2}, None),
        ({"train_batch_size": 8, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 1}, None),
        ({"train_batch_size": 1}, None),
    ],
)
def test_batch_arithmetic_counts_replicas(tmp_path: Path, batch: dict[str, int], rows: str | None) -> None:
    path = tmp_path / "ds_config.json"
    path.write_text(json.dumps({**batch, "sequence_parallel": {"size": 4}}))
    result = CliRunner().invoke(app, ["check", str(path), "--ranks", "8"])
    shown = " ".join(result.output.split())
    assert result.exit_code == (1 if rows is None else 0), shown
    assert (f"rows of an optimizer step │ {rows}" if rows else "do not fit 2 replicas of 4 ranks") in shown


def test_other_parallelism_is_refused_without_starting(tmp_path: Path) -> None:
    path = tmp_path / "ds_config.json"
    path.write_text(json.dumps({"sequence_parallel": {"size": 4}, "tensor_parallel": {"autotp_size": 2}}))
    result = CliRunner().invoke(app, ["check", str(path), "--ranks", "8"])
    assert (result.exit_code, "tensor_parallel.autotp_size: 2" in " ".join(result.output.split())) == (1, True)
