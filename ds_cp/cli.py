"""The shell: `ds-cp check` says what a config becomes for a model and a number of ranks, or why it is refused; `ds-cp explain`
shows a row under a layout. Starts nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from ds_cp import config, layout, topology
from ds_cp import explain as explaining

app = typer.Typer(add_completion=False, help="Sequence parallelism for DeepSpeed.")


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
    try:
        block = config.parse(str(ds_config))
        pairs, linear_heads = _heads_of(model) if model else ([(heads, kv_heads or heads)] if heads else [], [])
        degrees = topology.resolve(
            block.size,
            block.ulysses_size,
            block.ring_size,
            world=ranks,
            local_world=ranks_per_node or ranks,
            heads=pairs,
            linear_heads=linear_heads,
            linear=block.linear_attention,
        )
        linear = topology.resolve_linear(block.linear_attention, degrees, linear_heads)
    except ValueError as error:
        Console(stderr=True).print(f"[red]refused:[/red] {error}", soft_wrap=True)
        raise typer.Exit(1) from None
    table = Table("setting", "in this job")
    padding = layout.pad_multiple(block.layout, degrees.ring, degrees.ulysses)
    most = layout.most_padding(block.layout, degrees.ring, degrees.ulysses)
    for setting, value in {
        "size": degrees.size,
        "ulysses_size": degrees.ulysses,
        "ring_size": degrees.ring,
        "data-parallel replicas": degrees.data,
        "layout": layout.describe(block.layout),
        **({"linear_attention": linear} if linear_heads else {}),
        "rows are padded to a multiple of": padding if padding == most else f"{padding}; packed rows of up to {most}",
    }.items():
        table.add_row(setting, str(value))
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
        Console(stderr=True).print(f"[red]refused:[/red] {error}", soft_wrap=True)
        raise typer.Exit(1) from None


def _heads_of(model: str) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    from ds_cp.models import checks

    return checks.heads_of_pretrained(model)
