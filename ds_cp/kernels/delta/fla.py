"""flash-linear-attention's Triton kernels, on CUDA in fp16 and bf16.

The scan over chunks is serial, so a GPU that has few heads idles. `delta_rule` therefore cuts documents into segments that are
scanned side by side, as if each were a document, and passes state between them as between ranks (reference.py has the equations):

    forward   every segment from 0: N; its homogeneous part from I: M; compose (kernels/affine.py); scan with the right states
    backward  a segment's adjoint is D <- M' D + E: scan from 0 for E; compose with the forward's M, last segment first; scan

Six scans of segments take the place of three of documents. State passed between ranks is one more level of the same: every rank
gathers the others' (N, M), in backward (E, M'), of their whole pieces once.

Documents that need no cut, and whole documents under another release of fla, go through fla's own function (and so through what fla
puts behind it, FlashQLA where that is installed). The rest is written to the parts of one release, `TRIED`.

Shapes as in the package, and P segments. fla's tensors have a batch dim of 1 in front.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ds_cp.kernels import affine
from ds_cp.kernels.delta import Passing, Shapes, Span, hopper_reason, shapes_reason

TRIED = "0.6.0"
"""The release of fla-core whose parts are put together here."""

INSTALL = f'pip install "flash-linear-attention=={TRIED}" "tilelang>=0.1.9"'

try:
    from fla.modules.causal_conv1d import causal_conv1d
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule
except ImportError as error:
    raise ImportError(f"{error}; {INSTALL}, or set delta_kernel to reference") from error

VERSION = metadata.version("fla-core")
CHUNK = 64
MAX_HEAD_SIZE = 256
PROGRAMS = 64
"""Value heads times segments that are aimed at: two programs each fill an H200."""
MIN_CUT = 3
"""Segments of the longest document below which six short scans are not faster than three long ones."""

if VERSION == TRIED:
    from fla.modules.norm.l2norm import l2norm_bwd, l2norm_fwd
    from fla.ops.common.backends.tilelang import CommonTileLangBackend
    from fla.ops.common.chunk_delta_h import chunk_gated_delta_rule_bwd_dhu, chunk_gated_delta_rule_fwd_h
    from fla.ops.common.chunk_o import chunk_bwd_dqkwg, chunk_bwd_dv_local, chunk_fwd_o
    from fla.ops.gated_delta_rule.chunk_fwd import chunk_gated_delta_rule_fwd_intra
    from fla.ops.gated_delta_rule.wy_fast import prepare_wy_repr_bwd, recompute_w_u_fwd
    from fla.ops.utils import chunk_local_cumsum
    from fla.ops.utils.constant import RCP_LN2


# What runs where


def unsupported(shapes: Shapes, device: str, dtype: Any, passing: bool) -> str | None:
    if device != "cuda":
        return f"it runs on CUDA, not on {device}; set delta_kernel to reference"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"it computes in fp16 and bf16, got {dtype}; enable bf16 in the config or set delta_kernel to reference"
    if max(shapes.key_size, shapes.value_size) > MAX_HEAD_SIZE:
        return f"heads of {shapes.key_size} and {shapes.value_size} are larger than {MAX_HEAD_SIZE}; set delta_kernel to reference"
    if passing and VERSION != TRIED:
        return f"state passing is written for fla-core {TRIED}, {VERSION} is installed; {INSTALL}, or linear_attention: heads"
    major = torch.cuda.get_device_capability()[0]
    tilelang = CommonTileLangBackend.can_use() if VERSION == TRIED else find_spec("tilelang") is not None
    return shapes_reason(shapes) or hopper_reason(major, metadata.version("triton"), tilelang)


# Convolution


def convolve(x_SC: Tensor, weight_CW: Tensor, bias_C: Tensor | None, activation: str | None, span: Span) -> Tensor:
    width = weight_CW.shape[1]
    halo = None if span.passing is None or width == 1 else _halo(x_SC, width, len(span.documents) - 1, span.passing)
    plan = plan_of(span, x_SC.device, span.tokens)
    out, _ = causal_conv1d(
        x_SC.unsqueeze(0),
        weight_CW,
        bias_C,
        initial_state=halo,
        activation=activation,
        **_where(plan),
    )
    return out.squeeze(0)


def _halo(x_SC: Tensor, width: int, documents: int, passing: Passing) -> Tensor:
    """[documents, C, W]: the last W - 1 columns of the first are the tokens before the piece, of its own document only."""
    before = passing.gather(x_SC[1 - width :])[: passing.rank].flatten(0, 1)
    kept = min(width - 1, passing.before)
    first_WC = torch.cat([x_SC.new_zeros(width - kept, x_SC.shape[1]), before[len(before) - kept :]])
    return functional.pad(first_WC.T.unsqueeze(0), (0, 0, 0, 0, 0, documents - 1)).contiguous()


# Delta rule


def delta_rule(q_SKH: Tensor, k_SKH: Tensor, v_SVG: Tensor, g_SV: Tensor, beta_SV: Tensor, span: Span) -> Tensor:
    tokens = segment_tokens(span, v_SVG.shape[1])
    tensors = [x.unsqueeze(0) for x in (q_SKH, k_SKH, v_SVG, g_SV, beta_SV)]
    if tokens is None:
        plan = plan_of(span, q_SKH.device, span.tokens)
        out, _ = chunk_gated_delta_rule(*tensors, use_qk_l2norm_in_kernel=True, **_where(plan))
    else:
        with torch.autocast(q_SKH.device.type, enabled=False):  # states are composed in fp32
            out = Segments.apply(*tensors, span, plan_of(span, q_SKH.device, tokens))
    return out.squeeze(0)


def segment_tokens(span: Span, heads: int, programs: int = PROGRAMS) -> int | None:
    """The longest segment, or None where nothing is cut and fla's own function serves."""
    tokens = -(-span.tokens * heads // (programs * CHUNK)) * CHUNK
    longest = max(b - a for a, b in zip(span.documents, span.documents[1:], strict=False))
    if span.passing is None and (VERSION != TRIED or longest <= (MIN_CUT - 1) * tokens):
        return None
    return tokens


@dataclass(frozen=True, eq=False)
class Plan:
    """Segments of a span, with what fla reads of them on the device."""

    cu_seqlens: Tensor
    cu_seqlens_cpu: Tensor
    chunks: Tensor
    """(segment, chunk in it) of every chunk."""
    continues_P: Tensor
    """1 where a segment goes on from the one before it, which may be on the rank before; else 0."""
    continued_P: Tensor
    """1 where the next segment goes on from this one."""


def plan_of(span: Span, device: torch.device, tokens: int) -> Plan:
    """Made once a batch and kept in the span: copying it to the device in every layer would make the host wait."""
    if tokens not in span.plans:
        bounds, continues = affine.cut(span.documents, tokens, CHUNK)
        before = span.passing is not None and span.passing.before > 0
        after = span.passing is not None and span.passing.after > 0
        on_host = torch.tensor(bounds)
        if span.cu_seqlens is not None and len(bounds) == len(span.documents):
            on_device = span.cu_seqlens
        else:
            on_device = on_host.to(device, non_blocking=True)
        span.plans[tokens] = Plan(
            cu_seqlens=on_device,
            cu_seqlens_cpu=on_host,
            chunks=chunk_indices(bounds).to(device, non_blocking=True),
            continues_P=torch.tensor([float(x) for x in (before, *continues[1:])], device=device),
            continued_P=torch.tensor([float(x) for x in (*continues[1:], after)], device=device),
        )
    return span.plans[tokens]


def _where(plan: Plan) -> dict[str, Tensor]:
    """The documents for fla's own functions; what spares the host a wait is named as in the release that was tried."""
    known = {"cu_seqlens_cpu": plan.cu_seqlens_cpu, "chunk_indices": plan.chunks} if VERSION == TRIED else {}
    return {"cu_seqlens": plan.cu_seqlens, **known}


def chunk_indices(bounds: Sequence[int]) -> Tensor:
    """[chunks, 2]: the segment of each chunk and its place in it."""
    counts = -(-torch.tensor(bounds).diff() // CHUNK)
    segment = torch.arange(len(counts)).repeat_interleave(counts)
    return torch.stack([segment, torch.arange(len(segment)) - (counts.cumsum(0) - counts)[segment]], 1)


class Segments(torch.autograd.Function):
    """The rule on segments with state passed between them, and between ranks.

    Every rank of the ring must call it, forward and backward, if the span passes state.
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, span: Span, plan: Plan) -> Tensor:
        q, k, v, g, beta = (x.contiguous() for x in (q, k, v, g, beta))
        where = {"cu_seqlens": plan.cu_seqlens, "chunk_indices": plan.chunks}
        q, q_rstd = l2norm_fwd(q)
        k, k_rstd = l2norm_fwd(k)
        g = chunk_local_cumsum(g, chunk_size=CHUNK, scale=RCP_LN2, **where)  # fla's kernels take powers of 2
        w, u, solved = chunk_gated_delta_rule_fwd_intra(k=k, v=v, g=g, beta=beta, chunk_size=CHUNK, **where)
        n, m = _maps(k, w, u, g, plan)
        states = _incoming(n, m, span.passing, plan)
        h, v_new, _ = _scan(k, w, u, g, states, plan)
        scale = q.shape[-1] ** -0.5
        out = chunk_fwd_o(q=q, k=k, v=v_new, h=h, g=g, scale=scale, chunk_size=CHUNK, **where)
        ctx.save_for_backward(q, q_rstd, k, k_rstd, v, g, beta, solved, states, m)
        ctx.span, ctx.plan, ctx.scale = span, plan, scale
        return out.to(v.dtype)

    @staticmethod
    def backward(ctx, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, q_rstd, k, k_rstd, v, g, beta, solved, states, m = ctx.saved_tensors
        plan, dout = ctx.plan, dout.contiguous()
        where = {"cu_seqlens": plan.cu_seqlens, "chunk_indices": plan.chunks}
        w, u = recompute_w_u_fwd(k=k, v=v, beta=beta, A=solved, g=g, **where)
        h, v_new, _ = _scan(k, w, u, g, states, plan)
        dv = chunk_bwd_dv_local(q=q, k=k, g=g, do=dout, scale=ctx.scale, chunk_size=CHUNK, **where)

        def scan(dstates: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            """(dh of every chunk, gradient of the segments' incoming states, dv) from that of their final states."""
            return chunk_gated_delta_rule_bwd_dhu(
                q=q, k=k, w=w, g=g, h0=states, dht=dstates, do=dout, dv=dv, scale=ctx.scale, chunk_size=CHUNK, **where
            )

        e = scan(torch.zeros_like(states))[1]
        dh, _, dv = scan(_outgoing(e, m, ctx.span.passing, plan))
        dq, dk, dw, dg = chunk_bwd_dqkwg(
            q=q, k=k, v=v_new, w=w, g=g, h=h, dv=dv, do=dout, dh=dh, scale=ctx.scale, chunk_size=CHUNK, **where
        )
        dk_intra, dv, dbeta, dg_intra = prepare_wy_repr_bwd(k=k, v=v, beta=beta, g=g, A=solved, dw=dw, du=dv, **where)
        dg = chunk_local_cumsum(dg.add_(dg_intra), chunk_size=CHUNK, reverse=True, **where)
        dq, dk = l2norm_bwd(q, q_rstd, dq), l2norm_bwd(k, k_rstd, dk.add_(dk_intra))
        return dq.to(q), dk.to(k), dv.to(v), dg.to(g), dbeta.to(beta), None, None


def _scan(k: Tensor, w: Tensor, u: Tensor, g: Tensor, states: Tensor, plan: Plan) -> tuple[Tensor, Tensor, Tensor]:
    """(state before every chunk, v', final state of every segment)."""
    return chunk_gated_delta_rule_fwd_h(  # always with the same outputs, or each combination would be compiled and tuned anew
        k=k, w=w, u=u, g=g, initial_state=states, output_final_state=True, cu_seqlens=plan.cu_seqlens, chunk_indices=plan.chunks
    )


def _maps(k: Tensor, w: Tensor, u: Tensor, g: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
    """(N, M) of every segment, fp32; M is 0 where a document begins."""
    size, heads, segments = k.shape[-1], u.shape[2], len(plan.continues_P)
    zeros = torch.zeros(segments, heads, size, u.shape[-1], device=k.device)
    n_PVHG = _scan(k, w, u, g, zeros, plan)[2]
    start = plan.continues_P[:, None, None, None] * torch.eye(size, device=k.device)
    m_PVHH = _scan(k, w, torch.zeros_like(w), g, start.expand(-1, heads, -1, -1).contiguous(), plan)[2]
    return n_PVHG, m_PVHH


def _incoming(n_PVHG: Tensor, m_PVHH: Tensor, passing: Passing | None, plan: Plan) -> Tensor:
    """The state before every segment."""
    n_PVHG, m_PVHH = affine.prefixes(n_PVHG, m_PVHH)
    state = torch.zeros_like(n_PVHG[0])
    if passing is not None:
        n_RVHG, m_RVHH = _exchange(n_PVHG[-1], m_PVHH[-1], passing)
        if passing.before:
            state = affine.final(n_RVHG[: passing.rank], m_RVHH[: passing.rank])
            n_PVHG = n_PVHG + m_PVHH @ state
    return torch.cat([state.unsqueeze(0), n_PVHG[:-1]]) * plan.continues_P[:, None, None, None]


def _outgoing(e_PVHG: Tensor, m_PVHH: Tensor, passing: Passing | None, plan: Plan) -> Tensor:
    """The gradient of the state after every segment."""
    adjoint = m_PVHH.mT * plan.continued_P[:, None, None, None]
    e_PVHG, adjoint = (x.flip(0) for x in affine.prefixes(e_PVHG.flip(0), adjoint.flip(0)))
    dstate = torch.zeros_like(e_PVHG[0])
    if passing is not None:
        e_RVHG, adjoint_RVHH = _exchange(e_PVHG[0], adjoint[0], passing)
        if passing.after:
            dstate = affine.final(e_RVHG[passing.rank + 1 :].flip(0), adjoint_RVHH[passing.rank + 1 :].flip(0))
            e_PVHG = e_PVHG + adjoint @ dstate
    return torch.cat([e_PVHG[1:], dstate.unsqueeze(0)]) * plan.continued_P[:, None, None, None]


def _exchange(n_VHG: Tensor, m_VHH: Tensor, passing: Passing) -> tuple[Tensor, Tensor]:
    """Everybody's map of the whole piece, [R, ...] each."""
    n_RVHG, m_RVHH = passing.gather(torch.cat([n_VHG, m_VHH], -1)).split([n_VHG.shape[-1], m_VHH.shape[-1]], -1)
    return n_RVHG, m_RVHH
