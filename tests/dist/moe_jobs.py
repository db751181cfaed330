"""Jobs for mixtures of experts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from ds_cp import batch as batches
from ds_cp import comm, mesh
from ds_cp.kernels import attention
from ds_cp.router_loss import balance_loss
from ds_cp.topology import Topology
from tests.dist import jobs

EXPERTS, LAYERS, TOP = 16, 3, 2


class Reduced(TorchDispatchMode):
    """Bytes of each all-reduce."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.name().startswith("c10d::"):
            assert "allreduce" in func.name(), func.name()
            self.bytes += [x.nbytes for x in args[0]]
        return func(*args, **(kwargs or {}))


def balance(ulysses: int, ring: int, lengths: list[int]) -> tuple[float, float, list[int]]:
    """(error of the value, of the logits' gradient, bytes sent) of the balance loss alone, packed documents, padded at the end."""
    axes = mesh.build(Topology(ulysses=ulysses, ring=ring, data=1), timeout_s=60)
    methods = batches.Methods(attention=attention.load("torch_cpu"), layout="zigzag", ring_impl="p2p")
    batch = jobs.rows(1, sum(lengths) + 3)[0]
    batch["position_ids"] = torch.cat([torch.arange(n) for n in (*lengths, 3)]).unsqueeze(0)
    _, context = batches.prepare(batch, axes, methods, torch.device("cpu"))
    generator = torch.Generator().manual_seed(4)
    whole = [torch.randn(sum(lengths) + 3, EXPERTS, generator=generator).requires_grad_() for _ in range(LAYERS)]
    wanted = load_balancing_loss_func(tuple(whole), EXPERTS, TOP)
    wanted_gradients = torch.autograd.grad(wanted, whole)

    def cut(x: Tensor) -> Tensor:
        return batches.shard(x.detach()[None], context.rows, context.held.layout, axes, 0).squeeze(0)

    mine = [cut(x).requires_grad_() for x in whole]
    with Reduced() as reduced:
        local, value = balance_loss(mine, TOP, context)
    gradients = torch.autograd.grad(local, mine)
    total = comm.all_sum(local, axes.seq.group)
    errors = [float((a - cut(b)).abs().max() / b.abs().max()) for a, b in zip(gradients, wanted_gradients, strict=True)]
    mesh.destroy(axes)
    off = max(abs(float(x - wanted.detach())) for x in (value, total)) / float(wanted.detach())
    return off, max(errors), reduced.bytes
