"""The door to models that count positions themselves (BART and its kin, Llama 4), and to those that compute their loss themselves.

A decoder whose forward takes no position_ids numbers the tokens that it sees from 0, which in a shard are not the first ones of
their document, and looks the numbers up in its table of positions. The table is given the tokens' real positions instead, by a hook
of this instance that `remove` takes off.

Llama 4 numbers them for the temperature of its attention, by which it multiplies queries in its layers without RoPE. There its own
is switched off, and `with_temperature` takes the position_ids that the layer is given.

The first of these do not shift labels, as transformers documents, and hand no logits to a loss_function: the target of token i is
label i. Their loss is computed on what they return.
"""

from __future__ import annotations

import inspect
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ds_cp.mesh import Mesh
from ds_cp.models.relay import Relay
from ds_cp.models.replicas import any_replica

KEY = "position_ids"
TEMPERATURE = "attn_temperature_tuning"
MARK = "ds_cp_temperature"


class Door:
    """What counts positions in one model; in most models nothing."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model, self._tables, self._tempered = model, tables(model), tempered(model)
        self._hooks: list[Any] = []
        self._positions_1T: Tensor | None = None

    def apply(self) -> None:
        self._hooks = [table.register_forward_pre_hook(self._look_up, with_kwargs=True) for table in self._tables]
        for name, module in self._tempered.items():
            self._hooks.append(Relay(self._model.get_submodule(name.rpartition(".")[0]), module, key=KEY))
            setattr(module, MARK, getattr(module, TEMPERATURE))
            setattr(module, TEMPERATURE, False)

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._positions_1T = [], None
        for module in self._tempered.values():
            setattr(module, TEMPERATURE, getattr(module, MARK))
            delattr(module, MARK)

    def check(self, given_BS: Tensor | None, mesh: Mesh, device: torch.device) -> None:
        """Looks at the position_ids of a call, of whole rows.

        Raises:
            ValueError: they count otherwise than the model does; in training on every rank, where those of any replica do.
        """
        if not self._tables and not self._tempered:
            return
        reason = None
        if given_BS is not None and not _from_zero(given_BS):
            reason = ValueError(
                "batch: position_ids that do not count from 0 in every document, but the model counts so by itself and takes no "
                "others; leave them out, or give seq_lens to tell documents apart"
            )
        if torch.is_grad_enabled():
            any_replica(False, reason, mesh, device)
        elif reason is not None:  # replicas may evaluate different numbers of rows
            raise reason

    def begin(self, positions_1T: Tensor) -> None:
        """Notes the local tokens' positions."""
        self._positions_1T = positions_1T

    def _look_up(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        counted = kwargs.get(KEY)
        assert self._positions_1T is not None
        assert isinstance(counted, Tensor)
        assert counted.shape[-1] == self._positions_1T.shape[-1]
        return args, {**kwargs, KEY: self._positions_1T[0] if counted.ndim == 1 else self._positions_1T}


def tables(model: PreTrainedModel) -> list[nn.Module]:
    """Embeddings of position_ids that a module looks up which was given none."""
    decoder = model.get_decoder()
    named = ((name.rpartition(".")[0], m) for name, m in decoder.named_modules() if name and isinstance(m, nn.Embedding))
    return [m for owner, m in named if takes(m, KEY) and not takes(decoder.get_submodule(owner), KEY)]


def tempered(model: nn.Module) -> dict[str, nn.Module]:
    """Attention whose queries get a temperature by position, in the form that `with_temperature` knows, by name."""
    known = ("floor_scale", "attn_scale", "use_rope")
    asked = {name: m for name, m in model.named_modules() if getattr(m, TEMPERATURE, False) and all(hasattr(m, k) for k in known)}
    return {name: module for name, module in asked.items() if not module.use_rope}


def with_temperature(module: nn.Module, query_1NTH: Tensor, positions_1T: Tensor | None) -> Tensor:
    """q * (1 + attn_scale * log(1 + floor((position + 1) / floor_scale))) of a layer whose own temperature is switched off."""
    if not getattr(module, MARK, False):
        return query_1NTH
    if positions_1T is None:
        raise ValueError(
            f"model: {type(module).__name__} was not given the position_ids that its attention's temperature is made of"
        )
    floor_scale, attn_scale = (cast(float, getattr(module, name)) for name in ("floor_scale", "attn_scale"))
    steps = torch.floor((positions_1T.float() + 1.0) / floor_scale)
    scale_1T = torch.log1p(steps) * attn_scale + 1.0
    return (query_1NTH * scale_1T[:, None, :, None]).to(query_1NTH.dtype)


def takes(module: nn.Module, keyword: str) -> bool:
    return keyword in inspect.signature(type(module).forward).parameters


def computes_its_loss(model: nn.Module) -> bool:
    """Whether the class hands its logits to no loss_function. That it then shifts no labels is left to the trial."""
    code = getattr(inspect.unwrap(type(model).forward), "__code__", None)
    return code is not None and "loss_function" not in code.co_names


def unshifted(given: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """The keywords of a call whose labels are not to be shifted.

    Raises:
        ValueError: they were counted as if they were.
    """
    if given.get("labels") is None:
        return given
    if given.get("num_items_in_batch") is not None:
        raise ValueError(
            f"batch: {type(model).__name__} takes label i as the target of token i, while num_items_in_batch was counted for "
            "labels that are shifted; name them shift_labels, or leave num_items_in_batch out"
        )
    return {**{key: value for key, value in given.items() if key != "labels"}, "shift_labels": given["labels"]}


def with_loss(output: Any, loss: Tensor) -> Any:
    """A model's output with the loss that it did not compute."""
    return (loss, *output) if isinstance(output, tuple) else type(output)(**{**output, "loss": loss})


def _from_zero(positions_BS: Tensor) -> bool:
    starts = positions_BS[..., 1:][positions_BS.diff() != 1]
    return not bool(positions_BS[..., 0].any()) and not bool(torch.any(starts))
