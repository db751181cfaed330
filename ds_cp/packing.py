"""Documents into rows of one length, without padding inside: which pieces stand in which row, and the rows as a dataset.

    sequential            documents in their order; one that does not fit into what is left of a row begins the next
    first_fit_decreasing  the longest first, each into the first row that has room (Johnson, 1973): fewer rows, another order

Rows depend on the lengths and the arguments alone, so they are the same on every rank and after a resume. A document longer than a
row is refused unless the caller says what to do with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from ds_cp.batch import IGNORE

Order = Literal["sequential", "first_fit_decreasing"]
Overflow = Literal["error", "truncate", "split"]


class Piece(NamedTuple):
    """Tokens [start, end) of a document."""

    document: int
    start: int
    end: int


def pack(
    lengths: Sequence[int], tokens: int, order: Order = "first_fit_decreasing", overflow: Overflow = "error"
) -> list[tuple[Piece, ...]]:
    """The pieces of every row of at most `tokens` tokens.

    Args:
        lengths: tokens of each document; empty ones are left out.
        overflow: what becomes of a document longer than a row: refused, cut to its first `tokens` tokens, or cut into several
            pieces, which do not attend each other.

    Raises:
        ValueError: an unknown order or overflow, a row of no tokens, or a document too long under "error".
    """
    if order not in ("sequential", "first_fit_decreasing") or overflow not in ("error", "truncate", "split"):
        raise ValueError(
            f"pack: got order {order!r} and overflow {overflow!r}; orders are sequential and first_fit_decreasing, overflows "
            "error, truncate and split"
        )
    if tokens < 1:
        raise ValueError(f"pack: a row must have at least 1 token, got {tokens}")
    pieces = [piece for document, length in enumerate(lengths) for piece in _pieces(document, length, tokens, overflow)]
    return _sequential(pieces, tokens) if order == "sequential" else _first_fit_decreasing(pieces, tokens)


class PackedDataset(Dataset):
    """Rows of packed documents as keyword arguments of a causal LM, each [tokens of the row]; `collate` makes a batch of one.

    `position_ids` start again at 0 with every piece, which is how documents are told apart, and the label there is -100: nothing
    predicts a piece's first token. Rows are as long as their documents, not padded; ds_cp pads what its chunks need.
    """

    def __init__(
        self,
        documents: Sequence[Mapping[str, Any]],
        tokens: int,
        order: Order = "first_fit_decreasing",
        overflow: Overflow = "error",
        length_of: Callable[[Mapping[str, Any]], int] | None = None,
    ) -> None:
        """Args:
        documents: mappings with `input_ids` and optionally `labels`; a dataset with a length.
        length_of: of a document, where that is cheaper than reading it.
        """
        if not isinstance(documents, Sized):
            raise ValueError("PackedDataset: documents must have a length; use PackedStream for a stream")
        count = length_of or (lambda document: len(document["input_ids"]))
        self._documents = documents
        self.rows = pack([count(documents[i]) for i in range(len(documents))], tokens, order, overflow)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return _joined([_piece(self._documents[piece.document], piece) for piece in self.rows[index]])


class PackedStream(IterableDataset):
    """`PackedDataset` of a stream of documents: rows in its order, each as full as the next document allows.

    Rows depend on the documents alone, so a run that goes on goes on with the same rows. Every rank reads the whole stream.
    """

    def __init__(self, documents: Iterable[Mapping[str, Any]], tokens: int, overflow: Overflow = "error") -> None:
        """Args:
        documents: mappings with `input_ids` and optionally `labels`, read again in every epoch; its `set_epoch` is called.

        Raises:
            ValueError: an unknown overflow, a row of no tokens, documents that can be read only once.
        """
        pack([], tokens, "sequential", overflow)
        if isinstance(documents, Iterator):
            raise ValueError(
                f"PackedStream: a {type(documents).__name__} can be read only once, but every epoch, and every run that goes on, "
                "reads from the start; pass a dataset"
            )
        self._documents, self._tokens, self._overflow = documents, tokens, overflow

    def set_epoch(self, epoch: int) -> None:
        """Of the documents."""
        if hasattr(self._documents, "set_epoch"):
            self._documents.set_epoch(epoch)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        row: list[dict[str, Tensor]] = []
        left = self._tokens
        for number, document in enumerate(self._documents):
            for piece in _pieces(number, len(document["input_ids"]), self._tokens, self._overflow):
                size = piece.end - piece.start
                if size > left:
                    yield _joined(row)
                    row, left = [], self._tokens
                row.append(_piece(document, piece))
                left -= size
        if row:
            yield _joined(row)


def collate(rows: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Rows of `PackedDataset`, of any lengths, one after the other as a batch of one row; positions keep documents apart."""
    return {key: torch.cat([row[key] for row in rows]).unsqueeze(0) for key in rows[0]}


def _joined(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {key: torch.cat([part[key] for part in parts]) for key in ("input_ids", "labels", "position_ids")}


def _piece(document: Mapping[str, Any], piece: Piece) -> dict[str, Tensor]:
    part = slice(piece.start, piece.end)
    ids = torch.as_tensor(document["input_ids"], dtype=torch.long)[part]
    labels = torch.as_tensor(document.get("labels", document["input_ids"]), dtype=torch.long)[part].clone()
    assert len(ids) == len(labels) == piece.end - piece.start, "a document's length is not what length_of said"
    labels[0] = IGNORE
    return {"input_ids": ids, "labels": labels, "position_ids": torch.arange(len(ids))}


def _pieces(document: int, length: int, tokens: int, overflow: Overflow) -> list[Piece]:
    if length > tokens and overflow == "error":
        raise ValueError(
            f'pack: document {document} has {length} tokens and a row {tokens}; make rows longer, or set overflow to "truncate" '
            '(the rest is lost) or "split" (its pieces do not attend each other)'
        )
    last = min(length, tokens) if overflow == "truncate" else length
    return [Piece(document, start, min(start + tokens, last)) for start in range(0, last, tokens)]


def _sequential(pieces: list[Piece], tokens: int) -> list[tuple[Piece, ...]]:
    rows: list[list[Piece]] = []
    left = 0
    for piece in pieces:
        size = piece.end - piece.start
        if size > left:
            rows.append([])
            left = tokens
        rows[-1].append(piece)
        left -= size
    return [tuple(row) for row in rows]


def _first_fit_decreasing(pieces: list[Piece], tokens: int) -> list[tuple[Piece, ...]]:
    """The room of rows is a tree of maxima, so that the first row with room is found in the logarithm of their number."""
    leaves = 1 << max(len(pieces) - 1, 0).bit_length()
    room = [tokens] * (2 * leaves)
    rows: list[list[Piece]] = [[] for _ in pieces]
    for piece in sorted(pieces, key=lambda piece: piece.start - piece.end):  # stable: equal lengths stay in their order
        size, node = piece.end - piece.start, 1
        while node < leaves:
            node = 2 * node if room[2 * node] >= size else 2 * node + 1
        rows[node - leaves].append(piece)
        room[node] -= size
        while node > 1:
            node //= 2
            room[node] = max(room[2 * node], room[2 * node + 1])
    return [tuple(row) for row in rows if row]
