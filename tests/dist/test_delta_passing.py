"""State passed between ring ranks against the unsharded row, in fp64: out and the gradient of every tensor."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate

import pytest

from tests.dist import delta_jobs
from tests.dist.pool import Pool

ROWS = {
    "one document": [384],
    "one document, chunks that do not end with the piece": [400],
    "across every edge": [50, 300, 34],
    "ending and beginning at edges": [96, 96, 192],
    "one-token documents at the edges": [95, 1, 1, 94, 1, 1, 190, 1],
    "within pieces and across several": [10, 90, 250, 1, 33],
    "one piece holds many, the others one": [1, 2, 3, 4, 5, 6, 7, 356],
    "pieces shorter than the convolution": [8],
    "short pieces and documents": [1, 6, 1],
}


@pytest.mark.parametrize("lengths", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("ranks", [2, 4])
def test_pieces_give_what_the_row_gives(pool: Callable[..., Pool], ranks: int, lengths: list[int]) -> None:
    documents = tuple(accumulate(lengths, initial=0))
    for rank, errors in enumerate(pool(ranks).run(delta_jobs.passed, documents=documents)):
        assert max(errors.values()) <= 1e-10, (rank, errors)
