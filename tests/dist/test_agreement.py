"""Ranks that differ are refused on every rank, before a collective that one of them does not take part in."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tests.dist import agreement_jobs
from tests.dist.test_api import refused
from tests.dist.test_parity import block

HALF = {"attention_kernel": "reference"}

DIFFERENT: dict[str, tuple[dict[int, dict[str, Any]], str]] = {
    "stage": ({3: {"stage": 2}}, r"ds_config\.zero_optimization\.stage is 1 on ranks 0, 1, 2 \(\S+\) and 2 on rank 3 \(\S+\)\. Give every"),
    "accumulation": ({0: {"accumulation": 2}}, r"gradient_accumulation_steps is 2 on rank 0 \(\S+\) and 1 on ranks 1, 2, 3"),
    "switched off": ({2: {"block": {"size": 1}}}, r"sequence_parallel\.size is 4 on ranks 0, 1, 3 .* and 1 on rank 2"),
    "one key more": ({1: {"block": {**block(2, 2), **HALF}}}, r"sequence_parallel\.attention_kernel is not there on ranks 0, 2, 3 .*'reference' on rank 1"),
    "not a block": ({1: {"block": {**block(2, 2), "ring_size": 3}}}, r"ring_size is 2 on ranks 0, 2, 3 .* 3 on rank 1|is 6, not size 4.*\(rank 1\)"),
    "unknown key": ({2: {"block": {**block(2, 2), "layuot": "auto"}}}, r"unknown key; did you mean 'layout'.* \(rank 2\)"),
    "layers": ({0: {"changes": {"num_hidden_layers": 1}}}, r"model\.config\.num_hidden_layers is 1 on rank 0 .* and 2 on ranks 1, 2, 3 .*Build the same"),
    "frequencies": ({1: {"changes": {"rms_norm_eps": 1e-3}}}, r"model\.config\.rms_norm_eps is .* and 0\.001 on rank 1"),
    "a model refused": ({1: {"changes": {"attention_dropout": 0.1}}}, r"model\.config\.attention_dropout is 0\.0 on ranks 0, 2, 3 .* and 0\.1 on rank 1"),
}


@pytest.mark.parametrize("case", DIFFERENT)
def test_what_ranks_were_given_is_compared(pool, case: str) -> None:
    own, wanted = DIFFERENT[case]
    message = refused(pool(4), agreement_jobs.initialize, own=own, block=block(2, 2))
    assert re.search(wanted, message), message


def test_a_config_that_one_rank_does_not_find_ends_all(pool) -> None:
    message = refused(pool(2), agreement_jobs.missing_file, block=block(1, 2))
    assert "'not/there.json' is neither a file" in message
    assert message.endswith("(rank 1)")


def test_other_packages_are_named(pool) -> None:
    message = refused(pool(4), agreement_jobs.another_version, block=block(2, 2))
    assert re.search(r"transformers is \S+ on ranks 0, 1, 2 \(\S+\) and 0\.0\.1 on rank 3 \(\S+\)\. Install the same", message), message


def test_another_plan_of_the_same_row_is_refused_before_the_first_hop(pool) -> None:
    message = refused(pool(2), agreement_jobs.another_plan, block=block(1, 2, layout="balanced"))
    assert re.search(r"have planned the same row differently: chunks to ranks \(rank 0 \w{8}, rank 1 \w{8}\)", message), message


def test_ranks_whose_kernels_differ_are_refused(pool) -> None:
    message = refused(pool(2), agreement_jobs.disagree)
    assert re.search(r"attention_kernel is kernel 0 on rank 0 \(\S+\) and kernel 1 on rank 1 \(\S+\)\. Name one", message), message


@pytest.mark.parametrize("own", [{1: {"max_steps": 5}}, {1: {"block": {"size": 1}}}], ids=str)
def test_the_trainer_compares_its_arguments_too(pool, tmp_path: Path, own: dict[int, dict[str, Any]]) -> None:
    message = refused(pool(2), agreement_jobs.train, folder=str(tmp_path), block=block(1, 2), own=own)
    wanted = r"TrainingArguments\.max_steps is 4 on rank 0 .* and 5 on rank 1|sequence_parallel\.size is 2 on rank 0 .* and 1 on rank 1"
    assert re.search(wanted, message), message
