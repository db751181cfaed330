"""Ranks, groups and head splits, for every rank at once: they are integers."""

from __future__ import annotations

import re
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds_cp import topology
from ds_cp.topology import AXES, Topology

degree = st.integers(1, 6)
topologies = st.builds(Topology, ulysses=degree, ring=degree, data=degree)
SIZE_OF = {"ulysses": "ulysses", "ring": "ring", "seq": "size", "data": "data"}


@st.composite
def legal_heads(draw: st.DrawFn) -> tuple[int, int, int]:
    """(ulysses, query heads, key/value heads) that can be split: several ranks a kv head, or several kv heads a rank."""
    kv, factor, queries = draw(st.integers(1, 8)), draw(st.integers(1, 4)), draw(st.integers(1, 4))
    if draw(st.booleans()):
        return kv * factor, kv * factor * queries, kv
    return kv, kv * factor * queries, kv * factor


# Ranks and groups


@given(topologies)
def test_coordinates_name_every_rank_once_with_ulysses_fastest(t: Topology) -> None:
    wanted = [(u, r, d) for d in range(t.data) for r in range(t.ring) for u in range(t.ulysses)]
    assert [t.coordinates(rank) for rank in range(t.world)] == wanted
    assert (t.size, t.world) == (t.ulysses * t.ring, t.ulysses * t.ring * t.data)


@pytest.mark.parametrize("axis", AXES)
@given(t=topologies)
def test_groups_of_an_axis_partition_the_ranks_into_equal_parts(axis: topology.Axis, t: Topology) -> None:
    groups = t.groups(axis)
    assert sorted(rank for group in groups for rank in group) == list(range(t.world))
    assert {len(group) for group in groups} == {getattr(t, SIZE_OF[axis])}


@given(topologies)
def test_a_rank_stands_in_its_group_at_its_coordinate(t: Topology) -> None:
    for axis in AXES:
        for group in t.groups(axis):
            for index, rank in enumerate(group):
                u, r, d = t.coordinates(rank)
                assert index == {"ulysses": u, "ring": r, "seq": r * t.ulysses + u, "data": d}[axis]


@given(topologies)
def test_ranks_of_a_group_differ_in_its_own_coordinate_only(t: Topology) -> None:
    fixed = {"ulysses": (1, 2), "ring": (0, 2), "seq": (2,), "data": (0, 1)}
    for axis, kept in fixed.items():
        for group in t.groups(axis):
            assert len({tuple(t.coordinates(rank)[i] for i in kept) for rank in group}) == 1


