"""Jobs for mixtures of experts."""

from __future__ import annotations

from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

import ds_cp
from ds_cp import batch as batches
from ds_cp import comm, mesh, selftest
from ds_cp.kernels import attention
from ds_cp.router_loss import balance_loss
from ds_cp.topology import Topology
from tests.dist import jobs

EXPERTS, LAYERS, TOP = 16, 3, 2


class Reduced(TorchDispatchMode):
    """Bytes of each all-reduce."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.name().startswith("c10d::"):
            assert "allreduce" in func.name(), func.name()
            self.bytes += [x.nbytes for x in args[0]]
        return func(*args, **(kwargs or {}))


def balance(ulysses: int, ring: int, lengths: list[int]) -> tuple[float, float, list[int]]:
    """(error of the value, of the logits' gradient, bytes sent) of the balance loss alone, packed documents, padded at the end."""
    axes = mesh.build(Topology(ulysses=ulysses, ring=ring, data=1), timeout_s=60)
    methods = batches.Methods(attention=attention.load("torch_cpu"), layout="zigzag", ring_impl="p2p")
    batch = jobs.rows(1, sum(lengths) + 3)[0]
    batch["position_ids"] = torch.cat([torch.arange(n) for n in (*lengths, 3)]).unsqueeze(0)
    _, context = batches.prepare(batch, axes, methods, torch.device("cpu"))
    generator = torch.Generator().manual_seed(4)
    whole = [torch.randn(sum(lengths) + 3, EXPERTS, generator=generator).requires_grad_() for _ in range(LAYERS)]
    wanted = load_balancing_loss_func(tuple(whole), EXPERTS, TOP)
    wanted_gradients = torch.autograd.grad(wanted, whole)

    def cut(x: Tensor) -> Tensor:
        return batches.shard(x.detach()[None], context.rows, context.held.layout, axes, 0).squeeze(0)

    mine = [cut(x).requires_grad_() for x in whole]
    with Reduced() as reduced:
        local, value = balance_loss(mine, TOP, context)
    gradients = torch.autograd.grad(local, mine)
    total = comm.all_sum(local, axes.seq.group)
    errors = [float((a - cut(b)).abs().max() / b.abs().max()) for a, b in zip(gradients, wanted_gradients, strict=True)]
    mesh.destroy(axes)
    off = max(abs(float(x - wanted.detach())) for x in (value, total)) / float(wanted.detach())
    return off, max(errors), reduced.bytes


def autoep(stage: int, ep: int, block: dict[str, Any], clipping: float = 0.0) -> tuple[dict[str, float], float, float]:
    """(worst error of every parameter that this rank holds, reported norm, true norm) with the experts on `ep` ranks.

    A replica's row has a length of its own, the routers' biases differ, and one expert gets no token.
    """
    model, alone = (_biased(selftest.tiny_model("deepseek_v3")) for _ in range(2))
    size = block["size"]
    rows = [jobs.rows(1, length, seed=length)[0] for length in (50, 33)[: dist.get_world_size() // size]]
    targets = [row["labels"].shape[1] - 1 for row in rows]
    for row, count in zip(rows, targets, strict=True):
        (alone(**row, use_cache=False).loss * count / sum(targets)).backward()
    true = float(torch.nn.utils.clip_grad_norm_(alone.parameters(), clipping or 1e9))
    wanted = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in alone.named_parameters()}
    config = selftest.ds_config(stage, block) | {"gradient_clipping": clipping}
    config |= {"expert_parallel": {"enabled": True, "autoep_size": ep, "use_grouped_mm": False}}
    config |= {"optimizer": {"type": "SGD", "params": {"lr": selftest.LR}}}
    engine, *_ = ds_cp.initialize(model=model, model_parameters=model.parameters(), config=config)
    before = _whole(engine.module)
    loss = engine(**rows[dist.get_rank() // size], num_items_in_batch=sum(targets)).loss
    engine.backward(loss)
    engine.step()
    after = _whole(engine.module)
    norm = engine.get_global_grad_norm()
    engine.destroy()
    errors = {}
    for name in before:
        theirs = _of_alone(wanted, name, dist.get_rank() % ep, ep)
        mine = (before[name] - after[name]) / selftest.LR
        errors[name] = float((mine - theirs).abs().max() / theirs.abs().max().clamp(min=1e-12))
    return errors, float(norm or 0), true


def _biased(model: PreTrainedModel) -> PreTrainedModel:
    for name, bias in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            bias.copy_(torch.linspace(-0.3, 0.3, len(bias)))
            bias[1] = -1e3
    return model


def _whole(model: torch.nn.Module) -> dict[str, Tensor]:
    found = {}
    for name, parameter in model.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            found[name] = parameter.detach().clone()
    return found


def _of_alone(wanted: dict[str, Tensor], name: str, place: int, ep: int) -> Tensor:
    """The gradient of transformers' parameter, or of its part, that AutoEP's parameter `name` is on the expert rank `place`."""
    if name in wanted:
        return wanted[name]
    layer, leaf = name.rsplit(".", 1)
    if layer.endswith(".router.gate"):
        return wanted[f"{layer.removesuffix('.router.gate')}.gate.weight"]
    gate, up = wanted[f"{layer}.gate_up_proj"].chunk(2, 1)
    return {"w1": gate, "w2": wanted[f"{layer}.down_proj"], "w3": up}[leaf].chunk(ep)[place]
