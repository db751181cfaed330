"""`deepspeed.initialize` with sequence parallelism: checks, mesh, measurement, DeepSpeed's own engine, hooks."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import set_z3_leaf_module
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from ds_cp import agreement, comm, factor, launch, mesh, meter, preflight, profiling, topology, watch
from ds_cp import batch as batches
from ds_cp import config as configs
from ds_cp.batch import Methods
from ds_cp.config import Config
from ds_cp.kernels import choice
from ds_cp.loader import StepLoader, data_loader
from ds_cp.loss import CausalLMLoss
from ds_cp.mesh import Mesh
from ds_cp.models import attach, checks, lm_head, mlp, trial
from ds_cp.resolve import compute_dtype, methods_of, wrong_kernel
from ds_cp.table import print_table
from ds_cp.token_values import TokenValues, of_logits

Source = str | os.PathLike[str] | Mapping[str, Any]


def initialize(
    args: Any = None,
    model: nn.Module | None = None,
    optimizer: Any = None,
    model_parameters: Any = None,
    training_data: Any = None,
    lr_scheduler: Any = None,
    distributed_port: int | None = None,
    mpu: Any = None,
    dist_init_required: bool | None = None,
    collate_fn: Callable[[list[Any]], dict[str, Any]] | None = None,
    config: Source | None = None,
    mesh_param: Any = None,
    config_params: Source | None = None,
) -> tuple[deepspeed.DeepSpeedEngine, Any, StepLoader | Any, Any]:
    """`deepspeed.initialize`: the same arguments and the same four results, for a model whose rows are shared by ranks.

    What is shared is in the config's `sequence_parallel` block; without it, or with size 1, this is `deepspeed.initialize`.
    The engine takes whole rows, the same on every rank of a group, and returns the loss of the whole row.

    Raises:
        ValueError: on every rank, before training: the block, the model, the batch arithmetic or the launch is not supported.
    """
    source = next((each for each in (config, config_params, getattr(args, "deepspeed_config", None)) if each is not None), None)
    if source is None:
        raise ValueError("config: pass config=<path or dict>, as to deepspeed.initialize")
    ds_config, block = launch.read(source)
    given = {
        "args": args,
        "model": model,
        "optimizer": optimizer,
        "model_parameters": model_parameters,
        "lr_scheduler": lr_scheduler,
        "dist_init_required": dist_init_required,
    }
    given |= {} if distributed_port is None else {"distributed_port": distributed_port}
    if block.size == 1:
        launch.say_off(block)
        data = {"training_data": training_data, "collate_fn": collate_fn}
        return deepspeed.initialize(**given, **data, mpu=mpu, config=ds_config, mesh_param=mesh_param)
    if mpu is not None or mesh_param is not None:
        raise ValueError("mpu, mesh_param: ds_cp brings its own process groups beside DeepSpeed's; leave them out")
    launch.init_distributed(block.comm_timeout_s)  # of one rank, which read the config alone
    mesh_, methods = prepare(model, block, ds_config)
    factor.verify(ds_config, backward_divides=True)
    ours = {k: v for k, v in ds_config.items() if k != configs.BLOCK}
    ours["sequence_parallel_size"] = mesh_.seq.size  # DeepSpeed's batch arithmetic then counts replicas
    engine, optimizer, _, scheduler = deepspeed.initialize(**given, config=ours)
    handle = attach_model(engine.module, block, mesh_, engine.gradient_accumulation_steps, methods)
    assert handle.watch is not None
    assert handle.meter is not None
    handle.watch.follow(engine, "global_steps")
    handle.before_backward = lambda: _refuse_plain_backward(engine)
    meter.report_to_monitor(engine, handle.meter)
    loader = None
    if training_data is not None:
        loader = data_loader(engine, training_data, collate_fn, drop_last=ds_config.get("dataloader_drop_last") is True)
    return engine, optimizer, loader, scheduler


def _refuse_plain_backward(engine: deepspeed.DeepSpeedEngine) -> None:
    """DeepSpeed 0.19.8 divides the gradient of `loss.backward()` by the accumulation steps twice at ZeRO 1 and 2, once at 3."""
    steps, stage = engine.gradient_accumulation_steps(), engine.zero_optimization_stage()
    if steps > 1 and stage in (1, 2) and not getattr(engine, "_running_engine_backward", True):
        raise ValueError(
            f"loss.backward(): at ZeRO {int(stage)} with {steps} accumulation steps DeepSpeed {deepspeed.__version__} would make "
            f"its gradient {steps} times too small; call engine.backward(loss)"
        )


def prepare(model: nn.Module | None, block: Config, ds_config: Mapping[str, Any]) -> tuple[Mesh, Methods]:
    """Everything that can be refused, then the process groups; the process group of the job must be up.

    Returns:
        The mesh, and how layers are computed on it.

    Raises:
        ValueError: on every rank: the model or the sizes are not supported, or ranks differ.
    """
    inner = preflight.together(lambda: _model(model, ds_config))
    agreement.agree(agreement.of_model(inner), agreement.MODEL)
    local_world = mesh.local_world_size()
    degrees, methods, dtype = preflight.together(lambda: _resolve(inner, block, ds_config, local_world))
    delta = methods.delta and (methods.delta.__name__, methods.linear)
    found = {"sizes": degrees, "activations": dtype, "attention_kernel": choice.identity(methods.attention), "delta_kernel": delta}
    ring = methods.ring_impl, methods.gathered_tokens, methods.ring_keep
    found |= {"ring_impl, ring_keep": ring, "attention_head_chunks": methods.head_chunks}
    agreement.agree(found, "Give all hosts the same packages and GPUs, or name a kernel that all have")
    preflight.refuse_together(preflight.together(lambda: wrong_kernel(methods, inner, degrees, dtype)))
    mesh_ = mesh.build(degrees, block.comm_timeout_s)
    if dist.get_rank() == 0:
        print_table(block, mesh_, methods, inner)
    return mesh_, methods


def _model(given: Any, ds_config: Mapping[str, Any]) -> PreTrainedModel:
    """The HF model inside what was given."""
    if not isinstance(given, nn.Module):
        raise ValueError(f"model: pass a Hugging Face model, as to deepspeed.initialize; got {given!r:.60}")
    preflight.refuse_compiled(given)
    preflight.refuse_adapters(given)
    model = checks.hugging_face(attach.find(given))
    preflight.refuse_sections(ds_config, model.config.model_type)
    return model


def _resolve(
    model: PreTrainedModel, block: Config, ds_config: Mapping[str, Any], local_world: int
) -> tuple[topology.Topology, Methods, torch.dtype]:
    """Every "auto" resolved, or refused; nothing is sent."""
    trial.refuse(model)
    if block.tiled_mlp is True:
        mlp.refuse(model)
    if block.loss_kernel == "liger":
        lm_head.refuse_liger(model, get_accelerator().device_name())
    for module in _gathered_as_one(model, block):
        set_z3_leaf_module(module, True)
    degrees = topology.resolve(
        block.size,
        block.ulysses_size,
        block.ring_size,
        world=dist.get_world_size(),
        local_world=local_world,
        heads=checks.heads(model),
        linear_heads=checks.linear_heads(model),
        linear="heads" if checks.scan_heads(model) else block.linear_attention,
    )
    dtype = compute_dtype(ds_config, model)
    return degrees, methods_of(block, model, degrees, dtype, local_world), dtype


def _gathered_as_one(model: PreTrainedModel, block: Config) -> list[nn.Module]:
    """Modules of several modules that run in tiles: ZeRO-3 would gather each part in every tile."""
    head = model.get_output_embeddings()
    tiled_head = block.loss_chunk != 0 and lm_head.is_composite(head)
    return [*([head] if tiled_head else []), *(mlp.mlps(model) if block.tiled_mlp is True else [])]


def attach_model(
    model: nn.Module,
    block: Config,
    mesh_: Mesh,
    divisor: Callable[[], int],
    methods: Methods | None = None,
    steps: Callable[[], int] | None = None,
) -> attach.Handle:
    """Hooks the HF model inside `model`.

    Args: divisor: what backward divides a loss by. methods: what `prepare` returned. steps: accumulation steps, if not `divisor`.
    """
    inner = attach.find(model)
    handle = attach.Handle(
        model=inner,
        mesh=mesh_,
        methods=methods or methods_of(block, inner, mesh_.topology, compute_dtype({}, inner)),
        loss=CausalLMLoss(reduction=block.loss_reduction, divisor=divisor, steps=steps),
        loss_chunk=block.loss_chunk,
        loss_kernel=block.loss_kernel,
        tiled_mlp=block.tiled_mlp is True,
        activation_offload=block.activation_offload,
        watch=watch.begin(silent_s=min(watch.SILENT_S, block.comm_timeout_s)),
        meter=meter.begin(inner, mesh_),
        profile=profiling.begin(configs.profile_of(block)),
    )
    handle.apply()
    return handle


def unshard(x: Tensor) -> Tensor:
    """The whole rows of a model's output, in the user's order: [1, T, ...] to [B, S, ...], zeros at padding.

    Differentiable: gradients are those of the mean over ranks of the ranks' losses, as in data parallelism. Every rank of the
    sequence group must call it.

    Args:
        x: `out.logits`, or one of `out.hidden_states`, of an attached model (it carries the micro-batch's context).
    """
    if x is None:
        raise ValueError(
            "unshard: there are no logits: the loss was computed in tiles (sequence_parallel.loss_chunk), and they were never "
            "whole; call the engine with return_logits=True"
        )
    context = getattr(x, attach.CONTEXT, None)
    if context is None:
        raise ValueError("unshard: this is no output of a ds_cp model; pass out.logits or one of out.hidden_states itself, no copy")
    return batches.unshard(comm.all_gather(x, context.mesh.seq.group), context)


def token_logprobs(
    engine: nn.Module, *, entropies: bool = False, temperature: float = 1.0, **batch: Any
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probabilities of the tokens of whole rows, for DPO, GRPO and the like; logits are never whole.

    Entry [b, j] is log p(labels[b, j] | what stands before j), fp32; 0 where the label is -100, in a row's first column and at
    padding. Differentiable, with `unshard`'s convention: every rank computes the same loss from the whole rows and calls
    `engine.backward`. Every rank of the sequence group must call it.

    Args:
        entropies: also give the entropy of the distribution that each of these tokens was drawn from.
        temperature: divides the logits.
        batch: what `engine(**batch)` takes. Without `labels` every token of `input_ids` is one; with `shift_labels` entry [b, j]
            belongs to shift_labels[b, j] instead.

    Returns:
        [B, S], or two of them.

    Raises:
        ValueError: the temperature is not positive, or the batch has no tokens to take labels from.
    """
    if not temperature > 0:
        raise ValueError(f"token_logprobs: temperature must be more than 0, got {temperature}")
    batch = {k: v for k, v in batch.items() if v is not None}
    if "labels" not in batch and "shift_labels" not in batch:
        if "input_ids" not in batch:
            raise ValueError("token_logprobs: give labels [B, S] with inputs_embeds")
        mask = batch.get("attention_mask")
        batch["labels"] = batch["input_ids"] if mask is None else batch["input_ids"].masked_fill(mask == 0, batches.IGNORE)
    asked = TokenValues(entropies, temperature)
    if attach.handle_of(engine) is None:
        values = _values_of_one_process(engine, batch, asked)
    else:
        values = unshard(engine(**batch, token_values=asked).logits)
    if "shift_labels" not in batch:  # from the token that predicts to the one that is predicted
        values = functional.pad(values[:, :-1], (0, 0, 1, 0))
    return (values[..., 0], values[..., 1]) if entropies else values[..., 0]


def _values_of_one_process(engine: nn.Module, batch: dict[str, Any], asked: TokenValues) -> Tensor:
    """[B, S, K] of a model whose rows are not shared (size 1)."""
    inputs = {k: v for k, v in batch.items() if k not in ("labels", "shift_labels")}
    logits = engine(**inputs, use_cache=False).logits.float()
    targets = batches.shifted_targets(batch).to(logits.device)
    return of_logits(logits.flatten(0, 1), targets.flatten(), asked).unflatten(0, targets.shape)


def disabled(engine: nn.Module) -> AbstractContextManager[None]:
    """Inside the block the model runs unsharded, as HF wrote it: for generation and small evaluations."""
    handle = attach.handle_of(engine)
    return nullcontext() if handle is None else handle.disabled()


def data_parallel_size(source: nn.Module | Source) -> int:
    """Number of different rows in a step: ranks of the job / size.

    Args:
        source: an engine or model from ds_cp, or the ds_config (path or dict), so that a loader can be made first.
    """
    return dist.get_world_size() // _row_ranks(source)


def data_parallel_rank(source: nn.Module | Source) -> int:
    """Which of them this rank gets; the same on every rank of a sequence group."""
    return dist.get_rank() // _row_ranks(source)


def _row_ranks(source: nn.Module | Source) -> int:
    if not dist.is_initialized():
        raise ValueError("data_parallel_rank/size: call deepspeed.init_distributed() or ds_cp.initialize first")
    if isinstance(source, nn.Module):
        handle = attach.handle_of(source)
        return 1 if handle is None else handle.mesh.seq.size
    size = configs.parse(source).size
    size = dist.get_world_size() if size == "auto" else size
    if dist.get_world_size() % size:
        raise ValueError(f"sequence_parallel.size: {size} does not divide the {dist.get_world_size()} ranks of this job")
    return size
