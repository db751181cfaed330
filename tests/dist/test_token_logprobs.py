"""Log-probabilities and entropies of whole rows, and the gradients through them, against HF's logits in one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import ds_cp
from tests.dist import jobs
from tests.dist.test_api import refused
from tests.dist.test_parity import TOLERANCE, block, masked, packed, padded


def assert_values(results: list[tuple[float, float, str]]) -> None:
    for values, gradient, name in results:
        assert values <= TOLERANCE
        assert gradient <= TOLERANCE, f"gradient of {name} is off by {gradient:.2e}"


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_every_stage(pool, stage: int) -> None:
    batch = masked(jobs.rows(1, 50), [20])[0]
    assert_values(pool(4).run(jobs.token_values_errors, block=block(2, 2, loss_chunk=7), stage=stage, batch=batch, temperature=0.7))


@pytest.mark.parametrize(("entropies", "low_rank"), [(False, False), (True, True)])
def test_with_and_without_entropies_and_an_adapter(pool, entropies: bool, low_rank: bool) -> None:
    run = {"block": block(1, 2, loss_chunk=5), "stage": 3, "batch": jobs.rows(1, 50)[0], "low_rank": low_rank}
    assert_values(pool(2).run(jobs.token_values_errors, entropies=entropies, **run))


@pytest.mark.parametrize("kind", ["packed", "left", "right"])
def test_rows_come_back_in_their_order(pool, kind: str) -> None:
    batch: dict[str, Any] = packed([13, 1, 22, 14]) if kind == "packed" else padded([40, 9, 23], kind)
    assert_values(pool(2).run(jobs.token_values_errors, block=block(1, 2, loss_chunk=5), stage=1, batch=batch))
    if kind == "right":
        del batch["labels"]
        assert_values(pool(2).run(jobs.token_values_errors, block=block(2, 1), stage=1, batch=batch))


def test_without_sharding(pool) -> None:
    assert all(pool(2).run(jobs.values_without_sharding))


def test_what_cannot_be_is_refused(pool) -> None:
    run = {"stage": 3, "batch": jobs.rows(1, 20)[0]}
    message = refused(pool(2), jobs.token_values_errors, block=block(1, 2, loss_chunk=0), low_rank=True, **run)
    assert "the head must be gathered as one" in message
    model, batch = torch.nn.Linear(2, 2), run["batch"]
    with pytest.raises(ValueError, match="temperature must be more than 0"):
        ds_cp.token_logprobs(model, temperature=0.0, **batch)
    with pytest.raises(ValueError, match=r"give labels \[B, S\] with inputs_embeds"):
        ds_cp.token_logprobs(model, inputs_embeds=torch.zeros(1, 4, 8))
