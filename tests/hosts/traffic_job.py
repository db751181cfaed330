"""Bytes that one host of two sends in a training step, as its interface counts them, by `ring_keep` and the row's length.

python -m tests.hosts.traffic_job OUT
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

import ds_cp
from ds_cp import selftest
from ds_cp.models import attach
from tests.dist.jobs import rows

LENGTHS = (512, 2560)
KEPT = ("never", "always")
SENT = Path("/sys/class/net/eth0/statistics/tx_bytes")


def attention_bytes(tokens: int, kept: str) -> int:
    """Of one rank of a ring of 2 in one step: (k, v) in forward, (k, v) in backward unless they are kept, (dk, dv) in fp32."""
    config = selftest.tiny_model("llama").config
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return config.num_hidden_layers * (2 if kept == "always" else 3) * 2 * (tokens // 2) * config.num_key_value_heads * size * 4


def main(out: Path) -> None:
    torch.set_num_threads(1)
    model = selftest.tiny_model("llama")
    config = selftest.ds_config(2, {"size": 2, "ulysses_size": 1, "ring_size": 2})
    engine, *_ = ds_cp.initialize(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=1e-3), config=config)
    handle, found = attach.handle_of(engine), {}
    for kept in KEPT:
        handle.methods = dataclasses.replace(handle.methods, ring_keep=kept)
        found[kept] = {tokens: sent(engine, rows(1, tokens)[0]) for tokens in LENGTHS}
    if dist.get_rank() == 0:
        out.write_text(json.dumps(found))
    handle.watch.end()
    dist.destroy_process_group()


def sent(engine: torch.nn.Module, batch: dict[str, torch.Tensor]) -> int:
    step(engine, batch)
    dist.barrier()
    before = int(SENT.read_text())
    step(engine, batch)
    dist.barrier()
    return int(SENT.read_text()) - before


def step(engine: torch.nn.Module, batch: dict[str, torch.Tensor]) -> None:
    engine.backward(engine(**batch).loss)
    engine.step()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
