"""The door for layers that drop unknown keywords on the way to their attention (StableLM, Nemotron): what a layer was called with
is handed to the attention inside it. Hooks of this instance, undone by `remove`.

Checkpointing runs a layer's forward again in backward, past the layer's hooks (transformers 5.23) and perhaps after other rows have
gone through it. So where a layer is checkpointed, what it runs again has its own call's context with it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

KEY = "cp"
FUNCTION = "_gradient_checkpointing_func"
"""The attribute by which transformers gives a layer its checkpoint function."""


class Relay:
    """From one layer to those inside it that mix tokens, which take keywords."""

    def __init__(self, layer: nn.Module, *mixers: nn.Module, key: str = KEY) -> None:
        self._key = key
        self._given: list[Any] = []
        """What the layer's calls that have not returned were given."""
        self._hooks = [
            layer.register_forward_pre_hook(self._enter, with_kwargs=True),
            layer.register_forward_hook(self._leave, always_call=True),
            *(mixer.register_forward_pre_hook(self._hand_over, with_kwargs=True) for mixer in mixers),
        ]

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _enter(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self._given.append(kwargs.get(self._key))
        if getattr(module, "gradient_checkpointing", False) and FUNCTION in module.__dict__:
            setattr(module, FUNCTION, partial(self._checkpointed, kwargs.get(self._key), module.__dict__[FUNCTION]))

    def _leave(self, module: nn.Module, *_: Any) -> None:
        self._given.pop()
        while isinstance(own := module.__dict__.get(FUNCTION), partial) and isinstance(getattr(own.func, "__self__", None), Relay):
            setattr(module, FUNCTION, own.args[1])  # past the relays of other keywords too: the layer is done

    def _checkpointed(self, given: Any, checkpoint: Callable[..., Any], function: Callable[..., Any], *args: Any) -> Any:
        def again(*inputs: Any) -> Any:
            self._given.append(given)
            try:
                return function(*inputs)
            finally:
                self._given.pop()

        return checkpoint(again, *args)

    def _hand_over(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        if kwargs.get(self._key) is not None or not self._given or self._given[-1] is None:
            return None
        return args, {**kwargs, self._key: self._given[-1]}


def relays(model: nn.Module, mixers: dict[str, nn.Module]) -> list[Relay]:
    """One for each layer that takes keywords and has attention, or other mixers, that take keywords themselves; and one from the
    model to what is under its head, for models that keep them to themselves (Mamba-2)."""
    pairs = [(model.get_submodule(name.rpartition(".")[0]), mixer) for name, mixer in mixers.items() if "." in name]
    inner = getattr(model, "base_model", model)
    pairs += [(model, inner)] if inner is not model else []
    by_layer: dict[nn.Module, list[nn.Module]] = {}
    for layer, mixer in pairs:
        if _takes_keywords(layer) and _takes_keywords(mixer):
            by_layer.setdefault(layer, []).append(mixer)
    return [Relay(layer, *inside) for layer, inside in by_layer.items()]


def _takes_keywords(module: nn.Module) -> bool:
    parameters = inspect.signature(type(module).forward).parameters.values()
    return any(parameter.kind == inspect.Parameter.VAR_KEYWORD for parameter in parameters)
