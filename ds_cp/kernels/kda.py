"""Kimi delta attention in chunks, in PyTorch: the specification, on any device, in fp32 (fp64 where given). (Kimi Linear, 2025.)

The gated delta rule with a decay of its own for each channel h of a key. A head has the state

    S_t = (1 - beta_t k_t k_t') diag(exp g_t) S_(t-1) + beta_t k_t v_t'        y_t = S_t' q_t

with q and k divided by their norms. With b_t = g_1 + ... + g_t from the start of a chunk,

    A_ts = beta_t sum_h k_th k_sh exp(b_th - b_sh)    s < t,  in one document
    (1 + A) u = beta v        (1 + A) w = beta k exp(b)
    S <- diag(exp b_L) S + sum_s k_s exp(b_L - b_s) (u_s - w_s S)'

as in the reference of the gated delta rule (`kernels/delta`), whose decay is one number. exp(b_t - b_s) is formed for each pair of
tokens of a chunk and each channel, so chunks are short. A boundary of documents is a zero among the decays.

Shapes: S tokens, V heads, H key and value size, P chunks of L tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from ds_cp.kernels.delta import Span

CHUNK = 16
EPS = 1e-6


def delta_rule(q_SVH: Tensor, k_SVH: Tensor, v_SVH: Tensor, g_SVH: Tensor, beta_SV: Tensor, span: Span) -> Tensor:
    """[S, V, H] in v's dtype, the state 0 where a document begins.

    Args:
        g_SVH: logs of the decays, <= 0, fp32 or fp64. beta_SV: writing strengths. span: whole documents.
    """
    assert span.passing is None, "its state is not passed between ranks"
    with torch.autocast(q_SVH.device.type, enabled=False):  # it would compute the products in bf16
        return _delta_rule(q_SVH, k_SVH, v_SVH, g_SVH, beta_SV, span)


def _delta_rule(q_SVH: Tensor, k_SVH: Tensor, v_SVH: Tensor, g_SVH: Tensor, beta_SV: Tensor, span: Span) -> Tensor:
    work = g_SVH.dtype
    q_VPLH = _chunks(_normalised(q_SVH.to(work)) * q_SVH.shape[-1] ** -0.5)
    k_VPLH = _chunks(_normalised(k_SVH.to(work)))
    v_VPLH, beta_VPL1 = _chunks(v_SVH.to(work)), _chunks(beta_SV.to(work)).unsqueeze(-1)
    b_VPLH = _chunks(g_SVH).double().cumsum(2)
    document_PL = _documents(span, q_SVH.device)
    same_PLL = (document_PL[:, :, None] == document_PL[:, None, :]).tril()
    before_P = torch.cat([document_PL.new_full((1,), -1), document_PL[:-1, -1]])
    goes_on_PL1 = (document_PL == before_P.unsqueeze(1)).unsqueeze(-1)
    at_end_PL1 = (document_PL == document_PL[:, -1:]).unsqueeze(-1)

    decay_VPLLH = _decay(b_VPLH.unsqueeze(3) - b_VPLH.unsqueeze(2), same_PLL.unsqueeze(-1), work)
    kk_VPLL, qk_VPLL = (torch.einsum("vplh,vpsh,vplsh->vpls", x, k_VPLH, decay_VPLLH) for x in (k_VPLH, q_VPLH))
    into_VPLH = _decay(b_VPLH, goes_on_PL1, work)
    right = torch.cat([v_VPLH, k_VPLH * into_VPLH], -1) * beta_VPL1
    u_w = torch.linalg.solve_triangular((kk_VPLL * beta_VPL1).tril(-1), right, upper=False, unitriangular=True)
    u_VPLH, w_VPLH = u_w.chunk(2, -1)
    z_VPLH = k_VPLH * _decay(b_VPLH[:, :, -1:] - b_VPLH, at_end_PL1, work)

    state_VPHH = _states(u_VPLH, w_VPLH, z_VPLH, into_VPLH[:, :, -1])
    out_VPLH = (q_VPLH * into_VPLH) @ state_VPHH + qk_VPLL @ (u_VPLH - w_VPLH @ state_VPHH)
    return out_VPLH.flatten(1, 2)[:, : span.tokens].transpose(0, 1).to(v_SVH.dtype)


def _states(u_VPLH: Tensor, w_VPLH: Tensor, z_VPLH: Tensor, decay_VPH: Tensor) -> Tensor:
    """The state before each chunk, [V, P, H, H]."""
    heads, _, _, size = w_VPLH.shape
    state, before = u_VPLH.new_zeros(heads, size, size), []
    for u, w, z, decay in zip(*(x.unbind(1) for x in (u_VPLH, w_VPLH, z_VPLH, decay_VPH)), strict=True):
        before.append(state)
        state = decay.unsqueeze(-1) * state + z.mT @ (u - w @ state)
    return torch.stack(before, 1)


def _decay(exponent: Tensor, kept: Tensor, work: torch.dtype) -> Tensor:
    """exp of sums that were taken in fp64; 0 where not kept."""
    return exponent.to(work).masked_fill(~kept, -torch.inf).exp()


def _normalised(x: Tensor) -> Tensor:
    return x / ((x * x).sum(-1, keepdim=True) + EPS).sqrt()


def _chunks(x: Tensor) -> Tensor:
    """[S, heads, ...] to [heads, P, L, ...], zeros at the end."""
    padded = functional.pad(x, (0, 0) * (x.dim() - 1) + (0, -x.shape[0] % CHUNK))
    return padded.unflatten(0, (-1, CHUNK)).movedim(2, 0).contiguous()


def _documents(span: Span, device: torch.device) -> Tensor:
    """Number of each token's document [P, L]; the padding is one of its own."""
    bounds = torch.tensor(span.documents[1:], device=device)
    tokens = torch.arange(-(-span.tokens // CHUNK) * CHUNK, device=device)
    return torch.bucketize(tokens, bounds, right=True).view(-1, CHUNK)
