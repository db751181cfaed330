"""What the server has imported from which CPU ranks are forked. Nothing here may start a thread, which a fork would lose.

The second part is what DeepSpeed, PyTorch and ds_cp import as late as in a job: a rank would do so for more than two seconds.
"""

# ruff: noqa: F401

from __future__ import annotations

import gc
import os
from functools import cache

import transformers.models.llama.modeling_llama

from tests.dist import jobs

# isort: split
import deepspeed.module_inject.auto_ep_layer
import deepspeed.runtime.superoffload.superoffload_stage3
import deepspeed.runtime.zero.muon.muon_optimizer
import rich.console
import rich.table
import torch._dynamo.testing
import torch._inductor.compile_fx

from ds_cp import agreement, models
from ds_cp.kernels import probe

models.families()
deepspeed.ops.__compatible_ops__  # noqa: B018  (asked for, it is found out, by compiling programs, and kept)
SERVER = os.getpid()

gc.collect()
gc.freeze()  # a rank's collector does not touch, and so copy, what is here for good


def remember() -> None:
    """In a rank: every job asks for versions, the kernel's errors and the list of families, and gets the same answers again."""
    agreement._version = cache(agreement._version)
    probe.wrong = cache(probe.wrong)
    models.families = cache(models.families)


def server() -> tuple[bool, int]:
    """Whether this rank was forked after these imports, and the threads of the process that it was forked from."""
    return os.getppid() == SERVER, len(os.listdir(f"/proc/{os.getppid()}/task"))
