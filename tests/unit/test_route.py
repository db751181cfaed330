"""Routes between two distributions of one row: integers, all ranks in one process."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds_cp import layout as layouts
from ds_cp.layout import Range


def tokens(spans: Sequence[Range]) -> list[int]:
    return [token for start, end in spans for token in range(start, end)]


@st.composite
def distributions(draw: st.DrawFn) -> tuple[list[tuple[Range, ...]], list[tuple[Range, ...]], int]:
    """(held, worked on, how many ranks work on each token): what delta and attention ask for, of any ring and ulysses."""
    ring, ulysses = draw(st.integers(1, 6)), draw(st.integers(1, 4))
    zigzag = layouts.build("zigzag", draw(st.integers(1, 90)), ring, ulysses)
    contiguous = layouts.build("contiguous", zigzag.length, ring, ulysses)
    held = draw(st.sampled_from([zigzag, contiguous]))
    row = [((0, zigzag.length),)] * (ring * ulysses)
    attention = [zigzag.ring_ranges(r) for r in range(ring) for _ in range(ulysses)]
    worked, copies = draw(st.sampled_from([(row, ring * ulysses), (attention, ulysses)]))
    return list(layouts.shards(held)), worked, copies


@given(distributions())
def test_every_token_worked_on_comes_once_and_stands_where_it_should(case) -> None:
    held, worked, copies = case
    routes = [layouts.route(held, worked, rank) for rank in range(len(held))]
    for receiver, spans in enumerate(worked):
        wanted, found = tokens(spans), {}
        for sender, route in enumerate(routes):
            sent = [tokens(held[sender])[i] for i in tokens(route.sent[receiver])]
            places = tokens(routes[receiver].received[sender])
            assert len(sent) == len(places) == route.counts[0][receiver] == routes[receiver].counts[1][sender]
            assert sent == sorted(sent), "both ends list a message in the row's order"
            assert not set(places) & found.keys()
            found |= dict(zip(places, sent, strict=True))
        assert [found[place] for place in range(len(wanted))] == wanted
    assert all(sum(route.counts[0]) == copies * len(tokens(mine)) for route, mine in zip(routes, held, strict=True))


@pytest.mark.parametrize("ring", [2, 4, 8])
def test_neighbouring_pieces_are_one_copy(ring: int) -> None:
    """From contiguous pieces a zigzag ring rank's two chunks come from two ranks, one span each."""
    zigzag = layouts.build("zigzag", 16 * ring, ring, 1)
    held = layouts.shards(layouts.build("contiguous", zigzag.length, ring, 1))
    for rank in range(ring):
        route = layouts.route(held, [zigzag.ring_ranges(r) for r in range(ring)], rank)
        assert sum(map(len, route.sent)) == sum(map(len, route.received)) == 2
