"""The norm that DeepSpeed reports and clips by is that of the whole, token-weighted gradient: against torch's in one process."""

from __future__ import annotations

from typing import Any

import pytest

from tests.dist import jobs, norm_jobs
from tests.dist.test_api import refused
from tests.dist.test_parity import TOLERANCE, block, masked

STAGES = (0, 1, 2, 3)


def assert_clipped(results: list[norm_jobs.Clipped], stage: int) -> None:
    for rank, got in enumerate(results):
        assert got.error <= TOLERANCE, f"rank {rank}: clipped gradient of {got.parameter} is off by {got.error:.2e}"
        if stage == 0:
            assert got.norm_error is None, "DeepSpeed reports no norm of fp32 at ZeRO 0"
        else:
            assert got.norm_error <= TOLERANCE, f"rank {rank}: the norm is off by {got.norm_error:.2e}"


@pytest.mark.parametrize(
    ("mesh", "stage"), [((2, 1), 0), ((2, 1), 3), ((1, 2), 1), ((1, 2), 2), *(((2, 2), stage) for stage in STAGES)]
)
def test_norm_and_clipping(pool, mesh: tuple[int, int], stage: int) -> None:
    assert_clipped(pool(mesh[0] * mesh[1]).run(norm_jobs.clipped, block=block(*mesh), stage=stage), stage)


@pytest.mark.parametrize(
    ("reduction", "stage"), [*(("token_mean", stage) for stage in STAGES), ("mean", 1), ("mean", 3), ("sum", 0), ("sum", 2)]
)
def test_replicas_accumulation_and_unequal_targets(pool, reduction: str, stage: int) -> None:
    run: dict[str, Any] = {"replicas": 2, "accumulation": 2, "reduction": reduction, "stage": stage}
    batches = masked(jobs.rows(4, 50), [0, 11, 37, 45])
    assert_clipped(pool(4).run(norm_jobs.clipped, block=block(1, 2), batches=batches, **run), stage)


@pytest.mark.parametrize("stage", STAGES)
def test_a_tied_head_in_tiles_counts_once(pool, stage: int) -> None:
    changes = {"tie_word_embeddings": True}
    assert_clipped(pool(2).run(norm_jobs.clipped, block=block(2, 1, loss_chunk=7), stage=stage, changes=changes), stage)


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize(
    "zero", [{"reduce_scatter": False}, {"offload_optimizer": {"device": "cpu"}}], ids=["no_scatter", "offload"]
)
def test_zero_flags(pool, zero: dict[str, Any], stage: int) -> None:
    assert_clipped(pool(2).run(norm_jobs.clipped, block=block(1, 2), stage=stage, zero=zero, accumulation=2), stage)


@pytest.mark.parametrize(
    ("dtype", "stage"), [*(("bfloat16", stage) for stage in STAGES), *(("float16", stage) for stage in STAGES[1:])]
)
def test_low_precision_and_a_static_loss_scale(pool, dtype: str, stage: int) -> None:
    """The norm of tens of thousands of rounded entries is within a hundredth; a scale left in it would be a factor of 1,024."""
    run = {"stage": stage, "dtype": dtype, "scale": 1024.0 if dtype == "float16" else 1.0}
    for got, floor in pool(2).run(norm_jobs.low_precision, block=block(1, 2, loss_chunk=7 * (stage % 2)), **run):
        assert got.norm_error <= 1e-2, got
        assert got.error <= 2 * floor, (got, floor)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_dynamic_loss_scale_skips_steps_until_it_fits(pool, stage: int) -> None:
    for first, after, same, taken, error in pool(2).run(norm_jobs.overflow, block=block(2, 1), stage=stage):
        assert (after, same) == (first / 2, True)
        assert taken < after
        assert error <= 1e-2


def test_fp16_that_deepspeed_scales_wrongly_is_refused(pool) -> None:
    message = refused(pool(2), norm_jobs.started, block=block(1, 2), stage=0, section={"fp16": {"enabled": True}})
    assert "every gradient would be 0.0625 times too large. At ZeRO 0 it divides fp16 gradients by a loss scale" in message
    autocast = {"torch_autocast": {"enabled": True, "dtype": "float16"}}
    message = refused(pool(2), norm_jobs.started, block=block(1, 2), stage=1, section=autocast)
    assert "clips by, is 6.55e+04 times the gradient's. At ZeRO 1 to 3 it clips autocast's fp16 gradients" in message
