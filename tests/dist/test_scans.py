"""Models with Mamba layers, Lightning or Kimi delta attention against HF's own in one process, one run a document."""

from __future__ import annotations

from typing import Any

import pytest

from tests.dist import jobs
from tests.dist.test_parity import MESHES, assert_parity, block, packed

DOCUMENTS = [13, 1, 1, 22, 5, 1, 20, 2]


def check(pool, mesh: tuple[int, int], model_type: str, **run: Any) -> None:
    assert_parity(pool(MESHES[mesh]).run(jobs.parity, model_type=model_type, block=block(*mesh), **run))


@pytest.mark.parametrize(("mesh", "stage"), [((2, 1), 0), ((1, 2), 3), ((2, 2), 3), ((1, 4), 0)])
@pytest.mark.parametrize("model_type", ["jamba", "minimax", "bailing_hybrid"])
def test_one_of_each_kind_has_the_gradients_of_one_process(pool, model_type: str, mesh: tuple[int, int], stage: int) -> None:
    check(pool, mesh, model_type, stage=stage, batches=[jobs.rows(1, 70)[0], packed(DOCUMENTS)], accumulation=2)


@pytest.mark.parametrize("model_type", ["zamba", "kimi_linear"])
def test_every_other_listed_type_has_parity(pool, model_type: str) -> None:
    check(pool, (2, 2), model_type, stage=3, batches=[jobs.rows(1, 70)[0], packed(DOCUMENTS)], accumulation=2)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(pool, reentrant: bool) -> None:
    for model_type in ("jamba", "minimax", "kimi_linear"):
        check(pool, (1, 2), model_type, stage=3, checkpointing=reentrant)
