"""TRL's trainers: what is counted over rows instead of ranks before training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from trl import GRPOConfig

from ds_cp import trl_trainers
from ds_cp.mesh import AxisGroup, Mesh
from ds_cp.topology import Topology

GIVEN = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "num_generations": 4, "use_cpu": True, "bf16": False}


def grpo(folder: Path, **given: Any) -> GRPOConfig:
    return GRPOConfig(output_dir=str(folder), **{**GIVEN, **given})


def shared_by(ranks: int) -> Mesh:
    one, row = (AxisGroup(group=None, ranks=tuple(range(n)), rank=0) for n in (1, ranks))
    return Mesh(topology=Topology(1, ranks, 1), ulysses=one, ring=row, seq=row, data=one)


def test_a_config_of_two_trainers_counts_rows_in_both(tmp_path: Path) -> None:
    args = grpo(tmp_path)
    for _ in range(2):
        trl_trainers._share_generations(args, 4, 4, shared_by(2))
        assert args.generation_batch_size == 4 * 2


def test_generations_that_do_not_fill_the_rows_are_refused(tmp_path: Path) -> None:
    args = grpo(tmp_path, num_generations=8)
    args.steps_per_generation = 1
    with pytest.raises(ValueError, match="8 over ranks is 4 over rows, which num_generations = 8 must divide"):
        trl_trainers._share_generations(args, 8, 4, shared_by(2))


@pytest.mark.parametrize(("rows", "evaluated"), [(2, 4), (4, 3)])
def test_an_evaluation_that_does_not_fit_is_refused(tmp_path: Path, rows: int, evaluated: int) -> None:
    args = grpo(tmp_path, per_device_eval_batch_size=rows)
    trl_trainers._share_generations(args, 4, evaluated, shared_by(2))
    args.eval_strategy = "steps"
    with pytest.raises(ValueError, match=f"per_device_eval_batch_size: {rows} rows .* num_generations_eval = {evaluated} must"):
        trl_trainers._share_generations(args, 4, evaluated, shared_by(2))


def test_selective_checkpointing_is_refused_over_a_ring(tmp_path: Path) -> None:
    args = grpo(tmp_path, gradient_checkpointing=True, gradient_checkpointing_kwargs={"selective": True})
    with pytest.raises(ValueError, match=r"gradient_checkpointing_kwargs.selective: .* with a ring \(ring_size 2\)"):
        trl_trainers._refuse_selective(args, shared_by(2))
    trl_trainers._refuse_selective(args, shared_by(1))
    trl_trainers._refuse_selective(grpo(tmp_path), shared_by(2))
