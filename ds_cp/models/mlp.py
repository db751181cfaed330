"""The door to what treats every token alike, MLPs and the norms of layers: each one's own `forward` (of this instance, undone by
`remove`) runs in tiles of tokens. A norm in tiles keeps its input alone, where autograd keeps fp32 copies of it as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ds_cp.models.routers import routers
from ds_cp.tiled_module import tiled

NAME = "mlp"


def mlps(model: PreTrainedModel) -> list[nn.Module]:
    """The dense MLPs of the model's layers."""
    named = _decoder(model).named_modules()
    return [m for name, m in named if name.rpartition(".")[2] == NAME and type(m).__name__.endswith("MLP") and not routers(m)]


def norms(model: PreTrainedModel) -> list[nn.Module]:
    """The norms over the hidden size: those that layers call themselves (not their attention), and the last one."""
    decoder = _decoder(model)
    layers = (layer for child in decoder.children() if isinstance(child, nn.ModuleList) for layer in child)
    return [m for parent in (decoder, *layers) for m in parent.children() if type(m).__name__.endswith("Norm")]


def refuse(model: PreTrainedModel) -> None:
    """Raises a ValueError where not every layer of the model has a dense MLP that ds_cp finds."""
    layers, found = model.config.get_text_config().num_hidden_layers, len(mlps(model))
    if layers != found:
        raise ValueError(
            f"sequence_parallel.tiled_mlp: {found} of the {layers} layers of {type(model).__name__} have a dense MLP named "
            f"{NAME!r} (mixtures of experts are not tiled in this version); set it to false"
        )


class Door:
    """The MLPs and norms of one attached model."""

    def __init__(self, model: PreTrainedModel, on: bool) -> None:
        self._modules = list(_calls(model)) if on else []
        self.tile = model.config.get_text_config().hidden_size
        """Tokens: so many that a tile's products with the weights are as large as the weights themselves, bound by arithmetic."""
        self._before: list[tuple[bool, Callable[..., Tensor]]] = []

    def apply(self) -> None:
        for module, call in self._modules:
            self._before.append(("forward" in module.__dict__, module.forward))
            module.forward = partial(call, module, module.forward, self.tile)

    def remove(self) -> None:
        for (module, _), (own, forward) in zip(self._modules, self._before, strict=True):
            if own:
                module.forward = forward
            else:
                del module.forward
        self._before = []


def _decoder(model: PreTrainedModel) -> nn.Module:
    return model.get_decoder() if hasattr(model, "get_decoder") else model


def _calls(model: PreTrainedModel) -> Iterator[tuple[nn.Module, Callable[..., Tensor]]]:
    yield from ((module, _mlp) for module in mlps(model))
    yield from ((module, _in_tiles) for module in norms(model))


def _mlp(module: nn.Module, plain: Callable[[Tensor], Tensor], tile: int, x: Tensor) -> Tensor:
    split = any(hasattr(p, "ds_id") and p.requires_grad for p in module.parameters())
    if torch.is_grad_enabled() and not x.requires_grad and split:
        raise ValueError(
            "sequence_parallel.tiled_mlp: under ZeRO-3 an MLP cannot be trained whose input needs no gradient (all that comes "
            "before it is frozen): DeepSpeed would lose its gradient; set it to false, or use ZeRO 0 to 2"
        )
    return _in_tiles(module, plain, tile, x)


def _in_tiles(module: nn.Module, plain: Callable[[Tensor], Tensor], tile: int, x: Tensor) -> Tensor:
    return plain(x) if x.shape[-2] <= tile else tiled(plain, x, tile, tuple(module.parameters()))
