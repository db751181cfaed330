"""Waits of CUDA streams, by events: what counts, and what is hidden behind another stream's work."""

from __future__ import annotations

import pytest
import torch

from ds_cp.timing import ATTENTION, EXCHANGE, RING, Waits, timed

pytestmark = pytest.mark.gpu

CYCLES = 20_000_000
"""Of `torch.cuda._sleep`, some 10 ms."""


def measured(sleeps: int) -> float:
    """Seconds of so many sleeps, one after another. The process's first loads the kernel, which is no sleep."""
    torch.cuda._sleep(1)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(sleeps):
        torch.cuda._sleep(CYCLES)
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3


def wait_for(sleeps: int, other: int) -> dict[str, float]:
    """What counts as a wait of the current stream for a third one that sleeps so often, while another one sleeps `other` times."""
    waits, beside, network = Waits(cuda=True), torch.cuda.Stream(), torch.cuda.Stream()
    waits.counting = True
    torch.cuda.synchronize()
    with torch.cuda.stream(network):
        for _ in range(sleeps):
            torch.cuda._sleep(CYCLES)
        arrived = torch.cuda.current_stream().record_event()
    with torch.cuda.stream(beside):
        for _ in range(other):
            torch.cuda._sleep(CYCLES)
    with timed("all", waits, ATTENTION), timed("wait", waits, RING, (beside,)):
        torch.cuda.current_stream().wait_event(arrived)
    torch.cuda.synchronize()
    found = waits.take()
    assert waits.take() == {RING: 0.0, EXCHANGE: 0.0, ATTENTION: 0.0}
    return found


@pytest.mark.parametrize(("other", "exposed"), [(0, 4), (1, 3), (6, 0)])
def test_a_wait_counts_from_when_the_last_stream_ran_dry(other: int, exposed: int) -> None:
    one = measured(1)
    found = wait_for(4, other)
    assert found[RING] == pytest.approx(exposed * one, abs=0.5 * one)
    assert found[ATTENTION] == pytest.approx(4 * one, abs=0.5 * one)


def test_events_are_used_again() -> None:
    waits = Waits(cuda=True)
    waits.counting = True
    for _ in range(50):
        with timed("wait", waits, EXCHANGE):
            torch.cuda._sleep(1000)
        torch.cuda.synchronize()
        waits.settle()
    assert len(waits._free) == 2
    assert not waits._pending


def test_a_wait_beside_a_stream_that_is_still_busy_is_read_later() -> None:
    waits, beside = Waits(cuda=True), torch.cuda.Stream()
    waits.counting = True
    with torch.cuda.stream(beside):
        torch.cuda._sleep(20 * CYCLES)
    with timed("wait", waits, RING, (beside,)):
        torch.cuda._sleep(1000)
    torch.cuda.current_stream().synchronize()
    waits.settle()
    assert waits._pending
    torch.cuda.synchronize()
    waits.settle()
    assert not waits._pending
