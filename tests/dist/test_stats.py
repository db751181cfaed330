"""What `ds_cp.stats`, the Trainer's logs and DeepSpeed's monitor say of a run."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from ds_cp import meter, selftest
from tests.dist import stats_jobs, trainer_jobs
from tests.dist.test_parity import block, packed, padded


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


def test_every_rank_writes_a_trace_with_named_ranges(pool, tmp_path: Path) -> None:
    window = {"after": 1, "steps": 2, "folder": str(tmp_path / "traces")}
    shared = block(2, 2, loss_chunk=4, profile=window, linear_attention="heads")
    ranks = pool(4).run(stats_jobs.profiled, block=shared, batch=packed([24]), kind="qwen3_5_text", steps=4)
    assert sorted(path.name for path in (tmp_path / "traces").iterdir()) == [f"rank{n}of4_steps2-3.json.gz" for n in range(4)]
    wanted = {
        "ProfilerStep#1",
        "ProfilerStep#2",
        "ds_cp attention",
        "ds_cp attention tile",
        "ds_cp attention backward",
        "ds_cp attention tile backward",
        "ds_cp all-to-all (ulysses)",
        "ds_cp key/value hop: wait",
        "ds_cp gradient hop: wait",
        "ds_cp exchange of tokens and heads (seq)",
        "ds_cp loss chunk",
    }
    for names in ranks:
        assert wanted <= set(names), wanted - set(names)
        assert names.count("ds_cp attention backward") == 2, "one layer of attention, in two recorded steps"
