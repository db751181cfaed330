"""What was saved goes on with another sharing of rows or another number of ranks as if nothing had happened; and is read by others."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.dist import checkpoint_jobs
from tests.dist.checkpoint_jobs import SAVED, STEPS, TAG
from tests.dist.test_parity import block
from tests.dist.test_trainer import assert_same_run, losses
from tests.dist.test_trainer import run as train

OTHERS: dict[int, list[tuple[dict[str, Any], int]]] = {
    0: [(block(1, 4, layout="contiguous"), 2)],
    1: [(block(1, 2, layout="balanced"), 1)],
    2: [(block(4, 1), 2)],
    3: [(block(2, 2, layout="contiguous"), 2), (block(2, 1), 1), (block(1, 4, layout="zigzag"), 2)],
}
"""By ZeRO stage: blocks, and the accumulation with which 4 ranks take two rows a step."""



Saved = tuple[Path, list[float], dict[str, torch.Tensor]]


@pytest.fixture(scope="module")
def saved(pool, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Saved]:
    """Of a ZeRO stage: the folder in which 4 ranks that share rows saved, and losses and weights of that run, which went on."""

    @cache
    def of(stage: int) -> Saved:
        folder = tmp_path_factory.mktemp(f"zero{stage}")
        run = {"block": block(2, 2), "stage": stage, "accumulation": 2, "save": True}
        losses, weights = pool(4).run(checkpoint_jobs.run, folder=str(folder), **run)[0]
        assert len(losses) == len(set(losses)) == STEPS
        assert (folder / "latest").read_text() == TAG
        if stage:
            checkpoint_jobs.to_universal(folder)
        return folder, losses, weights

    return of


@pytest.mark.parametrize("stage", OTHERS)
def test_other_sizes_and_layouts_go_on_with_the_curve(pool, saved, stage: int) -> None:
    folder, *wanted = saved(stage)
    for other, accumulation in OTHERS[stage]:
        run = {"block": other, "stage": stage, "accumulation": accumulation, "resume": "as saved"}
        assert_goes_on(pool(4).run(checkpoint_jobs.run, folder=str(folder), **run), *wanted)


@pytest.mark.parametrize(("stage", "mesh", "accumulation"), [(1, (1, 2), 2), (2, (2, 1), 2), (3, (1, 2), 2)])
def test_another_number_of_ranks_goes_on_with_the_curve(
    pool, saved, stage: int, mesh: tuple[int, int], accumulation: int
) -> None:
    """Through DeepSpeed's universal checkpoint."""
    folder, *wanted = saved(stage)
    run = {"block": block(*mesh), "stage": stage, "accumulation": accumulation, "resume": "universal"}
    assert_goes_on(pool(2).run(checkpoint_jobs.run, folder=str(folder), **run), *wanted)


def test_more_ranks_go_on_with_the_curve(pool, tmp_path: Path) -> None:
    two = pool(2).run(checkpoint_jobs.run, folder=str(tmp_path), block=block(2, 1), stage=3, accumulation=2, save=True)[0]
    checkpoint_jobs.to_universal(tmp_path)
    got = pool(4).run(checkpoint_jobs.run, folder=str(tmp_path), block=block(2, 1), stage=3, resume="universal")
    assert_goes_on(got, *two)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_consolidated_weights_are_those_of_the_run(saved, stage: int) -> None:
    """Plain transformers with them has the loss of the step after."""
    folder, losses, _ = saved(stage)
    assert loss_of_step(checkpoint_jobs.exported(folder), SAVED) == pytest.approx(losses[SAVED], rel=1e-5)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_trainer_goes_on_with_another_size_and_layout(pool, tmp_path: Path, stage: int) -> None:
    whole = train(pool, 4, tmp_path, block=block(2, 2), stage=stage, save_strategy="steps", save_steps=2)
    other = {"block": block(1, 2, layout="contiguous"), "gradient_accumulation_steps": 1}
    resumed = train(pool, 4, tmp_path, stage=stage, resume=str(tmp_path / "checkpoint-2"), **other)
    assert len(losses(whole)) == 4
    assert_same_run(resumed, whole)


def assert_goes_on(got: list[Any], wanted: list[float], weights: dict[str, torch.Tensor]) -> None:
    for found, _ in got:
        assert found == pytest.approx(wanted[SAVED:], rel=1e-5)
    for name, weight in weights.items():
        # By norm: AdamW turns rounding noise in a gradient of zero into a whole step of that one entry.
        assert float((got[0][1][name] - weight).norm() / weight.norm()) <= 1e-4, name


def loss_of_step(model: torch.nn.Module, step: int) -> float:
    """The token mean of the two rows that come in that step, document by document."""
    rows = checkpoint_jobs.Packed(9)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    total = count = 0.0
    for index in order[2 * step : 2 * step + 2]:
        batch = {key: value.unsqueeze(0) for key, value in rows[index].items()}
        targets = int((batch["labels"][:, 1:] != -100).sum())
        with torch.no_grad():
            total += float(model(**batch, use_cache=False).loss) * targets
        count += targets
    return total / count
