"""ALST with all its tricks, as its users put them together: loss and MLPs in DeepSpeed's tiles, layer inputs on the host.

DeepSpeed 0.19.8 ships `TiledMLP` and `TiledFusedLogitsLoss`; the number of tiles is that of their examples (MLP: tokens / hidden
size; loss: a GiB of fp32 logits a tile). For the layer inputs its users patch PyTorch's checkpoint function so that its first
argument waits on the CPU; here the saved tensors' hooks do that, through pinned memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import MethodType
from typing import Any

import torch
from deepspeed.runtime.sequence_parallel.ulysses_sp import TiledFusedLogitsLoss, TiledMLP
from torch import Tensor, nn

LOGITS_BYTES = 2**30


def tile_mlps(model: Any) -> None:
    for layer in model.model.layers:
        layer.mlp.forward = MethodType(_mlp_forward, layer.mlp)


def _mlp_forward(self: nn.Module, x: Tensor) -> Tensor:
    def inner(module: nn.Module, part: Tensor) -> Tensor:
        return module.down_proj(module.act_fn(module.gate_proj(part)) * module.up_proj(part))

    weights = [self.down_proj.weight, self.gate_proj.weight, self.up_proj.weight]
    return TiledMLP.apply(inner, self, x, math.ceil(x.shape[1] / x.shape[2]), weights)


def tile_loss(model: Any, part: Callable[[Callable[..., Tensor]], Callable[..., Tensor]]) -> None:
    """`model(**batch)` then gives the local sum of the loss; `part` wraps what computes it."""

    def loss_of(module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return nn.functional.cross_entropy(module.lm_head(x).float(), y, reduction="sum")

    def tiled(hidden: Tensor, labels: Tensor) -> Tensor:
        tiles = max(1, math.ceil(4 * labels.numel() * model.config.vocab_size / LOGITS_BYTES))
        return TiledFusedLogitsLoss.apply(loss_of, model, hidden, labels, None, tiles, [model.lm_head.weight], "sum")

    def forward(self: Any, shift_labels: Tensor, **batch: Tensor) -> Tensor:
        return marked(self.model(**batch).last_hidden_state, shift_labels)

    marked = part(tiled)
    model.forward = MethodType(forward, model)


def inputs_on_host(shape: torch.Size) -> AbstractContextManager[None]:
    """Around a forward pass: saved tensors of a layer input's shape wait on the CPU."""

    def pack(x: Tensor) -> Tensor | tuple[torch.device, Tensor]:
        if x.shape != shape or isinstance(x, nn.Parameter):
            return x
        return x.device, torch.empty(x.shape, dtype=x.dtype, pin_memory=x.is_cuda).copy_(x)

    def unpack(kept: Tensor | tuple[torch.device, Tensor]) -> Tensor:
        return kept if isinstance(kept, Tensor) else kept[1].to(kept[0])

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)
