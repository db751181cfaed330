"""What the workers run. Every function runs on all ranks of a pool and returns something small."""

from __future__ import annotations

import dataclasses
import os
import time
from functools import partial
from types import SimpleNamespace
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from torch.utils._python_dispatch import TorchDispatchMode

import ds_cp
from ds_cp import batch as batches
from ds_cp import comm, factor, mesh, preflight, selftest
from ds_cp.attention import attend
from ds_cp.batch import IGNORE, count_targets
from ds_cp.kernels import attention as kernels
from ds_cp.kernels.attention import Score
from ds_cp.models import attach
from ds_cp.topology import Topology


def rows(count: int, length: int, vocab: int = 96, seed: int = 1) -> list[dict[str, Any]]:
    """Rows of random tokens, one a batch."""
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(3, vocab, (1, length), generator=generator) for _ in range(count)]
    return [{"input_ids": x, "labels": x.clone()} for x in ids]


def parity(
    model_type: str,
    block: dict[str, Any],
    stage: int,
    batches: list[dict[str, Any]] | None = None,
    replicas: int = 1,
    accumulation: int = 1,
    reduction: str = "mean",
    zero: dict[str, Any] | None = None,
    checkpointing: bool | None = None,
    changes: dict[str, Any] | None = None,
    length: int = 50,
    terms: dict[str, float] | None = None,
    low_rank: bool = False,
    head_only: bool = False,
    frozen: str | None = None,
) -> tuple[float, float, str, float]:
    """(loss, loss error, worst parameter, its gradient error) of one step against one process.

    `terms` are keywords of the call (label smoothing, z-loss); `low_rank` puts an adapter on the output head; `head_only` freezes
    everything before it, `frozen` the parameters whose names begin so.
    """
    batches = batches or rows(replicas * accumulation, length)
    model, alone = (selftest.tiny_model(model_type, **(changes or {})) for _ in range(2))
    for each in (model, alone) if low_rank else ():
        each.lm_head = LowRank(each.lm_head)
    for each in (model, alone):
        each.to(get_accelerator().current_device_name())
    for each in (model, alone) if head_only else ():
        each.model.requires_grad_(False)
    for name, parameter in (*model.named_parameters(), *alone.named_parameters()) if frozen else ():
        parameter.requires_grad_(not name.startswith(frozen))
    if terms:
        alone.loss_function = partial(smoothed_loss, **terms)
        batches = [{**batch, **terms} for batch in batches]
    per_replica = [batches[i * accumulation : (i + 1) * accumulation] for i in range(replicas)]
    wanted = selftest.reference(alone, batches, reduction)
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
    items = sum(float(count_targets(batch)) for batch in batches) if reduction == "token_mean" else None
    block = {**block, "loss_reduction": reduction}
    got = selftest.sharded(model, selftest.ds_config(stage, block, accumulation, zero), per_replica, items)
    report = selftest.compare(*got, *wanted)
    return report.loss, report.loss_error, *report.worst


