"""Runs of the raw loop over a loader for the workers: whole epochs against one process, and runs that stop and go on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import IterableDataset

import ds_cp
from ds_cp import selftest
from ds_cp.batch import count_targets
from tests.dist.jobs import Rows, row_of, started

LR = 0.05


class RowStream(IterableDataset):
    """The rows of `Rows` in another order every epoch; `ends_early_on` is a rank whose stream is shorter."""

    def __init__(self, count: int, ends_early_on: int | None = None) -> None:
        self.rows, self.epoch = Rows(count), 0
        self.missing = 3 if ends_early_on == torch.distributed.get_rank() else 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        generator = torch.Generator().manual_seed(self.epoch)
        order = torch.randperm(len(self.rows), generator=generator).tolist()
        return iter(self.rows[i] for i in order[: len(order) - self.missing])


def data_of(kind: str, count: int) -> Any:
    return RowStream(count) if kind == "stream" else Rows(count)


def an_epoch_against_one_process(block: dict[str, Any], kind: str, count: int, batch_size: int = 1, accumulation: int = 2) -> Any:
    """(worst relative error of a weight after an epoch, largest change of it, rows of this replica by micro-batch)."""
    reduction = "sum" if block.get("loss_reduction") == "sum" else "token_mean"
    lr = LR / 50 if reduction == "sum" else LR
    engine, _ = started(block, accumulation, lr=lr)
    loader = ds_cp.data_loader(engine, data_of(kind, count), batch_size=batch_size)
    before, mine = selftest.full_parameters(engine.module), []
    for batch in loader:
        mine.append([row_of({k: v[i : i + 1] for k, v in batch.items() if v.ndim}) for i in range(len(batch["labels"]))])
        engine.backward(engine(**batch).loss)
        engine.step()
    after = selftest.full_parameters(engine.module)
    everyone: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, mine)
    selftest.finish(engine)
    alone, rows = selftest.tiny_model("llama"), Rows(count)
    for step in range(0, len(mine), accumulation):
        taken = {row for theirs in everyone for micro in theirs[step : step + accumulation] for row in micro if row >= 0}
        batches = [{key: value.unsqueeze(0) for key, value in rows[row].items()} for row in sorted(taken)]
        _, gradients = selftest.reference(alone, batches, reduction)
        with torch.no_grad():
            for name, parameter in alone.named_parameters():
                parameter -= lr * gradients[name]
    wanted = dict(alone.named_parameters())
    error = max(float((after[name] - x).abs().max() / x.abs().max()) for name, x in wanted.items())
    return error, max(float((after[name] - before[name]).abs().max()) for name in wanted), mine


def interrupted(
    block: dict[str, Any], kind: str, workers: int, folder: str, steps: int, stop: int | None = None, resume: bool = False
) -> list[tuple[int, float]]:
    """(row, loss) of every micro-batch of `steps` steps over epochs of 13 rows, from the start or from what a stopped run saved."""
    engine, _ = started(block, 2, stage=3, lr=LR)
    loader = ds_cp.data_loader(engine, data_of(kind, 13), num_workers=workers)
    if resume:
        _, client = engine.load_checkpoint(folder)
        loader.load_state_dict(client["loader"])
    seen: list[tuple[int, float]] = []
    while engine.global_steps < (steps if stop is None else stop):
        for batch in loader:
            loss = engine(**batch).loss
            seen.append((row_of(batch), float(loss.detach())))
            engine.backward(loss)
            engine.step()
            if engine.global_steps == (steps if stop is None else stop):
                break
    if stop is not None:
        engine.save_checkpoint(folder, client_state={"loader": loader.state_dict()})
    selftest.finish(engine)
    return seen


def streams_that_differ(block: dict[str, Any]) -> None:
    engine, _ = started(block, 2)
    for batch in ds_cp.data_loader(engine, RowStream(13, ends_early_on=1)):
        engine.backward(engine(**batch).loss)
        engine.step()


def without_sharding(count: int) -> tuple[list[int], bool]:
    """Size 1: rows are dealt in the same way, and nothing is counted."""
    engine, _ = started({"size": 1}, 2)
    batches = list(ds_cp.data_loader(engine, Rows(count)))
    engine.destroy()
    assert all(float(count_targets(batch)) > 0 for batch in batches)
    return [row_of(batch) for batch in batches], any("num_items_in_batch" in batch for batch in batches)
