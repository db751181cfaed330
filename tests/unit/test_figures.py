"""The figures of docs/concepts.md are what the code draws today, and what they show is what it has to be."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from itertools import pairwise

import pytest

from scripts import gen_figures as figures


@pytest.mark.parametrize("name", figures.FIGURES)
def test_a_figure_is_what_the_code_draws(name: str) -> None:
    written = (figures.TARGET / f"{name}.svg").read_text(encoding="utf-8")
    assert written == figures.FIGURES[name]().render(), "run python scripts/gen_figures.py"


def pairs() -> Iterator[tuple[int, int]]:
    for _, _, query, first, end in figures.attended():
        yield from ((query, key) for key in range(first, end))


def test_every_pair_of_a_document_is_computed_once() -> None:
    documents = pairwise(figures.STEP_DOCUMENTS)
    wanted = [(q, k) for start, end in documents for q in range(start, end) for k in range(start, q + 1)]
    assert sorted(pairs()) == wanted


def test_layouts_deal_out_the_whole_row_and_balanced_is_even() -> None:
    rows = dict(figures.layouts())
    for row in rows.values():
        assert sorted(chunk for chunks in row.layout.chunks for chunk in chunks) == list(range(sum(map(len, row.layout.chunks))))
    busiest = {title: max(row.work) * figures.RING / sum(row.work) for title, row in rows.items()}
    assert busiest["zigzag, one document"] < 1.001
    assert busiest["balanced, the same documents"] < 1.05 < busiest["zigzag, packed documents"]


def test_heads_and_tokens_of_the_exchanges_are_whole() -> None:
    query = [head for heads, _ in figures.heads_of(4, *figures.HEADS) for head in heads]
    assert query == list(range(figures.HEADS[0]))
    for linear in ("heads", "state"):
        worked = [
            (head, token)
            for _, tokens, heads in figures.placed(linear)
            for head in heads
            for start, end in tokens
            for token in range(start, end)
        ]
        assert sorted(worked) == [(h, t) for h in range(figures.VALUE_HEADS) for t in range(figures.STEP_TOKENS)], linear


def test_weights_of_targets() -> None:
    micro_batches = [sum(step) for replica in figures.TARGETS for step in replica]
    flat = {reduction: [each for row in figures.weights(reduction) for each in row] for reduction in ("mean", "token_mean", "sum")}
    assert flat["mean"] == [Fraction(1, n * len(micro_batches)) for n in micro_batches]
    assert flat["token_mean"] == [Fraction(1, sum(micro_batches))] * len(micro_batches)
    assert flat["sum"] == [1] * len(micro_batches)