class LowRank(torch.nn.Module):
    """A head of several modules, as LoRA makes them: the frozen layer plus a trained product."""

    def __init__(self, base: torch.nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = torch.nn.Linear(base.in_features, 3, bias=False)
        self.up = torch.nn.Linear(3, base.out_features, bias=False)
        for seed, layer in enumerate((self.down, self.up)):
            torch.nn.init.normal_(layer.weight, std=0.1, generator=torch.Generator().manual_seed(seed))

    @property
    def weight(self) -> torch.nn.Parameter:
        return self.base.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + 0.5 * self.up(self.down(x))


def smoothed_loss(
    logits: torch.Tensor, labels: torch.Tensor, label_smoothing: float = 0.0, z_loss: float = 0.0, **_: Any
) -> torch.Tensor:
    """HF's mean loss with torch's label smoothing, and PaLM's z-loss."""
    scores, targets = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    loss = torch.nn.functional.cross_entropy(scores, targets, label_smoothing=label_smoothing)
    return loss + z_loss * torch.logsumexp(scores[targets != IGNORE], dim=-1).square().mean()


def bf16_errors(block: dict[str, Any], stage: int) -> tuple[float, float]:
    """Worst relative gradient error against fp32 of (ours in bf16, HF in one process in bf16)."""
    batches = rows(1, 64)
    wanted = selftest.reference(selftest.tiny_model("llama"), batches, "mean")
    theirs = selftest.compare(*selftest.reference(selftest.tiny_model("llama").bfloat16(), batches, "mean"), *wanted)
    config = {**selftest.ds_config(stage, {**block, "loss_reduction": "mean"}), "bf16": {"enabled": True}}
    # bf16 weights cannot hold (old - LR * g), so the gradient is read where the optimizer reads it.
    ours = selftest.compare(*selftest.sharded_low_precision(selftest.tiny_model("llama"), config, batches), *wanted)
    return ours.worst[1], theirs.worst[1]


def fp64_parity(ulysses: int, ring: int, ring_impl: str = "p2p") -> dict[str, float]:
    """Worst relative gradient error per kernel of the fp64 model under hooks alone, packed and whole rows."""
    errors = {}
    for kernel in ("reference", "torch_cpu"):
        for lengths in ([50], [13, 1, 1, 22, 13]):
            positions = torch.cat([torch.arange(n) for n in lengths]).unsqueeze(0)
            batch = {**rows(1, 50)[0], "position_ids": positions}
            error = selftest.parity_without_deepspeed("gpt_neox", kernel, ulysses, ring, batch, ring_impl)
            errors[f"{kernel} {lengths}"] = error
    return errors


def thirty_steps(block: dict[str, Any], stage: int) -> float:
    """Largest relative difference of the weights after 30 AdamW steps with clipping, accumulation 2, token_mean."""
    return selftest.trajectory_error("llama", {**block, "loss_reduction": "token_mean"}, stage, rows(60, 40), accumulation=2)


class Rows(torch.utils.data.Dataset):
    """`count` rows of 24 tokens; row i starts with token i and has another number of targets than its neighbours."""

    def __init__(self, count: int, length: int = 24) -> None:
        self.rows = rows(count, length)
        for index, row in enumerate(self.rows):
            row["input_ids"][0, 0] = index
            row["labels"][0, : 1 + index] = IGNORE

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {key: value[0] for key, value in self.rows[index].items()}


def targets_of(row: int) -> float:
    return 24.0 - 1 - row


def started(
    block: dict[str, Any],
    accumulation: int = 1,
    stage: int = 1,
    changes: dict[str, Any] | None = None,
    lr: float = 1e-2,
    **kwargs: Any,
) -> tuple[Any, Any]:
    """(engine, loader) of a tiny llama under SGD."""
    model = selftest.tiny_model("llama", **(changes or {}))
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    config = selftest.ds_config(stage, block, accumulation)
    engine, _, loader, _ = ds_cp.initialize(model=model, optimizer=optimizer, config=config, **kwargs)
    return engine, loader


def loader_rows(block: dict[str, Any], accumulation: int, count: int) -> tuple[list[int], list[float]]:
    """Rows of an epoch, -1 for one without targets, and the counts that came with them."""
    engine, loader = started(block, accumulation, training_data=Rows(count))
    batches = list(loader)
    assert len(batches) == len(loader)
    for batch in batches:
        engine.backward(engine(**batch).loss)
        engine.step()
    assert row_of(next(iter(loader))) != row_of(batches[0]), "next epoch, next order"
    selftest.finish(engine)
    return [row_of(batch) for batch in batches], [float(batch["num_items_in_batch"]) for batch in batches]


def row_of(batch: dict[str, Any]) -> int:
    """Which of `Rows` a batch is, -1 where it has no targets."""
    return int(batch["input_ids"][0, 0]) if bool((batch["labels"] != IGNORE).any()) else -1


def plain_backward(block: dict[str, Any], stage: int, labels: bool = True) -> None:
    engine, _ = started(block, accumulation=2, stage=stage)
    batch = rows(1, 20)[0]
    if labels:
        engine(**batch).loss.backward()
    else:
        ds_cp.token_logprobs(engine, input_ids=batch["input_ids"]).sum().backward()
    selftest.finish(engine)


def unsharded_logits(block: dict[str, Any], batch: dict[str, Any]) -> tuple[float, float, int]:
    """Relative errors of the whole rows' logits and of one parameter's gradient through them; local length."""
    kept = batch["attention_mask"].bool()
    weight = torch.randn(*kept.shape, 96, generator=torch.Generator().manual_seed(5))
    alone = selftest.tiny_model("llama")
    out = alone(**batch, output_hidden_states=True)
    wanted, hidden = out.logits, out.hidden_states[-1]
    (wanted * weight)[kept].sum().backward()
    engine, _ = started(block)
    out = engine(**batch, output_hidden_states=True)
    local, whole = out.logits, ds_cp.unshard(out.logits)
    torch.testing.assert_close(ds_cp.unshard(out.hidden_states[-1])[kept], hidden[kept], rtol=1e-5, atol=1e-5)
    (whole * weight)[kept].sum().backward()
    name = "model.layers.0.self_attn.k_proj.weight"
    gradient = dict(engine.module.named_parameters())[name].grad
    if gradient is None:
        gradient = deepspeed.utils.safe_get_full_grad(dict(engine.module.named_parameters())[name])
    reference = dict(alone.named_parameters())[name].grad
    error = float((whole - wanted).abs()[kept].max() / wanted.abs().max())
    selftest.finish(engine)
    return error, float((gradient - reference).abs().max() / reference.abs().max()), local.shape[1]


def disabled_outputs(block: dict[str, Any]) -> tuple[bool, int]:
    """Whether logits inside `disabled` are HF's own to the bit, and how many tokens were generated."""
    ids = rows(1, 20)[0]["input_ids"]
    engine, _ = started(block)
    engine(input_ids=ids, labels=ids)
    with ds_cp.disabled(engine), torch.no_grad():
        inside = engine.module(input_ids=ids).logits
        generated = engine.module.generate(input_ids=ids, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    wanted = selftest.tiny_model("llama")(input_ids=ids).logits
    assert engine(input_ids=ids, labels=ids, return_logits=True).logits.shape[1] < 20, "sharded again after the block"
    selftest.finish(engine)
    return torch.equal(inside, wanted), generated.shape[1] - 20


def logits_on_request(block: dict[str, Any]) -> tuple[Any, float]:
    """Logits of a tiled call (None), and the error of those of a call that asks for them against one process."""
    batch = rows(1, 30)[0]
    wanted = selftest.tiny_model("llama")(**batch)
    engine, _ = started(block)
    tiled = engine(**batch)
    whole = engine(**batch, return_logits=True)
    assert abs(float(tiled.loss.detach()) - float(whole.loss.detach())) < 1e-5
    error = float((ds_cp.unshard(whole.logits) - wanted.logits).abs().max() / wanted.logits.abs().max())
    kept = tiled.logits
    selftest.finish(engine)
    return kept, error


def unshard_nothing(block: dict[str, Any]) -> None:
    engine, _ = started(block)
    ds_cp.unshard(engine(**rows(1, 30)[0]).logits)


def token_values_errors(
    block: dict[str, Any],
    stage: int,
    batch: dict[str, Any],
    entropies: bool = True,
    temperature: float = 1.0,
    low_rank: bool = False,
) -> tuple[float, float, str]:
    """Errors of whole rows' values, and of the worst gradient of a loss made of them, against HF's logits in one process."""
    generator = torch.Generator().manual_seed(7)
    weights = torch.randn(2, *batch["input_ids"].shape, generator=generator)
    alone, model = (selftest.tiny_model("llama") for _ in range(2))
    for each in (alone, model) if low_rank else ():
        each.lm_head = LowRank(each.lm_head)
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    log_p = torch.log_softmax(alone(**inputs, use_cache=False).logits / temperature, -1)[:, :-1]
    labels = batch.get("labels", batch["input_ids"].masked_fill(batch.get("attention_mask", torch.ones(1)) == 0, IGNORE))
    targets = labels[:, 1:]
    if "attention_mask" in batch:  # ds_cp does not predict from padding
        targets = targets.masked_fill(batch["attention_mask"][:, :-1] == 0, IGNORE)
    picked = log_p.gather(2, targets.clamp(min=0).unsqueeze(2)).squeeze(2)
    wanted = [picked, -(log_p.exp() * log_p).sum(2)][: 1 + entropies]
    wanted = [torch.nn.functional.pad(x.masked_fill(targets == IGNORE, 0.0), (1, 0)) for x in wanted]
    sum((x * w).sum() for x, w in zip(wanted, weights, strict=False)).backward()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=selftest.LR)
    engine, *_ = ds_cp.initialize(model=model, optimizer=optimizer, config=selftest.ds_config(stage, block))
    got = ds_cp.token_logprobs(engine, entropies=entropies, temperature=temperature, **batch)
    got = got if entropies else (got,)
    engine.backward(sum((x * w).sum() for x, w in zip(got, weights, strict=False)))
    engine.step()
    after = selftest.full_parameters(engine.module)
    selftest.finish(engine)
    gradients = {name: (before[name] - after[name]) / selftest.LR for name in before}
    references = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in alone.named_parameters()}
    name, gradient = selftest.compare(0.0, gradients, 0.0, references).worst
    values = max(float((x - y).detach().abs().max() / y.detach().abs().max()) for x, y in zip(got, wanted, strict=True))
    return values, gradient, name


