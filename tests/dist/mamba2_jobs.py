"""Jobs of Mamba-2 layers for the workers."""

from __future__ import annotations

from typing import Any

import torch

from ds_cp import batch as batches
from ds_cp import mamba2, mesh
from ds_cp.kernels import attention
from ds_cp.topology import Topology
from tests.dist import jobs


def traffic(ulysses: int, ring: int, heads: tuple[int, int], sizes: tuple[int, int]) -> dict[str, Any]:
    """Elements through each all-to-all of one layer of a row of 64 tokens on four ranks, there and in backward.

    Args:
        heads: heads and groups. sizes: of a head, and of its state.
    """
    axes = mesh.build(Topology(ulysses=ulysses, ring=ring, data=1), timeout_s=60)
    methods = batches.Methods(attention=attention.load("torch_cpu"), layout="zigzag", scans=True)
    _, context = batches.prepare(jobs.rows(1, 64)[0], axes, methods, torch.device("cpu"))
    (count, groups), (size, state) = heads, sizes
    shapes = [(count, size), (groups, state), (groups, state), (count,)]
    local = [torch.randn(16, *shape, requires_grad=True) for shape in shapes]
    channels = count * size + 2 * groups * state
    layer = mamba2.Layer(
        conv_CW=torch.randn(channels, 4),
        conv_bias_C=None,
        activation="silu",
        a_log_V=torch.zeros(count),
        d_V=torch.zeros(count),
        dt_bias_V=torch.zeros(count),
        dt_limit=(0.0, float("inf")),
    )
    there, back = jobs.Traffic(), jobs.Traffic()
    with there:
        out = mamba2.mix(*local, layer, context)
    with back:
        torch.autograd.grad(out, local, torch.ones_like(out))
    mesh.destroy(axes)
    return {"there": there.exchanged, "back": back.exchanged}