@given(topologies)
def test_ranks_that_share_a_row_are_those_of_one_quotient(t: Topology) -> None:
    assert t.groups("seq") == [[rank for rank in range(t.world) if rank // t.size == i] for i in range(t.data)]


# Heads


def kv_source(split: topology.HeadSplit, ulysses: int) -> tuple[int, ...]:
    """For every Ulysses rank in order, the key/value heads that it gets."""
    return tuple(rank // split.sharing * split.kv + i for rank in range(ulysses) for i in range(split.kv))


@given(legal_heads())
def test_every_query_head_is_computed_once_beside_its_own_kv_head(heads: tuple[int, int, int]) -> None:
    ulysses, query_heads, kv_heads = heads
    split = topology.split_heads(*heads)
    assert split.query * ulysses == query_heads
    source = kv_source(split, ulysses)
    assert len(source) == split.kv * ulysses
    assert split.query % split.kv == 0
    for head in range(query_heads):
        rank, local = divmod(head, split.query)
        beside = source[rank * split.kv + local * split.kv // split.query]  # as a kernel pairs its own heads
        assert beside == head * kv_heads // query_heads


@given(legal_heads())
def test_a_kv_head_is_replicated_only_where_ranks_outnumber_them(heads: tuple[int, int, int]) -> None:
    ulysses, _, kv_heads = heads
    split = topology.split_heads(*heads)
    assert split.kv == max(kv_heads // ulysses, 1)
    assert sorted(kv_source(split, ulysses)) == sorted(list(range(kv_heads)) * max(ulysses // kv_heads, 1))


@pytest.mark.parametrize(
    ("ulysses", "kv_heads", "kv", "source"),
    [
        (4, 1, 1, (0, 0, 0, 0)),
        (4, 2, 1, (0, 0, 1, 1)),
        (4, 4, 1, (0, 1, 2, 3)),
        (4, 8, 2, (0, 1, 2, 3, 4, 5, 6, 7)),
        (8, 2, 1, (0, 0, 0, 0, 1, 1, 1, 1)),
        (1, 2, 2, (0, 1)),
    ],
    ids=["kv 1", "kv 2", "kv = ulysses", "kv = N", "kv < ulysses", "no ulysses"],
)
def test_the_split_of_eight_query_heads(ulysses: int, kv_heads: int, kv: int, source: tuple[int, ...]) -> None:
    split = topology.split_heads(ulysses, 8, kv_heads)
    assert (split.query, split.kv) == (8 // ulysses, kv)
    assert kv_source(split, ulysses) == source


@given(ulysses=st.integers(1, 16), query=st.integers(1, 32), kv=st.integers(1, 32))
def test_heads_are_illegal_exactly_if_a_rank_would_get_parts_of_one(ulysses: int, query: int, kv: int) -> None:
    legal = query % ulysses == 0 and (kv % ulysses == 0 or ulysses % kv == 0)
    assert (topology.heads_illegal(ulysses, query, kv) is None) == legal


def test_the_reason_names_the_heads_in_the_way() -> None:
    assert topology.heads_illegal(3, 8, 8) == "it does not divide the 8 query heads"
    assert topology.heads_illegal(4, 24, 6) == "it neither divides nor is a multiple of the 6 key/value heads"


def test_an_illegal_split_is_our_own_mistake() -> None:
    with pytest.raises(AssertionError, match="query heads"):
        topology.split_heads(3, 8, 8)


# Sizes


def resolve(
    size: int | Literal["auto"] = "auto",
    ulysses: int | Literal["auto"] = "auto",
    ring: int | Literal["auto"] = "auto",
    world: int = 8,
    local_world: int | None = None,
    heads: tuple[tuple[int, int], ...] = ((32, 8),),
) -> Topology:
    return topology.resolve(size, ulysses, ring, world=world, local_world=local_world or world, heads=list(heads))


@st.composite
def jobs(draw: st.DrawFn) -> tuple[int, int, int]:
    """(size, world, ranks of a node): a row may lie on a part of a node, on one, or on several."""
    local_world = draw(st.integers(1, 12))
    world = local_world * draw(st.integers(1, 4))
    return draw(st.sampled_from([d for d in range(1, world + 1) if world % d == 0])), world, local_world


@given(job=jobs(), heads=st.lists(legal_heads(), max_size=2))
def test_auto_is_the_largest_legal_degree_whose_groups_stay_inside_a_node(
    job: tuple[int, int, int], heads: list[tuple[int, int, int]]
) -> None:
    size, world, local_world = job
    pairs = tuple((query, kv) for _, query, kv in heads)
    best = _best_ulysses(size, world, local_world, pairs)
    assert resolve(size, world=world, local_world=local_world, heads=pairs) == Topology(best, size // best, world // size)


def _best_ulysses(size: int, world: int, local_world: int, heads: tuple[tuple[int, int], ...]) -> int:
    """By trying every degree and looking at every all-to-all group."""

    def fits(u: int) -> bool:
        groups = Topology(u, size // u, world // size).groups("ulysses")
        inside = all(len({rank // local_world for rank in group}) == 1 for group in groups)
        return inside and all(n % u == 0 and (m % u == 0 or u % m == 0) for n, m in heads)

    return max(u for u in range(1, size + 1) if size % u == 0 and fits(u))


@pytest.mark.parametrize(
    ("world", "local_world", "heads", "wanted"),
    [
        (8, 8, ((32, 8),), (8, 1)),
        (16, 8, ((32, 8),), (8, 2)),
        (8, 8, ((32, 2),), (8, 1)),
        (8, 8, ((4, 1),), (4, 2)),
        (8, 8, ((6, 3),), (1, 8)),
        (6, 6, ((12, 3),), (6, 1)),
        (6, 6, ((8, 4),), (2, 3)),
        (8, 8, ((32, 8), (12, 4)), (4, 2)),
        (6, 2, ((12, 12),), (2, 3)),
        (8, 8, (), (8, 1)),
    ],
    ids=["all", "two nodes", "kv < ulysses", "few queries", "kv 3", "kv 3, size 6", "size 6", "two kinds", "small nodes", "none"],
)
def test_auto_on_known_machines(world: int, local_world: int, heads: tuple[tuple[int, int], ...], wanted: tuple[int, int]) -> None:
    found = resolve(world=world, local_world=local_world, heads=heads)
    assert (found.ulysses, found.ring, found.data) == (*wanted, 1)


def test_what_the_user_gives_is_taken_and_the_rest_follows() -> None:
    assert resolve(size=4, ulysses=2) == Topology(ulysses=2, ring=2, data=2)
    assert resolve(size=4, ring=4) == Topology(ulysses=1, ring=4, data=2)
    assert resolve(size=4, ulysses=1, ring=4) == Topology(ulysses=1, ring=4, data=2)
    assert resolve(ulysses=4) == Topology(ulysses=4, ring=2, data=1)
    assert resolve(size=8, ulysses=8, local_world=4) == Topology(ulysses=8, ring=1, data=1)  # asked for, so allowed


@pytest.mark.parametrize(("size", "world", "legal"), [(3, 8, [1, 2, 4, 8]), (16, 8, [1, 2, 4, 8]), (4, 6, [1, 2, 3, 6])])
def test_a_size_that_does_not_divide_the_job_is_refused(size: int, world: int, legal: list[int]) -> None:
    message = (
        f"sequence_parallel.size: {size} does not divide the {world} ranks of this job; use one of {legal} or start a "
        f"multiple of {size} ranks"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        resolve(size=size, world=world)


def test_degrees_that_do_not_make_the_size_are_refused() -> None:
    message = 'sequence_parallel: ulysses_size 2 x ring_size 2 is not size 8; change one or leave it "auto"'
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        resolve(ulysses=2, ring=2)


@pytest.mark.parametrize(("ulysses", "ring"), [(3, "auto"), ("auto", 3), (16, "auto"), ("auto", 16)])
def test_one_degree_that_does_not_divide_an_auto_size_is_refused(ulysses: int | str, ring: int | str) -> None:
    with pytest.raises(ValueError, match="does not divide size 8; use one of"):
        resolve(ulysses=ulysses, ring=ring)


@pytest.mark.parametrize(
    ("ulysses", "heads", "reason", "legal"),
    [
        (8, ((4, 1),), "it does not divide the 4 query heads", [1, 2, 4]),
        (4, ((24, 6),), "it neither divides nor is a multiple of the 6 key/value heads", [1, 2]),
        (8, ((32, 8), (12, 4)), "it does not divide the 12 query heads", [1, 2, 4]),
    ],
)
def test_a_degree_that_cannot_split_the_heads_is_refused_with_the_legal_ones(
    ulysses: int, heads: tuple[tuple[int, int], ...], reason: str, legal: list[int]
) -> None:
    message = (
        f"sequence_parallel.ulysses_size: {ulysses} is not possible for this model: {reason}; legal for size 8: {legal}, the "
        "rest goes into ring_size"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        resolve(ulysses=ulysses, heads=heads)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        resolve(ring=8 // ulysses, heads=heads)


# Gated DeltaNet heads: (value heads, key heads)


@pytest.mark.parametrize(
    ("setting", "sizes", "heads", "wanted"),
    [
        ("auto", (4, 2), (32, 16), "heads"),
        ("auto", (4, 8), (32, 16), "heads"),  # key heads shared by two ranks
        ("auto", (4, 16), (32, 16), "state"),  # 64 ranks, 32 value heads
        ("auto", (1, 3), (32, 16), "state"),
        ("state", (4, 2), (32, 16), "state"),
        ("heads", (32, 1), (32, 16), "heads"),
    ],
)
def test_how_recurrent_layers_are_sharded(setting: str, sizes: tuple[int, int], heads: tuple[int, int], wanted: str) -> None:
    assert topology.resolve_linear(setting, Topology(*sizes, data=1), [heads]) == wanted


def test_too_many_ranks_for_the_heads_names_the_largest_degree() -> None:
    with pytest.raises(ValueError, match=r"degree 64: it does not divide the 32 value heads; use size 32 at most") as caught:
        topology.resolve_linear("heads", Topology(4, 16, data=1), [(32, 16)])
    assert '"linear_attention": "state"' in str(caught.value)
    with pytest.raises(ValueError, match=r"with state passed along the ring at degree 64: .*; use ulysses_size 32 at most"):
        topology.resolve_linear("state", Topology(64, 2, data=1), [(32, 16)])


def test_layers_that_pass_no_state_are_sharded_by_heads_or_not_at_all() -> None:
    assert topology.resolve_linear("auto", Topology(4, 8, data=1), [(32, 1)], passes=False) == "heads"
    with pytest.raises(
        ValueError, match=r"recurrent layers .* degree 64: it does not divide the 32 heads; use size 32 at most"
    ) as caught:
        topology.resolve_linear("auto", Topology(4, 16, data=1), [(32, 1)], passes=False)
    assert "state" not in str(caught.value)
    with pytest.raises(ValueError, match='recurrent layers do not pass their state; use "heads" or "auto"'):
        topology.resolve_linear("state", Topology(4, 8, data=1), [(32, 1)], passes=False)


@pytest.mark.parametrize(("linear", "wanted"), [("auto", (2, 8)), ("state", (2, 8)), ("heads", (8, 2))])
def test_auto_ulysses_splits_recurrent_heads_where_state_is_passed(linear: str, wanted: tuple[int, int]) -> None:
    found = topology.resolve(16, "auto", "auto", world=16, local_world=8, heads=[(32, 8)], linear_heads=[(2, 2)], linear=linear)
    assert (found.ulysses, found.ring) == wanted


def test_auto_ulysses_does_not_look_at_recurrent_heads_that_all_ranks_share() -> None:
    found = topology.resolve(8, "auto", "auto", world=8, local_world=8, heads=[(4, 4)], linear_heads=[(32, 16)])
    assert (found.ulysses, found.ring) == (4, 2)


@pytest.mark.parametrize(
    ("ulysses", "heads", "least_memory", "wanted"),
    [(8, (32, 8), True, 4), (8, (32, 8), False, 1), (1, (32, 8), True, 1), (2, (24, 8), True, 12), (4, (8, 2), True, 2)],
)
def test_auto_groups_of_heads(ulysses: int, heads: tuple[int, int], least_memory: bool, wanted: int) -> None:
    degrees = Topology(ulysses, 2, data=1)
    assert topology.resolve_head_chunks("auto", degrees, [heads], passing=False, least_memory=least_memory) == wanted


def test_groups_of_heads_that_do_not_match_key_value_heads_are_refused() -> None:
    degrees = Topology(1 + 1, 1, data=1)
    with pytest.raises(
        ValueError, match=r"groups of 4 query heads do not match key/value heads that serve 6; use one of \[1, 2, 4"
    ):
        topology.resolve_head_chunks(3, degrees, [(24, 4)], passing=False, least_memory=False)
    with pytest.raises(ValueError, match='not available with linear_attention "state"'):
        topology.resolve_head_chunks(2, degrees, [(24, 4)], passing=True, least_memory=False)


def test_the_ring_keeps_what_it_receives_where_it_leaves_a_host() -> None:
    """ "auto" goes by the ranks that are sure to be on one host, not by where a rank is; an answer that was given stays."""
    across, inside = topology.Topology(2, 2, 1), topology.Topology(2, 2, 2)
    assert topology.resolve_ring_keep("auto", across, 2, 1) == "checkpointing"
    assert topology.resolve_ring_keep("auto", across, 6, 1) == "checkpointing"
    assert topology.resolve_ring_keep("auto", across, 2, 2) == "never"
    assert topology.resolve_ring_keep("auto", inside, 8, 1) == "never"
    assert topology.resolve_ring_keep("auto", topology.Topology(4, 1, 1), 2, 1) == "never"
    assert topology.resolve_ring_keep(True, inside, 8, 4) == "always"
    assert topology.resolve_ring_keep(False, across, 2, 1) == "never"
