"""All ranks of a ring in one process: NCCL puts no two ranks on one GPU, so each rank is a thread and a hop is a queue.

What runs is `ds_cp.attention.RingAttention` itself, forward and backward, called directly: autograd has one thread per device, in
which ranks that wait for each other would block.
"""

from __future__ import annotations

import queue
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ds_cp import comm, layout, tiles
from ds_cp.attention import RingAttention

TIMEOUT_S = 60


class LocalRing:
    """Stands where the ring's process group stands; one queue per receiving rank and kind of hop."""

    def __init__(self, size: int) -> None:
        self.queues = {(rank, what): queue.Queue() for rank in range(size) for what in ("key/value", "gradient")}


class LocalHop:
    """`comm.Hop` between threads."""

    def __init__(self, x: Tensor, group: LocalRing, ranks: Sequence[int], rank: int, what: str) -> None:
        assert x.is_contiguous()
        group.queues[(rank + 1) % len(ranks), what].put(x.clone())
        self._mine = group.queues[rank, what]

    def wait(self) -> Tensor:
        return self._mine.get(timeout=TIMEOUT_S)


def ring(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    documents: Sequence[int],
    size: int,
    kernel: ModuleType,
    scale: float,
    monkeypatch: Any,
) -> dict[str, Tensor]:
    """out, dq, dk, dv of the whole row, [S, heads, H], computed by `size` ring ranks on zigzag chunks."""
    monkeypatch.setattr(comm, "Hop", LocalHop)
    plan = layout.build("zigzag", q.shape[0], size, 1)
    assert plan.length == q.shape[0], "rows here have a legal length"
    group, ranks = LocalRing(size), tuple(range(size))
    index = [torch.cat([torch.arange(a, b) for a, b in plan.ring_ranges(r)]).to(q.device) for r in ranks]

    def one(rank: int) -> tuple[Tensor, ...]:
        ctx = SimpleNamespace(save_for_backward=lambda *saved: setattr(ctx, "saved_tensors", saved))
        axis = SimpleNamespace(group=group, ranks=ranks, rank=rank)
        context = SimpleNamespace(kernel=kernel, tiles=tiles.plan(plan, rank, documents), mesh=SimpleNamespace(ring=axis))
        out = RingAttention.forward(ctx, *(x[index[rank]] for x in (q, k, v)), context, scale)
        return out, *RingAttention.backward(ctx, dout[index[rank]])[:3]

    with ThreadPoolExecutor(size) as threads, torch.no_grad():
        parts = list(threads.map(one, ranks))
    whole = {}
    for position, name in enumerate(("out", "dq", "dk", "dv")):
        gathered = torch.cat([part[position] for part in parts])
        whole[name] = torch.empty_like(gathered).index_copy_(0, torch.cat(index), gathered)
    return whole
