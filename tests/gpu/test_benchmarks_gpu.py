"""The scripts that measure on GPUs run against today's code, each in a process of its own, at small sizes.

What comes out is looked at, not how fast. tests/e2e/test_benchmarks.py runs on CPU what goes there too.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

BENCH = Path(__file__).parents[2] / "scripts" / "bench"
SMALL = {  # of Llama-8B's shapes: two layers, and a tenth of a GPU
    "offload_trace": ["--layers", "2", "--local-tokens", "4096", "--steps", "1"],
    "memory": ["--loss", "--loss-tokens", "4096"],
}
BF16 = 2**-8
"""Of a number: how far apart two of its neighbours in bf16 are."""


def measured(folder: Path, script: str, *options: str) -> list[dict[str, Any]]:
    """The rows that a script writes. Tests have DS_ACCELERATOR=cpu for the ranks that they start themselves."""
    command = [sys.executable, str(BENCH / f"{script}.py"), "--json", str(folder / "out.json"), *options]
    environment = os.environ | {"DS_ACCELERATOR": "cuda"}
    ended = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=240)
    assert ended.returncode == 0, ended.stdout[-3000:]
    return json.loads((folder / "out.json").read_text())["rows"]


def test_ligers_gradients_are_as_near_to_fp64_as_those_of_whole_logits(tmp_path: Path) -> None:
    pytest.importorskip("liger_kernel")
    rows = measured(tmp_path, "liger")
    ways = ("ds_cp", "Liger", "Liger, accum_dtype fp32")
    assert [row["way"] for row in rows] == [*ways] * 6  # two dtypes, three losses
    for row in rows:
        for of in ("hidden", "weight"):
            assert row[f"{of}_error"] <= 2 * row[f"{of}_limit"], row
            assert row[f"{of}_limit"] < (1e-5 if row["dtype"] == "float32" else 4 * BF16), row


def test_the_loss_alone_takes_a_fraction_of_what_whole_logits_take(tmp_path: Path) -> None:
    rows = {row["contender"]: row for row in measured(tmp_path, "memory", *SMALL["memory"])}
    whole, ours = rows["whole logits"], rows["ds_cp, loss_chunk auto"]
    assert whole["tokens"] == 4096
    assert max(ours["weight_difference"], ours["hidden_difference"]) < BF16
    assert 0 < ours["over_own_gib"] < whole["over_own_gib"] / 2


def test_copies_of_offloaded_activations_are_in_the_trace_of_a_step(tmp_path: Path) -> None:
    png = tmp_path / "trace.png"
    plain, offloaded = measured(tmp_path, "offload_trace", *SMALL["offload_trace"], "--png", str(png))
    assert (plain["activation_offload"], offloaded["activation_offload"]) == (False, True)
    inputs_mib = 2 * 4096 * 4096 * 2 / 2**20  # layers, tokens, hidden size, bf16
    assert plain["to_host_mib"] == 0
    assert inputs_mib <= offloaded["to_host_mib"] <= 2 * inputs_mib, "with what the last norm and the head keep in the same shape"
    assert offloaded["copies_ms"] > plain["copies_ms"]
    assert 0 <= offloaded["covered"] <= 1
    assert 0 <= offloaded["exposed_ms"] <= offloaded["copies_ms"]
    assert png.read_bytes().startswith(b"\x89PNG")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("section", ["step", "ring"])
def test_real_ranks_of_two_gpus(section: str, tmp_path: Path) -> None:
    rows = measured(tmp_path, "real_ranks", "--tiny", "--ranks", "2", "--settings", "1x2", "--sections", section)
    assert all(row["device"] == torch.cuda.get_device_name() for row in rows)
    if section == "step":
        alst, ours = rows
        assert (alst["contender"], ours["contender"], ours["ring"]) == ("ALST", "ds_cp", 2)
        assert ours["loss"] == pytest.approx(alst["loss"], rel=1e-3)
        assert min(row["peak_gib"] for row in rows) > 0
        return
    assert [row["impl"] for row in rows] == ["p2p", "allgather"]
    for row in rows:
        assert len(row["ranks"]) == 2
        assert row["efficiency"] == pytest.approx(row["alone_ms"] / 2 / row["ring_ms"])
        assert min(row["compute_ms"], row["hop_ms"], row["host_ms"]) > 0