def values_without_sharding() -> bool:
    """Size 1: the same function, from whole logits."""
    model, batch = selftest.tiny_model("llama"), rows(1, 30)[0]
    values, entropies = ds_cp.token_logprobs(model, entropies=True, **batch)
    losses = torch.nn.functional.cross_entropy(model(**batch).logits[0, :-1], batch["labels"][0, 1:], reduction="none")
    return torch.allclose(values[0, 1:], -losses, rtol=1e-5) and not values[0, 0] and bool((entropies[0, 1:] > 0).all())


def offloaded(block: dict[str, Any], reentrant: bool) -> tuple[int, int]:
    """(layers, tensors that a forward pass sent to the host)."""
    engine, _ = started(block)
    model = engine.module
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    _steps(engine, rows(2, 60))
    sent = attach.handle_of(engine)._offload.count
    selftest.finish(engine)
    return len(model.model.layers), sent


def gathers(block: dict[str, Any], length: int = 60) -> int:
    """All-gathers of a whole ZeRO-3 step."""
    engine, _ = started(block, stage=3)
    batch = rows(1, length)[0]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        _steps(engine, [batch])
    selftest.finish(engine)
    return sum("allgather" in event.name and event.name.startswith("c10d::") for event in profile.events())


def evaluation_error(block: dict[str, Any]) -> float:
    batch = rows(1, 30)[0]
    wanted = float(selftest.tiny_model("llama")(**batch).loss)
    engine, _ = started(block)
    engine.eval()
    with torch.no_grad():
        got = float(engine(**batch).loss)
    selftest.finish(engine)
    return abs(got - wanted) / wanted


