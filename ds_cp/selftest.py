"""Parity with one process: a tiny twin of a model, sharded, against HF's own forward and backward on the same rows.

The tests call these functions; so does any user who wants the same proof on their own ranks.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, cast

import deepspeed
import torch
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedModel,
)

from ds_cp import engine as engines
from ds_cp.batch import count_targets
from ds_cp.models import family_of, family_of_type, trial
from ds_cp.models.routers import coefficient

LR = 2.0**20
"""SGD's step in the parity runs: so large that the new weight is the gradient, and the old one no longer rounds it."""

BAR = 1e-5
NOISE = 10.0

Batch = dict[str, Any]


@dataclass(frozen=True)
class Report:
    """Errors relative to the largest entry of each reference gradient."""

    loss: float
    reference_loss: float
    errors: dict[str, float]

    @property
    def worst(self) -> tuple[str, float]:
        return max(self.errors.items(), key=lambda item: item[1])

    @property
    def loss_error(self) -> float:
        return abs(self.loss - self.reference_loss) / max(abs(self.reference_loss), 1e-12)


def tiny_model(model_type: str, seed: int = 0, attention: str = "sdpa", **changes: Any) -> PreTrainedModel:
    """A seeded model of a few thousand parameters, fp32."""
    config = family_of_type(model_type).tiny(model_type)
    for name, value in changes.items():
        assert hasattr(config.get_text_config(), name), name
        setattr(config.get_text_config(), name, value)
    torch.manual_seed(seed)
    seeing = "vision_config" in config.sub_configs
    auto = AutoModelForImageTextToText if seeing else AutoModelForCausalLM
    kind = (MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING if seeing else MODEL_FOR_CAUSAL_LM_MAPPING)[type(config)]
    if getattr(config, "attn_logit_softcapping", None) or not kind._supports_sdpa:  # nor sinks
        attention = "eager"
    model = auto.from_config(config, attn_implementation=attention, dtype=torch.float32)
    family_of_type(model_type).settle(model)
    return model


def ds_config(stage: int, block: dict[str, Any], accumulation: int = 1, zero: dict[str, Any] | None = None) -> dict[str, Any]:
    """A DeepSpeed config for parity: no clipping, and flags that do not change the sum."""
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 100_000, **(zero or {})},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "sequence_parallel": block,
    }


def reference(model: PreTrainedModel, batches: Sequence[Batch], reduction: str) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of HF's own model in this process.

    `batches` are all micro-batches of the optimizer step, over replicas and accumulation. mean averages their losses,
    token_mean divides the sum over all targets by their number, sum does not divide; a balance loss is averaged, under sum
    summed. Of a family's types that are `APART` each document of a packed row is a row of its own.
    """
    model.zero_grad()
    family = family_of(model.config)
    assert family is not None, "the tests' models are of listed types"
    apart = model.config.model_type in family.APART
    counts = [float(count_targets(batch)) for batch in batches]
    total = 0.0
    for batch, count in zip(batches, counts, strict=True):
        if count == 0:
            continue
        scale = {"mean": 1 / len(batches), "token_mean": count / sum(counts), "sum": count}[reduction]
        # With a cache transformers does not look for documents in position_ids, and they would attend each other.
        here = {key: value.to(model.device) if isinstance(value, Tensor) else value for key, value in batch.items()}
        parts = [(model(**part, use_cache=False), float(count_targets(part))) for part in (_documents(here) if apart else [here])]
        own = [_balance_loss(model, out) for out, _ in parts]
        shares = zip(parts, own, strict=True)
        row = sum((out.loss - balance) * (scale * targets / count) for (out, targets), balance in shares if targets)
        row = row + _balance_of_row(model, [out for out, _ in parts]) * (1 if reduction == "sum" else 1 / len(batches))
        row.backward()
        total += float(row.detach())
    return total, {name: _gradient(p) for name, p in model.named_parameters()}


def _balance_loss(model: PreTrainedModel, out: Any) -> Tensor | float:
    """What transformers has added to its loss."""
    found = getattr(out, "aux_loss", None)
    return 0.0 if found is None else coefficient(model) * found


def _balance_of_row(model: PreTrainedModel, outs: Sequence[Any]) -> Tensor | float:
    """The same of a row whose documents ran one by one: transformers' function over all their router logits."""
    if len(outs) == 1 or getattr(outs[0], "aux_loss", None) is None:
        return _balance_loss(model, outs[0])
    layers = tuple(torch.cat(layer) for layer in zip(*(out.router_logits for out in outs), strict=True))
    function = importlib.import_module(type(model).__module__).load_balancing_loss_func
    config = model.config.get_text_config()
    return coefficient(model) * function(layers, config.num_experts, config.num_experts_per_tok)


