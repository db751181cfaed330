"""Rows to micro-batches: every row once, every replica as many micro-steps, and a run that goes on goes on with the next row."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import Dataset, IterableDataset

from ds_cp.batch import IGNORE
from ds_cp.deal import Deal, Drawn, Keys, Making, Rows, Stream
from ds_cp.loader import Reading, Step, StepLoader
from ds_cp.mesh import AxisGroup

deals = st.builds(Deal, st.just(1), st.just(0), st.integers(1, 3), st.integers(1, 4))
rows_of_an_epoch = st.integers(1, 40)


class Numbers(Dataset):
    """Row i is i."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> int:
        return index


class NumberStream(IterableDataset):
    def __init__(self, count: int) -> None:
        self.count = count

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.count))


def collate(rows: list[int]) -> dict[str, Any]:
    return {"input_ids": torch.tensor(rows), "labels": torch.tensor(rows)}


def read(replicas: int, replica: int, deal: Deal, count: int, seed: int | None = None, first: int = 0) -> list[Drawn]:
    """Micro-batches of one replica; those of a stream must be the same."""
    mine = Deal(replicas, replica, deal.batch_size, deal.accumulation)
    dataset = Rows(Numbers(count), Making(collate))
    drawn = [dataset[key] for key in Keys(mine, count, seed, first)]
    if seed is None:
        streamed = list(Stream(NumberStream(count), Making(collate), mine, first))
        assert [ids(x) for x in streamed] == [ids(x) for x in drawn]
        assert [x.rows for x in streamed] == [x.rows for x in drawn]
    return drawn


def ids(drawn: Drawn) -> list[int]:
    """The rows that are trained on."""
    assert torch.equal(drawn.batch["labels"], drawn.batch["input_ids"]) or bool((drawn.batch["labels"] == IGNORE).all())
    return [int(x) for x in drawn.batch["labels"] if x != IGNORE]


def order(count: int, seed: int | None) -> list[int]:
    return list(range(count)) if seed is None else torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()


