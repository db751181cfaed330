"""The shell: `ds-cp check` says what a config becomes for a model and a number of ranks, or why it is refused; `ds-cp explain`
shows a row under a layout; both start nothing. `ds-cp selftest` runs on the ranks of a job."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ds_cp import explain as explaining
from ds_cp import layout

app = typer.Typer(add_completion=False, help="Sequence parallelism for DeepSpeed.")


@app.callback()
def main(local_rank: Annotated[int, typer.Option("--local_rank", hidden=True, help="What DeepSpeed's launcher adds.")] = 0) -> None:
    """Sequence parallelism for DeepSpeed."""


@app.command()
def check(
    ds_config: Annotated[Path, typer.Argument(help="The ds_config.json.")],
    ranks: Annotated[int, typer.Option(min=1, help="Ranks (GPUs) of the job.")],
    ranks_per_node: Annotated[int, typer.Option(min=0, help="Ranks on one node; 0 means all.")] = 0,
    model: Annotated[str, typer.Option(help="A model's name or path: its layers are checked too, without its weights.")] = "",
    heads: Annotated[int, typer.Option(min=0, help="Query heads, where no model is given.")] = 0,
    kv_heads: Annotated[int, typer.Option(min=0, help="Key/value heads, where no model is given; 0 means as many.")] = 0,
) -> None:
    """Validates a config against a model and a number of ranks; exit code 1 and one sentence if it would be refused."""
    from ds_cp import checking

    try:
        found = checking.check(ds_config, ranks, ranks_per_node, model, (heads, kv_heads or heads) if heads else None)
    except ValueError as error:
        _refuse(error)
    table = Table("setting", "in this job")
    for setting, value in found.items():
        table.add_row(setting, value)
    Console().print(table)


@app.command()
def explain(
    docs: Annotated[Path, typer.Option(help="A file with the lengths of a row's documents.")],
    ring: Annotated[int, typer.Option(min=1, help="Ring ranks.")],
    layout_name: Annotated[str, typer.Option("--layout", help="auto, zigzag, balanced or contiguous.")] = "auto",
    ulysses: Annotated[int, typer.Option(min=1, help="Ulysses ranks of each ring rank.")] = 1,
    window: Annotated[int, typer.Option(min=0, help="Sliding window; 0 is full attention.")] = 0,
    png: Annotated[Path | None, typer.Option(help="Where to draw the same as a picture.")] = None,
) -> None:
    """Shows who holds what of a row, the work of every ring rank and what travels."""
    try:
        if layout_name not in layout.NAMES:
            raise ValueError(f"--layout {layout_name}: use one of {', '.join(layout.NAMES)}")
        if not docs.is_file():
            raise ValueError(f"--docs {docs}: no such file")
        found = explaining.explain(layout_name, explaining.read_lengths(docs), ring, ulysses, window or None)
        explaining.show(found, Console())
        if png is not None:
            explaining.draw(found, png)
    except ValueError as error:
        _refuse(error)


@app.command()
def selftest(
    ds_config: Annotated[Path, typer.Argument(help="The ds_config.json.")],
    model: Annotated[str, typer.Option(help="The model's name or path; its weights are not read.")],
) -> None:
    """Proves a config on the ranks that it will run on, in under two minutes; ends in PASS or in the sentence to act on.

    deepspeed --hostfile hosts --module ds_cp.cli selftest ds_config.json --model NAME
    """
    from ds_cp import prove

    first = int(os.environ.get("RANK", os.environ.get("OMPI_COMM_WORLD_RANK", 0))) == 0
    console = Console(quiet=not first, soft_wrap=True)
    try:
        prove.prove(str(ds_config), model, lambda what, found: console.print(Text(f"{what}: {found}")))
    except ValueError as error:
        _refuse(error)
    console.print(Text("PASS", style="green"))


def _refuse(error: ValueError) -> NoReturn:
    """One sentence, and an exit code for CI."""
    Console(stderr=True).print(Text("refused: ", style="red") + Text(str(error)), soft_wrap=True)
    raise typer.Exit(1) from None


if __name__ == "__main__":
    app()
