"""One micro-batch on all ranks of a mesh, in one process: `batch.prepare` needs integers, not process groups."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from ds_cp import batch as batches
from ds_cp import layout as layouts
from ds_cp import tiles
from ds_cp.batch import IGNORE, SequenceContext
from ds_cp.mesh import AxisGroup, Mesh
from ds_cp.topology import AXES, Topology

CPU = torch.device("cpu")
METHODS = batches.Methods(attention=SimpleNamespace(), layout="zigzag")  # a kernel that is carried, not called
HIDDEN = 3
MESHES = ((1, 1), (2, 1), (1, 2), (2, 2), (1, 4), (4, 2), (3, 3))

Local = tuple[dict[str, Any], SequenceContext]


# All ranks in one process


def meshes(ulysses: int, ring: int, data: int = 1) -> list[Mesh]:
    """The mesh of every rank, as `mesh.build` gives it, without groups."""
    topology = Topology(ulysses, ring, data)
    return [Mesh(topology=topology, **{axis: _axis_of(topology, axis, rank) for axis in AXES}) for rank in range(topology.world)]


def _axis_of(topology: Topology, axis: Any, rank: int) -> AxisGroup:
    ranks = next(group for group in topology.groups(axis) if rank in group)
    return AxisGroup(group=None, ranks=tuple(ranks), rank=ranks.index(rank))


def prepare(batch: dict[str, Any], ulysses: int = 1, ring: int = 2, layout: str = "zigzag") -> list[Local]:
    return [batches.prepare(batch, mesh, replace(METHODS, layout=layout), CPU) for mesh in meshes(ulysses, ring)]


def whole(shards: list[Local], key: str) -> Tensor:
    """The rows in the user's order, zeros at padding."""
    return batches.unshard(torch.stack([local[key] for local, _ in shards]), shards[0][1])


def local_targets(shards: list[Local]) -> int:
    return sum(int((local["labels"] != IGNORE).sum()) for local, _ in shards)


# Batches


def rows(batch_size: int, length: int, mask: Tensor | None = None) -> dict[str, Any]:
    """Tokens that are all different and none of them 0, their embeddings, labels and a mask."""
    ids = torch.arange(1, batch_size * length + 1).view(batch_size, length)
    batch = {"input_ids": ids, "labels": ids + 1000}
    if mask is not None:
        batch |= {"attention_mask": mask, "labels": batch["labels"].masked_fill(mask == 0, IGNORE)}
    return batch


def packed(*lengths: int) -> dict[str, Any]:
    return {**rows(1, sum(lengths)), "position_ids": torch.cat([torch.arange(n) for n in lengths]).unsqueeze(0)}


def shifted(labels: Tensor, fill: float = IGNORE) -> Tensor:
    """What HF's ForCausalLMLoss makes of labels: padded by one on the right, then without the first."""
    return torch.nn.functional.pad(labels, (0, 1), value=fill)[:, 1:]


def wanted_targets(batch: dict[str, Any]) -> Tensor:
    targets = shifted(batch["labels"])
    mask = batch.get("attention_mask")
    return targets if mask is None else targets.masked_fill(mask == 0, IGNORE)


RIGHT = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0]])
LEFT = RIGHT.flip(1)
INTERIOR = torch.tensor([[1, 1, 0, 0, 1, 1, 1], [0, 1, 0, 1, 0, 1, 0], [1, 1, 1, 1, 1, 1, 1]])
EMPTY_ROW = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0, 0], [0, 0, 1, 1, 1, 0, 0]])
MASKS = {"right": RIGHT, "left": LEFT, "interior": INTERIOR, "empty row": EMPTY_ROW, "none dropped": torch.ones_like(RIGHT)}


