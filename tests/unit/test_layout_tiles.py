"""Layouts and tiles against the definition: a token attends the tokens of its own document up to itself, once.

R ring ranks, U Ulysses ranks. Everything is integers, so one process looks at all ranks and all steps.
"""

from __future__ import annotations

import itertools
import random
import sys
from collections.abc import Sequence
from itertools import pairwise
from types import FrameType
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ds_cp import balance, tiles
from ds_cp import layout as layouts
from ds_cp.balance import Chunks, Window
from ds_cp.layout import Layout
from ds_cp.tiles import Tile

NAMES = tuple(name for name in layouts.NAMES if name != "auto")


@st.composite
def rows(draw: st.DrawFn, rings: Sequence[int] = range(1, 9)) -> tuple[Layout, tuple[int, ...]]:
    """A layout of a row, and the documents of the padded row as `batch` gives them: the padding is one of its own."""
    tokens = draw(st.integers(1, 96))
    documents = (0, *sorted(draw(st.sets(st.integers(1, tokens - 1), max_size=24)) if tokens > 1 else ()), tokens)
    name, ring, ulysses = draw(st.sampled_from(NAMES)), draw(st.sampled_from(rings)), draw(st.integers(1, 4))
    if name == "balanced" and ring > 1:  # rows this short would always get m = 1
        found = balance.cut(balance.Pairs(documents), ring, ulysses, draw(st.integers(1, balance.LARGEST_M)))
        if draw(st.booleans()):
            found = balance.fewer_calls(balance.padded(documents, found.length), found, 1)
        plan = Layout(found.chunk, found.chunks, ulysses)
    else:
        plan = layouts.build(name, tokens, ring, ulysses, documents)
    return plan, documents_of(plan, tokens, documents)


def documents_of(plan: Layout, tokens: int, cuts: set[int] | Sequence[int] = ()) -> tuple[int, ...]:
    return tuple(sorted({0, *cuts, tokens, plan.length}))


def one_document(name: str, tokens: int, ring: int, ulysses: int) -> tuple[Layout, tuple[int, ...]]:
    plan = layouts.build(name, tokens, ring, ulysses)
    return plan, documents_of(plan, tokens)


def tokens_of(ranges: Sequence[tuple[int, int]]) -> torch.Tensor:
    return torch.cat([torch.arange(start, end) for start, end in ranges])


def allowed(documents: Sequence[int], window: int | None = None) -> torch.Tensor:
    """[S, S], from the definition: the same document, the key no later than the query, and fewer than `window` before it."""
    token = torch.arange(documents[-1])
    document = sum((token >= start).long() for start in documents[1:])
    distance = token[:, None] - token[None, :]
    return (document[:, None] == document[None, :]) & (distance >= 0) & (distance < (window or len(token)))


def in_chunks(documents: Sequence[int], size: int) -> torch.Tensor:
    """[S, S], from the definition: allowed, and as many whole chunks between the document's start and the key as to the query."""
    token = torch.arange(documents[-1])
    starts = torch.tensor(documents)
    chunk = (token - starts[torch.bucketize(token, starts, right=True) - 1]) // size
    return allowed(documents) & (chunk[:, None] == chunk[None, :])


def pairs(tile: Tile) -> torch.Tensor:
    """[q, k] of a tile, as a kernel reads it."""
    if tile.documents is not None:
        assert tile.documents[-1] == tile.q_end - tile.q_start == tile.k_end - tile.k_start
        return allowed(tile.documents, tile.window)
    query, key = torch.arange(tile.q_end - tile.q_start)[:, None], torch.arange(tile.k_end - tile.k_start)[None, :]
    return tile.ahead + query - key < (tile.window or tile.ahead + len(query) + 1)


