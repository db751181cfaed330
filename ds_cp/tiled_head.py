"""The output head in tiles of tokens: the loss of rows whose logits are never whole.

    hidden [T, D] -> tile by tile: z [t, V] = score(head(hidden tile)) -> sum of w * l over the tile's targets, dz -> forgotten

What a token adds to the loss is known before the next tile, so its gradient is taken at once and nothing of size tokens x V
outlives a tile. With p = softmax(z), y the target, e the label smoothing and c the z-loss:

    l  = lse(z) - (1 - e) z_y - e mean(z) + c lse(z)^2
    dz = w ((1 + 2 c lse) p - (1 - e) onehot(y) - e / V)

On CUDA, in bf16 and fp16 and without a softcap, one kernel does that (`kernels.token_loss_cuda`). The head's parameters get their
gradient once, summed over tiles in fp32. Everything runs inside the head's own forward call, so that whoever gathers its parameters
(ZeRO-3) does so once a pass, and no collective depends on the number of tiles.

T local tokens, t tokens of one tile, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from ds_cp.batch import IGNORE
from ds_cp.timing import named

CONVERTED_AT_ONCE = 1 << 24
ADDMM = torch.addmm
"""As it is when this is imported: DeepSpeed's flops profiler puts another in its place for a step, which knows no `out_dtype`."""
FUSED_DTYPES = (torch.bfloat16, torch.float16)
"""Of hidden states and head on CUDA for which one kernel makes the losses and the gradient of the logits, in their memory."""


@dataclass(frozen=True)
class Terms:
    """What the loss of a token is made of beside its cross entropy."""

    label_smoothing: float = 0.0
    z_loss: float = 0.0


@dataclass(frozen=True)
class Head:
    """An output head, and what the model does to its output before the loss: softcap * tanh(scale * output / softcap)."""

    forward: Callable[[Tensor], Tensor]
    """[1, t, D] to [1, t, V], from its input and `parameters` alone."""
    parameters: tuple[Tensor, ...]
    linear: bool
    """`forward` is `functional.linear(x, *parameters)`: its gradients need no graph."""
    scale: float = 1.0
    softcap: float | None = None

    def score_(self, output: Tensor) -> Tensor:
        """The logits, in the memory of the head's output."""
        if self.scale != 1:
            output.mul_(self.scale)
        return output if self.softcap is None else output.div_(self.softcap).tanh_().mul_(self.softcap)


def tiled_loss(
    hidden_1TD: Tensor, head: Head, tile: int, targets_1T: Tensor, weights_1T: Tensor | None, terms: Terms
) -> tuple[Tensor, Tensor]:
    """The fp32 sum of w * l over the local targets, and the head's own output for the first token, [1, 1, V].

    The second is an output of the same graph node: whatever waits for the gradient of the head's output before it prepares the
    head's backward (ZeRO-3) must find one, see `joined`. Backward may run once: gradients are scaled in place.

    Args:
        hidden_1TD: what the model gives its head. tile: tokens at a time, any number from 1.
        targets_1T: shifted targets of the local tokens, -100 for none. weights_1T: their weights, None for ones.
    """
    weights = None if weights_1T is None else weights_1T.flatten()
    needs = torch.is_grad_enabled()
    return _TiledLoss.apply(hidden_1TD, head, tile, targets_1T.flatten(), weights, terms, needs, *head.parameters)


def joined(value: Tensor, output: Tensor) -> Tensor:
    """`value`, whose backward also sends zeros into `output`."""
    return _Joined.apply(value, output)


def token_losses(z_tV: Tensor, targets_t: Tensor, terms: Terms) -> Tensor:
    """l of whole logits [t], differentiable; any value where there is no target."""
    losses = functional.cross_entropy(z_tV, targets_t, ignore_index=IGNORE, reduction="none", label_smoothing=terms.label_smoothing)
    return losses + terms.z_loss * z_tV.logsumexp(-1).square() if terms.z_loss else losses


