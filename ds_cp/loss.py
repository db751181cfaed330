"""The loss of a whole row from local logits, and the one factor that makes DeepSpeed's averaging exact.

Each rank has the fp32 sum l_r of w * cross entropy over its own targets; sum_r l_r over a seq group is the row's sum L. What
DeepSpeed makes of the ranks' gradients g_r is

    reduced = sum over all W ranks and a accumulation steps of g_r * weight,   weight = 1 / (W * divisor)

where divisor is a if engine.backward divides by it (raw DeepSpeed) and 1 if it does not (HF Trainer). So with g_r = f * grad l_r
(size ranks a row, D = W / size replicas):

    mean        value L / n      f = size / n                n targets of the micro-batch; averaged over D and a
    token_mean  value L * D / N  f = W * divisor / N         N targets of the global batch, over D and a
    sum         value L          f = W * divisor             no denominator, no averaging

A denominator of zero counts as one: such a row has a loss of 0 and a gradient of 0.

A term x that every micro-batch has once (a balance loss) is averaged over D and a, and under sum it is summed like the rest:

    mean        value x          f = size
    token_mean  value x / a      f = size * divisor / a
    sum         value x          f = W * divisor
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ds_cp import comm
from ds_cp.batch import IGNORE, SequenceContext
from ds_cp.tiled_head import Terms, token_losses

Reduction = Literal["auto", "mean", "token_mean", "sum"]
PLAIN = Terms()
LOCAL = "ds_cp_local"
"""Attribute of the loss: this rank's own part of it."""


@dataclass(frozen=True)
class CausalLMLoss:
    """The `loss_function` of a sharded HF model."""

    reduction: Reduction
    divisor: Callable[[], int]
    """What `backward` divides the loss by: the accumulation steps under raw DeepSpeed, 1 under HF Trainer."""
    steps: Callable[[], int] | None = None
    """The accumulation steps, where `divisor` is something else."""

    def __call__(
        self,
        logits: Tensor,
        labels: Tensor,
        vocab_size: int | None = None,
        num_items_in_batch: Tensor | float | None = None,
        cp: SequenceContext | None = None,
        local: Tensor | None = None,
        terms: Terms = PLAIN,
        **_: Any,
    ) -> Tensor:
        """The row's loss, the same 0-d fp32 value on every rank of the seq group; all of them must call it.

        Args:
            logits: [1, T, V] of the local tokens. labels: [1, T] shifted targets of the local tokens, -100 for none.
            num_items_in_batch: targets (or their weight) of the whole global batch, for token_mean.
            local: l_r where the head has computed it in tiles; the logits are not read then.

        Raises:
            ValueError: token_mean without num_items_in_batch, or the model did not pass the context on.
        """
        if cp is None or cp.targets is None:
            raise ValueError("loss_function: the model did not pass the `cp` keyword to its loss; it cannot be sharded")
        local = _sum(logits, labels, cp.weights, terms) if local is None else local
        factor, value_factor = self._factors(cp, num_items_in_batch, local.device)
        shown = comm.all_sum(local, cp.mesh.seq.group) * value_factor
        loss = _Shown.apply(local, shown.to(local.dtype), factor)
        setattr(loss, LOCAL, local.detach())
        return loss

    def once(self, local: Tensor, whole: Tensor, weight: float, items: Tensor | float | None, cp: SequenceContext) -> Tensor:
        """weight * x of a term x that every micro-batch has once, shown and differentiated by this reduction.

        Args:
            local: this rank's part, whose sum over the row's ranks is x. whole: x.
        """
        topology, reduction = cp.mesh.topology, self._resolved(items)
        divisor = self.divisor()
        steps = divisor if self.steps is None else self.steps()
        factor, shown = {
            "mean": (topology.size, 1.0),
            "token_mean": (topology.size * divisor / steps, 1.0 / steps),
            "sum": (topology.world * divisor, 1.0),
        }[reduction]
        return _Shown.apply(local, whole * (weight * shown), weight * factor)

    def _resolved(self, items: Tensor | float | None) -> Reduction:
        if self.reduction == "auto":
            return "mean" if items is None else "token_mean"
        return self.reduction

    def _factors(self, cp: SequenceContext, items: Tensor | float | None, device: torch.device) -> tuple[Tensor, Tensor]:
        """(factor on the local gradient, factor on the row's sum), 0-d fp64."""
        topology, reduction = cp.mesh.topology, self._resolved(items)
        if reduction == "token_mean" and items is None:
            raise ValueError(
                "sequence_parallel.loss_reduction: token_mean needs num_items_in_batch in the batch, the number of targets "
                "of the whole global batch; use ds_cp.initialize's loader, pass it yourself, or choose mean"
            )
        one = torch.ones((), device=device, dtype=torch.float64)
        if reduction == "sum":
            return one * topology.world * self.divisor(), one
        if reduction == "mean":
            assert cp.targets is not None, "a loss has labels"
            inverse = _inverse(cp.targets.to(device))
            return inverse * topology.size, inverse
        inverse = _inverse(torch.as_tensor(items, dtype=torch.float64, device=device))
        return inverse * topology.world * self.divisor(), inverse * topology.data


def _inverse(count: Tensor) -> Tensor:
    """1 / count, and 1 for a count of zero, whose sum is zero."""
    return 1 / torch.where(count == 0, torch.ones_like(count), count)


def _sum(logits: Tensor, labels: Tensor, weights: Tensor | None, terms: Terms) -> Tensor:
    work = torch.float64 if logits.dtype == torch.float64 else torch.float32
    targets = labels.flatten()
    losses = token_losses(logits.flatten(0, -2).to(work), targets, terms)
    weights = torch.ones_like(losses) if weights is None else weights.flatten().to(work)
    return (losses * weights.masked_fill(targets == IGNORE, 0.0)).sum()


class _Shown(torch.autograd.Function):
    """Shows one value and passes another's gradient: y = shown; d local = dy * factor."""

    @staticmethod
    def forward(ctx, local: Tensor, shown: Tensor, factor: Tensor | float) -> Tensor:
        ctx.factor, ctx.dtype = factor, local.dtype
        return shown.clone()

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        return (grad * ctx.factor).to(ctx.dtype), None, None
