"""A rank that stalls ends the run within `comm_timeout_s`, with a sentence that names the ranks: no hang."""

from __future__ import annotations

import time

import pytest

from tests.dist import jobs
from tests.dist.pool import Pool, WorkerError
from tests.dist.test_parity import block

TIMEOUT_S = 4


@pytest.mark.parametrize(
    ("mesh", "layer", "sentence"),
    [
        ((1, 2), True, "ds_cp: the key/value hop from rank 1 to rank 0 failed"),
        ((2, 1), True, "ds_cp: the all-to-all of ranks [0, 1] failed on rank 0"),
        ((2, 1), False, "ds_cp: the all-gather of ranks [0, 1] failed on rank 0"),  # of the check that all hold the same row
    ],
    ids=["ring", "ulysses", "before the pass"],
)
def test_a_stalled_rank_ends_the_run(built_extension: None, mesh: tuple[int, int], layer: bool, sentence: str) -> None:
    pool = Pool(2)
    try:
        start = time.monotonic()
        with pytest.raises(WorkerError) as caught:
            pool.run(jobs.stall, block=block(*mesh, comm_timeout_s=TIMEOUT_S), seconds=3 * TIMEOUT_S, layer=layer)
        assert time.monotonic() - start < 120
        assert sentence in caught.value.errors[0][1]
    finally:
        pool.close()
