"""What `ds_cp.stats`, the Trainer's logs and DeepSpeed's monitor say of a run."""

from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import Any

import pytest

from ds_cp import meter, selftest
from tests.dist import pictures, stats_jobs, trainer_jobs
from tests.dist.test_parity import block, packed, padded
from tests.unit.test_docs import ranges_of_docs


def test_tokens_and_imbalance_of_packed_and_padded_rows(pool, tmp_path: Path) -> None:
    steps = [
        [packed([16, 8]), packed([24])],
        [packed([5, 11, 8]), padded([9, 16], "left")],
        [packed([24]), padded([3, 13], "right")],
    ]
    run = {"block": block(1, 2, layout="contiguous"), "steps": steps, "folder": str(tmp_path)}
    found = pool(2).run(stats_jobs.measured, **run)
    assert found[0] == found[1], "all ranks know the same"
    nothing, *figures = found[0]
    assert nothing == {}, "the first step is not counted"
    assert [each["tokens"] for each in figures] == [24 + 25, 24 + 16]
    for each in figures:
        assert each["tokens_per_second_per_gpu"] == pytest.approx(each["tokens"] / each["step_seconds"] / 2)
        assert "mfu" not in each, "of a CPU nobody knows the peak"
    work = meter.work_of(selftest.tiny_model("llama"))
    layers = len(work.windows)
    # contiguous halves: of 24 tokens the first 12 (78 pairs) and the last 12; of documents of 3 and 13, 8 tokens each (6 + 15, 76)
    first = [12 * work.token + layers * work.pair * 222, 8 * work.token + layers * work.pair * 76]
    whole = work.of((0, 24)) + work.of((0, 3, 16))
    assert figures[1]["imbalance"] == pytest.approx(sum(first) / (whole / 2))
    assert figures[1]["tflops_per_gpu"] == pytest.approx(whole / 2 / figures[1]["step_seconds"] / 1e12)
    (file,) = tmp_path.rglob("*ds_cp_tokens.csv")
    rows = list(csv.reader(file.open()))[1:]
    assert [(float(sample), float(tokens)) for sample, tokens in rows] == [(4, 49.0), (6, 40.0)]


def test_the_trainer_logs_them(pool, tmp_path: Path) -> None:
    results = pool(4).run(trainer_jobs.train, folder=str(tmp_path), block=block(1, 2), max_steps=5, logging_steps=2)
    logs = [[entry for entry in result["logs"] if "loss" in entry] for result in results]
    names = ("tokens", "step_seconds", "tokens_per_second_per_gpu", "tflops_per_gpu", "imbalance")
    seen = [[{name: entry.get(name) for name in names} for entry in log] for log in logs]
    assert all(each == seen[0] for each in seen)
    per_step = 2 * 2 * 24  # replicas, accumulation, row
    assert [entry["tokens"] for entry in seen[0]] == [per_step, 2 * per_step], "of step 2; of 3 and 4"
    assert all(entry["imbalance"] == pytest.approx(1.0, abs=0.05) for entry in seen[0])


@pytest.mark.parametrize(("sizes", "where", "other"), [((1, 2), "ring", "exchange"), ((2, 1), "exchange", "ring")])
def test_a_rank_that_is_late_shows_as_imbalance_and_as_the_others_wait(
    pool, sizes: tuple[int, int], where: str, other: str
) -> None:
    found, same = pool(2).run(stats_jobs.uneven, block=block(*sizes), batch=packed([24]), late_s=0.1)
    assert found == same
    assert 1.5 < found["attention_imbalance"] <= 2, "one of two ranks has nearly all of it"
    assert 0.25 < found[f"exposed_{where}"] < 1, "nearly all of one rank's step"
    assert found[f"exposed_{other}"] == 0


