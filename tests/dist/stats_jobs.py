"""Runs whose figures are looked at."""

from __future__ import annotations

import gzip
import json
import time
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch

import ds_cp
from ds_cp import selftest


def measured(block: dict[str, Any], steps: list[list[dict[str, Any]]], folder: str) -> list[dict[str, float]]:
    """`ds_cp.stats` after each step of the given micro-batches; DeepSpeed's CSV monitor writes into `folder`."""
    model = selftest.tiny_model("llama")
    config = selftest.ds_config(1, block, len(steps[0]))
    config |= {"csv_monitor": {"enabled": True, "output_path": folder, "job_name": "run"}, "steps_per_print": 10**6}
    engine, *_ = ds_cp.initialize(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=1e-2), config=config)
    found = []
    for step in steps:
        for batch in step:
            engine.backward(engine(**batch).loss)
            engine.step()
        found.append(ds_cp.stats(engine))
        engine.eval()
        engine(**step[0])
        engine.train()
    selftest.finish(engine)
    return found


def uneven(block: dict[str, Any], batch: dict[str, Any], late_s: float) -> dict[str, float]:
    """`ds_cp.stats` of a run whose rank 1 takes so much longer for each tile of attention."""
    model = selftest.tiny_model("llama")
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    engine, *_ = ds_cp.initialize(model=model, optimizer=optimizer, config=selftest.ds_config(1, block))
    handle = selftest.engines.attach.handle_of(engine)
    kernel = handle.methods.attention

    def late(call: Callable[..., Any]) -> Callable[..., Any]:
        def once(*args: Any) -> Any:
            time.sleep(late_s)
            return call(*args)

        return once

    if torch.distributed.get_rank() == 1:
        given = {"unsupported": kernel.unsupported, "forward": late(kernel.forward), "backward": late(kernel.backward)}
        handle.methods = replace(handle.methods, attention=SimpleNamespace(**given))
    for _ in range(3):
        engine.backward(engine(**batch).loss)
        engine.step()
        found = ds_cp.stats(engine)
    selftest.finish(engine)
    return found


def profiled(block: dict[str, Any], batch: dict[str, Any], kind: str, steps: int) -> list[str]:
    """So many steps, an evaluation after each; names of the ranges of this package in this rank's trace."""
    model = selftest.tiny_model(kind)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    engine, *_ = ds_cp.initialize(model=model, optimizer=optimizer, config=selftest.ds_config(1, block))
    for _ in range(steps):
        engine.backward(engine(**batch).loss)
        engine.step()
        engine.eval()
        engine(**batch)
        engine.train()
    written = selftest.engines.attach.handle_of(engine).profile.written
    selftest.finish(engine)
    assert written is not None
    assert f"rank{torch.distributed.get_rank()}of" in written.name
    with gzip.open(written, "rt") as file:
        events = json.load(file)["traceEvents"]
    return [event["name"] for event in events if event.get("name", "").startswith(("ds_cp", "ProfilerStep"))]
