"""How a rank comes to know the others: DeepSpeed's launcher, torchrun, or MPI."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import deepspeed
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.comm import comm as deepspeed_comm

from ds_cp import agreement, config, preflight
from ds_cp.config import Config

MPI_RANKS = ("OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK", "MV2_COMM_WORLD_RANK")
TOLD_AFTER_S = 60.0
"""How long a rank waits for the others before it says so."""


def init_distributed(timeout_s: float | None = None) -> None:
    """DeepSpeed's process group of the job and this rank's GPU, whatever started it; the first thing that a training program does.

    Under mpirun, DeepSpeed's `--launcher openmpi`, or srun with PMI, ranks find each other through mpi4py; MASTER_ADDR and
    MASTER_PORT are respected where they are set. On CPU a program of HF Trainer must call this before it builds its
    TrainingArguments and model, because accelerate would make torch's group alone.

    Args:
        timeout_s: seconds after which a collective of all ranks (DeepSpeed's) fails; None is DeepSpeed's own.

    Raises:
        ValueError: a stale lock of a build, MPI without mpi4py, ranks that did not come in time, or a launcher and a process group
            that disagree.
    """
    preflight.check_extension_locks()
    if "RANK" not in os.environ and any(name in os.environ for name in MPI_RANKS):
        _discover_mpi()
    timeout = {} if timeout_s is None else {"timeout": timedelta(seconds=timeout_s)}
    if "LOCAL_RANK" in os.environ:  # else every rank's first collectives are from the first GPU, which NCCL refuses
        get_accelerator().set_device(int(os.environ["LOCAL_RANK"]))
    with _meeting():
        deepspeed.init_distributed(**timeout)
    preflight.check_world_size()


def say_off(block: Config) -> None:
    """What a block of size 1 sets for nothing, once for the job."""
    told = config.idle(block)
    if told is not None and os.environ.get("RANK", "0") == "0":
        print(f"ds_cp: {told}", flush=True)


def read(source: str | os.PathLike[str] | Mapping[str, Any], within_s: float | None = None) -> tuple[dict[str, Any], Config]:
    """The ds_config and its block. The ranks of a job meet first: what one cannot read, or reads otherwise, ends all of them.

    Args:
        within_s: seconds in which they must, if fewer than the block's comm_timeout_s.

    Raises:
        ValueError: on every rank: the config is wrong, or ranks have different ones, or different packages.
    """
    if preflight.launched() == 1:
        ds_config = config.load(source)
        return ds_config, config.parse(ds_config)
    ds_config, block, reason = {}, None, None
    try:
        ds_config = config.load(source)
        block = config.parse(ds_config)
    except (ValueError, OSError) as error:
        reason = str(error)
    limits = [within_s, None if block is None or block.size == 1 else block.comm_timeout_s]
    init_distributed(min((limit for limit in limits if limit is not None), default=None))
    preflight.refuse_together(reason)
    assert block is not None
    agreement.agree(agreement.of_config(ds_config), agreement.CONFIG)
    agreement.agree(agreement.packages(), agreement.INSTALL)
    return ds_config, block


@contextmanager
def _meeting() -> Iterator[None]:
    """While ranks come together: one that is alone says what it waits for, and ends with a sentence when it gives up.

    Raises:
        ValueError: torch has given up.
    """
    here = f"rank {os.environ.get('RANK', '?')} on {socket.gethostname()}"
    place = f"{os.environ.get('MASTER_ADDR', 'localhost')}:{os.environ.get('MASTER_PORT', '?')}"
    missing = f"not all {preflight.launched()} ranks have come to {place}; see what the launcher said of each host (ssh, names)"
    told = threading.Timer(
        TOLD_AFTER_S,
        lambda: print(f"ds_cp: {here} waits since {TOLD_AFTER_S:.0f} s: an op is being built, or {missing}", flush=True),
    )
    told.daemon = True
    told.start()
    try:
        yield
    except (dist.DistStoreError, dist.DistNetworkError) as error:
        first = str(error).partition("\n")[0]
        raise ValueError(f"launch: {here} gave up: {missing} ({first})") from None
    finally:
        told.cancel()


def _discover_mpi() -> None:
    given = {name: os.environ[name] for name in ("MASTER_ADDR", "MASTER_PORT") if name in os.environ}
    try:
        deepspeed_comm.mpi_discovery(distributed_port=int(given.get("MASTER_PORT", 29500)), verbose=False)
    except (ImportError, RuntimeError) as error:
        raise ValueError(
            f"launch: MPI started this program, but mpi4py cannot be used ({error}); pip install mpi4py, or start with deepspeed "
            "or torchrun"
        ) from None
    os.environ |= given