@given(deal=deals, replicas=st.integers(1, 4), count=rows_of_an_epoch, seed=st.one_of(st.none(), st.just(3)))
def test_every_row_comes_once_and_all_replicas_take_as_many_steps(deal: Deal, replicas: int, count: int, seed: int | None) -> None:
    by_replica = [read(replicas, r, deal, count, seed) for r in range(replicas)]
    per_step = deal.accumulation * replicas * deal.batch_size
    assert {len(mine) for mine in by_replica} == {-(-count // per_step) * deal.accumulation}
    assert all(0 < len(x.batch["input_ids"]) <= deal.batch_size for mine in by_replica for x in mine)
    for step in range(-(-count // per_step)):
        part = slice(step * deal.accumulation, (step + 1) * deal.accumulation)
        found = sorted(row for mine in by_replica for x in mine[part] for row in ids(x))
        assert found == sorted(order(count, seed)[step * per_step : (step + 1) * per_step])
        rows = {x.rows for mine in by_replica for x in mine[part]}
        assert rows == {len(found)}
        fillers = any(not ids(x) for mine in by_replica for x in mine[part])
        assert fillers == Deal(replicas, 0, deal.batch_size, deal.accumulation).lacks(len(found))


@given(deal=deals, other=deals, replicas=st.tuples(st.integers(1, 3), st.integers(1, 3)), count=rows_of_an_epoch, data=st.data())
def test_another_number_of_replicas_goes_on_with_the_next_row(
    deal: Deal, other: Deal, replicas: tuple[int, int], count: int, data: st.DataObject
) -> None:
    steps = data.draw(st.integers(0, -(-count // (deal.rows * replicas[0]))))
    done = min(steps * deal.rows * replicas[0], count)
    ended = slice(0, steps * deal.accumulation)
    first = [row for r in range(replicas[0]) for x in read(replicas[0], r, deal, count, 5)[ended] for row in ids(x)]
    rest = [row for r in range(replicas[1]) for x in read(replicas[1], r, other, count, 5, done) for row in ids(x)]
    assert sorted(first) == sorted(order(count, 5)[:done])
    assert sorted(first + rest) == list(range(count))


def loader(dataset: Any, accumulation: int = 2, fill: bool = True, **reading: Any) -> StepLoader:
    """Of one replica, without a process group."""
    settings = Reading(**{"batch_size": 2, "making": Making(collate), **reading})
    step = Step(lambda: accumulation, count=False, fill=fill)
    return StepLoader(dataset, settings, AxisGroup(group=None, ranks=(0,), rank=0), step, torch.device("cpu"))


def trained(batch: dict[str, Any]) -> list[int]:
    return ids(Drawn(batch, 0))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("at", [0, 1, 2, 3, 4, 5])
def test_a_state_goes_on_exactly_where_it_was_taken(at: int, workers: int) -> None:
    """Over the end of an epoch too, whose last step is filled up: 11 rows in steps of 4."""
    whole = loader(Numbers(11))
    wanted = [trained(batch) for _ in range(3) for batch in whole]
    assert len(wanted) == 3 * len(whole) == 18
    assert sorted(row for micro in wanted[:6] for row in micro) == list(range(11))
    assert wanted[:6] != wanted[6:12], "every epoch has its order"
    first, seen, state = loader(Numbers(11)), [], {}
    state = first.state_dict()
    for _ in range(3):
        for batch in first:
            if len(seen) == 2 * at:
                break
            seen.append(trained(batch))
            state = first.state_dict()
        if len(seen) == 2 * at:
            break
    again = loader(Numbers(11), workers=workers)
    again.load_state_dict(state)
    epochs = range(again.epoch, 3)
    assert seen + [trained(batch) for _ in epochs for batch in again] == wanted


def test_a_state_inside_a_step_begins_that_step_again() -> None:
    first = loader(Numbers(16))
    wanted = [trained(batch) for batch in loader(Numbers(16))]
    batches = iter(first)
    for _ in range(3):  # a step and a half
        next(batches)
    again = loader(Numbers(16))
    again.load_state_dict(first.state_dict())
    assert [trained(batch) for batch in again] == wanted[2:]


@pytest.mark.parametrize("change", [{"seed": 1}, {"shuffle": False}])
def test_a_state_of_another_order_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="loader state: it was taken with"):
        loader(Numbers(11), **change).load_state_dict(loader(Numbers(11)).state_dict())
    with pytest.raises(ValueError, match=r"'length': 11\}, this loader has \{'length': 12\}"):
        loader(Numbers(12)).load_state_dict(loader(Numbers(11)).state_dict())


def test_setting_the_epoch_that_was_loaded_keeps_its_place() -> None:
    first = loader(Numbers(16))
    batches = iter(first)
    wanted = [trained(next(batches)) for _ in range(8)]
    again, state = loader(Numbers(16)), {**first.state_dict(), "row": 4}
    again.load_state_dict(state)
    again.set_epoch(0)
    assert [trained(batch) for batch in again] == wanted[2:]
    again.set_epoch(0)
    assert [trained(batch) for batch in again] == wanted


def test_rows_that_cannot_be_filled_up_are_left_out_with_a_warning() -> None:
    """9 rows in steps of 4: the last step has one row for two micro-batches."""
    kept = loader(Numbers(9), fill=False)
    with pytest.warns(UserWarning, match="the last 1 rows of an epoch are left out: they do not make a whole step of 4 rows"):
        assert len(list(kept)) == len(kept) == 4
    whole = loader(Numbers(11), fill=False)  # three rows are two micro-batches
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(list(whole)) == len(whole) == 6
        asked = loader(Numbers(11), drop_last=True)
        assert len(list(asked)) == len(asked) == 4


def test_batches_without_labels_cannot_be_filled_up() -> None:
    without = loader(Numbers(9), making=Making(lambda rows: {"input_ids": torch.tensor(rows)}))
    with pytest.warns(UserWarning, match="they have no labels"):
        assert len(list(without)) == 4


def test_what_cannot_be_read_is_refused() -> None:
    with pytest.raises(ValueError, match="num_workers: got 2 for an IterableDataset, allowed 0 and 1"):
        loader(NumberStream(5), workers=2)
    with pytest.raises(ValueError, match="has neither a length nor is it an IterableDataset"):
        loader(iter([1]))
    with pytest.raises(ValueError, match="the dataset has no rows"):
        loader(Numbers(0))


def test_a_dataset_that_reads_many_rows_at_once_is_asked_for_them_at_once() -> None:
    class Many(Numbers):
        def __getitems__(self, indices: list[int]) -> list[int]:
            asked.append(indices)
            return [100 + i for i in indices]

    asked: list[list[int]] = []
    assert [trained(batch) for batch in loader(Many(4), shuffle=False)] == [[100, 101], [102, 103]]
    assert asked == [[0, 1], [2, 3]]
