"""Calls that ask a model for what its tokens scored: `model(**batch, labels=..., fused_lm_head=True)`, as TRL's trainers call the
head that they give a model.

On an attached model such a call has the values of whole rows, the same on every rank of a group, in the places that TRL gives them:
entry j belongs to the label at j + 1, so rows are one shorter. A loss of them is computed alike on every rank, and its gradient is
that of the mean over ranks, as `unshard` has it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.utils import ModelOutput

from ds_cp import batch as batches
from ds_cp import comm
from ds_cp.batch import SequenceContext
from ds_cp.token_values import TokenValues

KEY = "fused_lm_head"


@dataclass
class TokenOutput(ModelOutput):
    """What TRL reads, all [B, S - 1]; None where it was not asked for. Only `log_probs` and `entropy` have a gradient."""

    loss: Tensor | None = None
    log_probs: Tensor | None = None
    entropy: Tensor | None = None
    log_sum_sq_probs: Tensor | None = None
    mean_logits: Tensor | None = None
    is_top1: Tensor | None = None
    label_mask: Tensor | None = None
    aux_loss: Tensor | None = None


@dataclass(frozen=True)
class Call:
    """One such forward pass."""

    asked: TokenValues
    mask: Tensor
    """[B, S - 1]: which of the whole rows' tokens are scored."""

    def end(self, local: Tensor, aux_loss: Tensor | None, context: SequenceContext) -> TokenOutput:
        """From the values of the local tokens [1, T, K], and the row's balance loss; every rank of the group must call it."""
        whole = batches.unshard(comm.all_gather(local, context.mesh.seq.group), context)[:, :-1]
        names = ["log_probs", *(["entropy"] if self.asked.entropies else []), *self.asked.extras]
        values = dict(zip(names, whole.unbind(-1), strict=True))
        found = {name: value.detach() if name in self.asked.extras else value for name, value in values.items()}
        if "is_top1" in found:
            found["is_top1"] = found["is_top1"].bool()
        return TokenOutput(**found, label_mask=self.mask.to(local.device), aux_loss=aux_loss)


def begin(given: dict[str, Any], asked: TokenValues | None) -> Call | None:
    """Takes the keyword out of a batch of whole rows; None if it is another kind of call.

    Raises:
        ValueError: nobody has said what such a call is for, or it has no labels.
    """
    if not given.pop(KEY, False):
        return None
    if asked is None:
        raise ValueError(f"{KEY}: this model is not trained by ds_cp.TrainerMixin; call ds_cp.token_logprobs instead")
    if given.get("labels") is None:
        raise ValueError(f"{KEY}: the call has no labels [B, S], so there is nothing to score; pass them")
    given["token_values"] = asked
    return Call(asked, _mask(given))


def _mask(batch: Mapping[str, Any]) -> Tensor:
    with torch.no_grad():
        return (batches.shifted_targets(batch) != batches.IGNORE)[:, :-1]
