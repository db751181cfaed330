"""The raw loop over a loader: uneven ends of an epoch, streams, workers, runs that stop and go on."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.dist import loader_jobs
from tests.dist.test_api import refused
from tests.dist.test_parity import block


@pytest.mark.parametrize(("kind", "reduction"), [("map", "auto"), ("stream", "auto"), ("map", "sum")])
def test_an_epoch_that_ends_unevenly_is_that_of_one_process(pool, kind: str, reduction: str) -> None:
    results = pool(4).run(loader_jobs.an_epoch_against_one_process, block=block(1, 2, loss_reduction=reduction), kind=kind, count=13)
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
