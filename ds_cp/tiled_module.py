"""A module that treats every token alike (an MLP), in tiles of tokens: its inner activations exist for one tile at a time.

    forward:   y = cat over tiles of f(x tile), nothing kept but x
    backward:  tile by tile f(x tile) again, dx tile = f'(x tile)^T dy tile;  dw = sum over tiles, in fp32, handed to autograd once

Everything runs inside the module's own forward and backward: whoever gathers its parameters (ZeRO-3) does so once a pass, and no
collective depends on the number of tiles. It costs one more forward of the module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ds_cp.replay import Replay

DIM = -2
"""Tokens are the last dimension but one."""


def tiled(forward: Callable[[Tensor], Tensor], x: Tensor, tile: int, parameters: Sequence[Tensor]) -> Tensor:
    """`forward(x)`, `tile` tokens at a time.

    Args:
        forward: [..., t, D] to [..., t, E], token by token, from its input and `parameters` alone.
        x: [..., T, D].
    """
    return _Tiled.apply(x, forward, tile, *parameters)


class _Tiled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, forward, tile, *parameters):
        ctx.save_for_backward(x)
        ctx.call, ctx.parameters, ctx.replay = (forward, tile), parameters, Replay(x)
        return torch.cat([forward(x.narrow(DIM, *rows)) for rows in _tiles(x, tile)], DIM)

    @staticmethod
    def backward(ctx, dy):
        (x,), (forward, tile) = ctx.saved_tensors, ctx.call
        needs = [ctx.needs_input_grad[0], *ctx.needs_input_grad[3:]]
        work = torch.float64 if x.dtype == torch.float64 else torch.float32
        dx = torch.empty_like(x) if needs[0] else None
        trained = [p for p, need in zip(ctx.parameters, needs[1:], strict=True) if need]
        sums = [torch.zeros(p.shape, dtype=work, device=p.device) for p in trained]
        with ctx.replay():
            for rows in _tiles(x, tile):
                with torch.enable_grad():
                    part = x.narrow(DIM, *rows).detach().requires_grad_(needs[0])
                    y = forward(part)
                wanted = [part, *trained] if needs[0] else trained
                parts = list(torch.autograd.grad(y, wanted, dy.narrow(DIM, *rows), allow_unused=True))
                if dx is not None:
                    dx.narrow(DIM, *rows).copy_(parts.pop(0))
                for total, term in zip(sums, parts, strict=True):
                    if term is not None:
                        total.add_(term)
        made = (total.to(p.dtype) for total, p in zip(sums, trained, strict=True))
        return dx, None, None, *(next(made) if need else None for need in needs[1:])


def _tiles(x: Tensor, tile: int) -> Iterator[tuple[int, int]]:
    """(first token, number of tokens) of each tile."""
    tokens = x.shape[DIM]
    return ((start, min(tile, tokens - start)) for start in range(0, tokens, tile))
