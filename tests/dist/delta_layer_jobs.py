"""Gated DeltaNet jobs for the workers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ds_cp import batch as batches
from ds_cp import comm, delta, mesh, reshard
from ds_cp import layout as layouts
from ds_cp.attention import attend
from ds_cp.kernels import attention
from ds_cp.kernels import delta as kernels
from ds_cp.topology import Topology
from tests.dist import jobs

KEY, VALUE, WIDTH = 8, 6, 4  # head sizes, and taps of the convolution


def moved(ulysses: int, ring: int, to: str) -> tuple[float, float]:
    """Errors of `reshard` there (each entry says which token, head and channel it is) and of its adjoint."""
    axes = mesh.build(Topology(ulysses=ulysses, ring=ring, data=1), timeout_s=60)
    zigzag = layouts.build("zigzag", 48, ring, ulysses)
    held = layouts.shards(layouts.build("contiguous", zigzag.length, ring, ulysses))
    if to == "row":
        groups, worked = axes.seq.size, [((0, zigzag.length),)] * axes.seq.size
    else:
        groups, worked = ulysses, [zigzag.ring_ranges(r) for r in range(ring) for _ in range(ulysses)]
    route = layouts.route(held, worked, axes.seq.rank)
    mine, wanted = _tokens(held[axes.seq.rank]), _tokens(worked[axes.seq.rank])
    head = axes.seq.rank % groups

    def entries(tokens: Tensor, group: Tensor, channels: int) -> Tensor:
        return 1000.0 * tokens[..., None] + 10.0 * group[..., None] + torch.arange(channels)

    every = torch.arange(groups)[:, None].expand(groups, len(mine))
    sources = [entries(mine.expand(groups, -1), every, c).double().requires_grad_() for c in (2, 3)]
    got = reshard.to_heads(sources, (4, 1), route, axes.seq)
    there = torch.cat([entries(wanted, torch.full_like(wanted, head), c) for c in (2, 3)], dim=1)
    error = float((torch.cat(got, dim=1) - there).abs().max())
    back = reshard.to_tokens(torch.cat(got, dim=1).detach(), groups, route, axes.seq)
    error = max(error, float((back - torch.cat(sources, dim=2)).abs().max()))
    grads = [torch.randn_like(x) for x in got]
    dx = torch.autograd.grad(got, sources, grads)
    products = [sum(float((x * g).sum()) for x, g in zip(*side, strict=True)) for side in ((got, grads), (sources, dx))]
    both = comm.all_sum(torch.tensor(products, dtype=torch.float64), axes.seq.group)
    mesh.destroy(axes)
    return error, float((both[0] - both[1]).abs() / both[0].abs())


def layer_error(ulysses: int, ring: int, linear: str, heads: tuple[int, int], lengths: list[int]) -> dict[str, float]:
    """Worst relative errors in fp64 of one layer's output and of every gradient against the whole row on the kernel."""
    axes = mesh.build(Topology(ulysses=ulysses, ring=ring, data=1), timeout_s=60)
    context = _context(axes, linear, lengths)
    inputs, layer, dout = _layer(heads, sum(lengths))
    parameters = [layer.conv_CW, layer.a_log_V, layer.dt_bias_V]
    out, wanted = _alone(inputs, layer, lengths, heads, dout, parameters)
    mine = [_shard(x, context, axes).requires_grad_() for x in inputs]
    local = delta.mix(*mine, layer, context)
    found = torch.autograd.grad(local, [*mine, *parameters], _shard(dout, context, axes))
    errors = {"out": _error(_whole(local.detach(), context, axes), out)}
    for name, x, reference in zip(("q", "k", "v", "b", "a"), found[:5], wanted[:5], strict=True):
        errors[f"d{name}"] = _error(_whole(x, context, axes), reference)
    for name, x, reference in zip(("conv", "A_log", "dt_bias"), found[5:], wanted[5:], strict=True):
        errors[f"d{name}"] = _error(comm.all_sum(x, axes.seq.group), reference)
    mesh.destroy(axes)
    return errors


def traffic(ulysses: int, ring: int, linear: str, heads: tuple[int, int]) -> dict[str, Any]:
    """Elements through each all-to-all of one layer, there and in backward."""
    axes = mesh.build(Topology(ulysses=ulysses, ring=ring, data=1), timeout_s=60)
    context = _context(axes, linear, [64])
    inputs, layer, dout = _layer(heads, 64)
    mine = [_shard(x, context, axes).requires_grad_() for x in inputs]
    there, back = jobs.Traffic(), jobs.Traffic()
    with there:
        out = delta.mix(*mine, layer, context)
    with back:
        torch.autograd.grad(out, mine, _shard(dout, context, axes))
    mesh.destroy(axes)
    return {"there": there.exchanged, "back": back.exchanged}


