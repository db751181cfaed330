"""Communication, differentiable where a gradient passes. Groups and dims only; nothing here knows attention.

In the docstrings `w` is the group's size, `i`, `j` are ranks of it, `x_i` is the argument on rank i, `y_i` the result, and
`g_i = dL/dy_i` what backward receives. Every rank of the group must call each function, in the same order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from ds_cp.timing import EXCHANGE, RING, Waits, timed

if TYPE_CHECKING:
    from ds_cp.mesh import AxisGroup


def all_to_all(x: Tensor, axis: AxisGroup) -> Tensor:
    """Exchanges equal parts of dim 0: part j of rank i becomes part i of rank j.

    Shards: `x_i` is [w, ...] with `x_i[j]` meant for rank j.
    Forward: `y_j[i] = x_i[j]`.  Backward: `dx_i[j] = g_j[i]`, the same exchange (its own inverse).
    """
    return x if axis.group is None else _AllToAll.apply(x, axis)


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, axis: AxisGroup) -> Tensor:
        ctx.axis = axis
        return _exchange(x, axis)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _exchange(grad, ctx.axis), None


def _exchange(x: Tensor, axis: AxisGroup) -> Tensor:
    assert axis.group is not None, "nothing is sent where there is one rank"
    x = x.contiguous()
    out = torch.empty_like(x)
    with _named("all-to-all", axis.group, axis.waits):
        dist.all_to_all_single(out, x, group=axis.group)
    return out


@contextmanager
def _named(what: str, group: dist.ProcessGroup, waits: Waits | None = None) -> Iterator[None]:
    """An error inside says which collective of which ranks it was, a profiler's range which axis."""
    try:
        with timed(f"ds_cp {what} ({group.group_desc.removeprefix('ds_cp:')})", waits, EXCHANGE):
            yield
    except RuntimeError as error:
        ranks = dist.get_process_group_ranks(group)
        raise RuntimeError(f"ds_cp: the {what} of ranks {ranks} failed on rank {dist.get_rank()}: {error}") from error


def exchange(x: Tensor, sent: list[int], received: list[int], axis: AxisGroup, what: str = "all-to-all") -> Tensor:
    """Exchanges parts of dim 0 of different sizes. No gradient passes.

    Shards: `x_i` [sum(sent_i), ...], contiguous, its j-th part of `sent_i[j]` entries meant for rank j; `sent_i[j]` is
    `received_j[i]`. Result: `y_j` [sum(received_j), ...], what came from rank 0, 1, ...
    """
    assert axis.group is not None, "nothing is sent where there is one rank"
    out = x.new_empty((sum(received), *x.shape[1:]))
    with _named(what, axis.group, axis.waits):
        dist.all_to_all_single(out, x, received, sent, group=axis.group)
    return out


def exchange_rows(x: Tensor, sent: list[int], received: list[int], axis: AxisGroup) -> Tensor:
    """`exchange` with a gradient.

    Shards: as there. Forward: `y_j` is what came from rank 0, 1, ...  Backward: `dx_i` is what comes back of it, the same exchange
    with `received` sent. A rank without parts must call it too, and have its result in its loss's graph.
    """
    return x if axis.group is None else _ExchangeRows.apply(x, sent, received, axis)


class _ExchangeRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, sent: list[int], received: list[int], axis: AxisGroup) -> Tensor:
        ctx.rest = received, sent, axis
        return exchange(x.contiguous(), sent, received, axis)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        return exchange(grad.contiguous(), *ctx.rest), None, None, None


def all_gather(x: Tensor, group: dist.ProcessGroup | None, waits: Waits | None = None) -> Tensor:
    """Stacks the ranks' tensors on a new dim 0.

    Shards: `x_i` [...], the same shape on every rank.
    Forward: `y_j[i] = x_i` on every j.  Backward: `dx_i = sum_j g_j[i]`: the adjoint, so gradients are those of the sum of
    the ranks' losses; DeepSpeed's averaging turns that into their mean.
    """
    return x.unsqueeze(0) if group is None else _AllGather.apply(x, group, waits)


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup, waits: Waits | None) -> Tensor:
        ctx.group, ctx.waits = group, waits
        ctx.shape, ranks = x.shape, dist.get_world_size(group)
        out = x.new_empty(ranks * x.numel())
        with _named("all-gather", group, waits):
            dist.all_gather_into_tensor(out, x.contiguous().view(-1), group=group)
        return out.view(ranks, *x.shape)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        out = grad.new_empty(ctx.shape.numel())
        with _named("reduce-scatter", ctx.group, ctx.waits):
            dist.reduce_scatter_tensor(out, grad.contiguous().view(-1), group=ctx.group)
        return out.view(ctx.shape), None, None


