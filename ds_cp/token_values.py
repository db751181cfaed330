"""Log-probabilities and entropies of single tokens, from a head whose logits are never whole: memory O(T).

With z the logits of a token over the temperature, p = softmax(z), y the target, and g, h what backward receives for the two values:

    log p_y = z_y - lse(z)                      dz  = g (onehot(y) - p)
    H = - sum_v p_v log p_v                     dz += - h p (log p + H)

g and h are not known in the forward pass, so backward computes each tile's logits again.

T local tokens, t tokens of one tile, D hidden size, V vocabulary, K values of a token (log p, H if asked for, and the
extras, which have no gradient).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ds_cp.batch import IGNORE
from ds_cp.replay import Replay
from ds_cp.tiled_head import Head, Tiles

EXTRAS: Mapping[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "entropy": lambda z, log_p, chosen: torch.special.entr(log_p.exp()).sum(1),
    "is_top1": lambda z, log_p, chosen: (chosen >= log_p.amax(1)).to(log_p.dtype),
    "mean_logits": lambda z, log_p, chosen: z.mean(1),
    "log_sum_sq_probs": lambda z, log_p, chosen: (2 * log_p).logsumexp(1),
}
"""[t] from z over the temperature [t, V], its log-softmax and the target's entry of that."""


@dataclass(frozen=True)
class TokenValues:
    """What is asked of every token that has a target."""

    entropies: bool = False
    temperature: float = 1.0
    extras: tuple[str, ...] = ()
    """More of the distribution, without a gradient: names of EXTRAS."""


def token_values(hidden_1TD: Tensor, head: Head, tile: int, targets_1T: Tensor, asked: TokenValues) -> tuple[Tensor, Tensor]:
    """([1, T, K] in fp32, zeros where there is no target; the head's own output for the first token, as in `tiled_loss`).

    Args:
        hidden_1TD: what the model gives its head. tile: tokens at a time, any number from 1.
        targets_1T: shifted targets of the local tokens, -100 for none.
    """
    return _TokenValues.apply(hidden_1TD, head, tile, targets_1T.flatten(), asked, *head.parameters)


def of_logits(z_tV: Tensor, targets_t: Tensor, asked: TokenValues) -> Tensor:
    """The same [t, K] of whole logits, differentiable."""
    z_tV = z_tV / asked.temperature
    log_p = torch.log_softmax(z_tV, -1)
    valid = targets_t != IGNORE
    values = [log_p.gather(1, targets_t.clamp(min=0).unsqueeze(1)).squeeze(1)]
    values += [torch.special.entr(log_p.exp()).sum(1)] if asked.entropies else []
    values += [EXTRAS[name](z_tV.detach(), log_p.detach(), values[0].detach()) for name in asked.extras]
    return torch.stack(values, -1).masked_fill(~valid.unsqueeze(1), 0.0)


class _TokenValues(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, head, tile, targets, asked, *parameters):
        ctx.asked = hidden, head, tile, targets, asked
        ctx.again = Replay(hidden)
        tiles = Tiles(hidden, head, tile, [False] * (1 + len(parameters)))
        values = [of_logits(tiles.logits(rows), targets[rows], asked) for rows in tiles]
        return torch.cat(values).unsqueeze(0), tiles.first

    @staticmethod
    def backward(ctx, grad, _):
        hidden, head, tile, targets, asked = ctx.asked
        needs = [ctx.needs_input_grad[0], *ctx.needs_input_grad[5:]]
        with ctx.again():
            tiles = Tiles(hidden, head, tile, needs)
            for rows in tiles:
                z = tiles.logits(rows)
                tiles.add(rows, _gradient_(z, targets[rows], grad[0, rows].to(z.dtype), asked))
        d_hidden, *d_parameters = tiles.gradients(1.0)
        return d_hidden, None, None, None, None, *d_parameters


def _gradient_(z: Tensor, targets: Tensor, grad_tK: Tensor, asked: TokenValues) -> Tensor:
    """dz, in the memory of z."""
    grad = grad_tK.masked_fill((targets == IGNORE).unsqueeze(1), 0.0)
    z.div_(asked.temperature)
    log_p = z.sub_(z.logsumexp(1, keepdim=True))
    g = grad[:, :1]
    if asked.entropies:
        p = log_p.exp()
        entropy = torch.special.entr(p).sum(1, keepdim=True)
        dz = log_p.add_(entropy).mul_(grad[:, 1:2]).add_(g).mul_(p).neg_()
    else:
        dz = log_p.exp_().mul_(-g)
    return dz.scatter_add_(1, targets.clamp(min=0).unsqueeze(1), g).div_(asked.temperature)
