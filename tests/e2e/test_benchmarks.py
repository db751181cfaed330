"""The scripts that measure on a GPU as one rank of a job that is not there run against today's code."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "scripts" / "bench"
RUNS = {
    "one_rank": ["one_rank.py", "--settings", "2x4", "--alst", "--steps", "1"],
    "memory": ["memory.py", "--contenders", "ds_cp ring", "--first", "64", "--precision", "inf", "--layers", "1"],
}


@pytest.mark.parametrize("name", RUNS)
def test_a_benchmark_of_one_rank_runs(name: str, built_extension: None, tmp_path: Path) -> None:
    script, *options = RUNS[name]
    command = [sys.executable, str(BENCH / script), "--tiny", "--json", str(tmp_path / "out.json"), *options]
    ended = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=240, check=False)
    assert ended.returncode == 0, ended.stdout[-3000:]
    assert [row["outcome"] for row in json.loads((tmp_path / "out.json").read_text())["rows"]] == ["ok"]
