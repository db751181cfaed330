"""What every rank of a job must have alike, compared before a difference makes ranks wait for each other or train otherwise.

    when                              what
    the process group is up           the ds_config, key by key; packages; ds_cp's own files
    the model is there                its class, its config, key by key, names and shapes of its parameters
    everything "auto" is resolved     sizes and methods (kernels, with their versions)

The row and the plan of the first step are compared by `models.same_row`. A difference is one ValueError, the same on every rank.
"""

from __future__ import annotations

import hashlib
import platform
import socket
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn

PACKAGES = ("torch", "deepspeed", "transformers", "accelerate", "peft", "triton")
KERNELS = ("flash-attn-4", "flash-attn", "nvidia-cutlass-dsl", "flash-linear-attention", "tilelang")
OWN = ("tensorboard", "wandb", "csv_monitor", "comet", "flops_profiler", "steps_per_print", "wall_clock_breakdown", "dump_state")
"""Top-level keys of a ds_config that only say what a rank reports."""
PLACES = ("path", "dir", "file", "folder")
"""A key whose last word is one of these names a place on one host."""
SHOWN, LONGEST = 4, 60
CONFIG = "Give every host the same ds_config and the same arguments"
INSTALL = "Install the same packages on every host"
MODEL = "Build the same model on every rank"


def agree(what: Mapping[str, object], to_do: str) -> None:
    """Refuses when ranks have different values of anything in `what`; every rank of the job must call it, with what it has.

    Ranks exchange one hash, and what it stands for only where it differs.

    Raises:
        ValueError: the same on every rank: the items, the values, which ranks of which hosts have them, and `to_do`.
    """
    mine = {name: str(value) for name, value in what.items()}
    prints: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(prints, digest(f"{name}={value}" for name, value in sorted(mine.items())))
    if len(set(prints)) == 1:
        return
    everyone: list[tuple[str, dict[str, str]]] = [("", {})] * len(prints)
    dist.all_gather_object(everyone, (socket.gethostname(), mine))
    hosts, items = [host for host, _ in everyone], [found for _, found in everyone]
    names = sorted({name for found in items for name in found})
    compared = (_difference(name, [own.get(name, "not there") for own in items], hosts) for name in names)
    found = [text for text in compared if text]
    more = f" (and {len(found) - SHOWN} more)" if len(found) > SHOWN else ""
    raise ValueError(f"the ranks of this job differ: {'; '.join(found[:SHOWN])}{more}. {to_do}")


def _difference(name: str, values: list[str], hosts: list[str]) -> str | None:
    if len(set(values)) == 1:
        return None
    said = []
    for value in dict.fromkeys(values):
        ranks = [rank for rank, other in enumerate(values) if other == value]
        where = ", ".join(dict.fromkeys(hosts[rank] for rank in ranks))
        said.append(f"{_short(value)} on {_ranks(ranks)} ({_short(where)})")
    return f"{name} is {' and '.join(said)}"


def _ranks(ranks: list[int]) -> str:
    text = ", ".join(map(str, ranks if len(ranks) <= 8 else [*ranks[:6], "...", ranks[-1]]))
    return f"rank {text}" if len(ranks) == 1 else f"ranks {text}"


def _short(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."


def digest(parts: Iterable[str]) -> str:
    found = hashlib.sha256()
    for part in parts:
        found.update(part.encode() + b"\0")
    return found.hexdigest()[:12]


def of_config(ds_config: Mapping[str, Any], name: str = "ds_config") -> dict[str, str]:
    """Dotted keys and values, without what only one rank's reports depend on."""
    return dict(_flat({key: value for key, value in ds_config.items() if key not in OWN}, name))


def _flat(value: Any, name: str) -> Iterable[tuple[str, str]]:
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            if str(key).rpartition("_")[2] not in PLACES:
                yield from _flat(inner, f"{name}.{key}")
    else:
        yield name, repr(value)


def packages() -> dict[str, str]:
    """Versions of what a step is computed with, and a hash of ds_cp's own files: two checkouts can have one version."""
    found = {name: _version(name) for name in (*PACKAGES, *KERNELS)}
    here = Path(__file__).parent
    own = digest(
        text for path in sorted(here.rglob("*.py")) for text in (str(path.relative_to(here)), path.read_text(encoding="utf-8"))
    )
    return {**found, "python": ".".join(platform.python_version_tuple()[:2]), "ds_cp": f"{_version('ds_cp')} (files {own})"}


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def of_model(model: nn.Module) -> dict[str, str]:
    """Class, config and parameters; not the weights, which DeepSpeed takes from rank 0."""
    shapes = [(name, tuple(getattr(p, "ds_shape", p.shape)), str(p.dtype)) for name, p in model.named_parameters()]
    parameters = f"{len(shapes)} (names and shapes {digest(map(str, shapes))})"
    settings: Any = getattr(model, "config", None)
    config = {} if settings is None else settings.to_dict()
    config = {key: value for key, value in config.items() if not key.startswith("_") and key != "transformers_version"}
    return {"model": type(model).__name__, "model.parameters": parameters, **of_config(config, "model.config")}
