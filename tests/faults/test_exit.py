"""A run that succeeded ends with success, wherever the watch's thread is when it does."""

from __future__ import annotations

import subprocess
import sys

from tests.ports import free_port

PROGRAM = """
import os, sys, time
import torch.distributed as dist
from ds_cp import watch
os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": sys.argv[1], "RANK": "0", "WORLD_SIZE": "1"}
dist.init_process_group("gloo")
held = [watch.begin() for _ in range(8)]
watch.BEAT_S = 0.0  # the threads are now in the store nearly all the time
time.sleep(2.5)
dist.destroy_process_group()
print("done")
"""


def test_the_watch_does_not_abort_a_process_that_ends() -> None:
    ended = subprocess.run([sys.executable, "-c", PROGRAM, str(free_port())], capture_output=True, text=True, timeout=120)
    assert ended.stdout.strip().endswith("done")
    assert ended.returncode == 0, ended.stderr[-2000:]
