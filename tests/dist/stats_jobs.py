"""Runs whose figures are looked at."""

from __future__ import annotations

import gzip
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import repeat
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils.data import IterableDataset
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedModel

import ds_cp
from ds_cp import models, selftest
from ds_cp.models.twin import twin


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


class Again(IterableDataset):
    """One row, so many times."""

    def __init__(self, batch: dict[str, Any], times: int) -> None:
        self.row, self.times = {key: value[0] for key, value in batch.items()}, times

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return repeat(self.row, self.times)


def profiled(
    block: dict[str, Any],
    batch: dict[str, Any],
    kind: str,
    steps: int = 3,
    stream: bool = False,
    values: bool = False,
    evaluations: bool = False,
) -> list[str]:
    """Names of the ranges of this package in this rank's trace.

    Args: stream: the row comes from one. values: the loss is of log-probabilities of tokens. evaluations: one after each step.
    """
    listed = any(kind in family.MODEL_TYPES for family in models.families())
    model = selftest.tiny_model(kind) if listed else of_no_family(kind)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    data = {"training_data": Again(batch, steps)} if stream else {}
    engine, _, loader, _ = ds_cp.initialize(model=model, optimizer=optimizer, config=selftest.ds_config(1, block), **data)
    for given in loader if stream else repeat(batch, steps):
        loss = -ds_cp.token_logprobs(engine, **given).mean() if values else engine(**given).loss
        engine.backward(loss)
        engine.step()
        ds_cp.stats(engine)
        if evaluations:
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


def of_no_family(kind: str) -> PreTrainedModel:
    config = CONFIG_MAPPING[kind]()
    return twin(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)], config)
