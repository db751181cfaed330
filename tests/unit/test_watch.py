"""Watches of several ranks on one store, their threads off: each test takes the turns itself."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from ds_cp import mesh, reliable
from ds_cp import watch as watches
from ds_cp.watch import Preemption, Watch


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> list[Watch]:
    monkeypatch.setattr(watches, "BEAT_S", 1e9)
    monkeypatch.setattr(watches, "ANSWER_S", 0.0)
    store = dist.HashStore()
    return [Watch(store, rank, ["host1", "host1", "host2"], silent_s=5, grace_s=3) for rank in range(3)]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr(watches.time, "monotonic", lambda: now[0])
    return now


def test_a_rank_that_goes_silent_ends_those_that_wait(clock: list[float], ranks: list[Watch]) -> None:
    for rank in ranks:
        rank.enter("forward")
    assert [rank.look() for rank in ranks] == [None] * 3
    for _ in range(2):  # ranks 0 and 1 go on beating
        assert [after(clock, 2, rank) for rank in ranks[:2]] == [None] * 2
    line = after(clock, 2, ranks[1])
    assert line == (
        "ds_cp: rank 1 on host1 waited in step 1, forward for others and ends: no sign of life from rank 2 on host2 for 6 s"
    )
    assert "no sign of life from rank 2 on host2" in str(ranks[0].look())


def after(clock: list[float], seconds: float, rank: Watch) -> str | None:
    clock[0] += seconds
    return rank.look()


def test_a_rank_that_hangs_at_its_end_after_a_failure_is_ended(clock: list[float], ranks: list[Watch]) -> None:
    ranks[0].failed("ValueError: nothing")
    ranks[0].enter("forward")
    clock[0] += watches.LAST_WORDS_S - 1  # longer than its grace: it still asks who is there
    assert ranks[0].look() is None
    clock[0] += 1000
    assert ranks[0].look() == "ds_cp: rank 0 on host1 has not ended since, and is ended"
    ranks[1].enter("forward")
    clock[0] += 1000
    assert "rank 1 on host1 waited in step 1, forward for others and ends: rank 0 on host1 stopped" in str(ranks[1].look())


def test_nobody_ends_who_waits_for_nobody(clock: list[float], ranks: list[Watch]) -> None:
    ranks[0].failed("RuntimeError: broken")
    for phase in watches.OUTSIDE:
        ranks[1].enter(phase)
        assert after(clock, 100, ranks[1]) is None
    ranks[1].enter("backward")
    assert after(clock, 2, ranks[1]) is None
    line = after(clock, 2, ranks[1])
    assert line == (
        "ds_cp: rank 1 on host1 waited in step 1, backward for others and ends: "
        "rank 0 on host1 stopped in step 1, start: RuntimeError: broken"
    )


class Counts:
    global_steps = 4


def test_a_backward_whose_step_is_done_is_over(ranks: list[Watch]) -> None:
    engine = Counts()
    ranks[0].follow(engine, "global_steps")
    ranks[0].enter("backward")
    assert ranks[0].place() == "step 5, backward"
    engine.global_steps = 5
    assert ranks[0].place() == "step 5, after the step"
    del engine
    assert ranks[0].place() == "step 5, backward"  # nobody counts any more


def test_a_roll_call_names_who_does_not_answer(ranks: list[Watch], monkeypatch: pytest.MonkeyPatch) -> None:
    ranks[2].enter("forward")
    monkeypatch.setattr(watches.time, "sleep", lambda _: ranks[2].look())
    monkeypatch.setattr(watches, "_within", lambda _, work: work() or True)
    assert ranks[0].roll_call() == "no answer from rank 1 on host1; rank 2 on host2 is in step 1, forward"


def test_what_nccl_gave_up_ends_the_rank_wherever_it_is(ranks: list[Watch], monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL itself is in tests/gpu/test_nccl.py."""
    monkeypatch.setattr(watches.time, "sleep", lambda _: [ranks[i].look() for i in (1, 2)])
    monkeypatch.setattr(watches, "_within", lambda _, work: work() or True)
    for rank, posted, phase in zip(ranks, (7, 6, 7), ("save", "forward", "save"), strict=True):
        rank.enter(phase)
        monkeypatch.setattr(rank.posted, "count", lambda posted=posted: posted)
    monkeypatch.setattr(ranks[0].posted, "lost", lambda: "a collective of its group of 3 ranks was not done in time")
    line = (
        "rank 0 on host1 waited in step 0, save{}: a collective of its group of 3 ranks was not done in time; rank 1 on host1 is in"
        " step 1, forward; fewer collectives than others have posted rank 1 on host1"
    )
    assert ranks[0].look() == "ds_cp: " + line.format(" for others and ends")
    assert ranks[2].look() is None  # saves, and waits for nobody
    ranks[2].enter("backward")
    ranks[2]._since -= 10
    assert ranks[2].look() == "ds_cp: rank 2 on host2 waited in step 1, backward for others and ends: " + line.format("")


