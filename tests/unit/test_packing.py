"""Packing: every token of every document stands in one row, rows are not too long, and what a row says of its documents is true."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ds_cp.batch import IGNORE
from ds_cp.packing import PackedDataset, PackedStream, Piece, collate, pack

ORDERS = ("sequential", "first_fit_decreasing")
lengths_of_documents = st.lists(st.integers(0, 50), max_size=40)


@pytest.mark.parametrize("order", ORDERS)
@given(lengths=lengths_of_documents, tokens=st.integers(1, 60))
def test_split_keeps_every_token_once_and_rows_fit(order, lengths: list[int], tokens: int) -> None:
    rows = pack(lengths, tokens, order, "split")
    found = sorted((piece.document, t) for row in rows for piece in row for t in range(piece.start, piece.end))
    assert found == [(document, t) for document, length in enumerate(lengths) for t in range(length)]
    assert all(0 < sum(piece.end - piece.start for piece in row) <= tokens for row in rows)


@given(lengths=lengths_of_documents, tokens=st.integers(1, 60))
def test_first_fit_is_what_a_search_from_the_first_row_finds(lengths: list[int], tokens: int) -> None:
    kept = [min(length, tokens) for length in lengths]
    wanted: list[list[Piece]] = []
    for document in sorted(range(len(kept)), key=lambda i: -kept[i]):
        if kept[document]:
            piece = Piece(document, 0, kept[document])
            fits = [row for row in wanted if sum(p.end for p in row) + piece.end <= tokens]
            (fits[0] if fits else wanted.append([]) or wanted[-1]).append(piece)
    assert pack(lengths, tokens, "first_fit_decreasing", "truncate") == [tuple(row) for row in wanted]


@given(lengths=st.lists(st.integers(1, 20), min_size=1, max_size=40))
def test_sequential_keeps_the_order_and_wastes_no_row(lengths: list[int]) -> None:
    rows = pack(lengths, 20, "sequential")
    assert [piece.document for row in rows for piece in row] == list(range(len(lengths)))
    for row, following in pairwise(rows):
        assert sum(piece.end for piece in row) + following[0].end > 20


def test_too_long_documents_and_unknown_words_are_refused() -> None:
    with pytest.raises(ValueError, match=r"document 1 has 9 tokens and a row 8; make rows longer, or set overflow"):
        pack([3, 9], 8)
    with pytest.raises(ValueError, match="got order 'best' and overflow 'error'"):
        pack([3], 8, "best")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least 1 token, got 0"):
        pack([3], 0)


def test_a_row_tells_its_documents_apart_and_predicts_no_first_token() -> None:
    documents = [{"input_ids": list(range(10 * i, 10 * i + n))} for i, n in enumerate([3, 5, 2])]
    dataset = PackedDataset(documents, tokens=8, order="sequential")
    first, second = dataset[0], dataset[1]
    assert len(dataset) == 2
    assert first["input_ids"].tolist() == [0, 1, 2, 10, 11, 12, 13, 14]
    assert first["position_ids"].tolist() == [0, 1, 2, 0, 1, 2, 3, 4]
    assert first["labels"].tolist() == [IGNORE, 1, 2, IGNORE, 11, 12, 13, 14]
    batch = collate([first, second])
    assert {key: tuple(x.shape) for key, x in batch.items()} == dict.fromkeys(("input_ids", "labels", "position_ids"), (1, 10))
    assert torch.equal(batch["input_ids"][0, 8:], second["input_ids"])
    assert documents[0]["input_ids"] == [0, 1, 2]


def test_a_documents_own_labels_are_kept() -> None:
    row = PackedDataset([{"input_ids": [1, 2, 3], "labels": [IGNORE, IGNORE, 3]}], tokens=8)[0]
    assert row["labels"].tolist() == [IGNORE, IGNORE, 3]


class Documents:
    """Documents of these lengths, in another order every epoch."""

    def __init__(self, lengths: list[int]) -> None:
        self.all = [{"input_ids": list(range(100 * i, 100 * i + n))} for i, n in enumerate(lengths)]
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self):
        return iter(self.all[self.epoch :] + self.all[: self.epoch])


@pytest.mark.parametrize("overflow", ["truncate", "split"])
@given(lengths=lengths_of_documents, tokens=st.integers(1, 60))
def test_a_stream_gives_the_rows_of_a_dataset_in_its_order(overflow, lengths: list[int], tokens: int) -> None:
    documents = Documents(lengths)
    wanted = PackedDataset(documents.all, tokens, "sequential", overflow)
    stream = PackedStream(documents, tokens, overflow)
    for _ in range(2):  # again and again
        found = list(stream)
        assert len(found) == len(wanted)
        for row, expected in zip(found, wanted, strict=True):
            assert all(torch.equal(row[key], expected[key]) for key in expected)


def test_a_stream_goes_by_the_epoch_of_its_documents() -> None:
    stream = PackedStream(Documents([3, 4, 5]), 8)
    first = [row["input_ids"].tolist() for row in stream]
    stream.set_epoch(1)
    assert [row["input_ids"].tolist() for row in stream] != first


def test_what_can_be_read_only_once_is_refused() -> None:
    with pytest.raises(ValueError, match="a list_iterator can be read only once"):
        PackedStream(iter([{"input_ids": [1]}]), tokens=8)
    with pytest.raises(ValueError, match="overflow 'cut'"):
        PackedStream([], tokens=8, overflow="cut")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="document 1 has 9 tokens and a row 8"):
        list(PackedStream([{"input_ids": [1]}, {"input_ids": [1] * 9}], tokens=8))


def test_a_stream_is_refused_where_a_length_is_needed() -> None:
    with pytest.raises(ValueError, match="use PackedStream for a stream"):
        PackedDataset(iter([{"input_ids": [1]}]), tokens=8)  # type: ignore[arg-type]
