"""The selective scan of Mamba, in PyTorch: the specification, on any device, in fp32 (fp64 where given). (Gu and Dao, 2023.)

A channel v with step sizes dt_t, decays a_n < 0 for its N states, and the vectors b_t, c_t of its group has

    h_t = exp(a dt_t) h_(t-1) + dt_t x_t b_t        y_t = c_t . h_t + d x_t

elementwise in n, so unlike that of Mamba-2 (`ssd`) it is no product of matrices. The row is cut into about the root of S chunks,
which are scanned side by side, a token of each at a time; what a chunk hands on, and how much of what it was handed, is scanned
after that, so S tokens take about 2 roots of S steps. A decay is 0 where a document begins.

Shapes: S tokens, V channels, K groups (K divides V; channel i reads group i * K // V), N states, P chunks of L tokens.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from ds_cp.kernels.delta import Span


def scan(x_SV: Tensor, dt_SV: Tensor, a_VN: Tensor, b_SKN: Tensor, c_SKN: Tensor, d_V: Tensor, span: Span) -> Tensor:
    """[S, V] in x's dtype, the state 0 where a document begins.

    Args:
        dt_SV: step sizes > 0, fp32 or fp64. a_VN: decays < 0. d_V: weights of the way past the state. span: whole documents.
    """
    assert span.passing is None, "its state is not passed between ranks"
    with torch.autocast(x_SV.device.type, enabled=False):
        work, length = dt_SV.dtype, max(math.isqrt(span.tokens), 1)
        x_PLV, dt_PLV, b_PLKN, c_PLKN = (_chunks(x.to(work), length) for x in (x_SV, dt_SV, b_SKN, c_SKN))
        goes_on_PL = _chunks(_goes_on(span, x_SV.device, work), length)
        groups = b_SKN.shape[1]
        x_PLKR, dt_PLKR = (x.unflatten(2, (groups, -1)) for x in (x_PLV, dt_PLV))
        y_PLV = _scan(x_PLKR, dt_PLKR, a_VN.to(work), b_PLKN, c_PLKN, goes_on_PL)
        return (y_PLV.flatten(0, 1)[: span.tokens] + d_V.to(work) * x_SV.to(work)).to(x_SV.dtype)


def _scan(x_PLKR: Tensor, dt_PLKR: Tensor, a_VN: Tensor, b_PLKN: Tensor, c_PLKN: Tensor, goes_on_PL: Tensor) -> Tensor:
    """Groups of R channels. Inside each chunk from a state of 0, and what a state at its start adds: c . (kept h)."""
    a_KRN = a_VN.unflatten(0, x_PLKR.shape[2:])
    outs: list[Tensor] = []
    keeps: list[Tensor] = []
    for x, dt, b, on in zip(*(each.unbind(1) for each in (x_PLKR, dt_PLKR, b_PLKN, goes_on_PL)), strict=True):
        decay_PKRN = (dt.unsqueeze(-1) * a_KRN).exp() * on[:, None, None, None]
        added = (dt * x).unsqueeze(-1) * b.unsqueeze(2)
        outs.append(decay_PKRN * outs[-1] + added if outs else added)
        keeps.append(decay_PKRN * keeps[-1] if keeps else decay_PKRN)
    before, handed = [], torch.zeros_like(outs[-1][0])
    for last, share in zip(outs[-1].unbind(0), keeps[-1].unbind(0), strict=True):
        before.append(handed)
        handed = share * handed + last
    state_PLKRN = torch.stack(outs, 1) + torch.stack(keeps, 1) * torch.stack(before).unsqueeze(1)
    return torch.einsum("plkrn,plkn->plkr", state_PLKRN, c_PLKN).flatten(2)


def _goes_on(span: Span, device: torch.device, dtype: torch.dtype) -> Tensor:
    """1 for a token whose document has one before it, else 0."""
    goes_on = torch.ones(span.tokens, dtype=dtype, device=device)
    goes_on[torch.tensor(span.documents[:-1], device=device)] = 0.0
    return goes_on


def _chunks(x: Tensor, length: int) -> Tensor:
    """[S, ...] to [P, L, ...], zeros at the end."""
    return functional.pad(x, (0, 0) * (x.dim() - 1) + (0, -x.shape[0] % length)).unflatten(0, (-1, length))