def computed(plan: Layout, documents: Sequence[int], ring_rank: int) -> torch.Tensor:
    """[S, S]: how often each (query, key) pair of the row is computed on this ring rank, over all steps."""
    count = torch.zeros(plan.length, plan.length, dtype=torch.long)
    mine = tokens_of(plan.ring_ranges(ring_rank))
    for step, found in enumerate(tiles.plan(plan, ring_rank, documents).steps):
        theirs = tokens_of(plan.ring_ranges((ring_rank - step) % plan.ring))
        for tile in found:
            queries, keys = mine[tile.q_start : tile.q_end], theirs[tile.k_start : tile.k_end]
            assert (len(queries), len(keys)) == (tile.q_end - tile.q_start, tile.k_end - tile.k_start), "slices out of range"
            count[queries[:, None], keys[None, :]] += pairs(tile)
    return count


def computed_gathered(plan: Layout, documents: Sequence[int], ring_rank: int) -> torch.Tensor:
    """The same for `ring_impl: allgather`, whose second step has the whole row's keys, gathered slot by slot."""
    count = torch.zeros(plan.length, plan.length, dtype=torch.long)
    mine = tokens_of(plan.ring_ranges(ring_rank))
    chunks = sorted(range(plan.length // plan.chunk), key=layouts.gathered_places(plan).__getitem__)
    everyone = tokens_of([(chunk * plan.chunk, (chunk + 1) * plan.chunk) for chunk in chunks])
    steps = tiles.plan_gathered(plan, ring_rank, documents).steps
    for found, theirs in zip(steps, (mine, everyone)[: len(steps)], strict=True):
        for tile in found:
            queries, keys = mine[tile.q_start : tile.q_end], theirs[tile.k_start : tile.k_end]
            count[queries[:, None], keys[None, :]] += pairs(tile)
    return count


def assert_exact(plan: Layout, documents: Sequence[int]) -> None:
    for way in (computed, computed_gathered):
        count = sum(way(plan, documents, rank) for rank in range(plan.ring))
        assert torch.equal(count, allowed(documents).long())


# Layout


@given(
    name=st.sampled_from(NAMES),
    tokens=st.integers(1, 200),
    ring=st.integers(1, 8),
    ulysses=st.integers(1, 4),
)
def test_the_padded_row_is_the_shortest_that_all_ranks_share_equally(name: str, tokens: int, ring: int, ulysses: int) -> None:
    plan = layouts.build(name, tokens, ring, ulysses)
    multiple = layouts.pad_multiple(name, ring, ulysses)
    assert multiple == (2 if name != "contiguous" and ring > 1 else 1) * ring * ulysses
    assert plan.length == min(n for n in range(multiple, tokens + multiple, multiple) if n >= tokens)
    assert (plan.ring, plan.ulysses) == (ring, ulysses)


@given(rows())
def test_local_ranges_partition_the_row_into_equal_ascending_parts(row: tuple[Layout, tuple[int, ...]]) -> None:
    plan, _ = row
    ranks = [(r, u) for r in range(plan.ring) for u in range(plan.ulysses)]
    parts = [tokens_of(plan.local_ranges(r, u)) for r, u in ranks]
    assert {len(part) for part in parts} == {plan.length // len(ranks)}
    assert all(bool((part.diff() > 0).all()) for part in parts)
    assert torch.cat(parts).sort().values.tolist() == list(range(plan.length))


@given(rows())
def test_ulysses_ranks_hold_consecutive_pieces_of_their_ring_rank(row: tuple[Layout, tuple[int, ...]]) -> None:
    plan, _ = row
    for r in range(plan.ring):
        pieces = [tokens_of(plan.local_ranges(r, u)) for u in range(plan.ulysses)]
        assert torch.equal(torch.cat(pieces), tokens_of(plan.ring_ranges(r)))


@given(rows())
def test_gathered_order_is_a_permutation_in_the_order_of_the_shards(row: tuple[Layout, tuple[int, ...]]) -> None:
    plan, _ = row
    order = tokens_of(layouts.gathered_order(plan))
    assert order.sort().values.tolist() == list(range(plan.length))
    piece = plan.length // plan.ring // plan.ulysses
    for r in range(plan.ring):
        for u in range(plan.ulysses):
            start = (r * plan.ulysses + u) * piece  # the seq group's order: ulysses fastest
            assert torch.equal(order[start : start + piece], tokens_of(plan.local_ranges(r, u)))


def test_zigzag_pairs_early_chunks_with_late_ones_and_contiguous_does_not() -> None:
    assert {"zigzag", "contiguous"} <= set(NAMES)
    assert layouts.build("zigzag", 24, 3, 2).chunks == ((0, 5), (1, 4), (2, 3))
    assert layouts.build("zigzag", 24, 3, 2).chunk == 4
    assert layouts.build("contiguous", 24, 3, 2).chunks == ((0,), (1,), (2,))
    assert layouts.build("zigzag", 24, 1, 2).chunks == ((0,),)


@given(ring=st.integers(1, 8), ulysses=st.integers(1, 4), chunk=st.integers(1, 4))
def test_zigzag_gives_every_ring_rank_the_same_causal_work_for_one_document(ring: int, ulysses: int, chunk: int) -> None:
    tokens = chunk * layouts.pad_multiple("zigzag", ring, ulysses)
    plan, documents = one_document("zigzag", tokens, ring, ulysses)
    work = {int(computed(plan, documents, rank).sum()) for rank in range(ring)}
    assert work == {tokens * (tokens + 1) // 2 // ring}


@given(ring=st.integers(2, 8), chunk=st.integers(1, 4))
def test_zigzag_balances_every_ring_step_but_the_first(ring: int, chunk: int) -> None:
    plan, documents = one_document("zigzag", 2 * ring * chunk, ring, 1)
    for step in range(1, ring):
        work = {sum(int(pairs(t).sum()) for t in tiles.plan(plan, rank, documents).steps[step]) for rank in range(ring)}
        assert work == {2 * chunk * chunk}


# Tiles


@pytest.mark.parametrize("ring", range(1, 9))
@given(data=st.data())
def test_every_allowed_pair_is_computed_exactly_once_and_nothing_else(ring: int, data: st.DataObject) -> None:
    assert_exact(*data.draw(rows(rings=(ring,))))


@given(rows(), st.integers(1, 40))
def test_chunks_are_documents(row: tuple[Layout, tuple[int, ...]], size: int) -> None:
    plan, documents = row
    cut = Chunks(size).of(documents)
    assert torch.equal(in_chunks(documents, size), allowed(cut))
    assert_exact(plan, cut)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("ulysses", [1, 2, 3, 4])
@pytest.mark.parametrize("ring", [1, 2, 3, 5, 8])
def test_a_row_shorter_than_the_ranks_is_padded_and_exact(name: str, ring: int, ulysses: int) -> None:
    for tokens in {1, max(ring * ulysses // 2, 1), max(ring * ulysses - 1, 1)}:
        plan, documents = one_document(name, tokens, ring, ulysses)
        assert plan.length == layouts.pad_multiple(name, ring, ulysses)
        assert_exact(plan, documents)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("ring", [1, 2, 4, 8])
def test_one_token_documents_attend_themselves_and_need_no_other_rank(name: str, ring: int) -> None:
    plan = layouts.build(name, 64, ring, 2, range(65))
    documents = tuple(range(plan.length + 1))
    assert_exact(plan, documents)
    for rank in range(ring):
        for way in (tiles.plan, tiles.plan_gathered):
            assert (len(way(plan, rank, documents).steps), way(plan, rank, documents).reach) == (1, (0,) * ring)


@given(rows())
@example(one_document("zigzag", 64, 8, 1))
def test_a_step_has_at_most_one_rectangle_per_local_chunk(row: tuple[Layout, tuple[int, ...]]) -> None:
    plan, documents = row
    for rank in range(plan.ring):
        for found in tiles.plan(plan, rank, documents).steps[1:]:
            assert len(found) <= len(plan.chunks[rank])
            assert all(tile.documents is None for tile in found)
            chunks_begun = [tile.q_start * len(plan.chunks[rank]) // (plan.length // plan.ring) for tile in found]
            assert chunks_begun == sorted(set(chunks_begun))


@given(rows())
def test_the_first_step_is_one_causal_call_over_all_local_tokens(row: tuple[Layout, tuple[int, ...]]) -> None:
    plan, documents = row
    for rank in range(plan.ring):
        (own,) = tiles.plan(plan, rank, documents).steps[0]
        local = plan.length // plan.ring
        assert (own.q_start, own.q_end, own.k_start, own.k_end) == (0, local, 0, local)
        assert own.causal
        assert own.documents is not None
        assert (own.documents[0], own.documents[-1]) == (0, local)
        assert all(a < b for a, b in pairwise(own.documents))


@given(rows())
def test_a_block_travels_to_the_last_rank_that_needs_it_and_all_ranks_know(row: tuple[Layout, tuple[int, ...]]) -> None:
    plan, documents = row
    ring, found = plan.ring, [tiles.plan(plan, rank, documents) for rank in range(plan.ring)]
    last = [max(s for s in range(ring) if s == 0 or _step(found[(rank + s) % ring], s)) for rank in range(ring)]
    for rank in range(ring):
        assert found[rank].reach == tuple(last) == tiles.plan_gathered(plan, rank, documents).reach
        assert len(found[rank].steps) == 1 + max(last)


def _step(found: tiles.Plan, step: int) -> tuple[Tile, ...]:
    return found.steps[step] if step < len(found.steps) else ()


def test_a_document_within_one_rank_costs_no_hop() -> None:
    plan = Layout(chunk=4, chunks=((0, 1), (2, 3)), ulysses=1)
    assert tiles.plan(plan, 1, (0, 8, 16)).reach == (0, 0)
    assert tiles.plan(plan, 1, (0, 9, 16)).reach == (1, 0)


@pytest.mark.parametrize("ring", [2, 3, 8])
def test_gathered_keys_of_one_document_are_one_tile_a_chunk(ring: int) -> None:
    plan, documents = one_document("zigzag", 16 * ring, ring, 1)
    for rank in range(ring):
        found = tiles.plan_gathered(plan, rank, documents).steps[1]
        assert len(found) == (2 if rank else 1)  # nothing stands before the row's first chunk


def test_neighbouring_rectangles_with_the_same_keys_become_one() -> None:
    plan, documents = one_document("zigzag", 16, 2, 1)  # rank 1 holds chunks 1 and 2, rank 0 chunks 0 and 3
    assert tiles.plan(plan, 1, documents).steps[1] == (Tile(0, 8, 0, 4),)
    assert tiles.plan(plan, 0, documents).steps[1] == (Tile(4, 8, 0, 8),)


# Cost


def operations(name: str, tokens: int, documents: Sequence[int] = ()) -> int:
    """Bytecodes that ds_cp executes to lay out a row and plan one of 8 ring ranks: no clock, so the same on a busy machine."""
    files, count = {tiles.__file__, layouts.__file__, balance.__file__}, 0

    def trace(frame: FrameType, event: str, arg: Any) -> Any:
        nonlocal count
        if frame.f_code.co_filename not in files:
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        count += event == "opcode"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        plan = layouts.build(name, tokens, 8, 1, documents or (0, tokens))
        tiles.plan(plan, 7, documents_of(plan, tokens, documents))
    finally:
        sys.settrace(before)
    return count


@pytest.mark.parametrize("name", NAMES)
def test_planning_is_linear_in_the_documents(name: str) -> None:
    half, whole = (operations(name, 16 * count, range(0, 16 * count + 1, 16)) for count in (2048, 4096))
    assert whole <= 2.2 * half
    assert whole <= 1000 * 4096


@pytest.mark.parametrize("name", NAMES)
def test_planning_does_not_depend_on_the_length_of_the_row(name: str) -> None:
    assert operations(name, 2**20) == operations(name, 2**10) > 0


# Windows


def halo_of(plan: Layout, found: tiles.Plan, ring_rank: int) -> torch.Tensor:
    """The tokens that stand in the halo, where the plans of the ranks put them."""
    if found.halo is None:
        return torch.empty(0, dtype=torch.long)
    mine = tokens_of(plan.ring_ranges(ring_rank))
    halo = torch.full((found.halo.tokens,), -1)
    for place, start, end in found.halo.own:
        halo[place : place + end - start] = mine[start:end]
    return halo


@settings(max_examples=150)
@given(rows(), st.integers(1, 40))
def test_a_window_is_computed_exactly_once_and_only_it_travels(row: tuple[Layout, tuple[int, ...]], window: int) -> None:
    plan, documents = row
    found = [tiles.plan_window(plan, rank, documents, window) for rank in range(plan.ring)]
    held = [tokens_of(plan.ring_ranges(rank)) for rank in range(plan.ring)]
    halos = [halo_of(plan, found[rank], rank) for rank in range(plan.ring)]
    mask = allowed(documents, window)
    for rank, one in enumerate(found):  # what arrives, in the order of posting, is what was sent
        for sender in range(plan.ring):
            parts = [held[sender][start:end] for to, start, end in one_sent(found[sender]) if to == rank]
            places = [(start, end) for source, start, end in (one.halo.received if one.halo else ()) if source == sender]
            for part, (start, end) in zip(parts, places, strict=True):
                assert bool((halos[rank][start:end] == -1).all())
                halos[rank][start:end] = part
    count = torch.zeros_like(mask, dtype=torch.long)
    for rank, one in enumerate(found):
        assert one.halo is None or bool((halos[rank].diff() > 0).all() and (halos[rank] >= 0).all())
        for step, keys in zip(one.steps, (held[rank], halos[rank]), strict=False):
            for tile in step:
                queries, theirs = held[rank][tile.q_start : tile.q_end], keys[tile.k_start : tile.k_end]
                count[queries[:, None], theirs[None, :]] += pairs(tile)
                assert tile.pairs == int(pairs(tile).sum())
                assert bool(pairs(tile).any(1).all()), "a query without a key has no softmax"
                assert tile.window is None or tile.causal or len(queries) <= len(theirs), "FlashAttention-2 gets such bands wrong"
        least = mask[held[rank]].any(0)
        least[held[rank]] = False
        assert sum(end - start for _, start, end in (one.halo.received if one.halo else ())) == int(least.sum())
    assert torch.equal(count, mask.long())


def test_a_window_of_a_long_row_sends_what_a_rank_needs_and_lacks() -> None:
    plan, documents = one_document("zigzag", 2**17, 8, 1)
    sent = sum(end - start for rank in range(8) for _, start, end in one_sent(tiles.plan_window(plan, rank, documents, 4096)))
    assert sent == (2 * 8 - 2) * 4095  # before every chunk but the first, and the two middle ones are one run


def one_sent(found: tiles.Plan) -> tuple[tuple[int, int, int], ...]:
    return found.halo.sent if found.halo else ()


# Balance

DISTRIBUTIONS = {
    "one document": [2**18],
    "log-normal": [37, 5104, 11, 30111, 903, 1808, 60013, 2400, 7, 640, 12000, 1100, 83010, 512, 24, 1808, 20009, 3000, 150],
    "half and quarter": [40, 2**17, 900, 2**16, 4000, 300],
    "half-row head": [2**17],
}


@pytest.mark.parametrize("name", DISTRIBUTIONS)
@pytest.mark.parametrize("ring", [4, 8, 16])
def test_balanced_gives_every_rank_the_same_work(ring: int, name: str) -> None:
    lengths = list(DISTRIBUTIONS[name])
    lengths += [1777] * ((2**18 - sum(lengths)) // 1777)
    documents = (0, *torch.tensor(lengths).cumsum(0).tolist())
    plan = layouts.build("auto", documents[-1], ring, 1, documents)
    bounds = documents_of(plan, documents[-1], documents)
    work = [sum(tile.pairs for step in tiles.plan(plan, rank, bounds).steps for tile in step) for rank in range(ring)]
    assert sum(work) / ring / max(work) >= balance.BALANCED
    assert sum(work) == sum((end - start) * (end - start + 1) // 2 for start, end in pairwise(bounds))


def test_chunks_are_swapped_where_the_longest_first_rule_ends_uneven() -> None:
    assert balance.longest_first([7, 6, 4, 9, 8, 8], 2) == [(0, 1, 5), (2, 3, 4)]  # 21 and 21; the rule alone gives 22 and 20


@pytest.mark.parametrize("ring", [4, 8, 16])
def test_swaps_of_similar_chunks_save_calls_and_stay_balanced(ring: int) -> None:
    lengths = [*DISTRIBUTIONS["log-normal"], *[1777] * 11]
    documents = (0, *torch.tensor(lengths).cumsum(0).tolist())
    plain = balance.cut(balance.Pairs(documents), ring, 1, 3)
    bounds = balance.padded(documents, plain.length)
    found = balance.fewer_calls(bounds, plain, 1)

    def calls(one: balance.Cut) -> list[int]:
        plan = Layout(one.chunk, one.chunks, 1)
        return [sum(map(len, tiles.plan(plan, rank, bounds).steps)) for rank in range(ring)]

    assert sorted(c for mine in found.chunks for c in mine) == list(range(6 * ring))
    assert {len(mine) for mine in found.chunks} == {6}
    assert found.even >= min(plain.even, balance.STILL_BALANCED)
    assert balance.predict(documents, found, 1) < balance.predict(documents, plain, 1)
    assert sum(calls(found)) < sum(calls(plain))


@pytest.mark.parametrize("seed", [7, 25, 32])
def test_swaps_make_no_block_travel_further(seed: int) -> None:
    draw = random.Random(seed)
    documents = (0, *itertools.accumulate(draw.randint(100, 4000) for _ in range(128)))
    plain = balance.cut(balance.Pairs(documents), 8, 1, 2)
    bounds = balance.padded(documents, plain.length)
    swapped = balance.fewer_calls(bounds, plain, 1)
    before, after = (tiles.plan(Layout(one.chunk, one.chunks, 1), 0, bounds).reach for one in (plain, swapped))
    assert swapped != plain
    assert sum(after) <= sum(before)


@given(ring=st.integers(2, 16), chunk=st.integers(1, 4), ulysses=st.integers(1, 4))
def test_balanced_is_zigzag_for_one_document(ring: int, chunk: int, ulysses: int) -> None:
    tokens = 2 * ring * ulysses * chunk
    assert layouts.build("balanced", tokens, ring, ulysses) == layouts.build("zigzag", tokens, ring, ulysses)


def test_auto_goes_by_the_documents() -> None:
    documents = (0, 2**17, *range(2**17 + 512, 2**18 + 1, 512))
    assert layouts.build("auto", 2**18, 4, 1, (0, 2**18)) == layouts.build("zigzag", 2**18, 4, 1)
    assert layouts.build("auto", 2**18, 4, 1, documents) == layouts.build("balanced", 2**18, 4, 1, documents)
    assert layouts.build("auto", 2**18, 4, 1, documents) != layouts.build("zigzag", 2**18, 4, 1)


@given(rows(), st.lists(st.one_of(st.none(), st.integers(1, 40), st.builds(Chunks, st.integers(1, 40))), min_size=1, max_size=3))
def test_costs_are_the_pairs_that_a_chunks_queries_attend(row: tuple[Layout, tuple[int, ...]], windows: list[Window]) -> None:
    plan, documents = row
    near = [in_chunks(documents, w.size) if isinstance(w, Chunks) else allowed(documents, w) for w in windows]
    wanted = sum(mask.sum(1) for mask in near).unflatten(0, (-1, plan.chunk)).sum(1)
    assert balance.Pairs(documents, windows).of_chunks(plan.chunk, plan.length // plan.chunk) == wanted.tolist()
