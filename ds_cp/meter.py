"""What a run reaches: tokens a second, the share of the GPU's peak that is model FLOPs (MFU), imbalance over ranks.

    FLOPs of a step    2 for each parameter of a matrix and token that meets it (of experts: those routed to), 4 x heads x head size
                       for each pair of a query and a key that it attends, 6 x key size x value size for each head of a Gated
                       DeltaNet layer and token (its recurrent form); backward is twice that, once for a frozen matrix.
                       Recomputed forwards and padding are not counted
    seconds            host time between optimizer steps, the first step of a run and evaluation left out

Counting is in host integers, a micro-batch at a time; ranks and devices are waited for in `Meter.read` alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel

from ds_cp import balance, comm
from ds_cp.balance import Window
from ds_cp.batch import SequenceContext
from ds_cp.mesh import Mesh
from ds_cp.models import attach, checks, family_of, indexer, vision
from ds_cp.planner import machine, read
from ds_cp.timing import ATTENTION, EXCHANGE, KINDS, RING

PREFIX = "Train/ds_cp/"


@dataclass(frozen=True)
class Work:
    """FLOPs of a training step, forward and backward."""

    token: float
    """Of a token outside attention."""
    pair: float
    """Of a pair of a query and a key in one attention layer."""
    windows: tuple[Window, ...]
    """Of every attention layer."""
    uncounted: str | None = None
    """What of the model is not counted: then there is no MFU."""

    def of(self, documents: Sequence[int]) -> float:
        """Of a whole row; `documents` are its cu_seqlens without padding."""
        lengths = [end - start for start, end in pairwise(documents)]
        pairs = sum(balance.pairs_of_first(n, window) * self.windows.count(window) for window in set(self.windows) for n in lengths)
        return self.token * documents[-1] + self.pair * pairs

    def of_ranks(self, documents: Sequence[int], context: SequenceContext) -> list[float]:
        """Of each ring rank's share of a row, by one of its ulysses ranks."""
        layout, held = context.layout, context.held.layout
        tokens = [
            sum(max(min(end, documents[-1]) - start, 0) for start, end in held.ring_ranges(rank)) for rank in range(layout.ring)
        ]
        work = [0.0] * layout.ring
        if self.windows:
            count = layout.length // layout.chunk
            cost = balance.Pairs(balance.padded(documents, layout.length), self.windows).of_chunks(layout.chunk, count)
            work = [self.pair * sum(cost[c] for c in mine) for mine in layout.chunks]
        return [(pairs + self.token * n) / layout.ulysses for pairs, n in zip(work, tokens, strict=True)]


