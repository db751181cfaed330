"""`ds-cp selftest`: on the user's own ranks, with their config and a tiny twin of their model, in this order:

everything that a run would refuse, kernels against the reference included; the weight that DeepSpeed gives a gradient; loss and
every parameter's gradient of the twin against transformers in one process; bandwidth of each axis; speed of the attention kernel.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from transformers import PreTrainedModel

from ds_cp import checking, comm, engine, factor, launch, machines, preflight, resolve, selftest, topology
from ds_cp.config import Config
from ds_cp.mesh import Mesh, destroy
from ds_cp.models import checks, family_of, twin
from ds_cp.placement import Methods

Say = Callable[[str, str], None]
MEET_S = 300.0
"""In which the ranks must come together, longer than a first start on CPU builds DeepSpeed's op."""


def prove(source: str | os.PathLike[str], name: str, say: Say) -> None:
    """Runs all of it; every rank of the job must call it.

    Args:
        source: the ds_config.json. name: the model's name or path; its weights are not read.
        say: is told what was found, (what, finding), on every rank alike but for the ranks' own speeds.

    Raises:
        ValueError: on every rank: the sentence to act on.
    """
    written, block = launch.read(source, MEET_S)
    ds_config = with_precision(written, _on_cuda())
    if ds_config != written:
        say("precision", f'"auto" in the config, tried as with {"--bf16" if _on_cuda() else "none of --bf16 and --fp16"}')
    ranks = preflight.launched()
    if block.size == 1 or ranks == 1:
        raise ValueError(
            f"selftest: {ranks} ranks with sequence_parallel.size {block.size} share no row; start it on the ranks of the job "
            "(deepspeed --hostfile hosts --module ds_cp.cli selftest ...) with a size of 2 or more"
        )
    launch.init_distributed(block.comm_timeout_s)
    model = preflight.together(lambda: checking.read_model(name))
    mesh, methods = engine.prepare(model, block, ds_config)
    say("attention kernel", f"{engine.choice.describe(methods.attention)}, equal to the reference on every rank")
    say("weight of a rank's gradient", f"{factor.verify(ds_config, backward_divides=True):.6g}, as the loss assumes")
    report = parity(model, block, mesh, ds_config)
    say(
        "a tiny twin against one process", f"worst gradient {report.worst[1]:.1e} ({report.worst[0]}), loss {report.loss_error:.1e}"
    )
    for what, found in speeds(model, mesh, methods, ds_config).items():
        say(what, found)
    destroy(mesh)


def parity(model: PreTrainedModel, block: Config, mesh: Mesh, ds_config: dict[str, Any]) -> selftest.Report:
    """Of a twin with few heads, split as the model is as far as they allow; fp32, so on CUDA with the reference kernels.

    Raises:
        ValueError: on every rank: a gradient is further off than rounding.
    """
    small = preflight.together(lambda: _twin(model))
    settings = block.model_dump(include={"layout", "ring_impl", "ring_keep", "linear_attention", "comm_timeout_s", "loss_chunk"})
    kernels = {"attention_kernel": "reference", "delta_kernel": "reference"} if _on_cuda() else {}
    stage = int((ds_config.get("zero_optimization") or {}).get("stage", 0))
    with contextlib.redirect_stdout(io.StringIO()):  # the twin's own table
        report = selftest.tried(small, {**settings, **kernels, **_degrees(small, mesh.topology)}, stage)
    name, error = report.worst
    reason = (
        f"selftest: on these ranks the gradient of {name} of a tiny twin of the model is off by {error:.1e} of its size, and the "
        f"loss by {report.loss_error:.1e}; do not train: set sequence_parallel.size to 1, and report this with the table above"
    )
    preflight.refuse_together(None if max(error, report.loss_error) <= selftest.BAR else reason)
    return report


def with_precision(ds_config: dict[str, Any], on_cuda: bool) -> dict[str, Any]:
    """The config with what the HF Trainer would fill in for "auto" of bf16 and fp16: with --bf16 on CUDA, else without."""
    automatic = [key for key in ("bf16", "bfloat16", "fp16") if (ds_config.get(key) or {}).get("enabled") == "auto"]
    return ds_config | {key: {**ds_config[key], "enabled": on_cuda and key != "fp16"} for key in automatic}


def _on_cuda() -> bool:
    return get_accelerator().device_name() == "cuda"


def _twin(model: PreTrainedModel) -> PreTrainedModel:
    if family_of(model.config) is not None:
        return selftest.tiny_model(model.config.model_type)
    return twin.twin(type(model), model.config)


def _degrees(small: PreTrainedModel, asked: topology.Topology) -> dict[str, int]:
    """The run's own degrees where the twin's heads allow them."""
    legal = topology.legal_ulysses(asked.size, checks.heads(small))
    ulysses = max(degree for degree in legal if degree <= asked.ulysses)
    return {"size": asked.size, "ulysses_size": ulysses, "ring_size": asked.size // ulysses}


def speeds(model: PreTrainedModel, mesh: Mesh, methods: Methods, ds_config: dict[str, Any]) -> dict[str, str]:
    """Of the slowest rank: what its exchanges send, and what its attention kernel computes."""
    device = torch.device(get_accelerator().current_device_name())
    dtype = resolve.compute_dtype(ds_config, model)
    found = {
        f"{name}, slowest rank": f"{_least(rate, device) / 1e9:.2f} GB/s"
        for name, rate in machines.bandwidths(mesh, device).items()
    }
    split = topology.split_heads(mesh.ulysses.size, *checks.heads(model)[0])
    rate = machines.kernel_speed(methods.attention, (split.query, split.kv), checks.head_size(model), dtype, device)
    shape = f"{split.query}/{split.kv} heads of {checks.head_size(model)}, {str(dtype).removeprefix('torch.')}"
    found[f"attention kernel, {shape}, slowest rank"] = f"{_least(rate or 0.0, device) / 1e12:.3g} TFLOP/s" if rate else "not timed"
    return found


def _least(value: float, device: torch.device) -> float:
    everyone = comm.all_gather(torch.tensor([value], device=device), dist.group.WORLD)
    return float(everyone.min())