def all_sum(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The detached sum over the group, for values that are shown: no gradient passes."""
    out = x.detach().clone()
    if group is not None:
        with _named("all-reduce", group):
            dist.all_reduce(out, group=group)
    return out


class Hop:
    """A posted exchange between ranks of a ring; after `wait()` every tensor of `received` holds what its sender sent.

    Shards: `sent` are pairs (contiguous tensor, receiver), `received` pairs (contiguous tensor, sender), by rank in the group; what
    two ranks send each other is matched in the order of posting. A rank with nothing to send or receive need not call it. No tensor
    may change, and none of `received` be read, before `wait`. NCCL moves them on a stream of its own, which first waits for what
    the current stream was given before this call; `wait` makes the current stream wait, not the host.
    """

    def __init__(
        self, sent: Sequence[tuple[Tensor, int]], received: Sequence[tuple[Tensor, int]], axis: AxisGroup, what: str
    ) -> None:
        assert all(x.is_contiguous() for x, _ in (*sent, *received))
        ranks, mine, group = axis.ranks, axis.ranks[axis.rank], axis.group
        ways = [f"{what} hop from rank {ranks[peer]} to rank {mine}" for _, peer in received]
        ways = ways or [f"{what} hop from rank {mine} to rank {ranks[peer]}" for _, peer in sent]
        self._what = "; ".join(dict.fromkeys(ways))
        self._kind, self._waits = what, axis.waits
        self._sent = sent  # kept alive until the work is done
        sends = [dist.P2POp(dist.isend, x, ranks[peer], group) for x, peer in sent]
        receives = [dist.P2POp(dist.irecv, x, ranks[peer], group) for x, peer in received]
        # Receives first: gloo's word that a receive is ready would else wait behind the payload on the one connection of two ranks,
        # and what they send each other would go one way after the other.
        self._work = dist.batch_isend_irecv(receives + sends) if sends or receives else []

    def wait(self, streams: Sequence[torch.cuda.Stream] = ()) -> None:
        """What was sent may be overwritten from now on, what was received be read.

        Args:
            streams: as of `timing.timed`.

        Raises:
            RuntimeError: it did not come within `comm_timeout_s`, or the neighbour is gone.
        """
        if not self._work:
            return
        try:
            with timed(f"ds_cp {self._kind} hop: wait", self._waits, RING, streams):
                for work in self._work:
                    work.wait()
        except RuntimeError as error:
            raise RuntimeError(f"ds_cp: the {self._what} failed: {error}") from error


class Gather:
    """Posted all-gathers; after `wait()` each `received[p]` [w, ...] holds everybody's `sent[p]` in rank order. No gradient passes.

    Shards: `sent` are contiguous tensors, of the same shapes on all ranks. They must not change before `wait`.
    """

    def __init__(self, sent: Sequence[Tensor], received: Sequence[Tensor], axis: AxisGroup) -> None:
        assert axis.group is not None, "nothing is sent where there is one rank"
        self._sent, self._waits = sent, axis.waits  # kept alive until the work is done
        flat = [(into.view(-1), x.view(-1)) for x, into in zip(sent, received, strict=True)]
        self._work = [dist.all_gather_into_tensor(into, x, group=axis.group, async_op=True) for into, x in flat]

    def wait(self) -> None:
        with timed("ds_cp key/value gather: wait", self._waits, RING):
            for work in self._work:
                work.wait()


def reduce_scatter(parts: Sequence[Tensor], axis: AxisGroup) -> list[Tensor]:
    """Sums over ranks, of which each keeps its part. No gradient passes.

    Shards: `parts[p]` on rank i is [w, ...], contiguous, with `parts[p][j]` meant for rank j. Result: `y_j = sum_i x_i[j]` of each.
    """
    assert axis.group is not None, "nothing is sent where there is one rank"
    sums = [torch.empty_like(part[0]) for part in parts]
    with timed("ds_cp gradient reduce-scatter", axis.waits, RING):
        for into, part in zip(sums, parts, strict=True):
            dist.reduce_scatter_tensor(into.view(-1), part.view(-1), group=axis.group)
    return sums
