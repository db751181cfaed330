"""Gloo (or NCCL) workers that are started once per world size and then run functions: process start-up is paid once.

CPU ranks are forked from one server that has everything imported (`tests.dist.preloaded`): imports cost more than most jobs. They
share its hash seed: that no result hangs on the order of a set is seen where launchers start the ranks (tests/e2e, tests/hosts).

A job is (module:function, keyword arguments); the function runs on every rank and returns something picklable. A failing rank's
traceback is in the exception; a rank that does not answer in time ends the pool.
"""

from __future__ import annotations

import atexit
import faulthandler
import gc
import importlib
import os
import queue
import signal
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch.multiprocessing as mp

from tests.ports import free_port

TIMEOUT_S = 240


class WorkerError(Exception):
    """What the ranks raised: `errors[rank]` is (type name, message, traceback) or None."""

    def __init__(self, errors: list[tuple[str, str, str] | None]) -> None:
        self.errors = errors
        first = next(e for e in errors if e is not None)
        super().__init__(f"{sum(e is not None for e in errors)} of {len(errors)} ranks failed: {first[2]}")


class Pool:
    """`world` ranks with one thread each, on gloo, or on NCCL with a GPU each."""

    def __init__(self, world: int, local_world: int | None = None, device: str = "cpu") -> None:
        self.world = world
        context = _context(device)
        port = free_port()
        self._jobs = [context.Queue() for _ in range(world)]
        self._results = context.Queue()
        self._processes = [
            context.Process(target=_work, args=(rank, world, local_world or world, port, device, self._jobs[rank], self._results))
            for rank in range(world)
        ]
        for process in self._processes:
            process.start()  # not daemons, which may have no children: loaders start workers
        atexit.register(self.close)

    def run(self, function: Callable[..., Any], **kwargs: Any) -> list[Any]:
        """The results of all ranks, in rank order; raises WorkerError if any failed."""
        for jobs in self._jobs:
            jobs.put((f"{function.__module__}:{function.__qualname__}", kwargs))
        results: dict[int, tuple[Any, Any]] = {}
        for _ in range(self.world):
            try:
                rank, value, error = self._results.get(timeout=TIMEOUT_S)
            except queue.Empty:
                missing = sorted(set(range(self.world)) - set(results))
                self._show_where()
                self.close()
                raise TimeoutError(f"ranks {missing} of {self.world} did not answer in {TIMEOUT_S} s") from None
            results[rank] = (value, error)
        errors = [results[rank][1] for rank in range(self.world)]
        if any(errors):
            raise WorkerError(errors)
        return [results[rank][0] for rank in range(self.world)]

    def _show_where(self) -> None:
        """Every rank writes its threads' stacks to stderr."""
        for process in self._processes:
            if process.is_alive():
                os.kill(process.pid, signal.SIGUSR1)
                time.sleep(1)

    @property
    def usable(self) -> bool:
        return all(process.is_alive() for process in self._processes)

    def close(self) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()


def _context(device: str) -> Any:
    if device != "cpu":
        return mp.get_context("spawn")  # CUDA does not survive a fork
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["tests.dist.preloaded"])
    return context


def _work(rank: int, world: int, local_world: int, port: int, device: str, jobs: Any, results: Any) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(local_world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "DS_ACCELERATOR": device,
    }
    import logging

    import deepspeed
    import torch

    faulthandler.register(signal.SIGUSR1, all_threads=True)
    torch.set_num_threads(1)
    torch.set_printoptions(threshold=0, edgeitems=1)  # ZeRO 3 renders every parameter for a line that it does not print
    mp.set_start_method("fork", force=True)  # for loaders' workers, as in a process that a launcher starts
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    torch.utils.deterministic.fill_uninitialized_memory = True  # NaN in torch.empty, while the next line holds
    torch.use_deterministic_algorithms(True, warn_only=True)
    if device == "cuda":
        torch.cuda.set_device(rank)
    else:
        importlib.import_module("tests.dist.preloaded").remember()
    deepspeed.init_distributed(dist_backend="nccl" if device == "cuda" else "gloo", verbose=False)
    while True:
        gc.collect()
        gc.freeze()  # what is here now is for good; ZeRO-3 collects in every initialization, among 100,000 objects
        name, kwargs = jobs.get()
        module, _, function = name.partition(":")
        try:
            results.put((rank, getattr(importlib.import_module(module), function)(**kwargs), None))
        except Exception as error:
            results.put((rank, None, (type(error).__name__, str(error), traceback.format_exc())))