def _steps(engine: Any, data: list[dict[str, Any]]) -> None:
    for batch in data:
        engine.backward(engine(**batch).loss)
        engine.step()


def measured_factor(stage: int, backward_divides: bool) -> float:
    return factor.measure({"zero_optimization": {"stage": stage}}, backward_divides)[0]


def verified_factor(config: dict[str, Any]) -> float:
    return factor.verify(config, backward_divides=True)


def initialize_only(block: dict[str, Any], changes: dict[str, Any] | None = None, mpu: Any = None) -> None:
    engine, _ = started(block, changes=changes, mpu=mpu)
    selftest.finish(engine)


def degrees(block: dict[str, Any]) -> tuple[int, int, int]:
    engine, _ = started(block)
    topology = attach.handle_of(engine).mesh.topology
    selftest.finish(engine)
    return topology.ulysses, topology.ring, topology.data


def different_rows(block: dict[str, Any]) -> None:
    engine, _ = started(block)
    engine(**rows(1, 20, seed=torch.distributed.get_rank() // 3)[0])


def different_rows_later(block: dict[str, Any], passes: int) -> None:
    """The same rows in `passes` passes, then others on some ranks, of the same length."""
    engine, _ = started(block)
    for _ in range(passes):
        engine(**rows(1, 20)[0])
    batch = rows(1, 20)[0]
    batch["labels"][0, 7] += torch.distributed.get_rank() // 3
    engine(**batch)


def fails_together() -> None:
    """An error that is no refusal, on rank 1, where ranks would meet next."""
    preflight.together(lambda: 1 / (1 - torch.distributed.get_rank()))


def bad_batch(block: dict[str, Any], key: str) -> None:
    engine, _ = started(block)
    batch = rows(1, 20)[0]
    wrong = {"something": torch.zeros(1, 20), "none": None}.get(key, torch.zeros(1, 17, dtype=torch.long))
    engine(**(batch if wrong is None else {**batch, key: wrong}))


def checkpointing_on_one_rank(block: dict[str, Any]) -> None:
    """Where the ring would keep what it receives with checkpointed layers, as between hosts."""
    engine, _ = started(block)
    handle = attach.handle_of(engine)
    handle.methods = dataclasses.replace(handle.methods, ring_keep="checkpointing")
    engine(**rows(1, 20)[0])
    if torch.distributed.get_rank() == 1:
        engine.module.gradient_checkpointing_enable({"use_reentrant": False})
    engine(**rows(1, 20)[0])


def stall(block: dict[str, Any], seconds: float, layer: bool) -> None:
    """Rank 1 sleeps before its second forward pass, or in its first layer there; rank 0 waits for it."""
    engine, _ = started(block)
    engine(**rows(1, 20)[0])
    if torch.distributed.get_rank() == 1 and layer:
        attention = engine.module.model.layers[0].self_attn
        attention.register_forward_pre_hook(lambda *_: time.sleep(seconds))
    elif torch.distributed.get_rank() == 1:
        time.sleep(seconds)
    engine(**rows(1, 20)[0])


def local_world_sizes(sizes: list[int]) -> int:
    before = os.environ["LOCAL_WORLD_SIZE"]
    os.environ["LOCAL_WORLD_SIZE"] = str(sizes[torch.distributed.get_rank()])
    try:
        return mesh.local_world_size()
    finally:
        os.environ["LOCAL_WORLD_SIZE"] = before


def trace_of_a_ring(ulysses: int, ring: int) -> list[str]:
    """Hops posted and attention kernels run by one layer's forward and backward, in the order of a profiler trace."""
    names = {
        "c10d::send": "hop",
        "aten::_scaled_dot_product_flash_attention_for_cpu": "forward",
        "aten::_scaled_dot_product_flash_attention_for_cpu_backward": "backward",
    }
    axes, context, tensors = _attention_inputs(ulysses, ring, "torch_cpu")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        attend(*tensors, context, Score(0.3)).sum().backward()
    mesh.destroy(axes)
    events = sorted(profile.events(), key=lambda event: event.time_range.start)
    return [names[event.name] for event in events if event.name in names]


class Traffic(TorchDispatchMode):
    """Elements that go through each all-to-all, and elements of each tensor of more than a few that is copied."""

    def __init__(self) -> None:
        super().__init__()
        self.exchanged: list[int] = []
        self.copied: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.name().split("::")[1]
        if name.startswith("alltoall_base"):
            self.exchanged.append(args[1].numel())
        elif name in ("cat", "stack", "clone", "copy_", "_to_copy", "index_select") and out.numel() > 64:
            self.copied.append(out.numel())
        return out


def traffic(ulysses: int, kv_heads: int) -> dict[str, Any]:
    """What one attention call costs around its kernel, which here computes nothing."""

    def forward(q: Any, k: Any, v: Any, tile: Any, score: Any) -> Any:
        return torch.zeros_like(q, memory_format=torch.contiguous_format), q.new_zeros(q.shape[:2])

    def backward(dout: Any, q: Any, k: Any, v: Any, *_: Any) -> Any:
        return tuple(torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))

    axes, context, tensors = _attention_inputs(ulysses, 1, "reference", kv_heads)
    idle = SimpleNamespace(__name__="idle", unsupported=lambda *_: None, forward=forward, backward=backward)
    context = dataclasses.replace(context, methods=dataclasses.replace(context.methods, attention=idle))
    there, back = Traffic(), Traffic()
    with there:
        out = attend(*tensors, context, Score(0.3))
    dout = torch.ones_like(out)
    with back:
        torch.autograd.grad(out, tensors, dout)  # not into .grad, which copies
    mesh.destroy(axes)
    return {"exchanged": (there.exchanged, back.exchanged), "copied": (sum(there.copied), sum(back.copied))}


def sink_error(ulysses: int, ring: int, window: int | None, head_chunks: int = 1) -> float:
    """Worst relative error of out and of every gradient, fp64, against scores written out with a column for the sink."""
    axes, context, _ = _attention_inputs(ulysses, ring, "torch_cpu", window=window)
    context = dataclasses.replace(context, methods=dataclasses.replace(context.methods, head_chunks=head_chunks))
    generator = torch.Generator().manual_seed(3)
    whole = [torch.randn(1, 64, heads, 8, generator=generator, dtype=torch.float64) for heads in (8, 4, 4, 8)]
    sink = torch.randn(8, generator=generator, dtype=torch.float64)
    spans = context.layout.local_ranges(axes.ring.rank, axes.ulysses.rank)
    here = torch.cat([torch.arange(start, end) for start, end in spans])
    local = [x[:, here].transpose(1, 2).clone().requires_grad_() for x in whole[:3]]
    mine = sink.clone().requires_grad_()
    out = attend(*local, context, Score(0.3), window, mine)
    *grads, dsink = torch.autograd.grad(out, [*local, mine], whole[3][:, here])
    found = [out.detach(), *(x.transpose(1, 2) for x in grads), comm.all_sum(dsink, axes.seq.group)]
    wanted_out, *wanted, wanted_sink = _with_sink_written_out(whole, sink, window)
    mesh.destroy(axes)
    pairs = zip(found, [wanted_out[:, here], *(x[:, here] for x in wanted), wanted_sink], strict=True)
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)


