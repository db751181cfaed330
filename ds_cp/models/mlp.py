"""The door to a model's MLPs: each one's own `forward` (of this instance, undone by `remove`) runs in tiles of tokens."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ds_cp.tiled_module import tiled

NAME = "mlp"


def mlps(model: PreTrainedModel) -> list[nn.Module]:
    """The dense MLPs of the model's layers."""
    text = model.get_decoder() if hasattr(model, "get_decoder") else model
    named = text.named_modules()
    return [m for name, m in named if name.rpartition(".")[2] == NAME and type(m).__name__.endswith("MLP")]


def refuse(model: PreTrainedModel) -> None:
    """Raises a ValueError where not every layer of the model has a dense MLP that ds_cp finds."""
    layers, found = model.config.get_text_config().num_hidden_layers, len(mlps(model))
    if layers != found:
        raise ValueError(
            f"sequence_parallel.tiled_mlp: {found} of the {layers} layers of {type(model).__name__} have a dense MLP named "
            f"{NAME!r} (mixtures of experts are not tiled in this version); set it to false"
        )


class Door:
    """The MLPs of one attached model."""

    def __init__(self, model: PreTrainedModel, on: bool) -> None:
        self._modules = mlps(model) if on else []
        self.tile = model.config.get_text_config().hidden_size
        """Tokens: so many that a tile's products with the weights are as large as the weights themselves, bound by arithmetic."""
        self._before: list[tuple[bool, Callable[..., Tensor]]] = []

    def apply(self) -> None:
        for module in self._modules:
            self._before.append(("forward" in module.__dict__, module.forward))
            module.forward = partial(_forward, module, module.forward, self.tile)

    def remove(self) -> None:
        for module, (own, forward) in zip(self._modules, self._before, strict=True):
            if own:
                module.forward = forward
            else:
                del module.forward
        self._before = []


def _forward(module: nn.Module, plain: Callable[[Tensor], Tensor], tile: int, x: Tensor) -> Tensor:
    parameters = tuple(module.parameters())
    if torch.is_grad_enabled() and not x.requires_grad and any(hasattr(p, "ds_id") and p.requires_grad for p in parameters):
        raise ValueError(
            "sequence_parallel.tiled_mlp: under ZeRO-3 an MLP cannot be trained whose input needs no gradient (all that comes "
            "before it is frozen): DeepSpeed would lose its gradient; set it to false, or use ZeRO 0 to 2"
        )
    return plain(x) if x.shape[-2] <= tile else tiled(plain, x, tile, parameters)
