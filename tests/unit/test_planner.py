"""`ds-cp plan`: its predictions against what was measured, its counts against models, and what it writes against `ds-cp check`."""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import pytest
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from typer.testing import CliRunner, Result

from ds_cp import checking, selftest
from ds_cp.cli import app
from ds_cp.planner import choice as choices
from ds_cp.planner import machine, memory, read, render, search, times, traffic
from ds_cp.planner.choice import Choice
from ds_cp.planner.machine import Machine
from ds_cp.planner.shape import Shape
from ds_cp.topology import Topology

ROOT = Path(__file__).resolve().parents[2]
BENCH = ROOT / "scripts" / "bench"


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    sys.path.insert(0, str(BENCH))
    import planner_check

    return planner_check


@pytest.fixture(scope="module")
def llama(bench: ModuleType) -> Shape:
    return bench.llama(*bench.LLAMA_8B, 32)


def h100(gpus: int, host_memory: float = 1800) -> Machine:
    return machine.build(gpus, 8, "h100", 0, "nvlink", "infiniband-400g", host_memory)


# Predicted and measured

AT_LEAST = {
    "memory, counted on a CPU": 15,
    "memory, one GPU": 5,
    "time, a whole step": 4,
    "time, attention of a layer": 15,
    "traffic, what a host sends": 3,
    "time, shaped link": 3,
}
"""Points of docs/data that must be there and within the bar: 10 % of memory and traffic, 25 % of time."""


def rows_of_the_docs() -> dict[tuple[str, str], list[tuple[str, str, str, str]]]:
    """(file, case) -> [(predicted, unit, measured, mark)] of docs/planner.md."""
    found: dict[tuple[str, str], list[tuple[str, str, str, str]]] = {}
    for line in (ROOT / "docs" / "planner.md").read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.split("|")]
        if len(cells) == 8 and cells[1].startswith("["):
            name = re.match(r"\[(.+?)\]", cells[1]).group(1)
            predicted, unit = cells[3].split()
            found.setdefault((name, cells[2]), []).append((predicted, unit, cells[4], cells[6]))
    return found


def test_predictions_hold_where_the_docs_say_so(bench: ModuleType) -> None:
    shown, good = rows_of_the_docs(), Counter()
    for point in bench.points():
        told = [row for row in shown.get((point.file, point.what), []) if row[1:3] == (point.unit, f"{point.measured:.4g}")]
        for predicted, _, _, mark in told:
            assert predicted == f"{point.predicted:.4g}", f"run scripts/bench/planner_check.py --write docs/planner.md: {point}"
            assert mark or abs(point.error) <= point.bar, point
        good[point.section] += bool(told) and not point.beyond and abs(point.error) <= point.bar
    assert {section: good[section] for section in AT_LEAST if good[section] < AT_LEAST[section]} == {}


def test_a_length_that_ran_out_of_memory_is_not_proposed(bench: ModuleType) -> None:
    failed = [point for point in bench.memory_points() if point.beyond.startswith("ran out of memory")]
    assert failed
    assert all(bench.refused(point.predicted, point.measured) for point in failed), failed


# Counts


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3_text", "mixtral", "qwen3_5_text"])
def test_a_model_is_counted(kind: str) -> None:
    model = selftest.tiny_model(kind)
    shape, config = read.of(model, kind), model.config
    matrices = {p for name, p in model.named_parameters() if p.ndim >= 2 and "conv" not in name}
    embedding = model.get_input_embeddings().weight
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    assert (shape.embedding, shape.layers, shape.hidden) == (embedding.numel(), config.num_hidden_layers, config.hidden_size)
    assert shape.head == (0 if config.tie_word_embeddings else embedding.numel())
    met = 1.0
    if kind == "mixtral":
        met = config.num_experts_per_tok / config.num_local_experts
        assert shape.tiled_mlp_refused
        matrices = {p for p in matrices if p.shape[0] != config.num_local_experts or p.ndim == 3}  # the routers
    experts = sum(p.numel() for p in matrices if p.ndim == 3)
    dense = sum(p.numel() for p in matrices if p.ndim == 2) - shape.embedding - shape.head
    routers = sum(p.numel() for name, p in model.named_parameters() if "gate.weight" in name) if kind == "mixtral" else 0
    assert shape.mlp + shape.mixers == pytest.approx(dense + met * experts + routers)