RANGES: dict[str, tuple[int, dict[str, Any], set[str]]] = {
    "attention on 2 x 2, Gated DeltaNet by heads": (
        4,
        {"kind": "qwen3_5_text", "block": block(2, 2, loss_chunk=4, linear_attention="heads"), "steps": 4, "evaluations": True},
        {
            *("ds_cp attention", "ds_cp attention tile", "ds_cp attention backward", "ds_cp attention tile backward"),
            *("ds_cp all-to-all (ulysses)", "ds_cp key/value hop: wait", "ds_cp gradient hop: wait"),
            *("ds_cp exchange of tokens and heads (seq)", "ds_cp loss chunk", "ds_cp all-reduce (seq)", "ds_cp all-gather (seq)"),
        },
    ),
    "Gated DeltaNet by state": (
        4,
        {"kind": "qwen3_5_text", "block": block(2, 2, linear_attention="state")},
        {"ds_cp exchange of tokens and heads (ulysses)", "ds_cp all-gather (ring)", "ds_cp reduce-scatter (ring)"},
    ),
    "images in two replicas": (
        4,
        {"kind": "qwen3_vl", "block": block(1, 2), "batch": pictures.row([5, (2, 2), 7])},
        {"ds_cp all-to-all (seq)", "ds_cp all-reduce (data)"},
    ),
    "windows, a stream": (
        2,
        {"kind": "mistral", "block": block(1, 2), "stream": True},
        {
            *("ds_cp halo hop: wait", "ds_cp halo gradient hop: wait"),
            *("ds_cp all-gather (default_pg)", "ds_cp all-reduce (default_pg)"),
        },
    ),
    "a ring that gathers, log-probabilities": (
        2,
        {"kind": "llama", "block": block(1, 2, ring_impl="allgather"), "values": True},
        {"ds_cp key/value gather: wait", "ds_cp gradient reduce-scatter", "ds_cp reduce-scatter (seq)"},
    ),
    "short convolutions": (2, {"kind": "lfm2", "block": block(1, 2)}, {"ds_cp convolution's halo (seq)"}),
    "Mamba": (
        2,
        {"kind": "jamba", "block": block(1, 2)},
        {"ds_cp convolution's halo (seq)", "ds_cp exchange of tokens and heads (seq)"},
    ),
    "Mamba-2": (2, {"kind": "mamba2", "block": block(1, 2)}, {"ds_cp exchange of tokens and heads (seq)"}),
    "chosen keys": (2, {"kind": "deepseek_v32", "block": block(2, 1)}, {"ds_cp all-gather (ulysses)"}),
}
"""By kinds of layers and of steps: ranks, a run, and ranges that its trace must have."""


@pytest.fixture(scope="module")
def traces(pool, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[list[str]]]:
    """Of each rank, by run: the ranges in the trace that it wrote."""
    found = {}
    for kind, (ranks, run, _) in RANGES.items():
        folder = tmp_path_factory.mktemp("traces")
        profile = {"after": 1, "steps": 2 if run.get("evaluations") else 1, "folder": str(folder)}
        given = {"batch": packed([24]), **run, "block": {**run["block"], "profile": profile}}
        found[kind] = pool(ranks).run(stats_jobs.profiled, **given)
        last = "2-3" if run.get("evaluations") else "2-2"
        assert sorted(path.name for path in folder.iterdir()) == [f"rank{n}of{ranks}_steps{last}.json.gz" for n in range(ranks)]
    return found


@pytest.mark.parametrize("kind", RANGES)
def test_every_rank_writes_a_trace_with_named_ranges(traces: dict[str, list[list[str]]], kind: str) -> None:
    _, run, wanted = RANGES[kind]
    for names in traces[kind]:
        assert {"ProfilerStep#1", *wanted} <= set(names), wanted - set(names)
        if run.get("evaluations"):
            assert "ProfilerStep#2" in names
            assert names.count("ds_cp attention backward") == 2, "one layer of attention, in two recorded steps"


def test_the_ranges_are_those_that_the_docs_list(traces: dict[str, list[list[str]]]) -> None:
    found = {re.sub(r"(?<=^ProfilerStep#)\d+", "n", name) for ranks in traces.values() for names in ranks for name in names}
    assert found == ranges_of_docs()
