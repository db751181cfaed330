"""The shell: `ds-cp check` says what a config becomes for a model and a number of ranks, or why it is refused; `ds-cp explain`
shows a row under a layout; `ds-cp plan` chooses sizes for a model and GPUs. None of these starts anything. `ds-cp selftest` runs on
the ranks of a job."""

from __future__ import annotations

import json
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
def plan(
    model: Annotated[str, typer.Argument(help="A model's name, its folder, or a config.json; its weights are not read.")],
    gpus: Annotated[int, typer.Option(min=1, help="GPUs of the job.")],
    length: Annotated[int, typer.Option(min=0, help="Tokens of a row of one document.")] = 0,
    docs: Annotated[Path | None, typer.Option(help="Instead: a file with the lengths of a row's documents.")] = None,
    gpus_per_host: Annotated[int, typer.Option(min=0, help="0: 8, or all where there are fewer.")] = 0,
    gpu: Annotated[str, typer.Option(help="h100 or h200: its speeds, and its memory.")] = "h100",
    gpu_memory: Annotated[float, typer.Option(min=0, help="GiB of a GPU; 0: what the named one has.")] = 0,
    inside: Annotated[
        str, typer.Option(help="Link inside a host: nvlink, pcie-5, pcie-4, or GB/s of a GPU in one direction.")
    ] = "nvlink",
    between: Annotated[
        str,
        typer.Option(help="Between hosts: infiniband-400g, infiniband-200g, ethernet-400g, ethernet-100g, ethernet-25g, or GB/s."),
    ] = "infiniband-400g",
    host_memory: Annotated[float, typer.Option(min=0, help="GiB of a host, for what is offloaded.")] = 1800,
    rows: Annotated[int, typer.Option(min=1, help="Rows of the table.")] = 8,
    choose: Annotated[int, typer.Option(min=1, help="The row that --write takes.")] = 1,
    write: Annotated[Path | None, typer.Option(help="Where to write a ds_config.json of that row.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="All rows as JSON instead of the table.")] = False,
) -> None:
    """Which sizes, ZeRO stage and savings to train a model with: memory, traffic and time of each, predicted, the fastest first.

    Exit code 1 and one sentence if nothing fits.
    """
    from ds_cp.planner import machine, read, render, search, times

    try:
        if (docs is None) == (length == 0):
            raise ValueError("plan: give either --length or --docs")
        if write is not None and not write.parent.is_dir():
            raise ValueError(f"--write {write}: there is no folder {write.parent}")
        where = machine.build(gpus, gpus_per_host, gpu, gpu_memory, inside, between, host_memory)
        documents = (0, length) if docs is None else times.boundaries(explaining.read_lengths(docs))
        found = search.plan(read.read(model), where, documents)
        if found.advice:
            raise ValueError(found.advice)
        if choose > len(found.rows):
            raise ValueError(f"--choose {choose}: there are {len(found.rows)} rows")
    except ValueError as error:
        _refuse(error)
    if as_json:
        typer.echo(json.dumps(render.as_json(found), indent=1))
    else:
        render.show(found, Console(), max(rows, choose))
    if write is not None:
        chosen = found.rows[choose - 1].choice
        write.write_text(json.dumps(render.ds_config(chosen), indent=2) + "\n", encoding="utf-8")
        advice = "with gradient checkpointing" if chosen.checkpointing else "without gradient checkpointing"
        alone = "" if chosen.degrees.size > 1 else "; size 1: a row fits one GPU, so ranks share none (--choose takes another row)"
        Console(stderr=True).print(
            f"{write}: row {choose}; run it {advice}, one row a replica{alone}", highlight=False, soft_wrap=True
        )


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