def assert_reassembles(batch: dict[str, Any], shards: list[Local]) -> None:
    """Tokens, positions and targets of all ranks, put together, are the user's rows."""
    mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
    assert torch.equal(whole(shards, "input_ids"), batch["input_ids"] * mask)
    assert torch.equal(whole(shards, "labels"), wanted_targets(batch) * mask)
    columns = torch.arange(mask.shape[1]).expand_as(mask)
    assert torch.equal(whole(shards, "position_ids"), batch.get("position_ids", columns) * mask)
    count = int((wanted_targets(batch) != IGNORE).sum())
    assert local_targets(shards) == count == int(batches.count_targets(batch))
    assert [float(context.targets) for _, context in shards] == [count] * len(shards)


# Whole rows come back


@pytest.mark.parametrize("layout", ["zigzag", "balanced", "contiguous"])
@pytest.mark.parametrize("mesh", MESHES, ids=lambda m: f"u{m[0]}r{m[1]}")
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_shards_of_a_padded_batch_give_the_rows_back(mask: Tensor, mesh: tuple[int, int], layout: str) -> None:
    batch = rows(*mask.shape, mask=mask)
    assert_reassembles(batch, prepare(batch, *mesh, layout))


@pytest.mark.parametrize("mesh", MESHES, ids=lambda m: f"u{m[0]}r{m[1]}")
def test_shards_of_a_packed_row_give_the_row_back(mesh: tuple[int, int]) -> None:
    batch = packed(5, 1, 1, 9, 2)
    assert_reassembles(batch, prepare(batch, *mesh))


@st.composite
def masked_batches(draw: st.DrawFn) -> dict[str, Any]:
    batch_size, length = draw(st.integers(1, 4)), draw(st.integers(1, 16))
    cells = draw(st.lists(st.booleans(), min_size=batch_size * length, max_size=batch_size * length).filter(any))
    return rows(batch_size, length, mask=torch.tensor(cells).long().view(batch_size, length))


@settings(max_examples=150)
@given(
    batch=masked_batches(),
    ulysses=st.integers(1, 4),
    ring=st.integers(1, 4),
    layout=st.sampled_from(["zigzag", "balanced", "contiguous"]),
)
@example(batch=rows(1, 1), ulysses=4, ring=4, layout="zigzag")
def test_any_mask_on_any_mesh_gives_the_rows_back(batch: dict[str, Any], ulysses: int, ring: int, layout: str) -> None:
    assert_reassembles(batch, prepare(batch, ulysses, ring, layout))


def test_every_replica_gets_the_same_shards_of_the_same_row() -> None:
    batch = packed(5, 4)
    shards = [batches.prepare(batch, mesh, METHODS, CPU)[0] for mesh in meshes(2, 2, data=2)]
    for first, second in zip(shards[:4], shards[4:], strict=True):
        assert all(torch.equal(first[key], second[key]) for key in first)


def test_embeddings_are_cut_like_ids_and_keep_their_hidden_dim() -> None:
    batch = rows(*LEFT.shape, mask=LEFT)
    embeddings = torch.randn(*LEFT.shape, HIDDEN, generator=torch.Generator().manual_seed(0))
    shards = prepare({**batch, "input_ids": None, "inputs_embeds": embeddings}, ulysses=2)
    assert all("input_ids" not in local for local, _ in shards)
    assert torch.equal(whole(shards, "inputs_embeds"), embeddings * LEFT.unsqueeze(-1))


def test_unsharding_is_differentiable_and_its_gradient_is_the_shard() -> None:
    batch = rows(*INTERIOR.shape, mask=INTERIOR)
    shards = prepare(batch, ulysses=2)
    context = shards[0][1]
    gathered = torch.stack([local["input_ids"] for local, _ in shards]).double().requires_grad_()
    factor = torch.arange(1, INTERIOR.numel() + 1).view(INTERIOR.shape).double()
    (grad,) = torch.autograd.grad((batches.unshard(gathered, context) * factor).sum(), gathered)
    for i, mesh in enumerate(meshes(2, 2)):
        assert torch.equal(grad[i], batches.shard(factor, context.rows, context.layout, mesh, 0))


