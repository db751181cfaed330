"""`ds-cp explain`: what it shows is what the plans say."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from ds_cp import explain, tiles
from ds_cp.cli import app

LENGTHS = [4096, 100, 300, 2000, 1696]


def run(tmp_path: Path, *options: str, text: str = "4096, 100\n300 2000\n1696\n") -> tuple[int, str]:
    docs = tmp_path / "lengths.txt"
    docs.write_text(text)
    result = CliRunner().invoke(app, ["explain", "--docs", str(docs), *options], env={"COLUMNS": "200"})
    return result.exit_code, " ".join(result.output.split())


@pytest.mark.parametrize(("name", "window"), [("zigzag", None), ("balanced", None), ("contiguous", None), ("balanced", 64)])
def test_received_and_sent_tokens_are_the_same(name: str, window: int | None) -> None:
    found = explain.explain(name, LENGTHS, 4, window=window)
    local = found.layout.length // 4
    if window is None:
        sent = sum(found.plans[0].reach) * local
    else:
        sent = sum(end - start for plan in found.plans for _, start, end in plan.halo.sent)
    assert sum(map(sum, found.received)) == sent > 0
    assert len(found.work) == len(found.calls) == len(found.received) == 4


def test_work_is_that_of_the_plans() -> None:
    found = explain.explain("zigzag", [64], 2)
    assert found.work == [64 * 65 // 4] * 2
    assert (found.calls, found.received) == ([2, 2], [[32], [32]])
    assert explain.explain("zigzag", [64], 2, window=100).plans == found.plans, "a window that no document fills is none"
    assert explain.explain("zigzag", [64], 2, window=7).plans[0] == tiles.plan_window(found.layout, 0, (0, 64), 7)


def test_the_shell_shows_ranks_and_balance_and_draws(tmp_path: Path) -> None:
    png = tmp_path / "row.png"
    code, shown = run(tmp_path, "--layout", "balanced", "--ring", "4", "--png", str(png))
    assert code == 0, shown
    assert "balanced: 8,192 tokens (0 of padding), 5 documents, 4 ring ranks" in shown
    assert "even (mean / busiest): 0.9" in shown or "even (mean / busiest): 1.0" in shown
    assert png.read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("options", "text", "reason"),
    [
        (("--ring", "4", "--layout", "spiral"), "5", "--layout spiral: use one of auto, zigzag, balanced, contiguous"),
        (("--ring", "4"), "5 x", "whole numbers from 1, got 'x'"),
        (("--ring", "4"), "", "got 'nothing'"),
    ],
)
def test_what_cannot_be_explained_is_refused_in_one_sentence(tmp_path: Path, options, text: str, reason: str) -> None:
    code, shown = run(tmp_path, *options, text=text)
    assert code == 1
    assert reason in shown
