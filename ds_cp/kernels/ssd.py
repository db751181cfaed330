"""The scan of Mamba-2, in chunks, in PyTorch: the specification, on any device, in fp32 (fp64 where given). (Dao and Gu, 2024.)

A head with step sizes dt_t, a decay a < 0 and the vectors b_t, c_t of its group has the state

    S_t = exp(a dt_t) S_(t-1) + dt_t b_t x_t'        y_t = S_t' c_t + d x_t

With g_t = a dt_1 + ... + a dt_t over the row, a token s <= t of its document adds exp(g_t - g_s) (c_t . b_s) dt_s x_s to y_t.
Inside a chunk that is one masked product. What a chunk z leaves behind, of the document at its end, is read in a later chunk c that
begins with this document, decayed by exp(g at the start of c - g at the end of z): one product over pairs of chunks.

Shapes: S tokens, V heads, K groups (K divides V; head i reads group i * K // V), X head size, N state size, P chunks of L tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from ds_cp.kernels.delta import Span

CHUNK = 64
BLOCK = 64
"""Chunks that are paired at once, so that the work grows with the row and not with its square."""


def scan(x_SVX: Tensor, dt_SV: Tensor, a_V: Tensor, b_SKN: Tensor, c_SKN: Tensor, d_V: Tensor, span: Span) -> Tensor:
    """[S, V, X] in x's dtype, the state 0 where a document begins.

    Args:
        dt_SV: step sizes > 0, fp32 or fp64. a_V: decays < 0. d_V: weights of the way past the state.
        span: whole documents.
    """
    assert span.passing is None, "its state is not passed between ranks"
    with torch.autocast(x_SVX.device.type, enabled=False):  # it would compute the products in bf16
        return _scan(x_SVX, dt_SV, a_V, b_SKN, c_SKN, d_V, span)


def _scan(x_SVX: Tensor, dt_SV: Tensor, a_V: Tensor, b_SKN: Tensor, c_SKN: Tensor, d_V: Tensor, span: Span) -> Tensor:
    work, groups = dt_SV.dtype, b_SKN.shape[1]
    x_SVX_work = x_SVX.to(work)
    v_KRPLX = _chunks(x_SVX_work * dt_SV.unsqueeze(-1)).unflatten(0, (groups, -1))
    b_KPLN, c_KPLN = (_chunks(x.to(work)) for x in (b_SKN, c_SKN))
    g_KRPL = _chunks((a_V.to(work) * dt_SV).double().cumsum(0)).unflatten(0, (groups, -1))
    document_PL = _documents(span, x_SVX.device)

    same_PLL = (document_PL[:, :, None] == document_PL[:, None, :]).tril()
    scores_KRPLL = (c_KPLN @ b_KPLN.mT).unsqueeze(1) * _decay(g_KRPL.unsqueeze(-1) - g_KRPL.unsqueeze(-2), same_PLL, work)
    y_KRPLX = scores_KRPLL @ v_KRPLX

    first_P, last_P = document_PL[:, 0], document_PL[:, -1]
    left_KRPL = _decay(g_KRPL[..., -1:] - g_KRPL, document_PL == last_P.unsqueeze(1), work)
    left_KRPNX = b_KPLN.mT.unsqueeze(1) @ (v_KRPLX * left_KRPL.unsqueeze(-1))
    state_KRPNX = _states(left_KRPNX, g_KRPL, first_P, last_P)
    read_KRPL = _decay(g_KRPL - g_KRPL[..., :1], document_PL == first_P.unsqueeze(1), work)
    y_KRPLX = y_KRPLX + (c_KPLN.unsqueeze(1) @ state_KRPNX) * read_KRPL.unsqueeze(-1)

    y_SVX = y_KRPLX.flatten(0, 1).flatten(1, 2)[:, : span.tokens].transpose(0, 1)
    return (y_SVX + d_V.to(work).unsqueeze(-1) * x_SVX_work).to(x_SVX.dtype)


def _states(left_KRPNX: Tensor, g_KRPL: Tensor, first_P: Tensor, last_P: Tensor) -> Tensor:
    """What each chunk's first token finds, [K, R, P, N, X]: a product over pairs of chunks of a block, and what it hands on."""
    work, shape = left_KRPNX.dtype, left_KRPNX.shape[3:]
    left_KRPC, starts_KRP, ends_KRP = left_KRPNX.flatten(3), g_KRPL[..., 0], g_KRPL[..., -1]
    chunks, found = len(first_P), []
    carried_KR1C = torch.zeros_like(left_KRPC[:, :, :1])
    for begin in range(0, chunks, BLOCK):
        end = min(begin + BLOCK, chunks)
        rows = slice(begin, end + 1)  # and the first of the next block
        start_KRQ, first_Q = starts_KRP[..., rows], first_P[rows]
        kept_QB = (first_Q[:, None] == last_P[None, begin:end]).tril(-1)
        within = _decay(start_KRQ.unsqueeze(-1) - ends_KRP[..., None, begin:end], kept_QB, work) @ left_KRPC[:, :, begin:end]
        since = _decay(start_KRQ - start_KRQ[..., :1], first_Q == first_Q[0], work)
        state_KRQC = within + since.unsqueeze(-1) * carried_KR1C
        carried_KR1C = state_KRQC[:, :, -1:]
        found.append(state_KRQC[:, :, : end - begin])
    return torch.cat(found, 2).unflatten(3, shape)


def _decay(exponent: Tensor, kept: Tensor, work: torch.dtype) -> Tensor:
    """exp of differences that were taken in fp64: their gradient is a difference of large sums; 0 where not kept."""
    return exponent.to(work).masked_fill(~kept, -torch.inf).exp()


def _chunks(x: Tensor) -> Tensor:
    """[S, heads, ...] to [heads, P, L, ...], zeros at the end."""
    padded = functional.pad(x, (0, 0) * (x.dim() - 1) + (0, -x.shape[0] % CHUNK))
    return padded.unflatten(0, (-1, CHUNK)).movedim(2, 0).contiguous()


def _documents(span: Span, device: torch.device) -> Tensor:
    """Number of each token's document [P, L]; the padding is one of its own."""
    bounds = torch.tensor(span.documents[1:], device=device)
    tokens = torch.arange(-(-span.tokens // CHUNK) * CHUNK, device=device)
    return torch.bucketize(tokens, bounds, right=True).view(-1, CHUNK)
