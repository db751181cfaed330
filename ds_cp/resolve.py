"""How layers are computed under a block: every "auto" of it resolved for a model on a topology. Nothing is sent."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from deepspeed.accelerator import get_accelerator

from ds_cp import topology
from ds_cp.balance import Chunks
from ds_cp.batch import Methods
from ds_cp.config import Config
from ds_cp.kernels import choice, probe
from ds_cp.kernels import delta as deltas
from ds_cp.kernels.attention import Kernel
from ds_cp.models import checks

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def compute_dtype(ds_config: Mapping[str, Any], model: PreTrainedModel) -> torch.dtype:
    """The dtype of activations: what DeepSpeed makes of the model under this config, else the model's own."""
    for names, dtype in {("bf16", "bfloat16"): torch.bfloat16, ("fp16",): torch.float16}.items():
        if any(ds_config.get(name, {}).get("enabled") is True for name in names):
            return dtype
    autocast = ds_config.get("torch_autocast", {})
    if autocast.get("enabled") is True:
        return getattr(torch, str(autocast.get("dtype", "bfloat16")).removeprefix("torch."))
    return next(model.parameters()).dtype


def methods_of(
    block: Config, model: PreTrainedModel, degrees: topology.Topology, dtype: torch.dtype, local_world: int = 0
) -> Methods:
    """How layers are computed, every "auto" resolved; without `local_world` all ranks are on one node.

    Raises:
        ValueError: a kernel cannot serve here, or the DeltaNet layers have too few heads for the ranks.
    """
    shapes = checks.linear_shapes(model)
    scans = bool(checks.scan_heads(model))
    linear = topology.resolve_linear(block.linear_attention, degrees, checks.linear_heads(model), passes=not scans)
    split, asked = topology.split_heads(degrees.ulysses, *checks.heads(model)[0]), block.attention_head_chunks
    passing = linear == "state" and degrees.ring > 1 and bool(shapes)
    chunks = topology.resolve_head_chunks(asked, degrees, checks.heads(model), passing, least_memory=block.activation_offload)
    return Methods(
        attention=kernel_of(block, model),
        layout=block.layout,
        ring_impl=block.ring_impl,
        gathered_tokens=choice.gathered_tokens(split.query, checks.head_size(model), get_accelerator().device_name()),
        beside=torch.cuda.Stream() if get_accelerator().device_name() == "cuda" else None,
        delta=_delta_kernel(block, shapes, dtype, passing) if shapes else None,
        linear=linear,
        windows=checks.windows(model),
        scans=scans,
        halo=checks.halo(model),
        head_chunks=chunks,
        ring_keep=topology.resolve_ring_keep(block.ring_keep, degrees, local_world or degrees.world, chunks),
    )


def _delta_kernel(block: Config, shapes: list[deltas.Shapes], dtype: torch.dtype, passing: bool) -> deltas.Kernel:
    device = get_accelerator().device_name()
    kernel = deltas.resolve(block.delta_kernel, device)
    for each in dict.fromkeys(shapes):
        reason = kernel.unsupported(each, device, dtype, passing)
        if reason is not None:
            raise ValueError(f"sequence_parallel.delta_kernel: {kernel.__name__.split('.')[-1]}: {reason}")
    return kernel


def wrong_kernel(methods: Methods, model: PreTrainedModel, degrees: topology.Topology, dtype: torch.dtype) -> str | None:
    """What the attention kernel does not compute, or computes wrong on this rank, of what the model will ask of it."""
    config = model.config.get_text_config()
    split = topology.split_heads(degrees.ulysses, *checks.heads(model)[0])
    asked = probe.Asked(
        query_heads=split.query,
        kv_heads=split.kv,
        head_size=checks.head_size(model),
        windows=tuple(None if isinstance(window, Chunks) else window for window in methods.windows),
        softcap=getattr(config, "attn_logit_softcapping", None),
        rectangles=degrees.ring > 1,
    )
    found = probe.trouble(methods.attention, asked, dtype, torch.device(get_accelerator().current_device_name()))
    return found and f"sequence_parallel.attention_kernel: {found}"


def kernel_of(block: Config, model: PreTrainedModel) -> Kernel:
    """The attention kernel, "auto" resolved by the device and the model; refuses one that is of another device or not installed."""
    device = get_accelerator().device_name()
    capability = torch.cuda.get_device_capability()[0] if device == "cuda" else None
    softcap = bool(getattr(model.config.get_text_config(), "attn_logit_softcapping", None))
    return choice.resolve(block.attention_kernel, device, capability, softcap)
