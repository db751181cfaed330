"""Ranks that differ on purpose; each job must be refused on every rank, and ends."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from transformers import CONFIG_MAPPING, BartForCausalLM

from ds_cp import agreement, balance, engine, selftest
from ds_cp.models.twin import twin
from tests.dist import trainer_jobs
from tests.dist.jobs import rows, started


def disagree() -> None:
    """Ranks with the same kernel, then with two."""
    agreement.agree({"attention_kernel": "kernel"}, "")
    agreement.agree({"attention_kernel": f"kernel {dist.get_rank()}"}, "Name one")


def initialize(own: Mapping[int, Mapping[str, Any]], block: dict[str, Any]) -> None:
    """`own[rank]` are the keywords of `started` in which that rank differs."""
    started(**{"block": block, **own.get(dist.get_rank(), {})})


def given(own: Mapping[int, str], block: dict[str, Any]) -> None:
    """`own[rank]` names what a rank passes in the place of its model."""
    model = selftest.tiny_model("llama")
    others = {"nothing": None, "a path": "my_model", "a module of torch": torch.nn.Linear(2, 2), "compiled": torch.compile(model)}
    engine.initialize(model=others.get(own.get(dist.get_rank(), ""), model), config=selftest.ds_config(1, block))


def missing_file(block: dict[str, Any]) -> None:
    config = "not/there.json" if dist.get_rank() == 1 else {"sequence_parallel": block}
    engine.initialize(config=config)


def another_version(block: dict[str, Any]) -> None:
    with other("transformers"):
        started(block)


@contextmanager
def other(package: str) -> Iterator[None]:
    """As if another version of the package were installed on the last rank's host."""
    installed = agreement._version
    if dist.get_rank() == dist.get_world_size() - 1:
        agreement._version = lambda name: "0.0.1" if name == package else installed(name)
    try:
        yield
    finally:
        agreement._version = installed


def positions(of_replicas: list[torch.Tensor | None], block: dict[str, Any]) -> None:
    """A row with each replica's position_ids, to a model that counts them by itself."""
    model = twin(BartForCausalLM, CONFIG_MAPPING["bart"]())
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    model, *_ = engine.initialize(model=model, optimizer=optimizer, config=selftest.ds_config(1, block))
    own = of_replicas[engine.data_parallel_rank(model)]
    with torch.no_grad():
        model(**rows(1, 20, vocab=16)[0])
    model(**rows(1, 20, vocab=16)[0], position_ids=own)


def another_plan(block: dict[str, Any]) -> None:
    """As if rank 1 had a ds_cp in which chunks were dealt out otherwise."""
    model, _ = started(block)
    dealt = balance.longest_first
    if dist.get_rank() == 1:
        balance.longest_first = lambda cost, ring: dealt(cost, ring)[::-1]
    try:
        model(**rows(1, 40)[0])
    finally:
        balance.longest_first = dealt


def train(folder: str, block: dict[str, Any], own: Mapping[int, Mapping[str, Any]]) -> None:
    trainer_jobs.train(folder, **{"block": block, **own.get(dist.get_rank(), {})})