class _TiledLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, head, tile, targets, weights, terms, needs, *parameters):
        ctx.tiles = tiles = Tiles(
            hidden, head, tile, [needs and need for need in (ctx.needs_input_grad[0], *ctx.needs_input_grad[7:])]
        )
        sums = []
        for rows in tiles:
            of_tile = targets[rows], None if weights is None else weights[rows], terms
            if tiles.fused:
                dz = tiles.output(rows)
                sums.append(_fused_loss_(dz, head.scale, *of_tile))
            else:
                value, dz = _loss_(tiles.logits(rows), *of_tile)
                sums.append(value)
            if tiles.needed:
                tiles.add(rows, dz, of_output=tiles.fused)
        return torch.stack(sums).sum(), tiles.first

    @staticmethod
    def backward(ctx, grad, _):
        tiles, ctx.tiles = ctx.tiles, None
        if tiles is None:
            raise RuntimeError("ds_cp: the tiled loss was given backward twice; set sequence_parallel.loss_chunk to 0 for that")
        d_hidden, *d_parameters = tiles.gradients(grad)
        return d_hidden, None, None, None, None, None, None, *d_parameters


class _Joined(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value: Tensor, output: Tensor) -> Tensor:
        ctx.like = output
        return value.clone()

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, torch.zeros_like(ctx.like)


class Tiles:
    """The head on one tile after another, and the gradients of its input and parameters."""

    def __init__(self, hidden_1TD: Tensor, head: Head, tile: int, needs: Sequence[bool]) -> None:
        self.head, self.tile, self.needs, self.needed = head, tile, needs, any(needs)
        self.shape, self.hidden = hidden_1TD.shape, hidden_1TD.detach().flatten(0, 1)
        self.work = torch.float64 if hidden_1TD.dtype == torch.float64 else torch.float32
        self.linear = head.linear and not torch.is_autocast_enabled(hidden_1TD.device.type)
        self.fused = self.linear and hidden_1TD.is_cuda and hidden_1TD.dtype in FUSED_DTYPES and head.softcap is None
        self.first: Tensor | None = None
        self._d_hidden = torch.empty_like(self.hidden) if needs[0] else None
        self._sums = [
            torch.zeros(p.shape, dtype=self.work, device=p.device) if need else None
            for p, need in zip(head.parameters, needs[1:], strict=True)
        ]

    def __iter__(self) -> Iterator[slice]:
        for i in range(0, len(self.hidden), self.tile):
            with named("ds_cp loss chunk"):
                yield slice(i, min(i + self.tile, len(self.hidden)))

    def output(self, rows: slice) -> Tensor:
        """What the head gives for the tile [t, V]; where it is linear, in memory of its own and without a graph."""
        self._x = self.hidden[rows]
        if self.linear:
            self._output = functional.linear(self._x, *self.head.parameters)
        else:
            with torch.set_grad_enabled(self.needed):
                self._x = self._x.detach().requires_grad_(self.needs[0])
                self._output = self.head.forward(self._x.unsqueeze(0)).squeeze(0)
        self.first = self._output[None, :1].detach().clone() if self.first is None else self.first
        return self._output

    def logits(self, rows: slice) -> Tensor:
        """z [t, V] of the tile in the working precision, in memory of its own."""
        z = self.head.score_(self.output(rows).detach().to(self.work, copy=not self.linear))
        self._slope = 1 - (z / self.head.softcap).square_() if self.needed and self.head.softcap is not None else None
        return z

    def add(self, rows: slice, dz: Tensor, of_output: bool = False) -> None:
        """Adds what the last tile gives, from the gradient of its logits (or of the head's output) [t, V], which is overwritten."""
        if not of_output and self._slope is not None:
            dz.mul_(self._slope)
        if not of_output and self.head.scale != 1:
            dz.mul_(self.head.scale)
        dz = dz.to(self._output.dtype)
        parts = self._linear_parts(dz) if self.linear else self._graph_parts(dz)
        if self._d_hidden is not None:
            self._d_hidden[rows] = next(parts)
        for part, total in zip(parts, (s for s in self._sums if s is not None), strict=True):
            if part is not total:
                total.add_(part)

    def _linear_parts(self, dz: Tensor) -> Iterator[Tensor]:
        weight, *_ = self.head.parameters
        if self.needs[0]:
            yield dz @ weight
        if (total := self._sums[0]) is not None:
            yield _add_product_(total, dz, self._x)
        if self.needs[2:] == [True]:
            yield dz.sum(0, dtype=self.work)

    def _graph_parts(self, dz: Tensor) -> Iterator[Tensor]:
        wanted = [x for x, need in zip((self._x, *self.head.parameters), self.needs, strict=True) if need]
        parts = torch.autograd.grad(self._output, wanted, dz, allow_unused=True)
        return (torch.zeros_like(x) if part is None else part for x, part in zip(wanted, parts, strict=True))

    def gradients(self, factor: Tensor | float) -> Iterator[Tensor | None]:
        """Of the hidden states and of each parameter, times `factor`; in the memory of the sums, so only once."""
        d_hidden = self._d_hidden
        yield None if d_hidden is None else d_hidden.mul_(factor).view(self.shape)
        for parameter, total in zip(self.head.parameters, self._sums, strict=True):
            yield None if total is None else _scaled_(total, factor, parameter.dtype)


