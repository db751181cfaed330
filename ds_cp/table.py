"""The table at the start of a run: what stands in the block, and what it is in this run."""

from __future__ import annotations

from transformers import PreTrainedModel

from ds_cp import layout, profiling
from ds_cp.batch import Methods
from ds_cp.config import Config, profile_of
from ds_cp.kernels import choice
from ds_cp.mesh import Mesh
from ds_cp.models import lm_head


def _describe_chunk(block: Config, model: PreTrainedModel) -> str:
    head = model.get_output_embeddings()
    if block.loss_chunk != "auto" or head is None:
        return str(block.loss_chunk)
    return f"tiles of {lm_head.TILE_BYTES >> 20} MiB of logits, whole logits where a shard's are no more"


def print_table(block: Config, mesh_: Mesh, methods: Methods, model: PreTrainedModel) -> None:
    """What the run does, "auto" resolved, once, on the calling rank."""
    from rich.console import Console
    from rich.table import Table

    degrees = mesh_.topology
    table = Table(title="ds_cp: sequence parallelism", title_justify="left")
    for column in ("setting", "in the config", "in this run"):
        table.add_column(column)
    resolved = {
        "size": degrees.size,
        "ulysses_size": degrees.ulysses,
        "ring_size": degrees.ring,
        "layout": layout.describe(block.layout),
        "attention_kernel": choice.describe(methods.attention),
        "ring_impl": _describe_ring(methods, degrees.ring),
        "ring_keep": methods.ring_keep,
        "attention_head_chunks": methods.head_chunks,
        "loss_reduction": "token_mean if counted, else mean" if block.loss_reduction == "auto" else block.loss_reduction,
        "loss_chunk": _describe_chunk(block, model),
        "loss_kernel": "ds_cp's own" if block.loss_kernel == "auto" else block.loss_kernel,
        **_linear_rows(methods),
        "tiled_mlp": f"{model.config.get_text_config().hidden_size} tokens a tile" if block.tiled_mlp is True else "off",
        "activation_offload": block.activation_offload,
        "comm_timeout_s": block.comm_timeout_s,
        "profile": profiling.describe(profile_of(block)),
    }
    for name, value in resolved.items():
        table.add_row(name, str(getattr(block, name)), str(value))
    table.add_row("data-parallel replicas", "", str(degrees.data))
    Console().print(table)


def _describe_ring(methods: Methods, ring: int) -> str:
    if methods.ring_impl != "auto" or ring <= 2 or not methods.gathered_tokens:
        return methods.ring_impl.replace("auto", "p2p")
    return f"allgather for one document of at most {ring * methods.gathered_tokens:,} tokens, else p2p"


def _linear_rows(methods: Methods) -> dict[str, str]:
    if methods.scans:
        return {"linear_attention": "heads; scan in PyTorch"}
    if methods.delta is None:
        return {}
    return {"linear_attention": methods.linear, "delta_kernel": methods.delta.__name__.split(".")[-1]}
