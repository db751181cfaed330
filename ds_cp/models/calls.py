"""What a call of an attached model may not ask for, and what may not have been done to the model since it was attached."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import PreTrainedModel


def refuse_changes(model: PreTrainedModel, implementation: str) -> None:
    """Raises a ValueError for changes under which a shard would be taken for the row; `implementation` is ds_cp's attention."""
    found = model.config.get_text_config()._attn_implementation
    if found != implementation:
        raise ValueError(f"model: its attention was set to {found} under ds_cp; do that inside `with ds_cp.disabled(engine):` only")
    if model._compiled_call_impl is not None:
        raise ValueError("torch.compile: the model was compiled under ds_cp, which is not in this version; leave that out")


def refuse_keywords(given: dict[str, Any]) -> None:
    """Raises a ValueError for keywords whose meaning is that of a whole row."""
    if given.get("past_key_values") is not None or given.get("use_cache"):
        raise ValueError("batch: decoding with a cache is not sharded; generate inside `with ds_cp.disabled(engine):`")
    if given.get("output_attentions"):
        raise ValueError("batch: output_attentions is not available: the scores of a row are never in one place")
    keep = given.get("logits_to_keep", 0)
    if isinstance(keep, Tensor) or keep:
        raise ValueError("batch: logits_to_keep would count from the end of a shard; leave it out")
