"""Ranks are forked from a server that has everything imported and no thread."""

from __future__ import annotations

from tests.dist import preloaded


def test_ranks_are_forked_from_one_thread_after_the_imports(pool) -> None:
    assert pool(2).run(preloaded.server) == [(True, 1)] * 2
