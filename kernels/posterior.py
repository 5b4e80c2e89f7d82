"""The posterior mean over a bank of rows: one product makes the logits, another is the weights times the bank.

    b_j  = bank_j - c,  a_i = x_i - signal_i c                                             c: the bank's mean
    l_ij = scale_i (a_i . b_j - signal_i |b_j|^2 / 2) + prior_j                            scale = signal / sigma^2
    mean = c + sum_j w_ij b_j                                                              w: softmax of l
    h_ij = g_i . b_j,  m_i = sum_j w_ij h_ij,  z_ij = scale_i w_ij (h_ij - m_i)            g: the mean's gradient
    of x = sum_j z_ij b_j
    of b = sum_i w_ij g_i + z_ij (a_i - signal_i b_j)

Logits reach 1e7 where sigma is small, so rows of every type are multiplied in float32. m is summed from the weights and
not taken from the mean, which is rounded: the z of a row add up to 0.

Time 4 B N D forward; 6 B N D backward for x alone, 8 for the bank alone, 10 for both. The rows of x are taken so many
at once that a matrix of them and the bank has a sixteenth of the bank's elements, or 2^25 where that is more; up to
four such matrices are held. Where the rows take several turns, gradients of the bank wait for the next in float32.
"""

# mypy: disable-error-code="no-untyped-def, assignment"
from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from imbdiff.kernels import engine
from imbdiff.kernels.matrices import AS_IT_IS, PRODUCT, gather, products
from torch import Tensor

MATRIX = 2**25


@triton.jit
def logits(product, x_facts, bank_facts):
    """Of 1e7 the last digit is worth a factor e: nothing is left to contraction."""
    scale, signal = x_facts
    norm, prior = bank_facts
    around = tl.fma(-0.5 * signal[:, None], norm[None, :], product)
    return tl.fma(scale[:, None], around, prior[None, :])


def height(N: int, D: int) -> int:
    """Rows of x at once."""
    return max(1, max(D // 16, MATRIX // N) // PRODUCT.rows) * PRODUCT.rows


def slices(
    x: Tensor, bank: Tensor, signal: Tensor, sigma: Tensor, log_prior: Tensor
) -> Iterator[tuple[slice, Tensor, tuple[engine.Frame, ...], Tensor]]:
    """Rows of x: which, themselves, the frames of them and of the bank, their logits."""
    (B, D), N = x.shape, len(bank)
    frame: engine.Frame = (bank.mean(0, dtype=torch.float32), None, None)
    norm = engine.squared_norms(bank, bank[:0], frame, tl.float32)
    prior = log_prior if len(log_prior) else torch.zeros_like(norm)
    for first in range(0, B, height(N, D)):
        at = slice(first, first + height(N, D))
        frames, facts = ((frame[0], signal[at], None), frame), (signal[at] / sigma[at].square(), signal[at])
        yield at, x[at], frames, products(x[at], bank, frames, facts, (norm, prior), logits)


def posterior_mean(
    x_t: Tensor, bank: Tensor, signal: Tensor, sigma: Tensor, log_prior: Tensor
) -> tuple[Tensor, Tensor]:
    B, D = x_t.shape
    out, lse = x_t.new_empty(B, D), x_t.new_empty(2, B, dtype=torch.float32)
    if B > 0:
        with torch.cuda.device_of(x_t):
            for at, _, frames, l in slices(x_t, bank, signal, sigma, log_prior):
                w, centre = l.softmax(1), frames[1][0]
                lse[0, at], lse[1, at] = l.amax(1), -w.amax(1).log()
                gather(out[at], [(w, bank, frames[1])], (centre.expand(len(w), D), AS_IT_IS))
    return out, lse


def posterior_mean_bwd(
    grad: Tensor, x_t: Tensor, bank: Tensor, signal: Tensor, sigma: Tensor, log_prior: Tensor, out: Tensor,
    lse: Tensor, needs: Sequence[bool],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`lse` is not read: the weights are the softmax of the logits as they are made here."""
    of_x, of_bank = (x.new_empty(x.shape if need else 0) for x, need in zip((x_t, bank), needs, strict=True))
    if x_t.numel() == 0:
        return of_x, of_bank.zero_()
    one = len(x_t) <= height(*bank.shape)
    total = of_bank if one else of_bank.new_empty(of_bank.shape, dtype=torch.float32)
    with torch.cuda.device_of(x_t):
        for at, x, frames, l in slices(x_t, bank, signal, sigma, log_prior):
            w, h = l.softmax(1), products(grad[at], bank, (AS_IT_IS, frames[1]))
            z = h.sub_((w * h).sum(1, keepdim=True) / w.sum(1, keepdim=True)).mul_(w)
            z *= (signal[at] / sigma[at].square())[:, None]
            gather(of_x[at], [(z, bank, frames[1])])
            pulled = (frames[1][0], None, -(z * signal[at, None]).sum(0))
            before = [(total, AS_IT_IS)] if at.start else []
            gather(total, [(w.T, grad[at], AS_IT_IS), (z.T, x, frames[0])], (bank, pulled), *before)
    return of_x, total.to(bank.dtype)