def work_of(model: PreTrainedModel) -> Work:
    """Counts a model; its parameters may be partitioned by ZeRO-3."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    outside = {id(embedding.weight), *([id(head.weight)] if head is not None else [])}
    everything = [sum(read.matrices(model, outside, size)) for size in (read.size, _trained)]
    if head is not None:
        everything = [sum(pair) for pair in zip(everything, (read.size(head.weight), _trained(head.weight)), strict=True)]
    rule = sum(layer.value_heads * layer.key_size * layer.value_size for layer in checks.linear_shapes(model))
    attention = checks.attention_modules(model)
    heads, size = checks.heads(model)[0][0], checks.head_size(model)
    of_values = [getattr(module, "v_head_dim", None) for module in attention.values()]
    value = next((found for found in of_values if isinstance(found, int)), size)
    return Work(
        token=4.0 * everything[0] + 2.0 * everything[1] + 3 * 6.0 * rule,
        pair=3 * 2.0 * heads * (size + value),
        windows=checks.windows(model) if attention else (),
        uncounted=_uncounted(model),
    )


def _trained(parameter: Tensor) -> int:
    return read.size(parameter) if parameter.requires_grad else 0


def _uncounted(model: PreTrainedModel) -> str | None:
    """What `Work` would count wrong."""
    family = family_of(model.config)
    scans = [family.scan_heads(module) for module in family.mixers(model).values()] if family else []
    found = {
        "recurrent layers other than Gated DeltaNet": any(scan is not None for scan in scans),
        "image and sound towers": vision.has_parts(model.config),
        "attention to chosen keys": bool(indexer.indexers(model)),
        "attention layers of different numbers of heads": len(checks.heads(model)) > 1,
        "quantized weights": any(not p.is_floating_point() for p in model.parameters()),
    }
    return ", ".join(what for what, is_there in found.items() if is_there) or None


class Meter:
    """Counts the work of one rank's sequence group between two readings."""

    def __init__(self, mesh: Mesh, work: Work, peak: float | None) -> None:
        """`peak`: FLOP/s of a GPU, None where it is not known."""
        self._mesh, self._work, self._peak, self._waits = mesh, work, peak, mesh.seq.waits
        self._first: int | None = None
        self._step = -1
        self._report: Callable[[], None] | None = None
        self._every = 0
        self._begin()

    def _begin(self) -> None:
        self._tokens, self._flops, self._busiest, self._steps, self._seconds = 0, 0.0, 0.0, 0, 0.0
        self._count_from(None)

    def _count_from(self, since: float | None) -> None:
        """A step's time, and its waits, are counted from then on; None: they are not."""
        self._since: float | None = since
        self._waits.counting = since is not None

    def report(self, every: int, write: Callable[[], None]) -> None:
        """Calls `write` after every so many optimizer steps, when the next one begins. The same `every` on all ranks."""
        self._every, self._report = every, write

    def forward(self, context: SequenceContext, step: int, training: bool) -> None:
        """A micro-batch after `step` finished optimizer steps."""
        if not training:
            return self.rest()
        if not torch.is_grad_enabled():
            return None
        if step != self._step:
            if self._report is not None and self._first is not None and self._every and step % self._every == 0:
                self._report()
            self._step, self._first = step, step if self._first is None else self._first
            self._steps += step > self._first
        if step == self._first:
            return None
        if self._since is None:
            if self._steps == 1 and not self._tokens:
                _wait_for_device()  # which may still be at the first step
            self._count_from(time.perf_counter())
        self._waits.settle()
        documents = context.documents if context.documents[-1] == context.rows.tokens else context.documents[:-1]
        self._tokens += documents[-1]
        self._flops += self._work.of(documents)
        self._busiest += max(self._work.of_ranks(documents, context))
        return None

    def rest(self) -> None:
        """What follows until the next training pass is not part of a step: evaluation, saving."""
        if self._since is not None:
            self._seconds += time.perf_counter() - self._since
            self._count_from(None)

    def read(self) -> dict[str, float]:
        """The figures since the last reading, of the whole job; nothing before the second step has ended.

        Every rank must call it, after an optimizer step.
        """
        _wait_for_device()
        going_on = self._since is not None
        self.rest()
        waited = self._waits.take()
        mine = [self._tokens, self._flops, self._busiest, self._seconds, self._steps, *(waited[kind] for kind in KINDS)]
        seen, now = self._step, time.perf_counter()
        device = torch.device("cuda" if _on_cuda() else "cpu")
        everyone = comm.all_gather(torch.tensor(mine, dtype=torch.float64, device=device), dist.group.WORLD).tolist()
        self._begin()
        self._count_from(now if going_on and seen != self._first else None)
        return self._figures(everyone)

    def _figures(self, everyone: list[list[float]]) -> dict[str, float]:
        tokens, flops, busiest, seconds, steps, *waited = zip(*everyone, strict=True)
        ranks, shared, slowest = len(everyone), self._mesh.seq.size, max(seconds)
        if not (slowest > 0 and min(steps) > 0 and sum(flops) > 0):
            return {}
        job_tokens, job_flops = sum(tokens) / shared, sum(flops) / shared  # the ranks of a row count the same row
        found = {
            "tokens": job_tokens,
            "step_seconds": slowest / max(steps),
            "tokens_per_second_per_gpu": job_tokens / slowest / ranks,
            "imbalance": max(busiest) / (job_flops / ranks),
            **self._measured(dict(zip(KINDS, waited, strict=True)), sum(seconds)),
        }
        if self._work.uncounted is None:
            found["tflops_per_gpu"] = job_flops / slowest / ranks / 1e12
            if self._peak is not None:
                found["mfu"] = job_flops / slowest / ranks / self._peak
        return found

    def _measured(self, of_ranks: dict[str, Sequence[float]], seconds: float) -> dict[str, float]:
        """From the seconds of every rank by kind, and those of all of them."""
        found = {"exposed_ring": sum(of_ranks[RING]) / seconds, "exposed_exchange": sum(of_ranks[EXCHANGE]) / seconds}
        busy = [whole - waited for whole, waited in zip(of_ranks[ATTENTION], of_ranks[RING], strict=True)]
        rows = [[busy[rank] for rank in group] for group in self._mesh.topology.groups("seq")]
        if all(sum(row) > 0 for row in rows):
            found["attention_imbalance"] = max(max(row) / (sum(row) / len(row)) for row in rows)
        return found


def begin(model: PreTrainedModel, mesh: Mesh) -> Meter:
    name = torch.cuda.get_device_name() if _on_cuda() else ""
    return Meter(mesh, work_of(model), machine.peak(name))


def report_to_monitor(engine: Any, meter: Meter) -> None:
    """DeepSpeed's monitor gets the figures every `steps_per_print` steps, as these are set on rank 0, which alone writes."""
    every = [(engine.steps_per_print() or 1) if engine.monitor.enabled else 0]
    dist.broadcast_object_list(every, src=0)
    if every[0]:
        meter.report(every[0], lambda: write(engine, meter.read()))


def write(engine: Any, figures: dict[str, float]) -> None:
    """Hands figures to DeepSpeed's monitor, where one is enabled."""
    if figures and engine.monitor.enabled and dist.get_rank() == 0:
        engine.monitor.write_events([(PREFIX + name, value, engine.global_samples) for name, value in figures.items()])


def stats(engine: nn.Module) -> dict[str, float]:
    """What the run reached since the last call, the same numbers on every rank, which all must call it, after `engine.step()`.

    `tokens` (of documents, without padding, of the whole job), `step_seconds`, `tokens_per_second_per_gpu`, `tflops_per_gpu` and
    `mfu` (model FLOPs, where all layers of the model are counted; `mfu` on GPUs whose bf16 peak is known), `imbalance` (FLOPs of
    the busiest rank over the mean); measured: `attention_imbalance` (time in attention, of the busiest rank of a row over its
    mean), `exposed_ring` and `exposed_exchange` (shares of the step in which compute waits for hops, and for all-to-alls). Empty
    until the second step has ended, and without sequence parallelism.
    """
    handle = attach.handle_of(engine)
    if handle is None or handle.meter is None:
        return {}
    figures = handle.meter.read()
    write(engine, figures)
    return figures


def _on_cuda() -> bool:
    """Whether the job runs there: a machine with a GPU may train on CPU."""
    return "nccl" in dist.get_backend()


def _wait_for_device() -> None:
    if _on_cuda():
        torch.cuda.synchronize()