def test_no_padding_is_computed_on_but_what_makes_the_shards_equal() -> None:
    batch = rows(*RIGHT.shape, mask=RIGHT)
    shards = prepare(batch, ulysses=2, ring=2)
    kept = int(RIGHT.sum())  # 11 tokens; 2 chunks a ring rank, cut by 2 Ulysses ranks
    assert [local["input_ids"].shape for local, _ in shards] == [(1, -(-kept // 8) * 2)] * 4
    every = torch.cat([local["input_ids"] for local, _ in shards], dim=1)
    assert int((every == 0).sum()) == 16 - kept


def test_a_batch_of_padding_alone_is_one_token_without_a_target() -> None:
    nothing = torch.zeros(2, 5, dtype=torch.long)
    shards = prepare(rows(2, 5, mask=nothing))
    assert local_targets(shards) == 0
    assert [float(context.targets) for _, context in shards] == [0.0, 0.0]
    assert shards[0][1].rows.tokens == 1


# Documents


def documents(batch: dict[str, Any], ulysses: int = 1, ring: int = 2) -> tuple[int, ...]:
    shards = prepare(batch, ulysses, ring)
    assert len({context.documents for _, context in shards}) == 1
    return shards[0][1].documents


@pytest.mark.parametrize(
    ("batch", "wanted"),
    [
        (rows(1, 8), (0, 8)),
        (rows(1, 7), (0, 7, 8)),
        (rows(2, 4), (0, 4, 8)),
        (rows(3, 1), (0, 1, 2, 3, 4)),
        (packed(8), (0, 8)),
        (packed(3, 1, 4), (0, 3, 4, 8)),
        (packed(3, 1, 2), (0, 3, 4, 6, 8)),
        (rows(*RIGHT.shape, mask=RIGHT), (0, 7, 10, 11, 12)),
        (rows(*LEFT.shape, mask=LEFT), (0, 7, 10, 11, 12)),
        (rows(*INTERIOR.shape, mask=INTERIOR), (0, 5, 8, 15, 16)),
        (rows(*EMPTY_ROW.shape, mask=EMPTY_ROW), (0, 7, 10, 12)),
        ({**rows(2, 4), "position_ids": torch.arange(4).unsqueeze(0)}, (0, 4, 8)),
        ({**rows(2, 4), "position_ids": torch.tensor([[0, 1, 0, 1], [0, 1, 2, 3]])}, (0, 2, 4, 8)),
        ({**rows(2, 4), "position_ids": torch.tensor([[0, 1, 2, 3], [4, 5, 6, 7]])}, (0, 4, 8)),
        ({**rows(1, 4), "position_ids": torch.tensor([[5, 6, 7, 8]])}, (0, 4)),
        ({**rows(1, 8), "cu_seq_lens_q": torch.tensor([0, 3, 8], dtype=torch.int32)}, (0, 3, 8)),
        ({**rows(1, 8), "cu_seq_lens_q": torch.tensor([0, 3, 3, 8, 8])}, (0, 3, 8)),
        ({**rows(2, 4), "cu_seq_lens_q": torch.tensor([0, 1, 8])}, (0, 1, 4, 8)),
        ({**rows(1, 8), "seq_lens": torch.tensor([[3, 5]])}, (0, 3, 8)),
        ({**rows(1, 8), "seq_lens": [1, 1, 6]}, (0, 1, 2, 8)),
        ({**rows(2, 4), "seq_lens": torch.tensor([[3, 1], [4, 0]])}, (0, 3, 4, 8)),
    ],
)
def test_the_documents_are_those_of_the_rows_with_the_tail_padding_apart(batch: dict[str, Any], wanted: tuple[int, ...]) -> None:
    assert documents(batch) == wanted


def test_left_padded_positions_as_generate_counts_them_are_one_document_a_row() -> None:
    batch = rows(*LEFT.shape, mask=LEFT)
    batch["position_ids"] = (LEFT.cumsum(1) - 1).clamp(min=0)
    shards = prepare(batch)
    assert shards[0][1].documents == (0, 7, 10, 11, 12)
    assert_reassembles(batch, shards)


@settings(max_examples=60)
@given(lengths=st.lists(st.integers(1, 6), min_size=1, max_size=8), ulysses=st.integers(1, 3), ring=st.integers(1, 4))
def test_three_ways_to_give_documents_give_the_same_ones_and_the_same_positions(
    lengths: list[int], ulysses: int, ring: int
) -> None:
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    row = rows(1, sum(lengths))
    ways = (packed(*lengths), {**row, "cu_seq_lens_q": bounds}, {**row, "seq_lens": torch.tensor([lengths])})
    found = [prepare(way, ulysses, ring) for way in ways]
    assert {context.documents for shards in found for _, context in shards} == {
        tuple(sorted({*bounds.tolist(), found[0][0][1].layout.length}))
    }
    for shards in found:
        assert torch.equal(whole(shards, "position_ids"), ways[0]["position_ids"])


def test_keys_that_describe_documents_are_not_passed_on() -> None:
    batch = {**rows(1, 8), "cu_seq_lens_q": torch.tensor([0, 8]), "cu_seq_lens_k": torch.tensor([0, 8]), "max_length_q": 8}
    (local, _), _ = prepare({**batch, "max_length_k": 8, "num_items_in_batch": 7, "attention_mask": torch.ones(1, 8)})
    assert set(local) == {"input_ids", "position_ids", "labels", "num_items_in_batch"}


@pytest.mark.parametrize("mesh", MESHES, ids=lambda m: f"u{m[0]}r{m[1]}")
def test_the_context_holds_the_plan_of_its_own_ring_rank(mesh: tuple[int, int]) -> None:
    batch = packed(5, 1, 9, 2)
    for rank, (local, context) in zip(meshes(*mesh), prepare(batch, *mesh), strict=True):
        assert context.layout == layouts.build("zigzag", 17, ring=mesh[1], ulysses=mesh[0])
        assert context.plans == {None: tiles.plan(context.layout, rank.ring.rank, context.documents)}
        assert context.mesh == rank
        assert context.methods == METHODS
        assert local["input_ids"].shape == (1, context.layout.length // rank.seq.size)


def test_the_context_carries_the_census_it_is_given() -> None:
    census = object()
    for mesh in meshes(1, 2):
        assert batches.prepare(packed(8), mesh, METHODS, CPU, census=census)[1].census is census
        assert batches.prepare(packed(8), mesh, METHODS, CPU)[1].census is None


def test_no_local_document_reaches_over_a_boundary_of_the_row() -> None:
    for _, context in prepare(packed(5, 1, 9, 2), ulysses=2, ring=2):
        ranges = context.layout.ring_ranges(context.mesh.ring.rank)
        local = [token for start, end in ranges for token in range(start, end)]
        (own,) = context.plans[None].steps[0]
        assert own.documents is not None
        for start, end in pairwise(own.documents):
            assert not {*range(local[start] + 1, local[end - 1] + 1)} & {*context.documents}


# Targets


def test_targets_are_shifted_inside_a_row_and_before_the_cut() -> None:
    batch = rows(2, 5)
    wanted = torch.tensor([[1002, 1003, 1004, 1005, IGNORE], [1007, 1008, 1009, 1010, IGNORE]])
    assert torch.equal(whole(prepare(batch, ulysses=2), "labels"), wanted)


def test_shift_labels_are_taken_as_they_are_and_before_labels() -> None:
    batch = rows(1, 8)
    given_ = {**batch, "shift_labels": batch["labels"] + 7}
    assert torch.equal(whole(prepare(given_), "labels"), batch["labels"] + 7)
    del given_["labels"]
    assert torch.equal(whole(prepare(given_), "labels"), batch["labels"] + 7)
    assert int(batches.count_targets(given_)) == 8


def test_a_left_padded_rows_first_token_is_not_a_target() -> None:
    batch = rows(*LEFT.shape, mask=LEFT)
    assert local_targets(prepare(batch)) == (7 - 1) + (3 - 1) + 0


def test_ignored_labels_are_not_counted() -> None:
    batch = rows(1, 8)
    batch["labels"][:, 2:5] = IGNORE
    assert local_targets(prepare(batch)) == int(batches.count_targets(batch)) == 8 - 1 - 3


def test_without_labels_there_are_no_targets_and_no_weights() -> None:
    batch = {"input_ids": rows(1, 8)["input_ids"], "loss_weights": torch.ones(1, 8)}
    for local, context in prepare(batch):
        assert (context.targets, context.weights) == (None, None)
        assert set(local) == {"input_ids", "position_ids"}


@pytest.mark.parametrize("mask", [None, RIGHT, LEFT], ids=["whole", "right", "left"])
def test_loss_weights_shift_with_the_labels_and_make_the_count(mask: Tensor | None) -> None:
    batch = rows(3, 7, mask=mask)
    weights = torch.arange(1.0, 22.0).view(3, 7) / 8
    shards = prepare({**batch, "loss_weights": weights}, ulysses=2)
    kept = torch.ones(3, 7) if mask is None else mask
    gathered = torch.stack([context.weights for _, context in shards])
    assert torch.equal(batches.unshard(gathered, shards[0][1]), shifted(weights, 0) * kept)
    count = float(shifted(weights, 0)[wanted_targets(batch) != IGNORE].sum())
    assert float(batches.count_targets({**batch, "loss_weights": weights})) == count
    local = [float(context.weights[local["labels"] != IGNORE].sum()) for local, context in shards]
    assert sum(local) == count
    assert [float(context.targets) for _, context in shards] == [count] * 4


def test_loss_weights_beside_shift_labels_are_taken_as_they_are() -> None:
    batch = {"input_ids": rows(1, 8)["input_ids"], "shift_labels": torch.arange(8).unsqueeze(0)}
    weights = torch.arange(1.0, 9.0).unsqueeze(0)
    shards = prepare({**batch, "loss_weights": weights})
    gathered = torch.stack([context.weights for _, context in shards])
    assert torch.equal(batches.unshard(gathered, shards[0][1]), weights)
    assert float(shards[0][1].targets) == 36.0


# Refusals


def refusal(batch: dict[str, Any]) -> str:
    """The message, the same on every rank."""
    messages = set()
    for mesh in meshes(1, 2):
        with pytest.raises(ValueError, match=r"^batch: ") as error:
            batches.prepare(batch, mesh, METHODS, CPU)
        messages.add(str(error.value))
    assert len(messages) == 1
    return messages.pop()


@pytest.mark.parametrize("key", ["labels", "shift_labels"])
def test_targets_at_padding_are_refused_with_their_number(key: str) -> None:
    batch = {"input_ids": rows(3, 7)["input_ids"], "attention_mask": RIGHT, key: rows(3, 7)["labels"]}
    assert refusal(batch) == (
        "batch: labels hold 10 targets at positions that attention_mask marks as padding; set them to -100, else the model "
        "would train on padding"
    )


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("labels", torch.zeros(2, 7, dtype=torch.long)),
        ("labels", torch.zeros(1, 8, dtype=torch.long)),
        ("labels", torch.zeros(16, dtype=torch.long)),
        ("shift_labels", torch.zeros(2, 9, dtype=torch.long)),
        ("loss_weights", torch.zeros(2, 8, 1)),
        ("attention_mask", torch.ones(2, 9)),
        ("attention_mask", torch.ones(2, 1, 8, 8)),
        ("position_ids", torch.zeros(2, 4, dtype=torch.long)),
        ("position_ids", torch.zeros(2, 2, 8, dtype=torch.long)),
        ("position_ids", torch.zeros(3, 2, 7, dtype=torch.long)),
        ("position_ids", torch.zeros(8, dtype=torch.long)),
    ],
)
def test_a_tensor_of_another_shape_is_refused_with_both_shapes(key: str, value: Tensor) -> None:
    message = refusal({**rows(2, 8), key: value})
    assert message == f"batch: {key} has shape {tuple(value.shape)}, expected (2, 8) like the tokens"


@pytest.mark.parametrize("shape", [(2, 8), (8,), (2, 1, 8, 8), (2, 8, 5)])
def test_an_unknown_tensor_of_the_rows_length_is_refused_by_name(shape: tuple[int, ...]) -> None:
    message = refusal({**rows(2, 8), "token_type_ids": torch.zeros(shape)})
    assert message.startswith(f"batch: token_type_ids {shape} has the row's length 8, but ds_cp does not know how to shard it")
    assert all(key in message for key in batches.TOKEN_KEYS + batches.DOCUMENT_KEYS)


def test_unknown_values_of_another_size_are_passed_on() -> None:
    extra = {"temperature": torch.ones(()), "row_weight": torch.ones(2), "name": "x"}
    (local, _), _ = prepare({**rows(2, 8), **extra})
    assert {key: local[key] for key in extra} == extra


@pytest.mark.parametrize("given_", [(), ("input_ids", "inputs_embeds")], ids=["neither", "both"])
def test_exactly_one_of_ids_and_embeddings_is_taken(given_: tuple[str, ...]) -> None:
    values = {"input_ids": rows(1, 8)["input_ids"], "inputs_embeds": torch.zeros(1, 8, HIDDEN)}
    message = refusal({key: values[key] for key in given_})
    assert message == "batch: give exactly one of input_ids [B, S] and inputs_embeds [B, S, hidden]"


@pytest.mark.parametrize("value", [2, -1])
def test_a_mask_of_other_values_than_0_and_1_is_refused(value: int) -> None:
    mask = torch.ones(1, 8, dtype=torch.long)
    mask[0, 3] = value
    assert "attention_mask holds values other than 0 and 1" in refusal({**rows(1, 8), "attention_mask": mask})


@pytest.mark.parametrize(
    ("key", "value", "shown"),
    [
        ("cu_seq_lens_q", [1, 8], "[1, 8]"),
        ("cu_seq_lens_q", [0, 7], "[0, 7]"),
        ("cu_seq_lens_q", [0, 9], "[0, 9]"),
        ("cu_seq_lens_q", [0, 5, 3, 8], "[0, 5, 3, 8]"),
        ("cu_seq_lens_q", [*range(9), 12], "[0, 1, 2, 3, ..., 12]"),
        ("seq_lens", [3, 4], "[0, 3, 7]"),
        ("seq_lens", [9, -1], "[0, 9, 8]"),
    ],
)
def test_documents_that_do_not_fill_the_batch_are_refused_with_what_was_given(key: str, value: list[int], shown: str) -> None:
    message = refusal({**rows(1, 8), key: torch.tensor(value)})
    assert message == f"batch: {key} must ascend from 0 to the 8 tokens of the batch, got {shown}"


@pytest.mark.parametrize("key", ["cu_seq_lens_q", "seq_lens"])
def test_documents_and_a_mask_with_zeros_contradict_each_other(key: str) -> None:
    value = {"cu_seq_lens_q": [0, 21], "seq_lens": [21]}[key]
    message = refusal({**rows(*RIGHT.shape, mask=RIGHT), key: torch.tensor(value)})
    assert message == f"batch: {key} and an attention_mask with zeros contradict each other; give one of them"


@pytest.mark.parametrize("key", ["seq_idx", "cu_seq_lens_k"])
def test_a_document_key_alone_is_read(key: str) -> None:
    value = {"seq_idx": torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2]]), "cu_seq_lens_k": torch.tensor([0, 3, 5, 8])}[key]
    assert documents({**rows(1, 8), key: value}) == (0, 3, 5, 8)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("seq_lens", [4, 4]),
        ("cu_seq_lens_k", torch.tensor([0, 2, 8])),
        ("position_ids", torch.tensor([[0, 1, 2, 0, 1, 0, 1, 2]])),
    ],
)
def test_document_keys_that_contradict_each_other_are_refused(key: str, value: Any) -> None:
    message = refusal({**rows(1, 8), "cu_seq_lens_q": torch.tensor([0, 3, 8]), key: value})
    assert f"cu_seq_lens_q and {key} describe different documents" in message


