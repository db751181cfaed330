"""All ranks of a sequence group must get the same row: compared in every forward pass by a hash of what the batch holds.

On CPU ranks that differ are refused at once. On CUDA reading the answer would wait for all the work that the GPU was given, so the
first pass waits, and every later one is refused in the pass after it: a wrong row has been trained on by then, and the run ends.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor

from ds_cp import comm
from ds_cp.batch import SequenceContext
from ds_cp.late import Late
from ds_cp.mesh import Mesh


class SameRow:
    """The comparison of one model's batches."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh
        self._first = True
        self._waiting: tuple[Tensor, Late] | None = None

    def check(self, given: dict[str, Any], device: torch.device, keep: bool = False) -> None:
        """Raises on every rank of a group whose ranks hold different rows; every rank of it must call it.

        Args: keep: whether this rank's ring keeps what it receives, which goes by the model's checkpointing.

        Raises:
            ValueError: they differ, in this pass or, on CUDA, in the one before.
        """
        if self._mesh.seq.size == 1:
            return
        if self._waiting is not None:
            everyone, same = self._waiting
            self._refuse(everyone, same.read(), " in the step before this one")
        everyone = self._everyone(given, device, keep)
        same = Late((everyone == everyone[0]).all())
        if self._first or device.type != "cuda":
            self._refuse(everyone, same.read(), "")
        else:
            self._waiting = everyone, same
        self._first = False

    def _everyone(self, given: dict[str, Any], device: torch.device, keep: bool) -> Tensor:
        """(hash, keep) of each rank of the group; of embeddings and the like, which are large, in the first pass only."""
        keys = [k for k, v in given.items() if isinstance(v, Tensor) and v.ndim > 0 and (self._first or not v.is_floating_point())]
        prints = [fingerprint(key, given[key]).to(device, non_blocking=True) for key in sorted(keys)]
        shapes = sum((i + 2) * n for key in sorted(given) if isinstance(given[key], Tensor) for i, n in enumerate(given[key].shape))
        total = torch.stack(prints).sum(0) if prints else torch.zeros(1, dtype=torch.int64, device=device)
        return comm.all_gather(torch.cat((total + shapes, torch.full_like(total, keep))), self._mesh.seq.group)

    def _refuse(self, everyone: Tensor, same: bool, when: str) -> None:
        if same:
            return
        rows, keeps = everyone.unbind(1)
        if (keeps != keeps[0]).any():
            raise ValueError(
                f"model: gradient checkpointing is on on some ranks of a sequence group{when} "
                f"({self._mesh.seq.ranks} have {keeps.bool().tolist()}); the ring sends otherwise then. Switch it on on all or none"
            )
        prints = zip(self._mesh.seq.ranks, rows.tolist(), strict=True)
        table = [f"rank {rank} {found & 0xFFFFFFFF:08x}" for rank, found in prints]
        raise ValueError(
            f"batch: the ranks of one sequence group got different rows{when} ({', '.join(table)}); give every rank of a group the "
            "same row: shard the data by ds_cp.data_parallel_rank(), not by the global rank"
        )


def check_plan(context: SequenceContext, device: torch.device) -> None:
    """Raises on every rank of a group whose ranks plan the same row differently; every rank of it must call it.

    Each computes the plan by itself, and a hop that one rank expects and another does not send never ends.

    Raises:
        ValueError: with what differs, on which ranks.
    """
    ring = context.plans[None]
    parts = {
        "documents": context.documents,
        "chunks to ranks": context.layout,
        "tokens held": context.held.layout,
        "hops": (ring.reach, ring.gathered, sorted(context.plans, key=str)),
    }
    mine = [int(hashlib.sha256(repr(part).encode()).hexdigest()[:15], 16) for part in parts.values()]
    everyone = comm.all_gather(torch.tensor(mine, device=device), context.mesh.seq.group).tolist()
    for name, column in zip(parts, zip(*everyone, strict=True), strict=True):
        if len(set(column)) > 1:
            table = [f"rank {rank} {found & 0xFFFFFFFF:08x}" for rank, found in zip(context.mesh.seq.ranks, column, strict=True)]
            raise ValueError(
                f"plan: the ranks of one sequence group have planned the same row differently: {name} ({', '.join(table)}); "
                "start every rank from the same ds_cp and the same Python"
            )


def fingerprint(key: str, x: Tensor) -> Tensor:
    """A hash of name, shape and contents, int64 [1], on x's device."""
    flat = x.detach().contiguous().view(-1).view(torch.uint8) if x.is_floating_point() else x.detach().flatten()
    flat = flat.to(torch.int64)
    weights = torch.arange(1, flat.numel() + 1, device=flat.device) * 0x9E3779B1 + sum(map(ord, key))
    return (((flat + 1) * weights).sum() * 31 + sum((i + 1) * n for i, n in enumerate(x.shape))).reshape(1)
