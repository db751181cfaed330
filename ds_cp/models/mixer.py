"""What replaced forwards of token mixers share: how they are put in place, instance by instance, and what is checked first."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Protocol

from torch import Tensor, nn

from ds_cp import convolution
from ds_cp.batch import SequenceContext

Map = Callable[[Tensor], Tensor]
"""A projection, a norm or an activation."""
Parameters = Callable[[Tensor], tuple[Tensor, Tensor | None]]
"""A module whose forward is `parameters`."""


class GatedNorm(Protocol):
    """HF's norm of (x, gate)."""

    variance_epsilon: float

    def __call__(self, hidden_states: Tensor, gate: Tensor, /) -> Tensor: ...


def replace(forwards: Iterable[tuple[nn.Module, Callable[..., Any]]]) -> Callable[[], None]:
    """Gives each module a forward, a function that takes the module first; returns what gives them their own back."""
    replaced = []
    for module, forward in forwards:
        module.forward = partial(forward, module)
        replaced.append(module)

    def undo() -> None:
        for module in replaced:
            del module.forward

    return undo


def begin(module: nn.Module, cp: SequenceContext | None, *whole: Any) -> SequenceContext:
    """The context of a mixer's call, which is counted.

    Args:
        whole: what the layer was given that only a whole row has (a cache, a mask).

    Raises:
        ValueError: it was given no context, or something of `whole`.
    """
    name = type(module).__name__
    if cp is None:
        raise ValueError(f"model: {name} was called without ds_cp's context; it cannot be trained under sequence parallelism")
    if any(each is not None for each in whole):
        raise ValueError(f"model: {name} was given a cache or a mask, which shards do not have")
    if cp.census is not None:
        cp.census.calls[id(module)] += 1
    return cp


def parameters(conv: nn.Conv1d, _: Tensor) -> tuple[Tensor, Tensor | None]:
    """In a convolution's place: (weight [C, channels of a group, W], bias [C]) as copies, because ZeRO-3, whose hooks put the
    parameter together for the call and its backward, takes it apart after it."""
    return conv.weight.clone(), None if conv.bias is None else conv.bias.clone()


def convolved(conv: Parameters, x_TC: Tensor, context: SequenceContext) -> Tensor:
    """Local tokens after a causal convolution of each document, [T, C], by a module whose forward is `parameters`."""
    assert context.held.halo is not None, "planned without the convolution"
    weight, bias = conv(x_TC)
    return convolution.convolve(x_TC, weight, bias, len(weight), context.held.halo)
