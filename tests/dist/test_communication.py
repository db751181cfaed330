"""What attention sends and copies, and when: read off a profiler trace and PyTorch's dispatcher."""

from __future__ import annotations

import pytest

from tests.dist import jobs


@pytest.mark.parametrize("ring", [2, 4])
def test_hops_are_posted_before_the_compute_of_their_step(pool, ring: int) -> None:
    """(k, v) for the next step before this step's tiles; (dk, dv) after them, and once more to bring them home.

    The own k and v are sent as they are, each by itself, so their hop is two.
    """
    for rank, found in enumerate(pool(ring).run(jobs.trace_of_a_ring, ulysses=1, ring=ring)):
        forward = ["hop", "forward"] * (ring - 1) + ["forward"]
        backward = ["hop", "backward", "hop"] * (ring - 1) + ["backward", "hop"]
        if ring == 2:  # the sum of the even steps, here the own one, is at home already
            backward = ["hop", "backward", "backward", "hop"]
        assert found == ["hop", *forward, "hop", *backward], rank


@pytest.mark.parametrize(("ulysses", "kv_heads", "kv_sent"), [(2, 4, 4), (4, 4, 4), (4, 2, 4), (4, 1, 4)])
def test_an_all_to_all_moves_each_head_once_to_where_it_is_needed(pool, ulysses: int, kv_heads: int, kv_sent: int) -> None:
    """q, k, v in one exchange and the output in another, each copied once; in backward q, k, v also once after the exchange."""
    tokens, size = 64 // ulysses, 16
    for found in pool(ulysses).run(jobs.traffic, ulysses=ulysses, kv_heads=kv_heads):
        there, back = found["exchanged"]
        assert there == [tokens * (8 + 2 * kv_sent) * size, tokens * 8 * size]
        assert back == there[::-1]
        copied_there, copied_back = found["copied"]
        assert copied_there == sum(there)
        assert copied_back <= sum(back) + there[0]


@pytest.mark.parametrize(("ring", "window", "tokens"), [(2, 5, 64), (4, 9, 64), (4, 60, 512)])
def test_a_windowed_layer_sends_its_window_and_nothing_else(pool, ring: int, window: int, tokens: int) -> None:
    """Every chunk but the row's first has window - 1 tokens before it on other ranks; but the two middle chunks are one run."""
    found = pool(ring).run(jobs.sent_by_a_layer, ring=ring, window=window, tokens=tokens)
    assert window - 1 <= tokens // (2 * ring), "else the halo is of several chunks"
    least = (2 * ring - 2) * (window - 1) * 2 * 4 * 16 * 4
    assert sum(there for there, _ in found) == least
    assert sum(back for _, back in found) == 2 * least, "(k, v) once more, and their gradients in fp32"


@pytest.mark.parametrize(("ring", "window"), [(2, None), (4, None), (4, 9)])
def test_keys_and_values_that_were_kept_are_not_sent_again(pool, ring: int, window: int | None) -> None:
    """Backward sends what it sends without `ring_keep`, less what the forward sends."""
    sent, kept = (pool(ring).run(jobs.sent_by_a_layer, ring=ring, window=window, tokens=256, keep=keep) for keep in (False, True))
    for (there, back), (kept_there, kept_back) in zip(sent, kept, strict=True):
        assert (kept_there, kept_back) == (there, back - there)