def test_ranks_that_call_the_roll_together_answer_each_other(ranks: list[Watch], monkeypatch: pytest.MonkeyPatch) -> None:
    turns = []

    def sleep(_: float) -> None:  # while rank 0 waits for answers, rank 1 asks too, and waits for longer
        turns.append(None)
        if len(turns) == 1:
            found.append(ranks[1].roll_call())
            ranks[2].look()

    found: list[str] = []
    monkeypatch.setattr(watches.time, "sleep", sleep)
    monkeypatch.setattr(watches, "_within", lambda _, work: work() or True)
    monkeypatch.setattr(watches, "ANSWER_TURNS", 2)
    assert ranks[0].roll_call() == ""  # rank 1 answered it out of its own wait, rank 2 both in one look
    assert found == ["no answer from rank 0 on host1, rank 2 on host2"]  # which the test let answer only afterwards


def test_a_group_that_goes_away_under_the_watch_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    gone = object()
    monkeypatch.setattr(watches, "_groups", lambda: [gone])
    monkeypatch.setattr(watches.dist, "get_backend", lambda group: {}[group])
    assert watches.Posted().count() == 0
    monkeypatch.setattr(watches.dist, "get_backend", lambda _: (_ for _ in ()).throw(ValueError("destroyed")))
    assert watches.Posted().lost() is None


def test_a_failure_that_is_known_is_what_nccl_waited_for(ranks: list[Watch], monkeypatch: pytest.MonkeyPatch) -> None:
    ranks[1].enter("save")
    ranks[1].failed("OSError: disk full")
    ranks[0].enter("save")
    assert ranks[0].look() is None
    monkeypatch.setattr(ranks[0].posted, "lost", lambda: "a collective failed")
    reason = "rank 1 on host1 stopped in step 0, save: OSError: disk full"
    assert ranks[0].look() == f"ds_cp: rank 0 on host1 waited in step 0, save for others and ends: {reason}"


def test_posted_collectives_are_counted_over_all_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    posted = watches.Posted()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        group = dist.new_group([0])
        before = posted.count()
        dist.barrier(group)
        dist.all_reduce(torch.ones(1))
        assert posted.count() == before + 2
        assert posted.lost() is None
    finally:
        dist.destroy_process_group()


def test_all_ranks_stop_after_the_step_that_follows_the_wish(ranks: list[Watch]) -> None:
    assert [rank.stop_after(6, told=False) for rank in ranks] == [False] * 3
    assert ranks[1].stop_after(7, told=True) is False
    assert ranks[0].stop_after(7, told=False) is False
    assert [rank.stop_after(8, told=rank.rank == 1) for rank in ranks] == [True] * 3


def test_sigterm_is_a_wish_once() -> None:
    before = signal.getsignal(signal.SIGTERM)
    told = Preemption()
    signal.raise_signal(signal.SIGTERM)
    assert told.told
    assert signal.getsignal(signal.SIGTERM) is before


def test_neighbours_stay_on_one_host() -> None:
    assert mesh.neighbours([("a", 0), ("a", 0), ("b", 0), ("b", 0)]) == 2
    assert mesh.neighbours([("a", 0)] * 4 + [("b", 0)] * 2) == 2
    assert mesh.neighbours([("a", 0), ("b", 0), ("a", 0), ("b", 0)]) == 1
    assert mesh.neighbours([("a", 2)] * 4) == 2


def test_a_checkpoint_without_the_mark_is_not_gone_on_from(tmp_path: Path) -> None:
    assert reliable.last_checkpoint(tmp_path) is None
    for step in (2, 4, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
    assert reliable.last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")  # another program's
    (tmp_path / "checkpoint-4" / reliable.COMPLETE).touch()
    assert reliable.last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")
    with pytest.raises(ValueError, match=r"checkpoint-10 was not written to its end .* use .*checkpoint-4"):
        reliable._refuse_half(str(tmp_path / "checkpoint-10"))
