"""The door to a model's routers: hooks on them (of this instance, undone by `remove`) note what each gives for the local tokens.

The model itself is told `output_router_logits=False`: it would make the balance loss of a shard. The row's is added to the loss
where the model calls its `loss_function`, and stands in the output as `aux_loss`.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ds_cp.batch import SequenceContext
from ds_cp.loss import CausalLMLoss
from ds_cp.router_loss import balance_loss

KEY = "output_router_logits"


def routers(model: nn.Module) -> list[nn.Module]:
    """Modules that choose experts, and give their logits first."""
    return [module for module in model.modules() if type(module).__name__.lower().endswith("topkrouter")]


def coefficient(model: PreTrainedModel) -> float | None:
    """Of the balance loss; vision-language models have it in the config of their language model alone."""
    return getattr(model, "router_aux_loss_coef", getattr(model.config.get_text_config(), "router_aux_loss_coef", None))


class Door:
    """The routers of one attached model."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model, self._modules = model, routers(model)
        self._keyword = KEY in inspect.signature(type(model).forward).parameters
        self._hooks: list[Any] = []
        self._logits: list[Tensor] | None = None
        self._grad = False
        self._parts: tuple[Tensor, Tensor] | None = None

    def apply(self) -> None:
        self._hooks = [module.register_forward_hook(self._note) for module in self._modules]

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def begin(self, asked: bool | None) -> dict[str, Any]:
        """Keywords for this forward pass of the model; `asked` is what the call says about `output_router_logits`."""
        wanted = getattr(self._model.config.get_text_config(), KEY, False) if asked is None else asked
        if wanted and not (self._keyword and self._modules and coefficient(self._model) is not None):
            raise ValueError(
                f"model: {KEY} is set, but {type(self._model).__name__} has no balance loss in transformers; set it to False"
            )
        self._logits, self._parts, self._grad = [] if wanted else None, None, torch.is_grad_enabled()
        return {KEY: False} if self._keyword else {}

    def loss(self, loss: CausalLMLoss, items: Tensor | float | None, context: SequenceContext | None) -> Tensor | None:
        """The balance loss with its coefficient, as `loss` reduces it; None where it is off."""
        if self._logits is None or context is None:
            return None
        weight = coefficient(self._model)
        assert weight is not None
        return loss.once(*self._row(context), weight, items, context)

    def end(self, output: Any, context: SequenceContext) -> Any:
        """The model's output with the row's balance loss in it, whose gradient is as that of `unshard`: for the mean over ranks."""
        if self._logits is None:
            return output
        local, whole = self._row(context)
        self._logits = self._parts = None
        if isinstance(output, tuple):
            return output
        mean = CausalLMLoss(reduction="mean", divisor=lambda: 1)
        return type(output)(**{**output, "aux_loss": mean.once(local, whole, 1.0, None, context)})

    def _row(self, context: SequenceContext) -> tuple[Tensor, Tensor]:
        if self._parts is None:
            assert self._logits is not None
            if len(self._logits) != len(self._modules):
                raise ValueError(
                    f"model: {len(self._logits)} of its {len(self._modules)} routers ran, so the balance loss would be wrong; set "
                    f"{KEY} to False"
                )
            self._parts = balance_loss(self._logits, self._model.config.get_text_config().num_experts_per_tok, context)
        return self._parts

    def _note(self, module: nn.Module, args: tuple, output: tuple[Tensor, ...]) -> None:
        if self._logits is None:  # off, or recomputed in backward
            return
        if self._grad and not torch.is_grad_enabled():
            raise ValueError(
                f"model: {KEY} is set under reentrant gradient checkpointing, where the balance loss would have no gradient; use "
                'gradient_checkpointing_kwargs={"use_reentrant": False}, or where TRL sets it (adapters under ZeRO-3) ZeRO 1 or 2, '
                "or router_aux_loss_coef=0"
            )
        self._logits.append(output[0].flatten(0, -2))
