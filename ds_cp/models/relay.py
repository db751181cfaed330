"""The door for layers that drop unknown keywords on the way to their attention (StableLM, Nemotron): what a layer was called with
is handed to the attention inside it. Hooks of this instance, undone by `remove`; also when checkpointing calls the layer again.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

KEY = "cp"


class Relay:
    """From one layer to its attention, which takes keywords."""

    def __init__(self, layer: nn.Module, attention: nn.Module, key: str = KEY) -> None:
        self._key = key
        self._given: list[Any] = []
        """What the layer's calls that have not returned were given."""
        self._hooks = [
            layer.register_forward_pre_hook(self._enter, with_kwargs=True),
            layer.register_forward_hook(self._leave, always_call=True),
            attention.register_forward_pre_hook(self._hand_over, with_kwargs=True),
        ]

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _enter(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self._given.append(kwargs.get(self._key))

    def _leave(self, *_: Any) -> None:
        self._given.pop()

    def _hand_over(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        if kwargs.get(self._key) is not None or not self._given or self._given[-1] is None:
            return None
        return args, {**kwargs, self._key: self._given[-1]}


def relays(model: nn.Module, attentions: dict[str, nn.Module]) -> list[Relay]:
    """One for each attention whose layer takes keywords, and which takes keywords itself."""
    pairs = ((model.get_submodule(name.rpartition(".")[0]), attention) for name, attention in attentions.items() if "." in name)
    return [Relay(layer, attention) for layer, attention in pairs if _takes_keywords(layer) and _takes_keywords(attention)]


def _takes_keywords(module: nn.Module) -> bool:
    parameters = inspect.signature(type(module).forward).parameters.values()
    return any(parameter.kind == inspect.Parameter.VAR_KEYWORD for parameter in parameters)