def _documents(batch: Batch) -> list[Batch]:
    """A packed row of position_ids that reset as one row a document; other batches as they are."""
    positions = batch.get("position_ids")
    if positions is None:
        return [batch]
    bounds = [*(positions[0] == 0).nonzero().flatten().tolist(), positions.shape[1]]
    return [{key: value[:, start:end] for key, value in batch.items()} for start, end in pairwise(bounds)]


def sharded(
    model: nn.Module, config: dict[str, Any], replica_batches: Sequence[Sequence[Batch]], items: float | None = None
) -> tuple[float, dict[str, Tensor]]:
    """Loss and applied gradients of one optimizer step under ds_cp; all ranks must call it.

    Args:
        replica_batches: for every replica its micro-batches of the step.
        items: `num_items_in_batch`, given to every micro-batch.

    Returns:
        The mean over replicas of the mean (for token_mean: sum) over micro-batches of the loss shown, and (old - new) / LR, on the
        CPU.
    """
    before = {name: p.detach().cpu().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    engine, *_ = engines.initialize(model=model, optimizer=optimizer, config=config)
    mine = replica_batches[engines.data_parallel_rank(engine)]
    shown = 0.0
    for batch in mine:
        extra = {} if items is None else {"num_items_in_batch": items}
        loss = engine(**batch, **extra).loss
        engine.backward(loss)
        engine.step()
        shown += float(loss.detach()) / (1 if items is not None else len(mine))
    handle = engines.attach.handle_of(engine)
    assert handle is not None
    shown = float(engines.comm.all_sum(torch.tensor(shown, device=loss.device), handle.mesh.data.group)) / len(replica_batches)
    after = full_parameters(engine.module)
    finish(engine)
    return shown, {name: (before[name] - after[name]) / LR for name in before}


def compare(loss: float, gradients: dict[str, Tensor], wanted_loss: float, wanted: dict[str, Tensor]) -> Report:
    """Every parameter's largest error over its largest reference entry; an all-zero reference must be met exactly."""
    assert gradients.keys() == wanted.keys()
    errors = {}
    for name, reference_gradient in wanted.items():
        largest = float(reference_gradient.abs().max())
        difference = float((gradients[name].cpu().double() - reference_gradient.cpu().double()).abs().max())
        errors[name] = difference / largest if largest else (0.0 if difference == 0 else float("inf"))
    return Report(loss=loss, reference_loss=wanted_loss, errors=errors)


def full_parameters(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the whole parameters, gathered where ZeRO-3 has split them."""
    whole = {}
    for name, parameter in model.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            whole[name] = parameter.detach().clone().cpu()
    return whole


def _gradient(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.detach().clone()


def finish(engine: deepspeed.DeepSpeedEngine) -> None:
    """Gives model, groups and engine back; all ranks must call it."""
    handle = engines.attach.handle_of(engine)
    assert handle is not None
    assert handle.watch is not None
    handle.watch.end()
    handle.remove()
    engines.mesh.destroy(handle.mesh)
    engine.destroy()


def sharded_low_precision(model: nn.Module, config: dict[str, Any], batches: Sequence[Batch]) -> tuple[float, dict[str, Tensor]]:
    """Like `sharded` for one replica and one micro-batch, with the gradient read from DeepSpeed's fp32 accumulator."""
    from deepspeed.utils import safe_get_full_grad

    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    engine, *_ = engines.initialize(model=model, optimizer=optimizer, config=config)
    loss = engine(**batches[0]).loss
    engine.backward(loss)
    gradients = {name: safe_get_full_grad(p).detach().float().clone() for name, p in engine.module.named_parameters()}
    engine.step()
    finish(engine)
    return float(loss.detach()), gradients


def parity_without_deepspeed(
    model_type: str, kernel: str, ulysses: int, ring: int, batch: Batch, ring_impl: str = "p2p", head_chunks: int = 1
) -> float:
    """Worst relative gradient error of the fp64 model, hooks and communication only; `ulysses * ring` is the job's world.

    HF computes its loss (and RMSNorm) in fp32, which would bound the error from below: the reference's loss is fp64 here, and the
    model should be one without RMSNorm.
    """
    alone = tiny_model(model_type).double()
    alone.loss_function = _fp64_loss
    wanted = reference(alone, [batch], "mean")
    model = tiny_model(model_type).double()
    topology = engines.topology.Topology(ulysses=ulysses, ring=ring, data=1)
    degrees = {"size": ulysses * ring, "ulysses_size": ulysses, "ring_size": ring}
    methods = {"attention_kernel": kernel, "ring_impl": ring_impl, "attention_head_chunks": head_chunks}
    block = engines.Config.model_validate({**degrees, **methods})
    mesh = engines.mesh.build(topology, timeout_s=60)
    handle = engines.attach_model(model, block, mesh, divisor=lambda: 1)
    loss = model(**batch).loss
    loss.backward()
    gradients = {name: engines.comm.all_sum(_gradient(p), mesh.seq.group) / topology.size for name, p in model.named_parameters()}
    handle.remove()
    engines.mesh.destroy(mesh)
    report = compare(float(loss.detach()), gradients, *wanted)
    return max(report.loss_error, report.worst[1])


def _fp64_loss(logits: Tensor, labels: Tensor, **_: Any) -> Tensor:
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def tried(model: PreTrainedModel, block: dict[str, Any], stage: int = 2) -> Report:
    """A row of one document and one of several as one optimizer step on all ranks, against transformers in this process.

    The reference computes every document by itself. Where transformers in fp32 is not what it is in fp64 by `BAR` (the gradient of
    a bias of keys is zero but for rounding), an error is one of `NOISE` times that difference.
    """
    batches = trial.rows()
    alone = copy.deepcopy(model)
    wanted = _mean([trial.alone(alone, batch, documents) for batch, documents in batches])
    noise = _noise(alone, batches, wanted[1])
    rows = [batch for batch, _ in batches]
    replicas = torch.distributed.get_world_size() // block["size"]
    config = ds_config(stage, {**block, "loss_reduction": "mean"}, accumulation=len(rows))
    got = sharded(model, config, [rows] * replicas)
    report = compare(*got, *wanted)
    rounding = {name: NOISE * noise[name] / max(float(wanted[1][name].abs().max()), 1e-30) for name in report.errors}
    return replace(
        report, errors={name: min(error, BAR * error / max(rounding[name], BAR)) for name, error in report.errors.items()}
    )


def _mean(runs: Sequence[trial.Run]) -> trial.Run:
    gradients = {name: cast(Tensor, sum(run[1][name] for run in runs)) / len(runs) for name in runs[0][1]}
    return sum(run[0] for run in runs) / len(runs), gradients


def _noise(alone: PreTrainedModel, batches: Sequence[tuple[Batch, tuple[int, ...]]], found: dict[str, Tensor]) -> dict[str, float]:
    """By how much transformers' gradients in fp32 are not those in fp64; 0 where it cannot run in fp64."""
    if hasattr(alone, "set_experts_implementation"):  # the usual one has no fp64
        alone.set_experts_implementation("eager")
    try:
        exact = _mean([trial.alone(alone.double(), batch, documents) for batch, documents in batches])[1]
    except (RuntimeError, ValueError):
        return dict.fromkeys(found, 0.0)
    return {name: float((exact[name] - found[name]).abs().max()) for name in found}


def trajectory_error(model_type: str, block: dict[str, Any], stage: int, batches: Sequence[Batch], accumulation: int) -> float:
    """Largest relative weight difference after training on all batches with AdamW and clipping, against one process."""
    alone = tiny_model(model_type)
    optimizer = torch.optim.AdamW(alone.parameters(), lr=1e-3)
    for start in range(0, len(batches), accumulation):
        _, gradients = reference(alone, batches[start : start + accumulation], "token_mean")
        for name, parameter in alone.named_parameters():
            parameter.grad = gradients[name]
        torch.nn.utils.clip_grad_norm_(alone.parameters(), 1.0)
        optimizer.step()
    model = tiny_model(model_type)
    config = {**ds_config(stage, block, accumulation), "gradient_clipping": 1.0}
    engine, *_ = engines.initialize(model=model, optimizer=torch.optim.AdamW(model.parameters(), lr=1e-3), config=config)
    for start in range(0, len(batches), accumulation):
        step = batches[start : start + accumulation]
        items = sum(float(count_targets(batch)) for batch in step)
        for batch in step:
            engine.backward(engine(**batch, num_items_in_batch=items).loss)
            engine.step()
    wanted = {name: p.detach() for name, p in alone.named_parameters()}
    report = compare(0.0, full_parameters(engine.module), 0.0, wanted)
    finish(engine)
    return report.worst[1]