def test_windows_and_recurrent_layers_are_read() -> None:
    windowed = read.of(selftest.tiny_model("gemma3_text"), "gemma3_text")
    assert len(windowed.windows) == windowed.layers
    assert None in windowed.windows
    assert any(window is not None for window in windowed.windows)
    hybrid = read.of(selftest.tiny_model("qwen3_5_text"), "qwen3_5_text")
    assert len(hybrid.windows) + len(hybrid.linear) == hybrid.layers
    assert hybrid.linear


@pytest.mark.parametrize(
    ("kind", "layer"),
    [
        ("jamba", "JambaMambaMixer"),
        ("mamba2", "Mamba2Mixer"),
        ("minimax", "MiniMaxLightningAttention"),
        ("kimi_linear", "KimiLinearDeltaAttention"),
    ],
)
def test_scans_that_are_not_counted_are_refused(kind: str, layer: str) -> None:
    with pytest.raises(ValueError, match=f"plan: it: the planner does not know the scans of {layer}; .* ds-cp check"):
        read.of(selftest.tiny_model(kind), "it")


def test_what_a_norm_keeps_is_counted() -> None:
    """HF's RMSNorm: its input in fp32 (twice 2 bytes), what that becomes, and the output; PyTorch's LayerNorm: the output."""
    norm = selftest.tiny_model("llama").model.norm
    assert read.kept_by(norm, norm.weight.numel()) == 4
    norm = selftest.tiny_model("gpt_neox").gpt_neox.final_layer_norm
    assert read.kept_by(norm, norm.weight.numel()) == 1
    assert (read.of(selftest.tiny_model("gemma3_text"), "").norms, read.of(selftest.tiny_model("olmo2"), "").norms) == (4, 2)


def test_llama_8b_is_what_its_config_says(bench: ModuleType, llama: Shape) -> None:
    """The shape of the benchmarks, which is written out, and the one that is read."""
    hidden, inner, vocabulary, heads, kv_heads, _ = bench.LLAMA_8B
    sizes = {"hidden_size": hidden, "intermediate_size": inner, "vocab_size": vocabulary, "num_hidden_layers": 32}
    config = CONFIG_MAPPING["llama"](**sizes, num_attention_heads=heads, num_key_value_heads=kv_heads)
    import torch

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert read.of(model, "llama") == llama


# Recipes


def test_recipes_are_what_the_planner_writes_and_pass_the_check(tmp_path: Path) -> None:
    sys.path.insert(0, str(ROOT / "scripts"))
    import gen_recipes

    assert [str(path) for path, text in gen_recipes.texts().items() if path.read_text(encoding="utf-8") != text] == []
    for recipe in gen_recipes.RECIPES:
        gen_recipes.llama(recipe).save_pretrained(tmp_path)
        found = checking.check(ROOT / "ds_configs" / recipe.file, 8 * recipe.hosts, 8, str(tmp_path))
        assert int(found["ulysses_size"]) <= 8


# Choices


def test_what_is_written_passes_the_check_and_means_the_same(tmp_path: Path, llama: Shape) -> None:
    seen = set()
    for degrees, linear in choices.degrees(llama, h100(16), 1 << 20, Counter()):
        for one in choices.variants(llama, degrees, linear):
            written = render.ds_config(one)
            if (text := json.dumps(written)) in seen:
                continue
            seen.add(text)
            found = checking.check(written, 16, 8, heads=llama.heads[0])
            assert found["ulysses_size"] == str(degrees.ulysses) if degrees.size > 1 else found["size"] == "1"
            assert found["attention_head_chunks"] == str(one.head_chunks)
            assert written["zero_optimization"]["stage"] == one.stage
    assert len(seen) > 100