def _with_sink_written_out(whole: list[torch.Tensor], sink: torch.Tensor, window: int | None) -> list[torch.Tensor]:
    """out [1, T, N, H] and the gradients of q, k, v and the sink."""
    leaves = [x.clone().requires_grad_() for x in (*whole[:3], sink)]
    distance = torch.arange(64)[:, None] - torch.arange(64)[None, :]
    mask = (distance >= 0) & (distance < (window or 64))
    k, v = (x.repeat_interleave(2, 2) for x in leaves[1:3])
    scores = (torch.einsum("btnh,bsnh->bnts", leaves[0], k) * 0.3).masked_fill(~mask, -torch.inf)
    column = leaves[3][None, :, None, None].expand(1, -1, 64, 1)
    out = torch.einsum("bnts,bsnh->btnh", torch.cat((scores, column), -1).softmax(-1)[..., :-1], v)
    return [out.detach(), *torch.autograd.grad(out, leaves, whole[3])]


class Sent(TorchDispatchMode):
    """Bytes of each tensor that is sent to another rank."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.name().split("::")[1].startswith("send"):
            self.bytes += [x.nbytes for x in args[0]]
        return func(*args, **(kwargs or {}))


def sent_by_a_layer(ring: int, window: int | None, tokens: int, keep: bool = False) -> tuple[int, int]:
    """Bytes of (keys and values in forward, their gradients in backward), fp32, 4 heads of 16."""
    axes, context, tensors = _attention_inputs(1, ring, "torch_cpu", window=window, length=tokens, keep=keep)
    there, back = Sent(), Sent()
    with there:
        out = attend(*tensors, context, Score(0.3), window)
    dout = torch.randn(out.shape)
    with back:
        torch.autograd.grad(out, tensors, dout)
    mesh.destroy(axes)
    return sum(there.bytes), sum(back.bytes)


def _attention_inputs(
    ulysses: int, ring: int, kernel: str, kv_heads: int = 4, window: int | None = None, length: int = 64, keep: bool = False
) -> tuple[Any, Any, list[torch.Tensor]]:
    """(mesh, context, q, k, v as HF hands them over) for 8 query heads of 16 and one row."""
    axes = mesh.build(Topology(ulysses=ulysses, ring=ring, data=1), timeout_s=60)
    methods = batches.Methods(attention=kernels.load(kernel), layout="zigzag", windows=(window,))
    _, context = batches.prepare(rows(1, length)[0], axes, methods, torch.device("cpu"), keep=keep)
    tokens = length // (ulysses * ring)
    shapes = [(1, tokens, heads, 16) for heads in (8, kv_heads, kv_heads)]
    return axes, context, [torch.randn(shape).transpose(1, 2).requires_grad_() for shape in shapes]
