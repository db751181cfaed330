"""Runs whose figures are looked at."""

from __future__ import annotations

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
