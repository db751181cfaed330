"""What weight DeepSpeed gives one rank's gradient, and the norm that it clips by: measured, not assumed.

The weight is emergent behaviour of DeepSpeed (its ZeRO stages, flags, scaling of fp16 losses and versions multiply and divide at
different places). `loss.py` relies on 1 / (W * divisor); this trains a one-parameter model for one step under the user's own
flags and compares, and compares the norm that DeepSpeed reports with that of the gradient it applied.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import safe_get_full_fp32_param
from torch import Tensor, nn

ACCUMULATION = 2
TOLERANCE = 0.05  # bf16 reductions round; a wrong divisor is off by a factor of two or more
SMALL_BUCKET = 1024  # DeepSpeed allocates its buckets at once: by default 2 GB, for one parameter
LOSS_SCALE = 16  # of an fp16 run: its own may be dynamic, and begins where a first step overflows
KEPT = (
    "zero_optimization",
    "bf16",
    "fp16",
    "torch_autocast",
    "data_types",
    "communication_data_type",
    "prescale_gradients",
    "gradient_predivide_factor",
    "gradient_allreduce_op",
    "managed_gradient_accumulation",
)
"""Sections of ds_config that can change how gradients are reduced."""


def verify(ds_config: Mapping[str, Any], backward_divides: bool) -> float:
    """Measures the weight and refuses to train when it is not the one that the loss assumes; all ranks must call it.

    Args:
        ds_config: the user's DeepSpeed config; "auto" values are left to DeepSpeed's defaults.
        backward_divides: whether `engine.backward` divides by the accumulation steps (raw) or not (HF Trainer).

    Returns:
        The measured weight of one rank's gradient of one micro-batch.

    Raises:
        ValueError: the measured weight is not 1 / (W * divisor), or the norm that DeepSpeed clips by is not the gradient's.
    """
    expected = 1 / (dist.get_world_size() * (ACCUMULATION if backward_divides else 1))
    measured, norm = measure(ds_config, backward_divides)
    if abs(measured / expected - 1) > TOLERANCE:
        raise ValueError(
            f"deepspeed {deepspeed.__version__}: with this config it gives one rank's gradient the weight {measured:.6g}, and "
            f"ds_cp's loss is exact only for {expected:.6g}; every gradient would be {measured / expected:.3g} times too large. "
            f"{_fp16_advice(ds_config)}Change zero_optimization or the reduction keys ({', '.join(KEPT[5:])}), or use a deepspeed "
            "version that ds_cp lists"
        )
    if norm is not None and abs(norm - 1) > TOLERANCE:
        raise ValueError(
            f"deepspeed {deepspeed.__version__}: with this config the gradient norm that it reports, and clips by, is {norm:.3g} "
            f"times the gradient's. {_fp16_advice(ds_config)}Change zero_optimization, or use a deepspeed version that ds_cp lists"
        )
    return measured


def _fp16_advice(ds_config: Mapping[str, Any]) -> str:
    """Where DeepSpeed 0.19.8 itself goes wrong: it scales losses and gradients (or norms) at different places."""
    if ds_config.get("fp16", {}).get("enabled") is True:
        return "At ZeRO 0 it divides fp16 gradients by a loss scale that no loss was multiplied by: use ZeRO 1 to 3, or bf16. "
    if ds_config.get("torch_autocast", {}).get("enabled") is True:
        return (
            "At ZeRO 1 to 3 it clips autocast's fp16 gradients with their scale still in them: use bfloat16, or the fp16 section. "
        )
    return ""


def measure(ds_config: Mapping[str, Any], backward_divides: bool) -> tuple[float, float | None]:
    """The weight w in: reduced gradient = sum over ranks and accumulation steps of g * w; and the reported norm over the true one.

    The latter is None where DeepSpeed reports no norm.
    """
    engine = _one_parameter_engine(ds_config)
    values = [[1.0 + (rank + step) % 8 for step in range(ACCUMULATION)] for rank in range(dist.get_world_size())]
    for step in range(ACCUMULATION):
        loss = engine(values[dist.get_rank()][step]) * 1.0  # not the engine's output itself, as in trainer.py
        engine.set_gradient_accumulation_boundary(step == ACCUMULATION - 1)
        engine.backward(loss, scale_wrt_gas=backward_divides)
        engine.step()
    after, norm = _parameter(engine), engine.get_global_grad_norm()
    engine.destroy()
    return -after / sum(map(sum, values)), None if norm is None or not after else abs(float(norm) / after)


class _One(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x: float) -> Tensor:
        return (self.weight * x).sum().float()


def _one_parameter_engine(ds_config: Mapping[str, Any]) -> deepspeed.DeepSpeedEngine:
    config = {key: _resolved(ds_config[key]) for key in KEPT if key in ds_config and ds_config[key] != "auto"}
    if config.get("fp16", {}).get("enabled"):
        config["fp16"] = {"enabled": True, "loss_scale": min(config["fp16"].get("loss_scale") or LOSS_SCALE, LOSS_SCALE)}
    zero = config.setdefault("zero_optimization", {})
    zero |= {"reduce_bucket_size": SMALL_BUCKET, "allgather_bucket_size": SMALL_BUCKET}
    for section in ("offload_optimizer", "offload_param"):
        if zero.get(section, {}).get("device") == "nvme":
            zero.pop(section)  # where the state lies does not change the sum
    config |= {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": ACCUMULATION,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }
    model = _One().to(get_accelerator().current_device_name())
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


def _resolved(value: Any) -> Any:
    """A copy without the "auto" values that only HF's integration understands."""
    if isinstance(value, Mapping):
        return {k: _resolved(v) for k, v in value.items() if v != "auto"}
    return value


def _parameter(engine: deepspeed.DeepSpeedEngine) -> float:
    parameter = engine.module.weight
    master = safe_get_full_fp32_param(parameter)
    return float((parameter if master is None else master).float().sum())
