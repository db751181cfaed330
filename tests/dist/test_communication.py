"""What attention sends and copies, and when: read off a profiler trace and PyTorch's dispatcher."""

from __future__ import annotations

import pytest

from tests.dist import jobs


@pytest.mark.parametrize("ring", [2, 4])
def test_hops_are_posted_before_the_compute_of_their_step(pool, ring: int) -> None:
    """(k, v) for the next step before this step's tiles; (dk, dv) after them, and once more to bring them home."""
    for rank, found in enumerate(pool(ring).run(jobs.trace_of_a_ring, ulysses=1, ring=ring)):
        forward = ["hop", "forward"] * (ring - 1) + ["forward"]
        backward = ["hop", "backward", "hop"] * (ring - 1) + ["backward", "hop"]
        assert found == forward + backward, rank


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
