"""All heads of the tokens that a rank holds become some heads of the tokens that it works on, and back.

    held       [G, T, c] for each of several tensors: G groups of heads, rank j of the group works on head group j mod G
      -- one all-to-all; rank j gets the tokens that its route names -->
    worked on  [S, width] for each of the asked widths, all of one message side by side: the sum of the c is that of the widths

Tokens change their order in the copies that packing and unpacking make anyway; no tensor of indices is made. Each direction is the
other's backward: every (head group, token) is sent to one rank alone, so nothing is summed.

Shapes: G head groups, T held tokens, S tokens worked on, C channels of a message.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ds_cp import comm
from ds_cp.layout import Range, Route

if TYPE_CHECKING:
    from ds_cp.mesh import AxisGroup


def by_receiver(x_TNH: Tensor, groups: int, sharing: int) -> Tensor:
    """A view [groups, sharing, T, heads of one rank, H]; heads too few for every rank stand there for each that needs them."""
    if x_TNH.shape[1] % (groups * sharing) == 0:
        return x_TNH.unflatten(1, (groups, sharing, -1)).permute(1, 2, 0, 3, 4)
    each = x_TNH.transpose(0, 1)[:, None, :, None]
    return each.expand(-1, sharing, -1, -1, -1)  # whose backward sums the replicas


def to_heads(sources: Sequence[Tensor], widths: Sequence[int], route: Route, axis: AxisGroup) -> tuple[Tensor, ...]:
    """The tokens worked on, with this rank's heads.

    Shards over `axis`: `sources` [G, T, ...] hold this rank's tokens, of any strides and one dtype; what stands in a row of the
    result is the sources' channels of its token, one source after the other. Every rank of the axis must call it.
    Forward: `y_j[route of token t] = x_i[j mod G, t]`.  Backward: `dx_i[j mod G, t] = g_j[route of token t]`, which is `to_tokens`.

    Returns:
        One contiguous [S, width] for each of `widths`.
    """
    return _ToHeads.apply(tuple(widths), route, axis, *sources)


def to_tokens(x_SC: Tensor, groups: int, route: Route, axis: AxisGroup) -> Tensor:
    """The inverse of `to_heads` for one tensor: [S, C] of this rank's heads to [G, T, C], the held tokens with all heads."""
    return _ToTokens.apply(groups, route, axis, x_SC)


class _ToHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx, widths: tuple[int, ...], route: Route, axis: AxisGroup, *sources: Tensor) -> tuple[Tensor, ...]:
        ctx.route, ctx.axis, ctx.shapes = route, axis, [x.shape for x in sources]
        return _unpack_worked(_exchange(_pack_held(sources, route), *route.counts, axis), widths, route)

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Any, ...]:
        sent, received = ctx.route.counts
        message = _exchange(_pack_worked(grads, ctx.route), received, sent, ctx.axis)
        return None, None, None, *_unpack_held(message, ctx.shapes, ctx.route)


class _ToTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx, groups: int, route: Route, axis: AxisGroup, x_SC: Tensor) -> Tensor:
        ctx.route, ctx.axis = route, axis
        sent, received = route.counts
        shape = torch.Size((groups, max(end for spans in route.sent for _, end in spans), x_SC.shape[1]))
        (held,) = _unpack_held(_exchange(_pack_worked((x_SC,), route), received, sent, axis), [shape], route)
        return held

    @staticmethod
    def backward(ctx, grad_GTC: Tensor) -> tuple[Any, ...]:
        sent, received = ctx.route.counts
        message = _exchange(_pack_held((grad_GTC,), ctx.route), sent, received, ctx.axis)
        return None, None, None, *_unpack_worked(message, (grad_GTC.shape[2],), ctx.route)


def _exchange(message: Tensor, sent: list[int], received: list[int], axis: AxisGroup) -> Tensor:
    return comm.exchange(message, sent, received, axis, "exchange of tokens and heads")


def _pack_held(sources: Sequence[Tensor], route: Route) -> Tensor:
    """[tokens sent, C]: by receiver, in each the channels of the sources side by side."""
    widths = [x[0, 0].numel() for x in sources]
    message = sources[0].new_empty((sum(route.counts[0]), sum(widths)))
    for (start, end), channels, width in zip(_edges(widths), sources, widths, strict=True):
        for receiver, rows, span in _pieces(route.sent):
            part = channels[receiver % len(channels), slice(*span)]
            message[slice(*rows), start:end].view(len(part), *channels.shape[2:]).copy_(part)
        assert end - start == width
    return message


def _unpack_held(message: Tensor, shapes: Sequence[torch.Size], route: Route) -> list[Tensor]:
    held = [message.new_empty(shape) for shape in shapes]
    for (start, end), into in zip(_edges([shape[2:].numel() for shape in shapes]), held, strict=True):
        for receiver, rows, span in _pieces(route.sent):
            part = into[receiver % len(into), slice(*span)]
            part.copy_(message[slice(*rows), start:end].view(part.shape))
    return held


def _pack_worked(parts: Sequence[Tensor], route: Route) -> Tensor:
    """[tokens received, C]: by sender."""
    widths = [x.shape[1] for x in parts]
    message = parts[0].new_empty((sum(route.counts[1]), sum(widths)))
    for (start, end), part in zip(_edges(widths), parts, strict=True):
        for _, rows, span in _pieces(route.received):
            message[slice(*rows), start:end].copy_(part[slice(*span)])
    return message


def _unpack_worked(message: Tensor, widths: Sequence[int], route: Route) -> tuple[Tensor, ...]:
    worked = tuple(message.new_empty((len(message), width)) for width in widths)
    for (start, end), into in zip(_edges(widths), worked, strict=True):
        for _, rows, span in _pieces(route.received):
            into[slice(*span)].copy_(message[slice(*rows), start:end])
    return worked


def _pieces(side: Sequence[Sequence[Range]]) -> Iterator[tuple[int, Range, Range]]:
    """(rank, rows of the message, local tokens) of every piece."""
    row = 0
    for rank, spans in enumerate(side):
        for start, end in spans:
            yield rank, (row, row + end - start), (start, end)
            row += end - start


def _edges(widths: Sequence[int]) -> Iterator[Range]:
    start = 0
    for width in widths:
        yield start, start + width
        start += width
