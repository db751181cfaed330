"""All ranks of a ring in one process: NCCL puts no two ranks on one GPU, so each rank is a thread and a hop is a queue. One thread
runs at a time and hands over where it waits: compilers of kernels are not made for several.

What runs is `ds_cp.ring.RingAttention` itself, forward and backward, called directly: autograd has one thread per device, in
which ranks that wait for each other would block.
"""

from __future__ import annotations

import queue
import threading
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ds_cp import comm, layout, tiles
from ds_cp.kernels.attention import Score
from ds_cp.ring import RingAttention
from ds_cp.timing import RING, Waits, timed

TIMEOUT_S = 60


class LocalRing:
    """Stands where the ring's process group stands; one queue per sender, receiver and kind of hop."""

    def __init__(self, size: int) -> None:
        self.queues: dict[tuple[int, int, str], queue.Queue] = defaultdict(queue.Queue)
        self.rank_here = threading.local()
        self.turn = threading.Lock()
        self._board: dict[tuple[str, int], Sequence[Tensor]] = {}
        self._posted, self._read = threading.Barrier(size), threading.Barrier(size)

    def swap(self, what: str, x: Sequence[Tensor]) -> list[Sequence[Tensor]]:
        """Everybody's tensors, in rank order."""
        self._board[what, self.rank_here.value] = x
        with self.others():
            self._posted.wait(TIMEOUT_S)
        everyone = [self._board[what, rank] for rank in range(self._posted.parties)]
        with self.others():
            self._read.wait(TIMEOUT_S)
        return everyone

    @contextmanager
    def others(self) -> Iterator[None]:
        """The other ranks' turn, while this one waits."""
        self.turn.release()
        try:
            yield
        finally:
            self.turn.acquire()


class LocalGather:
    """`comm.Gather` between threads."""

    def __init__(self, sent: Sequence[Tensor], received: Sequence[Tensor], axis: Any) -> None:
        self._received, self._theirs = received, axis.group.swap("gather", sent)

    def wait(self) -> None:
        for part, into in enumerate(self._received):
            into.copy_(torch.stack([theirs[part] for theirs in self._theirs]))


def local_reduce_scatter(parts: Sequence[Tensor], axis: Any) -> list[Tensor]:
    """`comm.reduce_scatter` between threads."""
    everyone = axis.group.swap("reduce", parts)
    return [torch.stack([theirs[part][axis.rank] for theirs in everyone]).sum(0) for part in range(len(parts))]


Sends = Sequence[tuple[Tensor, int]]


class LocalHop:
    """`comm.Hop` between threads."""

    def __init__(self, sent: Sends, received: Sends, axis: Any, what: str) -> None:
        group, rank = axis.group, axis.rank
        for x, peer in sent:
            assert x.is_contiguous()
            copy = x.clone()
            ready = torch.cuda.current_stream().record_event() if x.is_cuda else None
            group.queues[rank, peer, what].put((copy, ready))
        self._received = [(x, group.queues[peer, rank, what]) for x, peer in received]
        self._group, self._waits = group, axis.waits

    def wait(self, streams: Sequence[torch.cuda.Stream] = ()) -> None:
        with timed("hop", self._waits, RING, streams):
            for x, arriving in self._received:
                with self._group.others():
                    theirs, ready = arriving.get(timeout=TIMEOUT_S)
                if ready is not None:  # it was made on another stream
                    torch.cuda.current_stream().wait_event(ready)
                    theirs.record_stream(torch.cuda.current_stream())
                x.copy_(theirs)


def ring(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    documents: Sequence[int],
    size: int,
    kernel: ModuleType,
    score: Score,
    monkeypatch: Any,
    gathered: bool = False,
    plan: layout.Layout | None = None,
    window: int | None = None,
    sink: Tensor | None = None,
    lanes: bool = False,
    kept: bool = False,
) -> dict[str, Tensor]:
    """out, dq, dk, dv of the whole row, [S, heads, H], computed by `size` ring ranks, on zigzag chunks if no layout is given."""
    monkeypatch.setattr(comm, "Hop", LocalHop)
    monkeypatch.setattr(comm, "Gather", LocalGather)
    monkeypatch.setattr(comm, "reduce_scatter", local_reduce_scatter)
    plan = plan or layout.build("zigzag", q.shape[0], size, 1)
    assert plan.length == q.shape[0], "rows here have a legal length"
    group, ranks = LocalRing(size), tuple(range(size))
    index = [torch.cat([torch.arange(a, b) for a, b in plan.ring_ranges(r)]).to(q.device) for r in ranks]

    def one(rank: int) -> tuple[Tensor, ...]:
        ctx = SimpleNamespace(save_for_backward=lambda *saved: setattr(ctx, "saved_tensors", saved))
        group.rank_here.value = rank
        mesh = SimpleNamespace(ring=SimpleNamespace(group=group, ranks=ranks, rank=rank, size=size, waits=Waits()))
        if window is None:
            found = (tiles.plan_gathered if gathered else tiles.plan)(plan, rank, documents)
        else:
            found = tiles.plan_window(plan, rank, documents, window)
        found = replace(found, kept=kept)
        beside = torch.cuda.Stream() if lanes else None  # its own: what a rank frees, another must not be given
        methods = SimpleNamespace(attention=kernel, beside=beside)
        context = SimpleNamespace(methods=methods, layout=plan, mesh=mesh)
        with group.turn:
            out = RingAttention.forward(ctx, *(x[index[rank]] for x in (q, k, v)), sink, context, found, score)
            if kept:  # a graph that is kept (retain_graph) has a second backward
                RingAttention.backward(ctx, torch.ones_like(out))
            return out, *RingAttention.backward(ctx, dout[index[rank]])[:4]

    with ThreadPoolExecutor(size) as threads, torch.no_grad():
        parts = list(threads.map(one, ranks))
    whole = {}
    for position, name in enumerate(("out", "dq", "dk", "dv")):
        gathered = torch.cat([part[position] for part in parts])
        whole[name] = torch.empty_like(gathered).index_copy_(0, torch.cat(index), gathered)
    if sink is not None:
        whole["dsink"] = sum(part[4] for part in parts)
    return whole
