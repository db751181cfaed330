"""Ranks of a job on this machine, each a process of its own that no launcher ends."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def start(program: Path, arguments: list[str], ranks: int, logs: Path) -> list[subprocess.Popen]:
    """`program` on CPU, once a rank; what they say goes on in logs/rank0.log, ..."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {
        "TORCH_EXTENSIONS_DIR": str(ROOT / ".cache" / "torch_extensions"),
        **os.environ,
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    started = []
    for rank in range(ranks):
        with open(logs / f"rank{rank}.log", "a") as log:
            environment = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            started.append(
                subprocess.Popen([sys.executable, str(program), *arguments], env=environment, stdout=log, stderr=subprocess.STDOUT)
            )
    return started


def end(processes: list[subprocess.Popen]) -> None:
    for process in processes:
        if process.poll() is None:
            process.kill()
        process.wait()
