"""The scripts that measure, and those that run for long, run against today's code: at their smallest, on CPU, and their figures
are looked at."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.hosts.test_hosts import WHY_NOT
from tests.interpreter import Interpreter

SCRIPTS = Path(__file__).parents[2] / "scripts"
Run = Callable[..., Any]
BF16 = 2**-8


@pytest.fixture(scope="module")
def interpreter(tmp_path_factory: pytest.TempPathFactory, built_extension: None) -> Iterator[Path]:
    started = Interpreter(tmp_path_factory.mktemp("interpreter"))
    yield started.path
    started.close()


@pytest.fixture
def run(interpreter: Path, tmp_path: Path) -> Run:
    """What a script writes with these options."""

    def run(script: str, *options: str) -> Any:
        command = [str(interpreter), str(SCRIPTS / script), *options, "--json", str(tmp_path / "out.json")]
        ended = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=240, check=False)
        assert ended.returncode == 0, ended.stdout[-3000:]
        return json.loads((tmp_path / "out.json").read_text())

    return run


RUNS = {
    "one_rank": ["--settings", "2x4", "--alst", "--steps", "1"],
    "memory": ["--contenders", "ds_cp ring", "--first", "64", "--precision", "inf", "--layers", "1"],
}


@pytest.mark.parametrize("name", RUNS)
def test_a_benchmark_of_one_rank_runs(name: str, run: Run) -> None:
    rows = run(f"bench/{name}.py", "--tiny", *RUNS[name])["rows"]
    assert [row["outcome"] for row in rows] == ["ok"]


def test_memory_is_counted(run: Run) -> None:
    (row,) = run("bench/planner_memory.py", "--case", json.dumps({"local_tokens": 32, "layers": 1, "world": 4}))["rows"]
    state = 16 * row["parameters"] / row["world"] / 2**20  # bf16 weight and gradient, fp32 weight, two moments, cut in four
    assert row["state_mib"] == pytest.approx(state, rel=0.05)
    assert row["peak_mib"] > row["state_mib"]
    assert row["mib_by_part"]["mlp"] > 0


def test_the_loss_alone(run: Run) -> None:
    whole, ours, theirs = run("bench/memory.py", "--loss", "--tiny")["rows"]
    assert (whole["contender"], ours["contender"]) == ("whole logits", "ds_cp, loss_chunk auto")
    assert max(ours["weight_difference"], ours["hidden_difference"], theirs["hidden_difference"]) < BF16


def test_a_step_with_and_without_offloaded_activations(run: Run) -> None:
    plain, offloaded = run("bench/offload_trace.py", "--tiny", "--layers", "1", "--steps", "1")["rows"]
    assert (plain["activation_offload"], offloaded["activation_offload"]) == (False, True)
    input_mib = 64 * 256 * 2 / 2**20  # tokens, hidden size, bf16
    assert plain["to_host_mib"] == 0
    assert offloaded["to_host_mib"] == 3 * input_mib, "the layer's, and what the last norm and the head keep in the same shape"


def test_real_ranks_of_two(run: Run) -> None:
    options = ["--ranks", "2", "--settings", "1x2", "--impl", "p2p", "--layers", "1", "--steps", "1"]
    ring, alst, ours = run("bench/real_ranks.py", "--tiny", *options)["rows"]
    assert [row["device"] for row in (ring, alst, ours)] == ["cpu"] * 3
    assert len(ring["ranks"]) == 2
    assert ring["efficiency"] == pytest.approx(ring["alone_ms"] / 2 / ring["ring_ms"])
    assert (alst["contender"], ours["contender"], ours["ring"]) == ("ALST", "ds_cp", 2)
    assert ours["loss"] == pytest.approx(alst["loss"], rel=1e-4)


def test_alst_and_ours(run: Run) -> None:
    options = ["--contenders", "ALST", "ds_cp ring=2", "--only", "packed", "speed", "--no-one-process", "--quick"]
    rows = run("bench/alst.py", *options, "--lengths", "64")["rows"]
    errors = {(row["zero"], row["contender"]): row["error"] for row in rows if row["section"] == "packed"}
    assert len(errors) == 4
    for (zero, contender), error in errors.items():
        wrong = contender == "ALST"  # its documents see each other
        assert error > 0.1 if wrong else error < 1e-5, (zero, contender)
    alst, ours = (row for row in rows if row["section"] == "speed")
    assert (alst["contender"], ours["contender"]) == ("ALST", "ds_cp ring=2")
    assert ours["to_alst"] == pytest.approx(ours["seconds"] / alst["seconds"])
    assert [len(row["all_seconds"]) for row in (alst, ours)] == [3, 3]
    assert min(row["peak_mib"] for row in (alst, ours)) > 0


@pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)
def test_a_step_over_a_shaped_link(run: Run) -> None:
    options = ["--rates", "1gbit", "--length", "256", "--steps", "1", "--kv-heads", "2"]
    (row,) = run("bench/link.py", *options, "--contenders", "ulysses 2 x ring 2, kept")["rows"]
    assert (row["rate"], row["kv_heads"]) == ("1gbit", 2)
    weights_mb = 4 * (2 * 1024 * 256 + 4 * (2 * 256 * 256 + 2 * 256 * 64 + 3 * 256 * 688)) / 1e6  # embedding, head, four layers
    assert row["sent_mb"] > weights_mb, "under ZeRO 3 a host sends its half in forward and in backward"


def test_a_run_with_a_killed_rank_ends_as_one_that_was_left_alone(run: Run) -> None:
    steps = 12
    options = ["--ranks", "2", "--steps", str(steps), "--save", "1", "--length", "64"]
    found = run("soak/kill.py", *options, "--every", "0", "--kills", "1")
    (kill,) = found["kills"]
    assert 0 < kill["after_step"] < steps
    assert kill["goes_on_from"].startswith("global_step")
    assert found["lines_compared"] >= 2 * steps
    assert found["different"] == []


def test_files_and_memory_of_a_long_run_are_counted(run: Run) -> None:
    ranks = run("soak/memory.py", "--ranks", "2", "--steps", "30", "--bar", "0.2")["ranks"]
    assert len(ranks) == 2
    for rank in ranks:
        assert rank["files"]["growth"] == 0
        assert len(rank["rss"]["every_50th"]) == 1
        assert rank["rss"]["steps_200_to_400"] > 1e8