def attention_traffic(ulysses: int, ring: int, kv_heads: int) -> dict[str, list[int]]:
    """Elements through each all-to-all of an attention layer, 8 query heads of 16, whose tokens are held in pieces."""
    axes = mesh.build(Topology(ulysses=ulysses, ring=ring, data=1), timeout_s=60)
    context = _context(axes, "state", [64])
    tokens = 64 // (ulysses * ring)
    tensors = [torch.randn(1, heads, tokens, 16).requires_grad_() for heads in (8, kv_heads, kv_heads)]
    there, back = jobs.Traffic(), jobs.Traffic()
    with there:
        out = attend(*tensors, context, attention.Score(0.3))
    with back:
        torch.autograd.grad(out, tensors, torch.ones_like(out))
    mesh.destroy(axes)
    return {"there": there.exchanged, "back": back.exchanged}


def _context(axes: mesh.Mesh, linear: str, lengths: list[int]) -> batches.SequenceContext:
    methods = batches.Methods(
        attention=attention.load("torch_cpu"), layout="zigzag", delta=kernels.load("reference"), linear=linear
    )
    batch = jobs.rows(1, sum(lengths))[0]
    batch["position_ids"] = torch.cat([torch.arange(n) for n in lengths]).unsqueeze(0)
    return batches.prepare(batch, axes, methods, torch.device("cpu"))[1]


def _layer(heads: tuple[int, int], tokens: int) -> tuple[list[Tensor], delta.Layer, Tensor]:
    """(q, k, v, b, a of the whole row, the layer, the output's gradient), fp64."""
    key_heads, value_heads = heads
    generator = torch.Generator().manual_seed(2)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    shapes = [(key_heads, KEY), (key_heads, KEY), (value_heads, VALUE), (value_heads,), (value_heads,)]
    channels = 2 * key_heads * KEY + value_heads * VALUE
    layer = delta.Layer(
        conv_CW=random(channels, WIDTH).requires_grad_(),
        conv_bias_C=None,
        activation="silu",
        a_log_V=(random(value_heads) - 3).requires_grad_(),
        dt_bias_V=(random(value_heads) - 2).requires_grad_(),
        beta_scale=2.0,
    )
    return [random(tokens, *shape) for shape in shapes], layer, random(tokens, value_heads, VALUE)


def _alone(
    inputs: list[Tensor], layer: delta.Layer, lengths: list[int], heads: tuple[int, int], dout: Tensor, parameters: list[Tensor]
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The recurrence of the definition, a token at a time, and PyTorch's convolution, a document at a time."""
    q, k, v, b, a = (x.clone().requires_grad_() for x in inputs)
    outs = []
    start = 0
    for length in lengths:
        part = slice(start, start + length)
        x_1CS = torch.cat([x[part].flatten(1) for x in (q, k, v)], dim=1).T[None]
        mixed = functional.conv1d(functional.pad(x_1CS, (WIDTH - 1, 0)), layer.conv_CW[:, None], groups=x_1CS.shape[1])
        mixed = functional.silu(mixed[0].T)
        keys = heads[0] * KEY
        of = [
            x.unflatten(1, (n, -1))
            for x, n in zip(mixed.split((keys, keys, heads[1] * VALUE), 1), (*heads[:1] * 2, heads[1]), strict=True)
        ]
        g = -layer.a_log_V.exp() * functional.softplus(a[part] + layer.dt_bias_V)
        outs.append(_recurrence(*of, g, b[part].sigmoid() * layer.beta_scale))
        start += length
    out = torch.cat(outs)
    return out.detach(), torch.autograd.grad(out, [q, k, v, b, a, *parameters], dout)


def _recurrence(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    repeats = v.shape[1] // k.shape[1]
    q, k = (x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6) for x in (q, k))
    q, k = (x.repeat_interleave(repeats, dim=1) for x in (q * KEY**-0.5, k))
    state = v.new_zeros(v.shape[1], KEY, VALUE)
    outs = []
    for t in range(len(v)):
        state = state * g[t].exp()[:, None, None]
        read = torch.einsum("vhg,vh->vg", state, k[t])
        state = state + torch.einsum("vh,vg->vhg", k[t], beta[t][:, None] * (v[t] - read))
        outs.append(torch.einsum("vhg,vh->vg", state, q[t]))
    return torch.stack(outs)


def _shard(x: Tensor, context: batches.SequenceContext, axes: mesh.Mesh) -> Tensor:
    return batches.shard(x[None], context.rows, context.held.layout, axes, 0).squeeze(0)


def _whole(x: Tensor, context: batches.SequenceContext, axes: mesh.Mesh) -> Tensor:
    return batches.unshard(comm.all_gather(x[None], axes.seq.group), context).squeeze(0)


def _error(x: Tensor, reference: Tensor) -> float:
    return float((x - reference).abs().max() / reference.abs().max())


def _tokens(spans: Any) -> Tensor:
    return torch.cat([torch.arange(start, end) for start, end in spans])
