"""The specification: the gated delta rule in chunks, on any device, in fp32 (fp64 for fp64).

Of one value head, with state S [H, G], decay exp(g_t) and q, k normalised, q also divided by the root of H (Yang et al., Gated
Delta Networks, 2024):

    S_t = exp(g_t) (I - beta_t k_t k_t') S_(t-1) + beta_t k_t v_t'          o_t = S_t' q_t

In chunks of L tokens (Yang et al., Parallelizing Linear Transformers with the Delta Rule, 2024, with gates), b_t the sum of g up
to t in the chunk and D_ts = exp(b_t - b_s) for s <= t:

    A_ts = beta_t D_ts k_t.k_s  (s < t)       T = (I + A)^-1
    U = T (beta v)     W = T (beta e^b k)     Z = e^(b_L - b) k
    v' = U - W S       o = e^b q S + (D * q k') v'       S <- e^(b_L) S + Z' v'

so a chunk is an affine map of its incoming state, S <- M S + N with M = e^(b_L) I - Z' W and N = Z' U.

Documents. Chunks lie on a grid over all tokens, whatever documents there are: no padding but at the end, and a thousand one-token
documents cost what one document costs. A boundary is a zero in the decays: D_ts = 0 across it, e^b_t = 0 (nothing is read from
the chunk's incoming state) once a document has begun in the chunk, e^(b_L - b_s) = 0 for what a later one has cut off.

Passing. A whole piece is an affine map too, S <- M S + N: the scan over its chunks runs once, on the state [N | M] that starts as
[0 | I]; M stays 0 where a boundary cut it. All ranks gather everybody's (N, M) once, and each composes those of the ranks before
it on which its first document lies,

    S_in = N_(r-1) + M_(r-1) (N_(r-2) + M_(r-2) (...)),

after which the state before chunk c is N_c + M_c S_in: nothing is scanned again. Outputs come from the states of all chunks at
once. The backward is autograd's: gather's backward sums what all ranks ask of this one's (N, M).

Shapes as in the package, and L tokens of a chunk, P chunks, R = V / K value heads of a key head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ds_cp.kernels import affine
from ds_cp.kernels.delta import Passing, Shapes, Span, shapes_reason

CHUNK = 64
EPS = 1e-6


def unsupported(shapes: Shapes, device: str, dtype: Any, passing: bool) -> str | None:
    return shapes_reason(shapes)


def convolve(x_SC: Tensor, weight_CW: Tensor, bias_C: Tensor | None, activation: str | None, span: Span) -> Tensor:
    work, width = _work_dtype(x_SC), weight_CW.shape[1]
    padded = torch.cat([_halo(x_SC, width - 1, span.passing), x_SC]).to(work)
    position_S1 = _positions(span, x_SC.device).unsqueeze(1)
    out = x_SC.new_zeros((), dtype=work) if bias_C is None else bias_C.to(work)
    for lag in range(width):
        end = width - 1 - lag
        earlier = padded[end : end + span.tokens]
        if lag:
            earlier = earlier.masked_fill(position_S1 < lag, 0.0)
        out = out + earlier * weight_CW[:, end].to(work)
    return (functional.silu(out) if activation else out).to(x_SC.dtype)


def delta_rule(q_SKH: Tensor, k_SKH: Tensor, v_SVG: Tensor, g_SV: Tensor, beta_SV: Tensor, span: Span) -> Tensor:
    with torch.autocast(q_SKH.device.type, enabled=False):  # it would compute the products in bf16
        return _delta_rule(q_SKH, k_SKH, v_SVG, g_SV, beta_SV, span)


def _delta_rule(q_SKH: Tensor, k_SKH: Tensor, v_SVG: Tensor, g_SV: Tensor, beta_SV: Tensor, span: Span) -> Tensor:
    work, heads = _work_dtype(q_SKH), v_SVG.shape[1]
    sharing = heads // q_SKH.shape[1]
    q_KPLH = _chunks(_normalised(q_SKH.to(work)) * q_SKH.shape[-1] ** -0.5)
    k_KPLH = _chunks(_normalised(k_SKH.to(work)))
    v_VPLG = _chunks(v_SVG.to(work))
    g_VPL, beta_VPL1 = _chunks(g_SV.to(work)), _chunks(beta_SV.to(work)).unsqueeze(-1)
    document_PL, begun_PL = _documents(span, q_SKH.device)

    b_VPL = g_VPL.double().cumsum(-1)  # its gradient is a difference of two large sums
    same_PLL = (document_PL[:, :, None] == document_PL[:, None, :]).tril()
    decay_VPLL = (b_VPL.unsqueeze(-1) - b_VPL.unsqueeze(-2)).to(work).masked_fill(~same_PLL, -torch.inf).exp()
    into_VPL1 = b_VPL.to(work).masked_fill(begun_PL, -torch.inf).exp().unsqueeze(-1)
    kk_VPLL, qk_VPLL = (_to_value_heads(x @ k_KPLH.mT, sharing) for x in (k_KPLH, q_KPLH))
    k_VPLH, q_VPLH = _to_value_heads(k_KPLH, sharing), _to_value_heads(q_KPLH, sharing)
    right = torch.cat([v_VPLG, k_VPLH * into_VPL1], -1) * beta_VPL1
    solved = torch.linalg.solve_triangular((kk_VPLL * decay_VPLL * beta_VPL1).tril(-1), right, upper=False, unitriangular=True)
    u_VPLG, w_VPLH = solved.split([v_VPLG.shape[-1], k_VPLH.shape[-1]], -1)
    z_VPLH = k_VPLH * decay_VPLL[:, :, -1, :].unsqueeze(-1)

    state_VPHG = states(u_VPLG, w_VPLH, z_VPLH, into_VPL1[:, :, -1:], span)
    v_new = u_VPLG - w_VPLH @ state_VPHG
    out_VPLG = (q_VPLH * into_VPL1) @ state_VPHG + (qk_VPLL * decay_VPLL) @ v_new
    return out_VPLG.flatten(1, 2)[:, : span.tokens].transpose(0, 1).to(v_SVG.dtype)


def states(u_VPLG: Tensor, w_VPLH: Tensor, z_VPLH: Tensor, decay_VP11: Tensor, span: Span) -> Tensor:
    """The state before each chunk, [V, P, H, G]."""
    heads, chunks, _, size = w_VPLH.shape
    value_size, passing = u_VPLG.shape[-1], span.passing
    state = u_VPLG.new_zeros(heads, size, value_size)
    if passing is not None and passing.before:  # the last columns carry M; W acts on them as on N, and nothing is added
        state = torch.cat([state, torch.eye(size, dtype=state.dtype, device=state.device).expand(heads, -1, -1)], -1)
        u_VPLG = functional.pad(u_VPLG, (0, size))
    before = []
    for chunk, (u, w, z, decay) in enumerate(zip(*(x.unbind(1) for x in (u_VPLG, w_VPLH, z_VPLH, decay_VP11)), strict=True)):
        before.append(state)
        if chunk + 1 < chunks or passing is not None:
            state = decay * state + z.mT @ (u - w @ state)
    if passing is None:
        return torch.stack(before, 1)
    mine_VHX = functional.pad(state, (0, value_size + size - state.shape[-1]))  # M is 0 where the first document begins here
    incoming = incoming_state(mine_VHX, value_size, passing)
    if not passing.before:
        return torch.stack([before[0] + incoming, *before[1:]], 1)  # of 0, which keeps this rank in the gather's backward
    before_VPHX = torch.stack(before, 1)
    return before_VPHX[..., :value_size] + before_VPHX[..., value_size:] @ incoming.unsqueeze(1)


def incoming_state(mine_VHX: Tensor, value_size: int, passing: Passing) -> Tensor:
    """The state before this piece, [V, H, G], from everybody's [N | M]; 0 where its first document begins here."""
    n_RVHG, m_RVHH = passing.gather(mine_VHX).split([value_size, mine_VHX.shape[1]], -1)
    ranks = slice(passing.rank if passing.before else 0)
    return affine.final(n_RVHG[ranks], m_RVHH[ranks])


