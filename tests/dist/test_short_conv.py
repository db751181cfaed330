"""Models with short convolutions over tokens against HF's own in one process, one run a document."""

from __future__ import annotations

from typing import Any

import pytest

from ds_cp.models import family_short_conv
from tests.dist import jobs, short_conv_jobs
from tests.dist.test_parity import MESHES, assert_parity, block, packed, padded

DOCUMENTS = [13, 1, 1, 22, 5, 1, 20, 2]


def check(pool, mesh: tuple[int, int], model_type: str, **run: Any) -> None:
    assert_parity(pool(MESHES[mesh]).run(jobs.parity, model_type=model_type, block=block(*mesh), **run))


@pytest.mark.parametrize(("mesh", "stage"), [((2, 1), 0), ((1, 2), 3), ((2, 2), 0), ((2, 2), 3), ((1, 4), 3)])
def test_lfm2_has_the_gradients_of_one_process(pool, mesh: tuple[int, int], stage: int) -> None:
    check(pool, mesh, "lfm2", stage=stage, batches=[jobs.rows(1, 70)[0], packed(DOCUMENTS)], accumulation=2)


@pytest.mark.parametrize("model_type", sorted(family_short_conv.MODEL_TYPES - {"lfm2"}))
def test_every_listed_model_type_has_parity(pool, model_type: str) -> None:
    check(pool, (2, 2), model_type, stage=3, batches=[jobs.rows(1, 70)[0], packed(DOCUMENTS)], accumulation=2)


def test_zaya_at_stage_0(pool) -> None:
    check(pool, (1, 4), "zaya", stage=0, batches=[packed(DOCUMENTS)])


@pytest.mark.parametrize("length", [2, 7])
def test_pieces_shorter_than_the_halo(pool, length: int) -> None:
    check(pool, (2, 2), "lfm3", stage=1, batches=jobs.rows(1, length))


def test_padded_batches(pool) -> None:
    """Without biases: with them transformers' own projections of left padding are not zero, and its first tokens see them."""
    check(pool, (1, 2), "lfm2", stage=1, batches=[padded([40, 9, 23], "left")], changes={"conv_bias": False})


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(pool, reentrant: bool) -> None:
    for model_type in ("lfm2", "zaya"):
        check(pool, (1, 2), model_type, stage=3, checkpointing=reentrant)


@pytest.mark.parametrize(("layout", "pieces"), [("contiguous", 1), ("zigzag", 2)])
def test_what_a_layer_sends_is_the_formula_of_the_docs(pool, layout: str, pieces: int) -> None:
    """width * C for each piece that another rank needs it for, whatever the row's length; the same back."""
    for tokens in (64, 256):
        found = pool(4).run(short_conv_jobs.traffic, layout=layout, tokens=tokens)
        for direction in ("there", "back"):
            sent = [rank[direction] for rank in found]
            assert max(sent) == pieces * short_conv_jobs.WIDTH * short_conv_jobs.CHANNELS, sent
            assert sum(sent) == (4 * pieces - (1 if pieces == 1 else 2)) * short_conv_jobs.WIDTH * short_conv_jobs.CHANNELS
