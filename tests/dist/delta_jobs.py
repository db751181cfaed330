"""What the workers run for the delta kernels: a ring rank computes its piece of a row and gives back what it found."""

from __future__ import annotations

from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from ds_cp import comm
from ds_cp.kernels import delta

KEY_HEADS, VALUE_HEADS, KEY_SIZE, VALUE_SIZE, WIDTH = 2, 4, 8, 6, 4


def row(tokens: int) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """(tensors of tokens: q, k, v packed for the convolution, g, beta; conv weight and bias; dout), the same on every rank."""
    generator = torch.Generator().manual_seed(4)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    channels = 2 * KEY_HEADS * KEY_SIZE + VALUE_HEADS * VALUE_SIZE
    tokenwise = [normal(tokens, channels), -0.1 * normal(tokens, VALUE_HEADS).exp(), normal(tokens, VALUE_HEADS).sigmoid()]
    return tokenwise, [normal(channels, WIDTH), normal(channels)], normal(tokens, VALUE_HEADS, VALUE_SIZE)


def layer(kernel: delta.Kernel, tensors: list[Tensor], span: delta.Span) -> Tensor:
    """Convolution and rule as a DeltaNet layer runs them."""
    packed, g, beta, weight, bias = tensors
    keys = KEY_HEADS * KEY_SIZE
    convolved = kernel.convolve(packed, weight, bias, "silu", span)
    q, k, v = convolved.split([keys, keys, convolved.shape[1] - 2 * keys], 1)
    q, k = (x.unflatten(1, (KEY_HEADS, KEY_SIZE)) for x in (q, k))
    return kernel.delta_rule(q, k, v.unflatten(1, (VALUE_HEADS, VALUE_SIZE)), g, beta, span)


def passed(documents: tuple[int, ...], kernel: str = "reference") -> dict[str, float]:
    """Largest difference from the unsharded row, relative to its largest entry: out and the gradient of every tensor.

    Tensors of tokens are compared piece by piece; the weights' gradients are summed over ranks first.
    """
    rank, size = dist.get_rank(), dist.get_world_size()
    tokenwise, weights, dout = row(documents[-1])
    module = delta.load(kernel)

    whole = [x.clone().requires_grad_() for x in tokenwise + weights]
    out = layer(module, whole, delta.Span(documents))
    wanted = [out.detach(), *torch.autograd.grad(out, whole, dout)]

    mine = slice(rank * documents[-1] // size, (rank + 1) * documents[-1] // size)
    tensors = [x.requires_grad_() for x in [x[mine].clone() for x in tokenwise] + [x.clone() for x in weights]]
    span = delta.piece(documents, rank, size, partial(comm.all_gather, group=dist.group.WORLD))
    out = layer(module, tensors, span)
    found = [out.detach(), *torch.autograd.grad(out, tensors, dout[mine])]
    for gradient in found[-2:]:
        dist.all_reduce(gradient)

    names = ["out", "qkv", "g", "beta", "weight", "bias"]
    pieces = [x[mine] for x in wanted[:4]] + wanted[4:]
    scales = [x.abs().max() for x in wanted]
    return {name: float((a - b).abs().max() / scale) for name, a, b, scale in zip(names, found, pieces, scales, strict=True)}