def _loss_(z: Tensor, targets: Tensor, weights: Tensor | None, terms: Terms) -> tuple[Tensor, Tensor]:
    """(sum of w * l, dz); dz takes the memory of z."""
    valid, smooth = targets != IGNORE, terms.label_smoothing
    w = valid.to(z.dtype) if weights is None else weights.to(z.dtype).masked_fill(~valid, 0.0)
    index = targets.clamp(min=0).unsqueeze(1)
    chosen = z.gather(1, index).squeeze(1)
    mean = z.mean(1) if smooth else 0.0
    lse, p = softmax_(z)
    losses = lse - (1 - smooth) * chosen - smooth * mean + terms.z_loss * lse.square()
    dz = p.mul_((w * (1 + 2 * terms.z_loss * lse)).unsqueeze(1))
    if smooth:
        dz.sub_((w * (smooth / z.shape[1])).unsqueeze(1))
    return (w * losses).sum(), dz.scatter_add_(1, index, ((smooth - 1) * w).unsqueeze(1))


def _fused_loss_(output: Tensor, scale: float, targets: Tensor, weights: Tensor | None, terms: Terms) -> Tensor:
    """Sum of w * l; the head's output becomes its gradient."""
    from ds_cp.kernels.token_loss_cuda import losses_fused_

    return losses_fused_(output, targets, weights, scale, terms.label_smoothing, terms.z_loss, IGNORE).sum()


def softmax_(z: Tensor) -> tuple[Tensor, Tensor]:
    """(lse [t], softmax [t, V]); the latter takes the memory of z."""
    largest = z.amax(1, keepdim=True)
    total = z.sub_(largest).exp_().sum(1, keepdim=True)
    return (largest + total.log()).squeeze(1), z.div_(total)


def _add_product_(total_VD: Tensor, dz_tV: Tensor, x_tD: Tensor) -> Tensor:
    """total += dz^T x, summed in the precision of `total`."""
    if dz_tV.is_cuda and dz_tV.dtype != total_VD.dtype:
        return ADDMM(total_VD, dz_tV.t(), x_tD, out_dtype=total_VD.dtype, out=total_VD)
    return total_VD.addmm_(dz_tV.t().to(total_VD.dtype), x_tD.to(total_VD.dtype))


def _scaled_(x: Tensor, factor: Tensor | float, dtype: torch.dtype) -> Tensor:
    """x * factor in a dtype that is not wider, in x's own memory: what is written lies before what is still to be read."""
    if x.dtype == dtype:
        return x.mul_(factor)
    flat = x.view(-1)
    narrow = flat.view(dtype)[: flat.numel()]
    for start in range(0, flat.numel(), CONVERTED_AT_ONCE):
        rows = slice(start, start + CONVERTED_AT_ONCE)
        narrow[rows] = flat[rows] * factor
    return narrow.view(x.shape)
