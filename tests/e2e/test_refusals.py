"""Wrong launches: one sentence, an exit code that is not 0, and no hang."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.ports import free_port
from tests.warm import Warm

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "train.py"
TIMEOUT_S = 240
MODEL = (
    "--model_type",
    "llama",
    "--config_overrides",
    "hidden_size=32,num_hidden_layers=1,num_attention_heads=4,num_key_value_heads=2",
)


def arguments(tmp_path: Path, block: dict[str, Any], *more: str) -> list[str]:
    """Of scripts/train.py."""
    config = tmp_path / "ds_config.json"
    sizes = dict.fromkeys(("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"), "auto")
    config.write_text(json.dumps({"sequence_parallel": block, "zero_optimization": {"stage": 1}, **sizes}))
    text = tmp_path / "text.txt"
    text.write_text("some words to train on\n" * 200)
    files = ["--deepspeed", str(config), "--data", str(text), "--output_dir", str(tmp_path / "out")]
    return [*MODEL, *files, "--max_steps", "1", "--save_strategy", "no", *more]


def test_a_wrong_launch_ends_with_the_sentence(tmp_path: Path) -> None:
    """Every other sentence about a block ends a launch in the same way; tests/dist/test_api.py has them, on every rank."""
    launcher = ["deepspeed", "--num_accelerators", "2", "--master_port", str(free_port())]
    run = subprocess.run(
        [*launcher, SCRIPT, *arguments(tmp_path, {"size": 2, "ulysses": 2}, "--use_cpu")],
        cwd=ROOT,
        env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert run.returncode != 0
    assert "unknown key; did you mean 'ulysses_size'" in run.stdout, run.stdout[-3000:]


def test_ranks_that_accelerate_does_not_see_are_refused(tmp_path: Path, warm: Warm) -> None:
    with pytest.raises(AssertionError, match="world size: the launcher started 2 ranks, accelerate sees 1"):
        warm.run(SCRIPT, *arguments(tmp_path, {"size": 2}), folder=tmp_path, ranks=2, timeout=TIMEOUT_S)


def test_a_lock_that_a_dead_build_left_is_named(tmp_path: Path, warm: Warm) -> None:
    folder = tmp_path / "extensions" / "deepspeed_shm_comm"
    folder.mkdir(parents=True)
    lock = folder / "lock"
    lock.touch()
    for path in (lock, folder):
        os.utime(path, (time.time() - 3600,) * 2)
    alone = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    environment = {"TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions"), **alone}  # a rank finds it before it looks for others
    with pytest.raises(AssertionError, match=re.escape(f"{lock} was left by a process that died while building")):
        warm.run(SCRIPT, *arguments(tmp_path, {"size": 2}, "--use_cpu"), folder=tmp_path, timeout=TIMEOUT_S, **environment)


def test_ranks_that_do_not_come_are_told_of_in_time() -> None:
    """As where the launcher could not reach a host: torch's store waits half an hour by default."""
    alone = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    program = [sys.executable, "-c", "import ds_cp; ds_cp.init_distributed(2.0)"]
    run = subprocess.run(program, cwd=ROOT, env={**os.environ, **alone}, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert run.returncode != 0
    last = run.stderr.strip().splitlines()[-1]
    assert last.startswith("ValueError: launch: rank 0 on ")
    assert f"not all 2 ranks have come to 127.0.0.1:{alone['MASTER_PORT']}" in last
