"""Topology to process groups: the one place that creates them."""

from __future__ import annotations

import atexit
import datetime
import gc
import math
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from operator import itemgetter

import torch.distributed as dist

from ds_cp.timing import Waits
from ds_cp.topology import AXES, Axis, Topology

LOCAL_SIZES = ("LOCAL_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE")


@dataclass(frozen=True)
class AxisGroup:
    """One axis as seen from this rank. `group` is None where the axis has one rank: nothing is ever sent there."""

    group: dist.ProcessGroup | None
    ranks: tuple[int, ...]
    rank: int
    waits: Waits = field(default_factory=Waits, compare=False, repr=False)
    """What this rank has waited for others, and computed of attention; one for all axes."""

    @property
    def size(self) -> int:
        return len(self.ranks)


@dataclass(frozen=True)
class Mesh:
    """The four axes of this rank. `seq` is ulysses x ring: the ranks that share a row."""

    topology: Topology
    ulysses: AxisGroup
    ring: AxisGroup
    seq: AxisGroup
    data: AxisGroup


def build(topology: Topology, timeout_s: int) -> Mesh:
    """Creates every group of every axis in one fixed order; all ranks of the job must call it.

    Args:
        timeout_s: seconds after which a collective of these groups fails.
    """
    assert dist.get_world_size() == topology.world, (dist.get_world_size(), topology)
    atexit.register(_end_gloo)
    waits = Waits(cuda="nccl" in dist.get_backend())
    axes = {axis: _axis(topology, axis, datetime.timedelta(seconds=timeout_s), waits) for axis in AXES}
    if axes["ring"].group is not None:  # NCCL wants all ranks of a group in its first call; a hop may have some of them only
        dist.barrier(group=axes["ring"].group)
    return Mesh(topology=topology, **axes)


def destroy(mesh: Mesh) -> None:
    """Frees the groups; all ranks of the job must call it. A gloo group keeps threads that wake a hundred times a second."""
    for axis in (mesh.ulysses, mesh.ring, mesh.seq, mesh.data):
        if axis.group is not None:
            dist.destroy_process_group(axis.group)


def _end_gloo() -> None:
    """Joins gloo's threads before the interpreter ends: one that then asks for the GIL aborts a run that had succeeded."""
    if dist.is_initialized() and dist.get_backend() == "gloo":
        dist.destroy_process_group()
    gc.collect()  # an engine in a reference cycle still holds groups, whose threads end with them


def local_world_size() -> int:
    """The largest number of neighbouring ranks that is sure to stay inside a node; all ranks of the job must call it.

    From the ranks' host names, because DeepSpeed's launcher sets no LOCAL_WORLD_SIZE, and from that variable (or mpirun's) where
    it is set. Nodes of different size count with their greatest common divisor, so that every rank comes to the same answer;
    ranks dealt out to nodes by turns have no neighbours.
    """
    mine = next((int(os.environ[name]) for name in LOCAL_SIZES if name in os.environ), 1)
    mine = 0 if mine == 1 else mine  # what accelerate writes there on CPU, however many there are
    everyone: list[tuple[str, int]] = [("", 0)] * dist.get_world_size()
    dist.all_gather_object(everyone, (socket.gethostname(), mine))
    return neighbours(everyone)


def neighbours(ranks: Sequence[tuple[str, int]]) -> int:
    """Ranks next to each other on one host, from every rank's (host name, what its launcher says or 0)."""
    runs = [len(list(run)) for _, run in groupby(ranks, key=itemgetter(0))]
    return math.gcd(*runs, *(said for _, said in ranks))


def _axis(topology: Topology, axis: Axis, timeout: datetime.timedelta, waits: Waits) -> AxisGroup:
    mine = dist.get_rank()
    found: AxisGroup | None = None
    for ranks in topology.groups(axis):
        group = dist.new_group(ranks, timeout=timeout, group_desc=f"ds_cp:{axis}") if len(ranks) > 1 else None
        if mine in ranks:
            found = AxisGroup(group=group, ranks=tuple(ranks), rank=ranks.index(mine), waits=waits)
    assert found is not None
    return found