def _halo(x_SC: Tensor, width: int, passing: Passing | None) -> Tensor:
    """The `width` tokens before the piece, from as many ranks as hold them; zeros before the row."""
    nothing = x_SC.new_zeros(width, x_SC.shape[1])
    if passing is None or width == 0:
        return nothing
    tails = passing.gather(x_SC[-width:])
    return torch.cat([nothing, tails[: passing.rank].flatten(0, 1)])[-width:]


def _positions(span: Span, device: torch.device) -> Tensor:
    """Each token's place in its document."""
    starts = torch.tensor(span.documents[:-1], device=device)
    lengths = torch.tensor(span.documents[1:], device=device) - starts
    if span.passing is not None:
        starts[0] -= span.passing.before
    return torch.arange(span.tokens, device=device) - starts.repeat_interleave(lengths)


def _documents(span: Span, device: torch.device) -> tuple[Tensor, Tensor]:
    """(number of each token's document; whether that document began in the token's chunk), [P, L] with the padding in the last."""
    bounds = torch.tensor(span.documents[1:-1], device=device)
    token_PL = torch.arange(-(-span.tokens // CHUNK) * CHUNK, device=device).view(-1, CHUNK)
    document_PL = torch.bucketize(token_PL, bounds, right=True)
    continues = span.passing is not None and span.passing.before > 0
    before_P = torch.cat([document_PL.new_full((1,), 0 if continues else -1), document_PL[:-1, -1]])
    return document_PL, document_PL != before_P.unsqueeze(1)


def _chunks(x: Tensor) -> Tensor:
    """[S, heads, ...] to [heads, P, L, ...], zeros at the end."""
    padded = functional.pad(x, (0, 0) * (x.dim() - 1) + (0, -x.shape[0] % CHUNK))
    return padded.unflatten(0, (-1, CHUNK)).movedim(2, 0).contiguous()


def _normalised(x: Tensor) -> Tensor:
    return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + EPS)


def _to_value_heads(x: Tensor, sharing: int) -> Tensor:
    return x.repeat_interleave(sharing, 0) if sharing > 1 else x


def _work_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
