"""The loader of the raw API: rows by sequence group, and the target count of a whole optimizer step in every batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sized
from itertools import islice
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from ds_cp import comm
from ds_cp.batch import count_targets
from ds_cp.mesh import Mesh


class StepLoader:
    """Draws the micro-batches of one optimizer step, counts their targets over all replicas once, and yields them.

    Every batch (a dict) gets `num_items_in_batch`, the 0-d fp64 number of targets of the global batch, which makes the loss
    exact over unequal micro-batches. All ranks of a sequence group get the same rows. An incomplete last step of an epoch is
    dropped, so every replica takes the same number of steps.
    """

    def __init__(
        self,
        dataset: Dataset,
        batch_size: int,
        collate_fn: Callable[[list[Any]], dict[str, Any]] | None,
        mesh: Mesh,
        steps: Callable[[], int],
        device: torch.device,
        count: bool,
    ) -> None:
        self.dataset = dataset
        self.sampler = _sampler(dataset, mesh)
        self.loader = DataLoader(dataset, batch_size=batch_size, sampler=self.sampler, collate_fn=collate_fn, drop_last=True)
        self._mesh, self._steps, self._device, self._count = mesh, steps, device, count
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """The epoch whose order the next iteration draws; without a call they follow one another."""
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self.loader) // self._steps() * self._steps()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        if self.sampler is not None:
            self.sampler.set_epoch(self._epoch)
        self._epoch += 1
        batches = iter(self.loader)
        while len(step := list(islice(batches, self._steps()))) == self._steps():
            yield from self._counted(step)

    def _counted(self, step: list[dict[str, Any]]) -> list[dict[str, Any]]:
        if not self._count or not all("labels" in batch or "shift_labels" in batch for batch in step):
            return step
        local = torch.stack([count_targets(batch).cpu() for batch in step]).sum().to(self._device)
        total = comm.all_sum(local, self._mesh.data.group)
        return [{**batch, "num_items_in_batch": total} for batch in step]


def _sampler(dataset: Dataset, mesh: Mesh) -> DistributedSampler | None:
    if not isinstance(dataset, Sized):
        raise ValueError("training_data: an IterableDataset is not in this version; pass a dataset with a length")
    return DistributedSampler(dataset, num_replicas=mesh.data.size, rank=mesh.data.rank, shuffle=True, drop_last=True)