def test_positions_that_run_through_given_documents_do_not_contradict_them() -> None:
    batch = {**rows(1, 8), "cu_seq_lens_q": torch.tensor([0, 3, 8]), "position_ids": torch.arange(8).unsqueeze(0)}
    assert documents(batch) == (0, 3, 8)


@pytest.mark.parametrize("counted", ["columns", "kept tokens"])
def test_padding_inside_a_row_does_not_split_a_document(counted: str) -> None:
    mask = torch.tensor([[1, 1, 1, 0, 0, 1, 1, 1]])
    positions = torch.arange(8).unsqueeze(0) if counted == "columns" else (mask.cumsum(1) - 1).clamp(min=0)
    assert documents({**rows(1, 8, mask), "position_ids": positions}) == (0, 6, 8), "six tokens of one document, two of padding"


@pytest.mark.parametrize(
    ("batch", "reason"),
    [
        ({"input_ids": torch.arange(8)}, r"input_ids has shape (8,), expected [B, S]"),
        ({"input_ids": torch.zeros(1, 0, dtype=torch.long)}, "at least one token"),
        ({**rows(1, 8), "cu_seq_lens_q": torch.tensor([])}, "cu_seq_lens_q must hold whole numbers"),
        ({**rows(1, 8), "cu_seq_lens_q": torch.tensor([0, 2.5, 8])}, "cu_seq_lens_q must hold whole numbers"),
        ({**rows(1, 8), "seq_idx": torch.zeros(1, 7, dtype=torch.long)}, "seq_idx has shape (1, 7)"),
    ],
)
def test_malformed_rows_are_refused_in_a_sentence(batch: dict[str, Any], reason: str) -> None:
    assert reason in refusal(batch)


