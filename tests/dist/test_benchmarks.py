"""The scripts that compare gradients on the tests' own ranks run against today's code: a few of their cases, in this process."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts" / "bench"
BAR = 1e-5
PACKED = "packed, one-token documents, ulysses 1 x ring 2"
TABLES = {  # of docs/benchmarks.md: options, and a case of each
    "parity": ([], PACKED),
    "windows": (["--windows"], "gemma2, packed, ulysses 1 x ring 2"),
    "experts": (["--experts"], "mixtral, packed, ulysses 1 x ring 2, ZeRO 3"),
    "vision": (["--vision"], "qwen3_vl, images, ulysses 1 x ring 2, ZeRO 3"),
    "hybrids": (["--hybrids"], "qwen3_5_text, ulysses 1 x ring 2, ZeRO 3"),
}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, built_extension: None) -> Any:
    """What a script writes with these options. It leaves the environment and sys.path as they are here."""

    def run(script: str, *options: str) -> Any:
        out = tmp_path / "out.json"
        monkeypatch.setattr(sys, "argv", [script, *options, "--json", str(out)])
        monkeypatch.syspath_prepend(SCRIPTS)
        runpy.run_path(str(SCRIPTS / script), run_name="__main__")
        return json.loads(out.read_text())["rows"]

    return run


@pytest.mark.parametrize("table", TABLES)
def test_a_case_of_each_table(table: str, run: Any) -> None:
    options, case = TABLES[table]
    (row,) = run("parity.py", *options, "--only", f"^{case}$")
    assert (row["case"], row["ranks"]) == (case, 2)
    assert 0 < row["gradient"] < BAR
    assert row["loss"] < BAR
    if table == "hybrids":
        assert 0 < row["own_error"] < BAR


def test_tiles_of_deepspeed_that_are_right_and_some_that_are_not(run: Any) -> None:
    mlp, loss = "MLP, 4 tiles", "loss, sum over tiles, divided by the targets"
    rows = run("deepspeed_tiles.py", "--only", f"^({mlp}|{loss})$", "--zero", "1")
    errors = {(row["way"], row["accumulation"]): row["error"] for row in rows}
    assert len(errors) == 4
    for (way, _), error in errors.items():
        assert error < BAR if way == mlp else error > 1, way
