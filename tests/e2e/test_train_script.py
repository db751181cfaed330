"""scripts/train.py: one process, two ranks that share every row as a user starts them, and two that go on from a checkpoint."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerControl, TrainerState, TrainingArguments
from transformers.models.qwen3 import Qwen3Config

from scripts import train_data, train_plot
from scripts.train_data import IGNORE, DataArguments, PackedRows
from tests.ports import free_port
from tests.warm import Warm

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "train.py"
TIMEOUT_S = 240
STEPS = 6
SAVED = 3
SEQ_LENGTH = 256
EVAL_ROWS = 2
ARGUMENTS = {
    "seq_length": SEQ_LENGTH,
    "max_rows": 30,
    "eval_rows": EVAL_ROWS,
    "max_steps": STEPS,
    "save_steps": SAVED,
    "eval_strategy": "steps",
    "eval_steps": SAVED,
    "gradient_accumulation_steps": 2,
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": EVAL_ROWS,
    "learning_rate": 1e-2,
    "lr_scheduler_type": "constant",
}


@dataclass(frozen=True)
class Runs:
    """The output folders of the three runs."""

    one: Path
    two: Path
    resumed: Path


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, warm: Warm) -> Runs:
    folder = tmp_path_factory.mktemp("train")
    made = Runs(one=folder / "one", two=folder / "two", resumed=folder / "resumed")
    model = save_model(folder / "model")
    data = save_texts(folder / "my.jsonl")
    forked(warm, 0, model, made.one, data=data)
    # The checkpoint of a ring is continued with Ulysses: what was saved does not depend on how rows were shared.
    again = {"data": data, "gradient_checkpointing": True}
    launched(model, made.two, deepspeed="ds_configs/ring.json", compare=made.one / "metrics.jsonl", **again)
    checkpoint = made.two / f"checkpoint-{SAVED}"
    forked(warm, 2, model, made.resumed, deepspeed="ds_configs/ulysses.json", resume_from_checkpoint=checkpoint, **again)
    return made


def save_model(folder: Path) -> Path:
    """A seeded model and its tokenizer: transformers draws a model from scratch in another order under ZeRO-3."""
    tokenizer = train_data.byte_tokenizer()
    tokenizer.save_pretrained(folder)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    torch.manual_seed(0)
    config = Qwen3Config(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, **heads)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def save_texts(path: Path) -> Path:
    """JSONL as a user has it: a module of the standard library, twenty lines a document."""
    lines = Path(json.decoder.__file__).read_text(encoding="utf-8").splitlines(keepends=True)
    documents = ("".join(lines[start : start + 20]) for start in range(0, len(lines), 20))
    path.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents), encoding="utf-8")
    return path


def arguments_of(model: Path, output: Path, changes: dict[str, Any]) -> list[str]:
    options = {"model": model, "output_dir": output, **ARGUMENTS, **changes}
    flags = [text for key, value in options.items() for text in (f"--{key}", str(value))]
    return ["--use_cpu", "--disable_tqdm", "true", *flags]


def forked(warm: Warm, ranks: int, model: Path, output: Path, **changes: Any) -> None:
    """Without the launcher, and the imports of every process: one process of no group where ranks is 0."""
    output.mkdir()
    warm.run(SCRIPT, *arguments_of(model, output, changes), folder=output, ranks=ranks, timeout=TIMEOUT_S)


def launched(model: Path, output: Path, **changes: Any) -> None:
    command = [Path(sys.executable).parent / "deepspeed", "--num_accelerators", "2", "--master_port", str(free_port())]
    run = subprocess.run(
        [*command, SCRIPT, *arguments_of(model, output, changes)],
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-6000:]
    assert f"largest difference of the loss from {changes['compare']}" in run.stdout


def metrics(output: Path) -> train_plot.Metrics:
    return train_plot.read(output / "metrics.jsonl")


class TestRuns:
    def test_metrics_are_one_json_line_a_log(self, runs: Runs) -> None:
        for output, first in ((runs.one, 1), (runs.two, 1), (runs.resumed, SAVED + 1)):
            lines = metrics(output)
            losses = [line for line in lines if "loss" in line]
            assert [line["step"] for line in losses] == list(range(first, STEPS + 1))
            always, reached = {"step", *train_plot.KEYS} - {"eval_loss", *train_plot.FIGURES}, {*train_plot.FIGURES} - {"mfu"}
            assert all(line.keys() - reached == always for line in losses), "and no mfu on CPU"
            sharded = [line.keys() >= reached for line in losses[1:]]
            assert not any(sharded) if output == runs.one else all(sharded)
            assert all(line["tokens_per_second"] > 0 for line in losses)
            assert [line["step"] for line in lines if "eval_loss" in line] == [s for s in (SAVED, STEPS) if s >= first]

    def test_the_loss_curve_is_a_picture(self, runs: Runs) -> None:
        for output in (runs.one, runs.two, runs.resumed):
            assert (output / "loss.png").read_bytes().startswith(b"\x89PNG")

    @pytest.mark.parametrize("key", ["loss", "eval_loss", "grad_norm"])
    def test_two_ranks_give_the_curve_of_one_process(self, runs: Runs, key: str) -> None:
        one, two = (train_plot.curve(metrics(output), key) for output in (runs.one, runs.two))
        assert two == pytest.approx(one, rel=1e-4)

    def test_the_loss_falls(self, runs: Runs) -> None:
        losses = train_plot.curve(metrics(runs.two))
        assert losses[STEPS] < losses[1] - 0.5

    @pytest.mark.parametrize("key", ["loss", "eval_loss", "grad_norm"])
    def test_a_resumed_run_gives_the_curve_of_an_uninterrupted_one(self, runs: Runs, key: str) -> None:
        whole, resumed = (train_plot.curve(metrics(output), key) for output in (runs.two, runs.resumed))
        assert resumed == pytest.approx({step: value for step, value in whole.items() if step in resumed}, rel=1e-5)

    def test_the_saved_model_has_the_logged_loss(self, runs: Runs) -> None:
        model = AutoModelForCausalLM.from_pretrained(runs.two)
        rows = PackedRows(runs.two / "rows.bin", SEQ_LENGTH).split(EVAL_ROWS)[1]
        batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
        with torch.no_grad():  # with a cache transformers does not look for documents in position_ids
            loss = model(**batch, use_cache=False).loss
        assert float(loss) == pytest.approx(train_plot.curve(metrics(runs.two), "eval_loss")[STEPS], rel=1e-5)
        assert AutoTokenizer.from_pretrained(runs.two)("é")["input_ids"] == train_data.byte_tokenizer()("é")["input_ids"]


class TestJsonLines:
    LINES = (
        {"text": "a"},
        {"messages": [{"role": "user", "content": "b"}, {"role": "assistant", "content": "c"}]},
        {"prompt": "d", "completion": "e"},
        {"prompt": [{"role": "user", "content": "f"}], "completion": [{"role": "assistant", "content": "g"}]},
    )

    def test_text_conversations_and_completions_become_documents(self, tmp_path: Path) -> None:
        path = tmp_path / "my.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in self.LINES), encoding="utf-8")
        tokenizer = train_data.byte_tokenizer()
        tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}:{{ m['content'] }};{% endfor %}"
        found = [tokenizer.decode(ids) for ids in train_data.tokenized(train_data.file_texts(path, "text"), tokenizer)]
        wanted = ["a", "user:b;assistant:c;", "de", "user:f;assistant:g;"]
        assert found == [text + tokenizer.eos_token for text in wanted]

    def test_conversations_without_a_chat_template_are_refused(self) -> None:
        with pytest.raises(ValueError, match="this tokenizer has no chat template"):
            list(train_data.tokenized([self.LINES[1]["messages"]], train_data.byte_tokenizer()))

    def test_a_named_field_is_not_replaced_by_another(self) -> None:
        with pytest.raises(ValueError, match="line 1 has the fields prompt, completion; needed are body"):
            train_data.document_of(self.LINES[2], "body", "line 1")


class TestPacking:
    def test_rows_are_full_and_positions_restart(self) -> None:
        rows = list(train_data.pack([[1, 2, 3], [4], [5, 6, 7, 8, 9, 10], [11]], seq_length=5))
        assert [row.tolist() for row in rows] == [[[1, 2, 3, 4, 5], [0, 1, 2, 0, 0]], [[6, 7, 8, 9, 10], [0, 1, 2, 3, 4]]]

    @given(st.lists(st.lists(st.integers(0, 99), max_size=30), max_size=20), st.integers(2, 16))
    def test_rows_are_the_stream(self, documents: list[list[int]], seq_length: int) -> None:
        stream = [token for document in documents for token in document]
        starts = {sum(map(len, documents[:i])) for i, document in enumerate(documents) if document}
        rows = list(train_data.pack(documents, seq_length))
        assert len(rows) == len(stream) // seq_length
        tokens, positions = (np.concatenate([row[i] for row in rows] or [[]]).tolist() for i in (0, 1))
        assert tokens == stream[: len(tokens)]
        assert {i for i, p in enumerate(positions) if p == 0} == {
            i for i in range(len(positions)) if i in starts or i % seq_length == 0
        }
        assert all(b in (0, a + 1) for a, b in pairwise(positions))

    def test_labels_leave_out_the_first_token_of_a_document(self, tmp_path: Path) -> None:
        np.array([[[7, 8, 9, 5], [0, 1, 0, 0]]], dtype=np.int32).tofile(tmp_path / "rows.bin")
        row = PackedRows(tmp_path / "rows.bin", 4)[0]
        assert {key: value.tolist() for key, value in row.items()} == {
            "input_ids": [7, 8, 9, 5],
            "position_ids": [0, 1, 0, 0],
            "labels": [IGNORE, 8, IGNORE, IGNORE],
        }

    def test_joined_documents_are_one_a_row(self, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_text("abc" * 20)
        (tmp_path / "b.txt").write_text("xyz" * 20)
        args = train_data.DataArguments(data=str(tmp_path), seq_length=32, join_documents=True)
        train_data.write_rows(tmp_path / "rows", args, train_data.byte_tokenizer())
        for row in train_data.PackedRows(tmp_path / "rows", 32):
            assert row["position_ids"].tolist() == list(range(32))
            assert int((row["labels"] == train_data.IGNORE).sum()) == 1

    def test_the_same_data_gives_the_same_file(self, tmp_path: Path) -> None:
        files = {limit: tmp_path / f"{limit}.bin" for limit in (8, 5)}
        for limit, file in files.items():
            arguments = DataArguments(seq_length=64, max_rows=limit)
            train_data.write_rows(file, arguments, train_data.byte_tokenizer())
            first = file.read_bytes()
            train_data.write_rows(file, arguments, train_data.byte_tokenizer())
            assert file.read_bytes() == first
            assert len(PackedRows(file, 64)) == limit
        assert files[8].read_bytes().startswith(files[5].read_bytes())
        assert sorted(tmp_path.iterdir()) == sorted(files.values())

    def test_evaluation_rows_are_not_trained_on(self, tmp_path: Path) -> None:
        np.arange(10 * 2 * 4, dtype=np.int32).tofile(tmp_path / "rows.bin")
        rows = PackedRows(tmp_path / "rows.bin", 4)
        train_rows, eval_rows = rows.split(3)
        assert [list(part.indices) for part in (train_rows, eval_rows)] == [list(range(7)), [7, 8, 9]]
        assert rows.split(0)[1] is None
        with pytest.raises(ValueError, match="--eval_rows 10: the data has 10 rows"):
            rows.split(10)

    def test_less_text_than_a_row_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "short.txt").write_text("short")
        arguments = DataArguments(data=str(tmp_path / "short.txt"), seq_length=64)
        with pytest.raises(ValueError, match=r"--seq_length 64: --data .* has 6 tokens, fewer than one row; make it 6 or less"):
            train_data.write_rows(tmp_path / "rows.bin", arguments, train_data.byte_tokenizer())
        with pytest.raises(ValueError, match="the first rank of this host has packed no rows"):
            PackedRows(tmp_path / "rows.bin", 64)


class TestTexts:
    def test_a_folder_is_read_in_the_order_of_names(self, tmp_path: Path) -> None:
        (tmp_path / "b").mkdir()
        (tmp_path / "b" / "z.md").write_text("second")
        (tmp_path / "c.jsonl").write_text('{"text": "third"}\n\n{"text": "fourth"}\n')
        (tmp_path / "a.txt").write_text("first")
        (tmp_path / "d.py").write_text("not text")
        assert list(train_data.texts(DataArguments(data=str(tmp_path)))) == ["first", "second", "third", "fourth"]

    def test_another_field_of_jsonl(self, tmp_path: Path) -> None:
        file = tmp_path / "data.jsonl"
        file.write_text(json.dumps({"body": "hello", "id": 3}))
        assert list(train_data.texts(DataArguments(data=str(file), text_field="body"))) == ["hello"]

    @pytest.mark.parametrize(
        ("line", "sentence"),
        [
            (
                {"body": "hello", "id": 3},
                "line 1 of .* has the fields body, id; needed are text, or messages, or prompt and completion",
            ),
            ({"text": 3}, "line 1 of .*: text is 3; it must be a text, or a list of messages"),
            ({"prompt": "a", "completion": []}, "prompt and completion are not of one kind"),
            (["hello"], "line 1 of .* is a list; every line must be an object"),
            ("{", "line 1 of .* is not JSON"),
        ],
    )
    def test_a_line_that_is_no_document_is_named(self, tmp_path: Path, line: Any, sentence: str) -> None:
        file = tmp_path / "data.jsonl"
        file.write_text(line if isinstance(line, str) else json.dumps(line))
        with pytest.raises(ValueError, match=f"--data: {sentence}" if sentence[0] == "l" else sentence):
            list(train_data.texts(DataArguments(data=str(file))))

    def test_a_folder_that_datasets_saved(self, tmp_path: Path) -> None:
        datasets = pytest.importorskip("datasets")
        split = datasets.Dataset.from_dict({"text": ["one", "two"]})
        split.save_to_disk(tmp_path / "one")
        datasets.DatasetDict({"train": split, "test": split.select([1])}).save_to_disk(tmp_path / "many")
        assert list(train_data.texts(DataArguments(data=str(tmp_path / "one")))) == ["one", "two"]
        assert list(train_data.texts(DataArguments(data=str(tmp_path / "many"), data_split="test"))) == ["two"]
        with pytest.raises(ValueError, match=r"--text_field body: .* has only text"):
            list(train_data.texts(DataArguments(data=str(tmp_path / "one"), text_field="body")))

    def test_the_standard_library_without_its_tests(self) -> None:
        files = train_data.stdlib_files()
        names = [file.as_posix() for file in files]
        assert len(files) > 300
        assert any(name.endswith("/asyncio/tasks.py") for name in names)
        assert not any("/test/" in name or "/site-packages/" in name for name in names)

    @pytest.mark.parametrize("data", ["missing.txt", "./missing", "/missing/folder"])
    def test_a_path_that_is_not_there_is_refused(self, data: str) -> None:
        with pytest.raises(ValueError, match="no such file or folder"):
            DataArguments(data=data)

    def test_bytes_survive_the_tokenizer(self) -> None:
        tokenizer = train_data.byte_tokenizer()
        text = "def f():\n\treturn 'Ωß€😀'  # \x00\r\n"
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert len(ids) == len(text.encode())
        assert tokenizer.decode(ids) == text
        assert len(tokenizer) == 258
        assert list(train_data.tokenized(["a", "", "b"], tokenizer)) == [
            [*tokenizer("a")["input_ids"], tokenizer.eos_token_id],
            [*tokenizer("b")["input_ids"], tokenizer.eos_token_id],
        ]


class TestModelFromScratch:
    @pytest.fixture
    def script(self, monkeypatch: pytest.MonkeyPatch) -> Any:
        monkeypatch.syspath_prepend(str(ROOT / "scripts"))
        return importlib.import_module("train")

    def test_overrides_reach_derived_fields(self, script: Any) -> None:
        overrides = "hidden_size=64,num_hidden_layers=3,tie_word_embeddings=true,rms_norm_eps=1e-5,hidden_act=gelu"
        arguments = script.ModelArguments(model_type="qwen3", config_overrides=overrides)
        config = script.load_config(arguments, train_data.byte_tokenizer())
        assert (config.hidden_size, config.tie_word_embeddings, config.rms_norm_eps) == (64, True, 1e-5)
        assert (config.hidden_act, len(config.layer_types), config.vocab_size, config.eos_token_id) == ("gelu", 3, 258, 256)

    def test_a_config_file_or_its_folder(self, script: Any, tmp_path: Path) -> None:
        Qwen3Config(hidden_size=48).save_pretrained(tmp_path)
        for path in (tmp_path, tmp_path / "config.json"):
            arguments = script.ModelArguments(config=str(path), config_overrides="intermediate_size=96")
            config = script.load_config(arguments, train_data.byte_tokenizer())
            assert (type(config), config.hidden_size, config.intermediate_size) == (Qwen3Config, 48, 96)

    def test_a_misspelt_override_is_refused(self, script: Any) -> None:
        arguments = script.ModelArguments(model_type="qwen3", config_overrides="hiden_size=64")
        with pytest.raises(ValueError, match="hiden_size: not in this config; did you mean 'hidden_size'"):
            script.load_config(arguments, train_data.byte_tokenizer())

    @pytest.mark.parametrize("given_", [{}, {"model": "a", "model_type": "qwen3"}])
    def test_exactly_one_model(self, script: Any, given_: dict[str, str]) -> None:
        with pytest.raises(ValueError, match="exactly one of --model, --config and --model_type"):
            script.ModelArguments(**given_)


def test_a_resumed_metrics_file_keeps_the_lines_up_to_the_checkpoint(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text("".join(json.dumps({"step": step, "loss": 9.0 - step}) + "\n" for step in range(1, 6)))
    arguments, control = TrainingArguments(output_dir=str(tmp_path), use_cpu=True), TrainerControl()
    callback = train_plot.MetricsFile(file, tokens_per_step=1)
    state = TrainerState(global_step=3, is_world_process_zero=True)
    callback.on_train_begin(arguments, state, control)
    state.global_step = 4
    callback.on_log(arguments, state, control, logs={"loss": 0.5, "epoch": 1.0})
    callback.on_log(arguments, state, control, logs={"train_runtime": 1.0})
    assert train_plot.curve(train_plot.read(file)) == {1: 8.0, 2: 7.0, 3: 6.0, 4: 0.5}
