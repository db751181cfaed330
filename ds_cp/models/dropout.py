"""The door to a model's dropout (an adapter's too): each rank of a row draws masks of its own.

The ranks of a row have one seed, so by themselves they would draw one mask for as many different tokens as there are ranks. Here
every `nn.Dropout` of the language model takes one number of the CPU's generator, which all ranks have alike, and draws by it and
its rank. It leaves the generators as all ranks leave them, so what must be alike (the order of rows) stays so; checkpointing,
which restores them, repeats the masks. Masks of weights, which all tokens of a row share, are no `nn.Dropout` and stay alike.
"""

from __future__ import annotations

from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ds_cp.mesh import Mesh
from ds_cp.models.checks import other_modules

SEEDS = 1 << 62


class Door:
    """The dropout of one attached model, but for parts that see whole images: they may run another number of times on each rank."""

    def __init__(self, model: PreTrainedModel, mesh: Mesh) -> None:
        self._rank, others = mesh.seq.rank, other_modules(model) if mesh.seq.size > 1 else set()
        found = [m for m in model.modules() if type(m) is nn.Dropout and "forward" not in m.__dict__ and id(m) not in others]
        self._modules = found if mesh.seq.size > 1 else []

    def apply(self) -> None:
        for module in self._modules:
            cast(nn.Module, module).forward = partial(_drop, module, self._rank)

    def remove(self) -> None:
        for module in self._modules:
            del module.forward


def _drop(module: nn.Dropout, rank: int, x: Tensor) -> Tensor:
    if not module.training or not module.p:
        return nn.Dropout.forward(module, x)
    seed = int(torch.randint(SEEDS, ())) + rank
    with torch.random.fork_rng(devices=[x.device] if x.is_cuda else []):
        (torch.cuda if x.is_cuda else torch).manual_seed(seed)
        return nn.Dropout.forward(module, x)
