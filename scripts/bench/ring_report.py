"""Rows of scripts/bench/attention.py: kept in a JSON as they come, shown as tables, drawn."""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import time
import traceback
from collections.abc import Callable
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from ring_rank import Row

COLUMNS = {
    "exact": "documents kernel contender out dq dk dv ratio outcome",
    "speed": "tokens ring kernel contender rank forward_ms backward_ms total_ms extra_mib efficiency x_rfa x_recomp outcome",
    "packed": "kernel contender documents calls busiest_ms mean_ms busiest/mean worst/mean busiest/whole worst/whole "
    "new_ms again_ms new/again same_ms new/same plan_ms outcome",
    "batches": "kernel count q k contender forward_us backward_us outcome",
    "tiles": "heads size kind q k kernel forward_us backward_us forward_first_s backward_first_s outcome",
}


class Book:
    """The rows so far: kept in the JSON, told on stdout as they come."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.began, self.rows = args, time.monotonic(), []
        self.about = machine(args)

    def row(self, section: str, head: Row, work: Callable[..., Row], *arguments: Any) -> Row:
        """`work(*arguments)` done and recorded; a failure is recorded too."""
        row: Row = {"section": section, **head, "outcome": "ok"}
        try:
            if time.monotonic() - self.began > self.args.deadline:
                raise TimeoutError("past --deadline")
            row |= work(*arguments)
        except torch.OutOfMemoryError:
            row["outcome"] = "out of memory"
        except TimeoutError as error:
            row["outcome"] = f"skipped: {error}"
        except Exception as error:
            row["outcome"] = f"failed: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:160]
            traceback.print_exc()
        gc.collect()  # what a traceback held
        if self.args.device == "cuda":
            torch.cuda.empty_cache()
        self.rows.append(row)
        if self.args.json:
            text = json.dumps({"machine": self.about, "rows": self.rows}, indent=1)
            self.args.json.with_suffix(".part").write_text(text + "\n")
            self.args.json.with_suffix(".part").replace(self.args.json)
        shown = " ".join(f"{key}={shorten(row[key])}" for key in COLUMNS[section].split() if row.get(key) is not None)
        print(f"[{time.monotonic() - self.began:6.1f} s] {section}: {shown}", flush=True)
        return row


def shorten(value: Any) -> str:
    return "" if value is None else f"{value:,.4g}" if isinstance(value, float) else str(value)


def tables(rows: list[Row]) -> None:
    for section, names in COLUMNS.items():
        found = [row for row in rows if row["section"] == section]
        used = [name for name in names.split() if any(row.get(name) is not None for row in found)]
        cells = [[shorten(row.get(name)) for name in used] for row in found]
        if not cells:
            continue
        try:
            from rich.console import Console
            from rich.table import Table
        except ImportError:  # a bare GPU machine; --read prints the tables elsewhere
            print("", " | ".join(used), *(" | ".join(line) for line in cells), sep="\n")
            continue
        table = Table(*used, title=section)
        for line in cells:
            table.add_row(*line)
        Console(width=max(Console().width, 160)).print(table)


def draw(rows: list[Row], path: Path) -> None:
    """Efficiency over the row's length, one panel a ring size, one line a kernel and ring_impl."""
    from matplotlib.figure import Figure

    found = [row for row in rows if row["section"] == "speed" and "efficiency" in row]
    sizes = sorted({row["ring"] for row in found})
    figure = Figure(figsize=(5 * max(len(sizes), 1), 4), layout="constrained")
    panels = figure.subplots(1, max(len(sizes), 1), sharey=True, squeeze=False)[0]
    for panel, size in zip(panels, sizes, strict=False):
        for line in sorted({(row["kernel"], row["contender"]) for row in found}):
            mine = [row for row in found if (row["kernel"], row["contender"], row["ring"]) == (*line, size)]
            points = sorted((row["tokens"], row["efficiency"]) for row in mine)
            style = "--" if "allgather" in line[1] else "-"
            panel.plot(*zip(*points, strict=True), style, marker="o", label=" ".join(line)) if points else None
        panel.axhline(1, color="black", linewidth=0.5)
        panel.set_xscale("log", base=2)
        panel.set_title(f"{size} ranks")
        panel.set_xlabel("tokens of the row")
        panel.grid(alpha=0.3)
        panel.legend(fontsize=7)
    panels[0].set_ylabel("efficiency: whole row / R / ring")
    figure.savefig(path, dpi=150)


def machine(args: argparse.Namespace) -> Row:
    packages = {}
    for name in ("torch", "triton", "flash-attn-4", "flash-attn", "nvidia-cutlass-dsl"):
        with contextlib.suppress(PackageNotFoundError):
            packages[name] = version(name)
    gpu = torch.cuda.get_device_name() if args.device == "cuda" else "none"
    settings = {key: value for key, value in vars(args).items() if not isinstance(value, Path | torch.dtype)}
    return {"gpu": gpu, **packages, "date": date.today().isoformat(), "arguments": settings}
