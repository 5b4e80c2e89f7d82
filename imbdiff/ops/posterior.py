"""Which clean image produced x_t: the posterior over a bank of rows, drawn from or averaged."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from imbdiff.ops import _check
from imbdiff.ops.reference import posterior as reference

Gate = Literal["t2h", "h2t", "full"]


def _check_common(
    op: str, x_t: Tensor, bank: Tensor, signal: Tensor, sigma: Tensor, log_prior: Tensor | None
) -> tuple[int, int]:
    _check.tensor(op, "x_t", x_t, symbols="[B, ...]")
    _check.tensor(op, "bank", bank, (None, *x_t.shape[1:]), "[N, ...] with x_t's row shape", like=x_t)
    _check.same_dtype(op, "x_t", x_t, "bank", bank)
    B, N = len(x_t), len(bank)
    if N == 0 and B > 0:
        raise ValueError(f"{op}: bank must have at least one row, got {_check.describe(bank)}")
    for name, value in (("signal", signal), ("sigma", sigma)):
        _check.tensor(op, name, value, (B,), "[B]", like=x_t)
    if log_prior is not None:
        _check.tensor(op, "log_prior", log_prior, (N,), "[N]", like=x_t)
    return B, N


def posterior_mean(
    x_t: Tensor, bank: Tensor, signal: Tensor, sigma: Tensor, *, log_prior: Tensor | None = None
) -> Tensor:
    r"""The posterior mean of the clean image over a bank of images.

        l_ij = (signal_i x_t,i . bank_j - signal_i^2 |bank_j|^2 / 2) / sigma_i^2 + log_prior_j
        out_i = sum_j softmax_j(l_ij) bank_j

    With the bank a whole data set this is the ideal denoiser of that set; with a batch, the stable target field.

    Args:
        x_t: [B, ...] noisy images x_t = signal x0 + sigma eps.
        bank: [N, ...] clean images, N >= 1, x_t's dtype.
        signal, sigma: [B], sigma > 0.
        log_prior: [N] or None (uniform).

    Returns:
        [B, ...] like x_t. Differentiable in x_t and bank.

    Raises:
        TypeError, ValueError: an argument of the wrong type, device, rank, shape or dtype; the message names it.

    Deterministic; logits in float32 (float64 for float64). Equivalent torch code:
    `imbdiff/ops/reference/posterior.py`. Source: Xu et al. 2023, "Stable target field", eq. 7.
    """
    _check_common("posterior_mean", x_t, bank, signal, sigma, log_prior)
    return reference.posterior_mean(x_t, bank, signal, sigma, log_prior)


def posterior_draw(
    x_t: Tensor,
    bank: Tensor,
    signal: Tensor,
    sigma: Tensor,
    u: Tensor,
    *,
    own: Tensor,
    counts_x: Tensor | None = None,
    counts_bank: Tensor | None = None,
    gate: Gate = "t2h",
    log_prior: Tensor | None = None,
) -> Tensor:
    r"""For each noisy image the index of a bank row, drawn from the posterior, where the class frequencies allow it.

        z_i ~ softmax_j(l_ij), l_ij as in `posterior_mean`, by the inverse of its distribution function at u_i
        t2h:  keep z_i if counts_bank[z_i] >= counts_x[i]      a sample may turn to a class at least as frequent
        h2t:  keep z_i if counts_bank[z_i] <= counts_x[i]
        full: always keep z_i
        otherwise own_i

    Args:
        x_t, bank, signal, sigma, log_prior: as in `posterior_mean`.
        u: [B] uniform numbers in [0, 1): the only randomness.
        own: [B] int64, the bank row that x_t,i was made from.
        counts_x, counts_bank: [B], [N], training images of each row's class; needed unless gate is "full".

    Returns:
        [B] int64 indices into the bank. No gradient.

    Raises:
        TypeError, ValueError: as `posterior_mean`; counts missing; an unknown gate.

    Deterministic given u. Equivalent torch code: `imbdiff/ops/reference/posterior.py`.
    Source: Zhang et al. 2024, "Long-tailed diffusion models with oriented calibration", section 4.
    """
    op = "posterior_draw"
    B, N = _check_common(op, x_t, bank, signal, sigma, log_prior)
    _check.tensor(op, "u", u, (B,), "[B]", like=x_t)
    _check.tensor(op, "own", own, (B,), "[B]", like=x_t, dtypes=(torch.int64,))
    if gate not in ("t2h", "h2t", "full"):
        raise ValueError(f"{op}: gate must be 't2h', 'h2t' or 'full', got {gate!r}")
    accept = None
    if gate != "full":
        if counts_x is None or counts_bank is None:
            raise ValueError(f"{op}: gate {gate!r} compares class frequencies; pass counts_x [B] and counts_bank [N]")
        counted = (*_check.FLOATS, torch.int64, torch.int32)
        _check.tensor(op, "counts_x", counts_x, (B,), "[B]", like=x_t, dtypes=counted)
        _check.tensor(op, "counts_bank", counts_bank, (N,), "[N]", like=x_t, dtypes=counted)
        more = counts_bank[None] - counts_x[:, None]
        accept = more >= 0 if gate == "t2h" else more <= 0
    with torch.no_grad():
        return reference.posterior_draw(x_t, bank, signal, sigma, u, own, accept, log_prior)
