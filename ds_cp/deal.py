"""Which rows make which micro-batch of which replica, and reading them.

A step takes the next A * D * B rows of the data's order: A accumulation steps, D replicas, B rows a micro-batch. Row j of a step is
in micro-batch j // (D * B) of replica j % D. The order depends on seed and epoch alone, so a run that goes on with other numbers
of replicas goes on with the next row.

The last step of an epoch may have fewer rows. A replica that has none left for a micro-batch computes a row of that step without
its labels: no row comes twice, none is missing, and all replicas take the same number of micro-steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice
from typing import Any, NamedTuple

import torch
from torch.utils.data import Dataset, IterableDataset, Sampler

from ds_cp.batch import IGNORE

TARGETS = ("labels", "shift_labels")


@dataclass(frozen=True)
class Deal:
    """What one replica gets of every step."""

    replicas: int
    replica: int
    batch_size: int
    accumulation: int

    @property
    def rows(self) -> int:
        """Of a whole step."""
        return self.accumulation * self.replicas * self.batch_size

    def micro_batches(self, rows: int) -> list[range]:
        """The own rows of each micro-batch in a step of `rows` rows."""
        each = self.replicas * self.batch_size
        return [range(m * each + self.replica, min((m + 1) * each, rows), self.replicas) for m in range(self.accumulation)]

    def lacks(self, rows: int) -> bool:
        """Whether any replica has no row for one of its micro-batches."""
        return rows < self.rows - (self.batch_size - 1) * self.replicas


class Drawn(NamedTuple):
    """One micro-batch."""

    batch: dict[str, Any]
    rows: int
    """Of its step, over all replicas."""


class Key(NamedTuple):
    """What a worker is asked for: the rows of a micro-batch, without targets where it only fills up, and the rows of its step."""

    indices: list[int]
    filler: bool
    rows: int


@dataclass(frozen=True)
class Making:
    """How rows become a batch, in the process that reads them."""

    collate: Callable[[list[Any]], dict[str, Any]]

    def __call__(self, rows: list[Any], filler: bool) -> dict[str, Any]:
        batch = self.collate(rows)
        if not filler:
            return batch
        return {k: torch.full_like(v, IGNORE) if k in TARGETS and v is not None else v for k, v in batch.items()}


class Keys(Sampler[Key]):
    """The micro-batches of one replica, for a dataset of `length` rows, from row `first` of the epoch's order on."""

    def __init__(self, deal: Deal, length: int, seed: int | None, first: int = 0) -> None:
        """Args: seed: of the order; None keeps that of the dataset."""
        self._deal, self._length, self._seed, self._first = deal, length, seed, first

    def __iter__(self) -> Iterator[Key]:
        order: Sequence[int] = range(self._length)
        if self._seed is not None:
            order = torch.randperm(self._length, generator=torch.Generator().manual_seed(self._seed)).tolist()
        for start in range(self._first, self._length, self._deal.rows):
            step = order[start : start + self._deal.rows]
            for mine in self._deal.micro_batches(len(step)):
                yield Key([step[j] for j in mine] or [step[0]], not mine, len(step))


class Rows(Dataset):
    """Micro-batches of a dataset with a length, by `Key`."""

    def __init__(self, dataset: Any, making: Making) -> None:
        self._dataset, self._making = dataset, making

    def __getitem__(self, key: Key) -> Drawn:
        many = getattr(self._dataset, "__getitems__", None)
        rows = many(key.indices) if many else [self._dataset[i] for i in key.indices]
        return Drawn(self._making(rows, key.filler), key.rows)


class Stream(IterableDataset):
    """The same of a stream, which every replica reads whole; holds the own rows of one step at a time."""

    def __init__(self, dataset: IterableDataset, making: Making, deal: Deal, first: int = 0) -> None:
        self._dataset, self._making, self._deal, self._first = dataset, making, deal, first

    def __iter__(self) -> Iterator[Drawn]:
        deal, rows = self._deal, iter(self._dataset)
        next(islice(rows, self._first, self._first), None)  # drops the first ones
        while True:
            kept, found = {}, 0
            for found, row in enumerate(islice(rows, deal.rows), start=1):
                number = found - 1
                if number == 0 or number % deal.replicas == deal.replica:
                    kept[number] = row
            if not found:
                return
            for mine in deal.micro_batches(found):
                yield Drawn(self._making([kept[j] for j in mine] or [kept[0]], not mine), found)


class Passes(IterableDataset):
    """A stream read again and again, with `set_epoch` before every pass where it has one; a step may lie in two passes."""

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset

    def __iter__(self) -> Iterator[Any]:
        for epoch in count():
            if hasattr(self._dataset, "set_epoch"):
                self._dataset.set_epoch(epoch)
            row = None
            for row in self._dataset:
                yield row
            if row is None:
                raise ValueError(f"train_dataset: a pass over the {type(self._dataset).__name__} gave no row")
