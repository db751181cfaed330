"""The raw loop over a loader: uneven ends of an epoch, streams, workers, runs that stop and go on.

They go on with another sharing of rows or another number of ranks as if nothing had happened; and what was saved is read by others.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.dist import checkpoint_jobs, loader_jobs
from tests.dist.checkpoint_jobs import SAVED, STEPS, TAG
from tests.dist.test_api import refused
from tests.dist.test_parity import block


@pytest.mark.parametrize(("kind", "reduction"), [("map", "auto"), ("stream", "auto"), ("map", "sum")])
def test_an_epoch_that_ends_unevenly_is_that_of_one_process(pool, kind: str, reduction: str) -> None:
    results = pool(4).run(
        loader_jobs.an_epoch_against_one_process, block=block(1, 2, loss_reduction=reduction), kind=kind, count=13
    )
    assert results[0][2] == results[1][2]
    assert results[2][2] == results[3][2]
    assert [len(mine) for _, _, mine in results] == [8] * 4
    trained = sorted(row for _, _, mine in (results[0], results[2]) for micro in mine for row in micro if row >= 0)
    assert trained == list(range(13)), "every row once"
    for error, change, _ in results:
        assert error <= 1e-5
        assert change > 1e-2, "there is something to be wrong about"


@pytest.mark.parametrize("count", [1, 11])
def test_several_rows_a_micro_batch_and_a_short_last_one(pool, count: int) -> None:
    run = {"block": block(2, 1), "kind": "map", "count": count, "batch_size": 3}
    results = pool(4).run(loader_jobs.an_epoch_against_one_process, **run)
    trained = sorted(row for _, _, mine in (results[0], results[2]) for micro in mine for row in micro if row >= 0)
    assert trained == list(range(count))
    assert all(error <= 1e-5 for error, _, _ in results)


@pytest.mark.parametrize(("kind", "workers", "stop"), [("map", 2, 5), ("stream", 1, 2)])
def test_a_run_that_stops_goes_on_with_the_same_rows_and_losses(pool, tmp_path: Path, kind: str, workers: int, stop: int) -> None:
    """Steps 0 to 3 are the first epoch of 13 rows in steps of 4; the second has another order."""
    run = {"block": block(1, 2), "kind": kind, "folder": str(tmp_path), "steps": 7}
    whole = pool(4).run(loader_jobs.interrupted, workers=0, **run)
    before = pool(4).run(loader_jobs.interrupted, workers=workers, stop=stop, **run)
    after = pool(4).run(loader_jobs.interrupted, workers=workers, resume=True, **run)
    for rank in range(4):
        assert len(whole[rank]) == 14
        assert before[rank] + after[rank] == whole[rank]
    assert [row for row, _ in whole[0]] != [row for row, _ in whole[2]]


def test_a_run_goes_on_with_other_numbers_of_replicas(pool, tmp_path: Path) -> None:
    run = {"kind": "map", "folder": str(tmp_path), "steps": 4, "workers": 0}
    before = pool(4).run(loader_jobs.interrupted, block=block(1, 2), stop=2, **run)
    after = pool(4).run(loader_jobs.interrupted, block=block(2, 2), resume=True, **{**run, "steps": 5})
    rows = [row for rank in (0, 2) for row, _ in before[rank]] + [row for row, _ in after[0] if row >= 0]
    assert sorted(rows) == list(range(13)), "8 rows in two steps of 4, then 5 in three steps of 2"


def test_streams_of_different_length_are_refused_on_every_rank(pool) -> None:
    message = refused(pool(4), loader_jobs.streams_that_differ, block=block(1, 2))
    assert "the stream has ended on some ranks and not on others" in message


def test_without_sharding_rows_are_dealt_in_the_same_way(pool) -> None:
    with_warning = pool(2).run(loader_jobs.without_sharding, count=9)
    rows = sorted(row for mine, _ in with_warning for row in mine)
    assert len(set(rows)) == len(rows) == 8
    assert not any(counted for _, counted in with_warning)


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


@pytest.mark.parametrize(("stage", "mesh"), [(1, (1, 2)), (2, (2, 1)), (3, (1, 2))])
def test_another_number_of_ranks_goes_on_with_the_curve(pool, saved, stage: int, mesh: tuple[int, int]) -> None:
    """Through DeepSpeed's universal checkpoint."""
    folder, *wanted = saved(stage)
    run = {"block": block(*mesh), "stage": stage, "accumulation": 2, "resume": "universal"}
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
