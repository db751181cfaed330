"""What the server has imported from which CPU ranks are forked. Nothing here may start a thread, which a fork would lose."""

from __future__ import annotations

import gc
import os

import transformers.models.llama.modeling_llama  # noqa: F401

from tests.dist import jobs  # noqa: F401

SERVER = os.getpid()

gc.collect()
gc.freeze()  # a rank's collector does not touch, and so copy, what is here for good


def server() -> tuple[bool, int]:
    """Whether this rank was forked after these imports, and the threads of the process that it was forked from."""
    return os.getppid() == SERVER, len(os.listdir(f"/proc/{os.getppid()}/task"))
