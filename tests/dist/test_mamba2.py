"""Models with Mamba-2 layers against HF's own in one process, one run a document."""

from __future__ import annotations

from typing import Any

import pytest

from ds_cp.models import family_mamba2
from tests.dist import jobs, mamba2_jobs
from tests.dist.pool import WorkerError
from tests.dist.test_parity import MESHES, assert_parity, block, packed, padded

DOCUMENTS = [13, 1, 1, 22, 5, 1, 20, 2]


def check(pool, mesh: tuple[int, int], model_type: str, **run: Any) -> None:
    assert_parity(pool(MESHES[mesh]).run(jobs.parity, model_type=model_type, block=block(*mesh), **run))


@pytest.mark.parametrize(("mesh", "stage"), [((2, 1), 0), ((1, 2), 3), ((2, 2), 0), ((2, 2), 3), ((1, 4), 3)])
def test_bamba_has_the_gradients_of_one_process(pool, mesh: tuple[int, int], stage: int) -> None:
    check(pool, mesh, "bamba", stage=stage, batches=[jobs.rows(1, 70)[0], packed(DOCUMENTS)], accumulation=2)


@pytest.mark.parametrize("model_type", sorted(family_mamba2.MODEL_TYPES - {"bamba"}))
def test_every_listed_model_type_has_parity(pool, model_type: str) -> None:
    check(pool, (2, 2), model_type, stage=3, batches=[jobs.rows(1, 70)[0], packed(DOCUMENTS)], accumulation=2)


def test_padded_batches(pool) -> None:
    """On the left transformers' convolution finds the bias of its padding before a row's first tokens."""
    check(pool, (1, 2), "nemotron_h", stage=1, batches=[padded([40, 9, 23], "right")])


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(pool, reentrant: bool) -> None:
    check(pool, (1, 2), "falcon_h1", stage=3, checkpointing=reentrant)


@pytest.mark.parametrize(
    ("more", "reason"), [({"linear_attention": "state"}, "do not pass their state"), ({}, "use size 2 at most")]
)
def test_what_cannot_be_shared_is_refused_with_what_can(pool, more: dict[str, Any], reason: str) -> None:
    changes = {} if more else {"mamba_n_heads": 2, "mamba_d_head": 64}
    with pytest.raises(WorkerError) as caught:
        pool(4).run(jobs.parity, model_type="bamba", block=block(2, 2, **more), stage=0, changes=changes)
    assert reason in caught.value.errors[0][1]


@pytest.mark.parametrize(("mesh", "groups", "each"), [((2, 2), 2, 1), ((1, 4), 8, 2)])
def test_what_a_layer_sends_is_the_formula_of_the_docs(pool, mesh: tuple[int, int], groups: int, each: int) -> None:
    """T (2 k P N + V (X + 1)) there and T V X back; in backward the same the other way around."""
    tokens, heads, size, state = 16, 8, 3, 5
    there = [tokens * (2 * each * 4 * state + heads * (size + 1)), tokens * heads * size]
    run = {"ulysses": mesh[0], "ring": mesh[1], "heads": (heads, groups), "sizes": (size, state)}
    for found in pool(4).run(mamba2_jobs.traffic, **run):
        assert found == {"there": there, "back": there[::-1]}
