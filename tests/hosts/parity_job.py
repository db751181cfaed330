"""Started on every host by a launcher: parity cases over all ranks of the job; rank 0 writes what came out.

python -m tests.hosts.parity_job OUT CASE ...
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

import ds_cp
from ds_cp import mesh
from tests.dist import jobs

CASES = {
    "replicas": ({"size": 2, "ulysses_size": 2, "ring_size": 1}, 2),
    "ring": ({"size": 4, "ulysses_size": 1, "ring_size": 4}, 1),
    "hybrid": ({"size": 4, "ulysses_size": 2, "ring_size": 2}, 1),
}


def main(out: Path, *names: str) -> None:
    torch.set_num_threads(1)
    ds_cp.init_distributed()
    errors = {}
    for name in names:
        block, replicas = CASES[name]
        _, loss_error, worst, error = jobs.parity("llama", block, stage=3, replicas=replicas)
        errors[name] = [loss_error, error, worst]
    auto = [jobs.degrees({"size": "auto"}), mesh.local_world_size()]
    if dist.get_rank() == 0:
        out.write_text(json.dumps({"ranks": dist.get_world_size(), "errors": errors, "auto": auto}))
    dist.destroy_process_group()


if __name__ == "__main__":
    out, *names = (argument for argument in sys.argv[1:] if not argument.startswith("--"))
    main(Path(out), *names)