def test_illegal_degrees_are_counted_with_their_reason(llama: Shape) -> None:
    illegal: Counter[str] = Counter()
    legal = [degrees for degrees, _ in choices.degrees(replace(llama, heads=((32, 8),)), h100(64), 1 << 20, illegal)]
    assert max(degrees.ulysses for degrees in legal) == 32
    assert illegal["ulysses 64: it does not divide the 32 query heads"] == 1
    assert len(legal) + sum(illegal.values()) == 7 * 8 // 2  # divisors of 64, and their divisors
    short: Counter[str] = Counter()
    assert [d for d, _ in choices.degrees(llama, h100(64), 8, short) if d.size > 8] == []
    assert any("more pieces than the row has tokens" in reason for reason in short)


def test_experts_are_not_tiled(llama: Shape) -> None:
    refused = replace(llama, tiled_mlp_refused="experts")
    plans = [
        one for d, linear in choices.degrees(refused, h100(8), 4096, Counter()) for one in choices.variants(refused, d, linear)
    ]
    assert not any(one.tiled_mlp for one in plans)


def test_the_parts_add_up_and_shrink_with_every_saving(llama: Shape) -> None:
    plain, tokens = Choice(Topology(8, 1, 1), 2), 65536
    found = memory.of(llama, plain, tokens)
    assert sum(found.parts.values()) == pytest.approx(found.peak)
    assert found.peak == max(found.at.values())
    for saving in ({"stage": 3}, {"offload_optimizer": True}, {"activation_offload": True}, {"tiled_mlp": True}):
        assert memory.of(llama, replace(plain, **saving), tokens).peak < found.peak, saving
    for price in ({"checkpointing": False}, {"tiled_loss": False}, {"stage": 1}, {"stage": 0}):
        assert memory.of(llama, replace(plain, **price), tokens).peak > found.peak, price
    assert memory.of(llama, plain, 2 * tokens).peak > found.peak


def test_what_is_offloaded_counts_as_the_hosts(llama: Shape) -> None:
    choice = Choice(Topology(8, 1, 1), 3, offload_optimizer=True, activation_offload=True)
    host = memory.of(llama, choice, 65536).host
    assert host == pytest.approx(18 * llama.parameters / 8 + 2 * 65536 * 4096 * 33)
    row = search.judge(llama, choice, h100(8), (0, 8 * 65536))
    assert search.fits(row, h100(8, host_memory=8 * host / machine.GIB + 1))
    assert not search.fits(row, h100(8, host_memory=8 * host / machine.GIB - 1))


