"""One rank of a raw DeepSpeed loop in which something goes wrong on purpose.

    python -m tests.faults.job FOLDER WHAT [STEP [RANK]]

WHAT goes wrong on RANK in STEP (from 0): kill-forward, kill-backward, kill-save, stall, stop, nan, full-disk; or nothing. Of "slow"
and "patient" every step takes a second more, so that something can be done to it from outside; "patient" and "calm" wait
longer for others.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist

import ds_cp
from ds_cp import selftest
from ds_cp.models import attach
from tests.dist.jobs import rows

STEPS = 8
EVERY = 2
TIMEOUT_S = 10
WAITS_S = {"patient": 120, "calm": 120}
MEET_S = 180


def main(folder: Path, what: str, step: int = 3, at: int = 1) -> None:
    torch.set_num_threads(1)
    met = meet()  # held: the process group is made in its server
    model = selftest.tiny_model("llama")
    timeout_s = WAITS_S.get(what, TIMEOUT_S)
    block = {"size": "auto", "ring_size": "auto", "ulysses_size": 1, "comm_timeout_s": timeout_s, "attention_kernel": "reference"}
    config = selftest.ds_config(2, block)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    engine, *_ = ds_cp.initialize(model=model, optimizer=optimizer, config=config)
    watch = attach.handle_of(engine).watch
    watch._silent_s, watch._grace_s = timeout_s, 4.0  # a test's patience
    engine.load_checkpoint(folder)
    data = rows(STEPS, 32)
    while engine.global_steps < STEPS:
        here = engine.global_steps == step and dist.get_rank() == at
        wrong = arm(engine.module, what, data[engine.global_steps]) if here else None
        time.sleep(1.0 if what in ("slow", "patient") else 0)
        loss = engine(**data[engine.global_steps]).loss
        engine.backward(loss)
        engine.step()
        if wrong is not None:
            wrong.remove()
        if dist.get_rank() == 0:
            print(f"loss {engine.global_steps} {float(loss.detach()):.9f}", flush=True)
        if engine.global_steps % EVERY == 0:
            save(engine, folder, what if here or (engine.global_steps == step + 1 and dist.get_rank() == at) else "")
        if ds_cp.should_stop(engine):
            save(engine, folder, "")
            break
    watch.end()
    del met
    dist.destroy_process_group()


def meet() -> dist.Store:
    """Waits until every rank has its imports done, which beside other work take longer than the timeouts of this job."""
    server, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    world, first = int(os.environ["WORLD_SIZE"]), os.environ["RANK"] == "0"
    return dist.TCPStore(server, port, world, first, timedelta(seconds=MEET_S), multi_tenant=True)


def arm(model: torch.nn.Module, what: str, batch: dict[str, Any]) -> Any:
    attention = model.model.layers[1].self_attn
    if what == "kill-forward":
        return attention.register_forward_pre_hook(lambda *_: die())
    if what == "kill-backward":
        return attention.o_proj.register_full_backward_hook(lambda *_: die())
    if what == "stall":
        return attention.register_forward_pre_hook(lambda *_: time.sleep(600))
    if what == "stop":
        return attention.register_forward_pre_hook(lambda *_: os.kill(os.getpid(), signal.SIGSTOP))
    if what == "nan":
        return model.lm_head.register_forward_hook(lambda module, given, out: out * float("nan"))
    if what == "term":
        return attention.register_forward_pre_hook(lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    return None


def save(engine: deepspeed.DeepSpeedEngine, folder: Path, what: str) -> None:
    if what == "kill-save":
        torch.save = lambda *_, **__: die()
    if what == "full-disk":
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
    ds_cp.save_checkpoint(engine, folder)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    folder, what, *numbers = sys.argv[1:]
    main(Path(folder), what, *map(int, numbers))
