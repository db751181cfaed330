"""The loader of the raw API: rows by sequence group, and the target count of a whole optimizer step in every batch."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sized
from dataclasses import dataclass
from itertools import islice
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

from ds_cp import comm
from ds_cp.batch import count_targets
from ds_cp.deal import TARGETS, Deal, Drawn, Keys, Making, Rows, Stream
from ds_cp.mesh import AxisGroup
from ds_cp.models import attach


@dataclass(frozen=True)
class Reading:
    """How rows are read."""

    batch_size: int
    making: Making
    shuffle: bool = True
    seed: int = 0
    workers: int = 0
    drop_last: bool = False


@dataclass(frozen=True)
class Step:
    """What a step is."""

    accumulation: Callable[[], int]
    count: bool
    """Whether batches get `num_items_in_batch`."""
    fill: bool
    """Whether a row without targets changes nothing."""


def data_loader(
    engine: nn.Module,
    dataset: Dataset,
    collate_fn: Callable[[list[Any]], dict[str, Any]] | None = None,
    *,
    batch_size: int | None = None,
    shuffle: bool = True,
    seed: int = 0,
    num_workers: int = 0,
    drop_last: bool = False,
) -> StepLoader:
    """The loader that `ds_cp.initialize` makes of its `training_data`, with more to say.

    Args:
        engine: from `ds_cp.initialize`, also one of size 1, whose batches are not counted.
        dataset: one with a length, or an IterableDataset, which every rank reads whole, in its own order.
        collate_fn: a list of rows to a batch; PyTorch's own where none is given.
        batch_size: rows of a micro-batch; `train_micro_batch_size_per_gpu` of the config where none is given.
        num_workers: processes that read and collate ahead; at most one for an IterableDataset.
        drop_last: leave out the last step of an epoch where it has fewer rows.

    Raises:
        ValueError: the dataset is of neither kind or empty, or has more workers than it may.
    """
    handle, run = attach.handle_of(engine), cast(Any, engine)  # DeepSpeed has no types
    if handle is None:
        ranks = tuple(range(dist.get_world_size()))
        data, reduction = AxisGroup(dist.group.WORLD, ranks, dist.get_rank()), "mean"
    else:
        data, reduction = handle.mesh.data, handle.loss.reduction
    reading = Reading(
        batch_size=batch_size or run.train_micro_batch_size_per_gpu(),
        making=Making(collate_fn or default_collate),
        shuffle=shuffle,
        seed=seed,
        workers=num_workers,
        drop_last=drop_last,
    )
    step = Step(run.gradient_accumulation_steps, count=reduction in ("auto", "token_mean"), fill=reduction != "mean")
    return StepLoader(dataset, reading, data, step, torch.device(run.device))


class StepLoader:
    """Draws the micro-batches of one optimizer step, counts their targets over all replicas once, and yields them.

    Every batch (a dict) gets `num_items_in_batch`, the 0-d fp64 number of targets of the global batch, which makes the loss
    exact over unequal micro-batches. All ranks of a sequence group get the same rows. The last step of an epoch may have fewer
    rows; micro-batches that no row is left for are filled with rows without targets, so that every replica takes the same number
    of steps. Where those would change the loss (`mean`, no labels) such a step is left out, with a warning.

    `state_dict()` says which row comes next; with `load_state_dict` of it a loader goes on there, also with another number of
    replicas, rows a batch or accumulation steps. Micro-batches of a step that has not ended come again.
    """

    def __init__(self, dataset: Dataset, reading: Reading, data: AxisGroup, step: Step, device: torch.device) -> None:
        self.dataset = dataset
        self._reading, self._data, self._step, self._device = reading, data, step, device
        self._next = (0, 0)  # epoch and row that the next iteration begins with
        self._at = (0, 0)  # where this one is
        self._streams = isinstance(dataset, IterableDataset)
        _check(dataset, reading, self._streams)

    @property
    def epoch(self) -> int:
        """The epoch that the next iteration draws."""
        return self._next[0]

    def set_epoch(self, epoch: int) -> None:
        """The epoch whose order the next iteration draws; without a call they follow one another."""
        if epoch != self._next[0]:  # else a state that was loaded holds
            self._next = (epoch, 0)

    def state_dict(self) -> dict[str, int | bool | None]:
        """For `engine.save_checkpoint(folder, client_state={"loader": loader.state_dict()})`; the same on every rank."""
        epoch, row = self._at
        return {"epoch": epoch, "row": row, **self._order()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The next iteration goes on where the state was taken.

        Raises:
            ValueError: the state is of other data or of another order.
        """
        mine = self._order()
        other = {key: state.get(key) for key, value in mine.items() if state.get(key) != value}
        if other:
            here = {key: mine[key] for key in other}
            raise ValueError(f"loader state: it was taken with {other}, this loader has {here}; make them the same")
        self._next = self._at = (int(state["epoch"]), int(state["row"]))

    def __len__(self) -> int:
        deal, rows = self._deal(), len(cast(Sized, self.dataset))
        rest = rows % deal.rows
        last = rest and not self._reading.drop_last and (self._step.fill or not deal.lacks(rest))
        return (rows // deal.rows + bool(last)) * deal.accumulation

    def __iter__(self) -> Iterator[dict[str, Any]]:
        epoch, row = self._at = self._next
        self._next = (epoch + 1, 0)
        deal = self._deal()
        batches = iter(self._loader(deal, epoch, row))
        while True:
            step: list[Drawn] = list(islice(batches, deal.accumulation))
            rows = step[0].rows if step else 0
            if self._streams:
                _agree(rows, self._device)
            if not rows or self._leaves_out(deal, step, rows):
                return
            counted = self._counted([drawn.batch for drawn in step])
            yield from counted[:-1]
            self._at = (epoch, self._at[1] + rows)  # before the last one: what is saved after the step's end goes on behind it
            yield counted[-1]

    def _deal(self) -> Deal:
        return Deal(self._data.size, self._data.rank, self._reading.batch_size, self._step.accumulation())

    def _order(self) -> dict[str, int | bool | None]:
        length = len(self.dataset) if isinstance(self.dataset, Sized) else None
        return {"length": length, "shuffle": self._reading.shuffle and not self._streams, "seed": self._reading.seed}

    def _loader(self, deal: Deal, epoch: int, row: int) -> DataLoader:
        reading, workers = self._reading, self._reading.workers
        if self._streams:
            if hasattr(self.dataset, "set_epoch"):
                self.dataset.set_epoch(epoch)
            stream = Stream(cast(IterableDataset, self.dataset), reading.making, deal, row)
            return DataLoader(stream, batch_size=None, num_workers=workers, collate_fn=_as_it_is)
        keys = Keys(deal, len(cast(Sized, self.dataset)), reading.seed + epoch if reading.shuffle else None, row)
        rows = Rows(self.dataset, reading.making)
        return DataLoader(rows, batch_size=None, sampler=keys, num_workers=workers, collate_fn=_as_it_is)

    def _leaves_out(self, deal: Deal, step: list[Drawn], rows: int) -> bool:
        """Whether a step is incomplete and cannot be filled up."""
        if rows == deal.rows or (not self._reading.drop_last and not deal.lacks(rows)):
            return False
        labelled = all(any(key in drawn.batch for key in TARGETS) for drawn in step)
        if not self._reading.drop_last and self._step.fill and labelled:
            return False
        if not self._reading.drop_last and not (dist.is_initialized() and dist.get_rank()):
            why = "the loss is a mean over micro-batches" if labelled else "they have no labels"
            warnings.warn(
                f"loader: the last {rows} rows of an epoch are left out: they do not make a whole step of {deal.rows} rows, and "
                f"cannot be filled up because {why}; with loss_reduction token_mean none is left out",
                stacklevel=2,
            )
        return True

    def _counted(self, step: list[dict[str, Any]]) -> list[dict[str, Any]]:
        if not self._step.count or not all(any(key in batch for key in TARGETS) for batch in step):
            return step
        local = torch.stack([count_targets(batch).cpu() for batch in step]).sum().to(self._device)
        total = comm.all_sum(local, self._data.group)
        return [{**batch, "num_items_in_batch": total} for batch in step]


def _as_it_is(drawn: Any) -> Any:
    return drawn


def _check(dataset: Dataset, reading: Reading, streams: bool) -> None:
    if not streams and not isinstance(dataset, Sized):
        raise ValueError(f"training_data: a {type(dataset).__name__} has neither a length nor is it an IterableDataset")
    if not streams and not len(cast(Sized, dataset)):
        raise ValueError("training_data: the dataset has no rows")
    if streams and reading.workers > 1:
        raise ValueError(
            f"num_workers: got {reading.workers} for an IterableDataset, allowed 0 and 1: each worker would read the whole stream, "
            "and every row would come once a worker"
        )


def _agree(rows: int, device: torch.device) -> None:
    """Raises on every rank where the ranks' streams do not have the same rows left; all ranks of the job must call it."""
    mine = torch.tensor([rows, rows * rows], dtype=torch.float64, device=device)
    total = comm.all_sum(mine, dist.group.WORLD)
    if bool((total != mine * dist.get_world_size()).any()):
        raise ValueError(
            "training_data: the stream has ended on some ranks and not on others; every rank must read the same stream, which "
            "ds_cp deals out by itself"
        )
