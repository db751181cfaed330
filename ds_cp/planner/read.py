"""A model's counts, from a name, a folder or a config file; its weights are not read."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from ds_cp import checking
from ds_cp.models import checks, mlp
from ds_cp.planner.shape import Linear, Shape

EXPERTS = ("num_experts_per_tok", "moe_topk", "top_k_experts", "experts_per_token")
MLPS = ("mlp", "feed_forward", "block_sparse_moe", "experts", "shared_expert", "shared_experts", "moe")


def read(name: str) -> Shape:
    """
    Args:
        name: of a model, a folder with a config.json, or such a file.

    Raises:
        ValueError: there is no such model, or ds_cp cannot shard it.
    """
    return of(checking.read_model(name), name)


def of(model: PreTrainedModel, name: str) -> Shape:
    config = model.config.get_text_config()
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    tied = head is None or head.weight is embedding.weight
    own = 0 if tied else head.weight.numel()
    total = sum(p.numel() for p in model.parameters())
    mlps, mixers = _matrices(model, {id(embedding.weight), *([id(head.weight)] if head is not None else [])})
    shapes = checks.linear_shapes(model)
    return Shape(
        name=name,
        hidden=config.hidden_size,
        layers=config.num_hidden_layers,
        vocabulary=embedding.weight.shape[0],
        heads=tuple(sorted(checks.heads(model), reverse=True)),
        head_size=checks.head_size(model),
        windows=_windows(model),
        parameters=total,
        embedding=embedding.weight.numel(),
        head=own,
        mlp=mlps,
        mixers=mixers,
        linear=tuple(Linear(s.value_heads, s.key_heads, s.value_size, s.key_size) for s in shapes),
        query_key_norms=any(part.rpartition(".")[2] == "q_norm" for part, _ in model.named_modules()),
        experts=_experts(model) > 1,
        tiled_mlp_refused=_refused(model),
    )


def _windows(model: PreTrainedModel) -> tuple[int | None, ...]:
    return tuple(checks.windows(model)) if checks.attention_modules(model) else ()


def _experts(model: PreTrainedModel) -> int:
    config = model.config.get_text_config()
    names = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
    return next((getattr(config, key) for key in names if getattr(config, key, None)), 1)


def _matrices(model: PreTrainedModel, outside: set[int]) -> tuple[int, int]:
    """Parameters of the language model's layers that multiply each token, of MLPs and of what mixes tokens."""
    config, towers = model.config.get_text_config(), checks.vision_modules(model)
    met = next((getattr(config, key) for key in EXPERTS if getattr(config, key, None)), 1)
    share = met / _experts(model) if _experts(model) > 1 else 1.0
    found = [0.0, 0.0]
    for path, module in model.named_modules():
        if id(module) in towers:
            continue
        for leaf, parameter in module.named_parameters(recurse=False):
            if parameter.ndim < 2 or id(parameter) in outside or isinstance(module, nn.Conv1d):
                continue
            parts = [*path.split("."), leaf]
            routed = "experts" in parts
            found[not any(part in MLPS for part in parts)] += parameter.numel() * (share if routed else 1.0)
    return round(found[0]), round(found[1])


def _refused(model: PreTrainedModel) -> str | None:
    try:
        mlp.refuse(model)
    except ValueError as error:
        return str(error)
    return None