def test_a_slow_link_between_hosts_is_kept_off_the_all_to_all(llama: Shape) -> None:
    slow = machine.build(16, 8, "h100", 0, "nvlink", "ethernet-25g", 1800)
    for choice, leaves in ((Choice(Topology(8, 1, 2), 3), False), (Choice(Topology(16, 1, 1), 3), True)):
        sent = traffic.of(llama, choice, slow, 8192)
        assert bool(sent.all_to_all.leaves) == leaves
    inside, across = (search.judge(llama, Choice(Topology(u, 16 // u, 1), 3), slow, (0, 1 << 18)) for u in (8, 16))
    assert inside.times.seconds < across.times.seconds


def test_packed_rows_take_less_time_than_one_document(llama: Shape) -> None:
    choice = Choice(Topology(2, 4, 1), 3)
    whole = search.judge(llama, choice, h100(8), (0, 1 << 17))
    packed = search.judge(llama, choice, h100(8), times.boundaries([1 << 13] * 16))
    assert packed.times.compute["attention"] < whole.times.compute["attention"] / 8
    assert packed.times.compute["MLP"] == pytest.approx(whole.times.compute["MLP"])


def test_the_best_come_first_and_what_they_save_is_needed(llama: Shape) -> None:
    found = search.plan(llama, h100(8), (0, 1 << 18))
    speeds = [row.tokens_per_second for row in found.rows]
    assert all(later <= earlier * search.TIED for earlier, later in pairwise(speeds))
    assert all(search.fits(row, found.machine) for row in found.rows)
    best = found.rows[0].choice
    for _, without in search._less(best):
        row = search.judge(llama, without, found.machine, found.documents)
        assert not search.fits(row, found.machine) or row.times.seconds > found.rows[0].times.seconds / search.SAME
    total = sum(len(list(choices.variants(llama, d, m))) for d, m in choices.degrees(llama, found.machine, 1 << 18, Counter()))
    assert found.fitting < total


def test_an_all_to_all_stays_inside_a_host_among_equals(bench: ModuleType) -> None:
    found = search.plan(bench.llama(8192, 28672, 128256, 64, 8, 128, 80), h100(256), (0, 1 << 20))
    tied = [row for row in found.rows if row.tokens_per_second * search.TIED >= found.rows[0].tokens_per_second]
    fewest = [row for row in tied if row.choice.savings == found.rows[0].choice.savings]
    assert any(row.traffic.all_to_all.leaves for row in fewest)
    assert not found.rows[0].traffic.all_to_all.leaves


# The shell


def plan(tmp_path: Path, *arguments: str) -> Result:
    if not (tmp_path / "model").exists():
        selftest.tiny_model("llama").config.save_pretrained(tmp_path / "model")
    return CliRunner().invoke(app, ["plan", str(tmp_path / "model"), *arguments])


def test_the_shell_shows_writes_and_chooses(tmp_path: Path) -> None:
    out = tmp_path / "ds_config.json"
    shown = plan(tmp_path, "--gpus", "4", "--length", "4096", "--write", str(out))
    assert shown.exit_code == 0, shown.output
    assert "because" not in shown.output
    assert "tokens/s a GPU" in shown.output
    checking.check(str(out), 4, 4, str(tmp_path / "model"))
    rows = json.loads(plan(tmp_path, "--gpus", "4", "--length", "4096", "--json").output)["rows"]
    assert rows[0]["ds_config"] == json.loads(out.read_text())
    assert plan(tmp_path, "--gpus", "4", "--length", "4096", "--choose", "2", "--write", str(out)).exit_code == 0
    assert rows[1]["ds_config"] == json.loads(out.read_text())
    lengths = tmp_path / "lengths.txt"
    lengths.write_text("1000 3096")
    packed = plan(tmp_path, "--gpus", "4", "--docs", str(lengths), "--json")
    assert json.loads(packed.output)["documents"] == 2
    assert plan(tmp_path / "model" / "..", "--gpus", "4", "--length", "4096").exit_code == 0


def test_a_config_file_is_a_model_too(tmp_path: Path) -> None:
    selftest.tiny_model("llama").config.save_pretrained(tmp_path)
    result = CliRunner().invoke(app, ["plan", str(tmp_path / "config.json"), "--gpus", "2", "--length", "128"])
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("--gpus", "12", "--length", "4096"), "--gpus 12: not a multiple of the 8"),
        (("--gpus", "4"), "give either --length or --docs"),
        (("--gpus", "4", "--length", "64", "--gpu", "b300"), "use one of h100, h200"),
        (("--gpus", "4", "--length", "64", "--inside", "string"), "nor one of nvlink"),
        (("--gpus", "4", "--length", "64", "--choose", "99"), "--choose 99: there are"),
        (("--gpus", "2", "--length", "4000000000"), "does not fit"),
    ],
)
def test_a_refusal_is_one_sentence_and_exit_code_1(tmp_path: Path, arguments: tuple[str, ...], reason: str) -> None:
    result = plan(tmp_path, *arguments)
    assert result.exit_code == 1
    assert reason in " ".join(result.output.split())


def test_the_length_that_a_refusal_names_does_fit(llama: Shape) -> None:
    found = search.plan(llama, h100(8), (0, 1 << 24))
    assert not found.rows
    length = int(re.search(r"use at most ([\d,]+) tokens", found.advice).group(1).replace(",", ""))
    assert search.plan_fits(llama, h100(8), length)
    assert not search.plan_fits(llama, h100(8), 2 * length)
