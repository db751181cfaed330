"""Text to rows of one length, in one file that every rank of a host maps into memory.

    documents   a .txt or .md file, a line of a .jsonl file, a row of a dataset, a module of the standard library
    stream      the tokens of one document after the other, each closed by the end-of-text token
    rows        the stream cut every `seq_length` tokens; what is left at the end is dropped

A document that is cut goes on in the next row as a document of its own. `position_ids` start again at 0 with every document,
and the label there is -100: nothing predicts a document's first token. The rows depend on the text and the tokenizer alone.
"""

from __future__ import annotations

import json
import os
import socket
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

IGNORE = -100
Document = str | list[dict[str, Any]]
"""A text, or the messages of a conversation."""
TEXT_SUFFIXES = (".txt", ".md", ".jsonl")
NOT_THE_LIBRARY = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages"})


@dataclass
class DataArguments:
    """What to train on."""

    data: str = field(
        default="stdlib",
        metadata={
            "help": "a .txt, .md or .jsonl file, a folder of such, a folder that `datasets` saved, a hub name of a dataset, or "
            "stdlib: the source text of Python's standard library, or shapes: drawn pictures with captions"
        },
    )
    data_config: str | None = field(default=None, metadata={"help": "configuration of a hub dataset"})
    data_split: str = field(default="train", metadata={"help": "split of a dataset"})
    text_field: str = field(
        default="text",
        metadata={
            "help": "field of a .jsonl line or a dataset's row that holds the text; a .jsonl line "
            "without `text` may have "
            "`messages`, or `prompt` and `completion`: every token is trained on"
        },
    )
    seq_length: int = field(default=1024, metadata={"help": "tokens in every row"})
    join_documents: bool = field(
        default=False, metadata={"help": "make every row one document: positions do not restart and texts see those before them"}
    )
    max_rows: int = field(default=0, metadata={"help": "stop reading after so many rows; 0 reads everything"})
    eval_rows: int = field(default=0, metadata={"help": "rows, the last ones, to evaluate on and not to train on"})

    def __post_init__(self) -> None:
        for name, least in (("seq_length", 2), ("max_rows", 0), ("eval_rows", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"--{name} {getattr(self, name)}: must be at least {least}")
        if looks_local(self.data) and not Path(self.data).exists():
            raise ValueError(f"--data {self.data}: no such file or folder")


class PackedRows(Dataset):
    """The rows of a file that `write_rows` wrote, as keyword arguments of a causal LM."""

    def __init__(self, path: Path, seq_length: int) -> None:
        if not path.exists() or not path.stat().st_size:
            raise ValueError(f"{path}: the first rank of this host has packed no rows into it; see what it said")
        self.rows = np.memmap(path, dtype=np.int32, mode="r").reshape(-1, 2, seq_length)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        tokens, positions = torch.from_numpy(self.rows[index].astype(np.int64))
        return {"input_ids": tokens, "position_ids": positions, "labels": tokens.masked_fill(positions == 0, IGNORE)}

    def split(self, eval_rows: int) -> tuple[Subset, Subset | None]:
        """The rows to train on, and the last `eval_rows` to evaluate on (None without any)."""
        first = len(self) - eval_rows
        if first < 1:
            raise ValueError(f"--eval_rows {eval_rows}: the data has {len(self)} rows, so none is left to train on")
        return Subset(self, range(first)), Subset(self, range(first, len(self))) if eval_rows else None


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """256 byte tokens, an end of text and a padding token; nothing to download, and it is saved with the checkpoint."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: index for index, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|pad|>")


def write_rows(path: Path, args: DataArguments, tokenizer: PreTrainedTokenizerBase) -> None:
    """Packs the data into `path`: int32 [rows, 2, seq_length], tokens and position_ids."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    rows = pack(tokenized(texts(args), tokenizer), args.seq_length)
    partial = path.with_name(f"{path.name}.{socket.gethostname()}.{os.getpid()}")  # hosts may share this folder
    try:
        with partial.open("wb") as file:
            for row in islice(rows, args.max_rows or None):
                if args.join_documents:
                    row[1] = np.arange(args.seq_length)
                file.write(row.tobytes())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    if not path.stat().st_size:
        tokens = sum(map(len, tokenized(texts(args), tokenizer)))
        reason = f"--data {args.data} has {tokens} tokens, fewer than one row; make it {tokens} or less"
        raise ValueError(f"--seq_length {args.seq_length}: {reason}")


def pack(documents: Iterable[list[int]], seq_length: int) -> Iterator[np.ndarray]:
    """Rows [2, seq_length] of tokens and position_ids."""
    tokens: list[int] = []
    positions: list[int] = []
    for document in documents:
        done = 0
        while done < len(document):
            piece = document[done : done + seq_length - len(tokens)]
            tokens += piece
            positions += range(len(piece))
            done += len(piece)
            if len(tokens) == seq_length:
                yield np.array([tokens, positions], dtype=np.int32)
                tokens, positions = [], []


def tokenized(documents: Iterable[Document], tokenizer: PreTrainedTokenizerBase) -> Iterator[list[int]]:
    """The tokens of each document that has any, and the end of text where the tokenizer has one."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    texts = iter(as_text(document, tokenizer) for document in documents if document)
    while group := list(islice(texts, 16)):
        for ids in tokenizer(group, add_special_tokens=False, verbose=False)["input_ids"]:
            yield ids + end


def as_text(document: Document, tokenizer: PreTrainedTokenizerBase) -> str:
    """A conversation in the form of the tokenizer's chat template."""
    if isinstance(document, str):
        return document
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError("--data: the lines are conversations, and this tokenizer has no chat template; give another --tokenizer")
    return tokenizer.apply_chat_template(document, tokenize=False)


def texts(args: DataArguments) -> Iterator[Document]:
    """The documents of --data, in an order that depends on their names alone."""
    path = Path(args.data)
    if args.data == "stdlib":
        yield from map(read_text, stdlib_files())
    elif path.is_file():
        yield from file_texts(path, args.text_field)
    elif path.is_dir() and not is_saved_dataset(path):
        files = [file for file in sorted(path.rglob("*")) if file.suffix in TEXT_SUFFIXES]
        if not files:
            raise ValueError(f"--data {path}: no {', '.join(TEXT_SUFFIXES)} file in this folder")
        for file in files:
            yield from file_texts(file, args.text_field)
    else:
        yield from dataset_texts(args)


def stdlib_files() -> list[Path]:
    """The modules of the standard library, sorted, without its tests."""
    root = Path(sysconfig.get_path("stdlib"))
    files = sorted(path.relative_to(root) for path in root.rglob("*.py"))
    return [root / path for path in files if NOT_THE_LIBRARY.isdisjoint(path.parts)]


def file_texts(path: Path, text_field: str) -> Iterator[Document]:
    """The one document of a text file, or those of a .jsonl file."""
    if path.suffix not in TEXT_SUFFIXES:
        raise ValueError(f"--data {path}: unknown kind of file; use {', '.join(TEXT_SUFFIXES)}")
    if path.suffix != ".jsonl":
        yield read_text(path)
        return
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            yield document_of(parsed(line, f"line {number} of {path}"), text_field, f"line {number} of {path}")


def parsed(line: str, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"--data: {where} is not JSON: {error}") from None
    if not isinstance(record, dict):
        raise ValueError(f'--data: {where} is a {type(record).__name__}; every line must be an object, as {{"text": ...}}')
    return record


def document_of(record: dict[str, Any], text_field: str, where: str) -> Document:
    """The field that --text_field names; by default also `messages`, or `prompt` and `completion`, one after the other."""
    names = next((names for names in forms(text_field) if record.keys() >= set(names)), None)
    if names is None:
        needed = ", or ".join(" and ".join(form) for form in forms(text_field))
        raise ValueError(f"--data: {where} has the fields {', '.join(record)}; needed are {needed} (--text_field names another)")
    first, *others = (record[name] for name in names)
    for value in others:
        if type(value) is not type(first):
            raise ValueError(f"--data: {where}: {' and '.join(names)} are not of one kind; each must be a text, or each messages")
        first = first + value
    if not isinstance(first, str | list):
        raise ValueError(f"--data: {where}: {names[0]} is {json.dumps(first)[:40]}; it must be a text, or a list of messages")
    return first


def forms(text_field: str) -> list[tuple[str, ...]]:
    """The fields of a line that make a document, the first that are there."""
    return [(text_field,), ("messages",), ("prompt", "completion")] if text_field == "text" else [(text_field,)]


def dataset_texts(args: DataArguments) -> Iterator[str]:
    """The documents of a dataset from the hub, or from the folder that `save_to_disk` wrote."""
    import datasets

    if is_saved_dataset(Path(args.data)):
        dataset = datasets.load_from_disk(args.data)
        dataset = dataset[args.data_split] if isinstance(dataset, datasets.DatasetDict) else dataset
    else:
        dataset = datasets.load_dataset(args.data, args.data_config, split=args.data_split)
    if args.text_field not in dataset.column_names:
        raise ValueError(f"--text_field {args.text_field}: {args.data} has only {', '.join(dataset.column_names)}")
    for row in dataset:
        yield row[args.text_field]


def read_text(path: Path) -> str:
    return path.read_bytes().decode("utf-8", errors="replace")


def is_saved_dataset(path: Path) -> bool:
    return (path / "state.json").exists() or (path / "dataset_dict.json").exists()


def looks_local(data: str) -> bool:
    """Whether --data is meant as a path: a hub name is `name` or `owner/name`."""
    return Path(data).suffix in TEXT_SUFFIXES or data.startswith((".", "/", "~")) or data.count("/") > 1