def test_a_weight_that_is_not_a_number_does_not_count_where_there_is_no_target() -> None:
    batch = rows(1, 8)
    batch["labels"][:, 3] = IGNORE
    weights = torch.ones(1, 8).index_fill(1, torch.tensor([3]), float("nan"))
    assert float(batches.count_targets({**batch, "loss_weights": weights})) == 6


@pytest.mark.parametrize(
    ("impl", "ring", "lengths", "wanted"),
    [
        ("auto", 4, [32], True),
        ("auto", 4, [31], True),  # padded to 32
        ("auto", 4, [40], False),
        ("auto", 4, [16, 16], False),
        ("auto", 2, [16], False),
        ("p2p", 4, [32], False),
        ("allgather", 4, [320], True),
        ("allgather", 2, [16, 16], True),
    ],
)
def test_auto_gathers_short_rows_of_one_document_on_more_than_two_ranks(
    impl: str, ring: int, lengths: list[int], wanted: bool
) -> None:
    methods = replace(METHODS, ring_impl=impl, gathered_tokens=8)
    batch = {"input_ids": torch.arange(sum(lengths)).unsqueeze(0), "seq_lens": torch.tensor(lengths)}
    for mesh in meshes(1, ring):
        _, context = batches.prepare(batch, mesh, methods, CPU)
        assert context.plans[None].gathered == wanted
