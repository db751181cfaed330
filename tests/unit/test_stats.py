"""Model FLOPs against PyTorch's own counter on a model in one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from ds_cp import meter, selftest
from ds_cp.planner import machine

LENGTH = 24


def counted(model: Any) -> int:
    """Of one step; eager attention computes all S x S pairs."""
    ids = torch.randint(3, 60, (1, LENGTH))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("frozen", ["", "mlp", "head"])
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_flops_are_those_that_pytorch_counts(kind: str, frozen: str) -> None:
    model = selftest.tiny_model(kind, attention="eager")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not (frozen and frozen in name))
    work = meter.work_of(model)
    dense = work.pair * LENGTH * LENGTH * len(work.windows)
    assert work.uncounted is None
    assert work.token * LENGTH + dense == counted(model)
    assert work.of((0, LENGTH)) == work.token * LENGTH + dense * (LENGTH + 1) / LENGTH / 2
    assert work.of((0, 10, LENGTH)) - work.token * LENGTH == work.pair * len(work.windows) * (55 + 105)


def test_experts_count_as_often_as_a_token_meets_them() -> None:
    few, many = (meter.work_of(selftest.tiny_model("qwen3_moe", num_experts=n, num_experts_per_tok=2)) for n in (6, 8))
    hidden = selftest.tiny_model("qwen3_moe").config.hidden_size
    layers = len(few.windows)
    assert many.token - few.token == 6 * 2 * hidden * layers, "two more rows of the routers"


def test_delta_layers_count_by_their_state() -> None:
    model = selftest.tiny_model("qwen3_5_text")
    shapes = meter.checks.linear_shapes(model)
    assert shapes
    matrices = sum(meter.read.matrices(model, {id(model.get_input_embeddings().weight), id(model.lm_head.weight)}))
    rule = sum(18 * s.value_heads * s.key_size * s.value_size for s in shapes)
    assert meter.work_of(model).token == 6 * (matrices + model.lm_head.weight.numel()) + rule
    assert len(meter.work_of(model).windows) == model.config.num_hidden_layers - len(shapes)


def test_what_is_not_counted_has_no_mfu() -> None:
    assert "Gated DeltaNet" in (meter.work_of(selftest.tiny_model("mamba2")).uncounted or "")


def test_peaks_go_by_the_name_of_a_device() -> None:
    names = {"NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H100 PCIe": 756e12, "NVIDIA A100-SXM4-80GB": 312e12, "NVIDIA B200": 2250e12}
    assert {name: machine.peak(name) for name in names} == names
    assert machine.peak("") is None
    assert machine.peak("NVIDIA GB200") is None
