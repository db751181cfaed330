"""A model's counts, from a name, a folder or a config file; its weights are not read."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import nn
from transformers import PreTrainedModel

from ds_cp import checking
from ds_cp.models import checks, family_of, mlp
from ds_cp.planner.shape import Linear, Shape

TOKENS = 8
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
    """
    Raises:
        ValueError: it has recurrent layers whose time and memory are not counted.
    """
    if scans := _scans(model):
        raise ValueError(
            f"plan: {name}: the planner does not know the scans of {', '.join(scans)}; choose sizes by hand and run ds-cp check, "
            "which knows them"
        )
    config = model.config.get_text_config()
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    tied = head is None or head.weight is embedding.weight
    own = 0 if tied else head.weight.numel()
    total = sum(p.numel() for p in model.parameters())
    mlps, mixers = matrices(model, {id(embedding.weight), *([id(head.weight)] if head is not None else [])})
    shapes, norms = checks.linear_shapes(model), mlp.norms(model)
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
        matrix=max(p.numel() for name, p in model.get_decoder().named_parameters() if p is not embedding.weight),
        norms=max((len(norms) - 1) // config.num_hidden_layers, 1),
        norm_kept=kept_by(norms[0], config.hidden_size),
        routed=_routed(model) if _experts(model) > 1 else 0,
        tiled_mlp_refused=_refused(model),
    )


def kept_by(norm: nn.Module, hidden: int) -> float:
    """What autograd keeps of a norm in bf16 beside its input and weight, and its output, in its input's elements."""
    norm = copy.deepcopy(norm).to(device="meta", dtype=torch.bfloat16)
    x = torch.empty(1, TOKENS, hidden, dtype=torch.bfloat16, device="meta", requires_grad=True)
    own = {x.untyped_storage()._cdata, *(p.untyped_storage()._cdata for p in norm.parameters())}
    kept: dict[int, torch.UntypedStorage] = {}  # the storages too, so that none takes another's place

    def keep(saved: torch.Tensor) -> torch.Tensor:
        kept[saved.untyped_storage()._cdata] = saved.untyped_storage()
        return saved

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved):
        out = norm(x)
    kept[out.untyped_storage()._cdata] = out.untyped_storage()
    whole = sum(storage.nbytes() for key, storage in kept.items() if key not in own and storage.nbytes() >= x.nbytes)
    return whole / x.nbytes


def _scans(model: PreTrainedModel) -> list[str]:
    """Classes of the recurrent layers other than Gated DeltaNet."""
    family = family_of(model.config)
    if family is None:
        return []
    return sorted({type(module).__name__ for module in family.mixers(model).values() if family.scan_heads(module) is not None})


def _windows(model: PreTrainedModel) -> tuple[int | None, ...]:
    """Chunks as windows of their size, which is the most that they cost."""
    found = checks.windows(model) if checks.attention_modules(model) else ()
    return tuple(window if window is None or isinstance(window, int) else window.size for window in found)


def _experts(model: PreTrainedModel) -> int:
    config = model.config.get_text_config()
    names = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
    return next((getattr(config, key) for key in names if getattr(config, key, None)), 1)


def _routed(model: PreTrainedModel) -> int:
    config = model.config.get_text_config()
    return next((getattr(config, key) for key in EXPERTS if getattr(config, key, None)), 1)


def size(parameter: torch.Tensor) -> int:
    """Elements, also of one that ZeRO-3 has partitioned."""
    return getattr(parameter, "ds_shape", parameter.shape).numel()


def matrices(model: PreTrainedModel, outside: set[int], count: Callable[[torch.Tensor], int] = size) -> tuple[int, int]:
    """Parameters of the language model's layers that multiply each token, of MLPs and of what mixes tokens.

    Args:
        outside: ids of parameters that are left out. count: of a parameter, what is summed.
    """
    towers = checks.other_modules(model)
    share = _routed(model) / _experts(model) if _experts(model) > 1 else 1.0
    found = [0.0, 0.0]
    for path, module in model.named_modules():
        if id(module) in towers:
            continue
        for leaf, parameter in module.named_parameters(recurse=False):
            shape = getattr(parameter, "ds_shape", parameter.shape)
            if len(shape) < 2 or id(parameter) in outside or isinstance(module, nn.Conv1d | nn.Embedding):
                continue
            parts = [*path.split("."), leaf]
            routed = "experts" in parts
            found[not any(part in MLPS for part in parts)] += count(parameter) * (share if routed else 1.0)
    return round(found[0]), round(found[1])


def _refused(model: PreTrainedModel) -> str | None:
    try:
        mlp.refuse(model)
    except ValueError as error:
        return str(error)
    return None
