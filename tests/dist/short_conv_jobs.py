"""Jobs of short convolutions for the workers."""

from __future__ import annotations

import torch

from ds_cp import batch as batches
from ds_cp import convolution, mesh
from ds_cp.kernels import attention
from ds_cp.topology import Topology
from tests.dist import jobs

CHANNELS, WIDTH = 5, 3


def traffic(layout: str, tokens: int) -> dict[str, int]:
    """Elements that this rank sends in one convolution on a ring of four, there and in backward."""
    axes = mesh.build(Topology(ulysses=1, ring=4, data=1), timeout_s=60)
    methods = batches.Methods(attention=attention.load("torch_cpu"), layout=layout, halo=WIDTH)
    _, context = batches.prepare(jobs.rows(1, tokens)[0], axes, methods, torch.device("cpu"))
    x = torch.randn(tokens // 4, CHANNELS, requires_grad=True)
    weight = torch.randn(CHANNELS, 1, WIDTH + 1)
    there, back = jobs.Traffic(), jobs.Traffic()
    with there:
        out = convolution.convolve(x, weight, None, CHANNELS, context.held.halo)
    with back:
        torch.autograd.grad(out, x, torch.ones_like(out))
    mesh.destroy(axes)
    return {"there": sum(there.exchanged), "back": sum(back.exchanged)}
