"""The door to indexers (DeepSeek-V3.2, GLM-5 and alike): of each query they choose the keys of the row that its layer attends.

An indexer's own forward is called as before, with its parameters where they are: first for the index keys of the local tokens, then
for a tile of queries at a time against those of the whole row, which it takes from its cache as it would in decoding. Where
attention is not eager or SDPA, its layer hands the chosen keys on as the keyword `indices`, also to layers that share them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from ds_cp.batch import SequenceContext
from ds_cp.indexed import choose
from ds_cp.layout import Range

KEY = "indices"
STAND_IN = "ds_cp_stand_in"


class Cache:
    """What an indexer takes for its cache: notes the keys that it is given and returns none, or those of the whole row."""

    def __init__(self, whole: Tensor | None = None) -> None:
        self._whole = whole
        self.noted: Tensor | None = None

    def update_indexer(self, keys: Tensor, layer: int) -> Tensor:
        self.noted = keys
        return keys[:, :0] if self._whole is None else self._whole


class Door:
    """The indexers of one model; of a model without it does nothing."""

    def __init__(self, model: nn.Module) -> None:
        self._layers: list[Any] = indexers(model)
        self._given: list[Any] = []
        """Contexts of the calls of attention that have not returned."""
        self._hooks: list[Any] = []

    def apply(self) -> None:
        for attention in self._layers:
            attention.indexer.forward = partial(self._forward, attention.indexer.forward)
            self._hooks += [
                attention.register_forward_pre_hook(self._enter, with_kwargs=True),
                attention.register_forward_hook(self._leave, always_call=True),
            ]

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()
        for attention in self._layers:
            del attention.indexer.forward
        self._hooks = []

    def _enter(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """The layer takes its mask apart for the indexer, which is told another one."""
        self._given.append(kwargs.get("cp"))
        mask = torch.zeros(1, 1, 1, 1, dtype=torch.bool)
        setattr(mask, STAND_IN, True)
        return args, {**kwargs, "attention_mask": mask}

    def _leave(self, *_: Any) -> None:
        self._given.pop()

    @torch.no_grad()
    def _forward(
        self,
        plain: Callable[..., Tensor],
        hidden: Tensor,
        q_resid: Tensor,
        embeddings: tuple[Tensor, ...],
        attention_mask: Tensor,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
    ) -> Tensor:
        """[1, T, K] places in the row, int32."""
        context = self._given[-1]
        if not isinstance(context, SequenceContext):  # attention is left out
            return torch.zeros(*hidden.shape[:2], 0, dtype=torch.int32, device=hidden.device)
        none, noting = torch.zeros(1, 1, 0, dtype=torch.bool, device=hidden.device), Cache()
        plain(hidden, q_resid, embeddings, none, None, past_key_values=noting)
        assert noting.noted is not None

        def chosen(key_1SD: Tensor, mask_1QS: Tensor, tile: Range) -> Tensor:
            part = slice(*tile)
            queries = hidden[:, part], q_resid[:, part], tuple(x[:, part] for x in embeddings)
            return plain(*queries, mask_1QS, None, past_key_values=Cache(key_1SD))

        return choose(noting.noted.squeeze(0), chosen, cast(Any, plain).__self__.n_heads, context)


def indexers(model: nn.Module) -> list[nn.Module]:
    """Attention with an indexer of the known form, in the order in which layers run."""
    known = ("n_heads", "index_topk", "wk")
    found = ((m, getattr(m, "indexer", None)) for m in model.modules())
    return [m for m, indexer in found if isinstance(indexer, nn.Module) and all(hasattr(indexer, key) for key in known)]


def is_stand_in(mask: Tensor | None) -> bool:
    return mask is not None and getattr(mask, STAND_IN, False)
