"""Which clean image produced x_t: the posterior over a bank of rows, drawn from or averaged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from imbdiff.ops import _backends, _check
from imbdiff.ops._op import Op, call, register, wanted
from imbdiff.ops.reference import posterior as reference

Gate = Literal["t2h", "h2t", "full"]


def _common(
    op: str, x_t: Tensor, bank: Tensor, signal: Tensor, sigma: Tensor, log_prior: Tensor | None
) -> tuple[Tensor, ...]:
    """Checked, and as the schemas want them: rows, and small tensors in the accumulator's type."""
    _check.tensor(op, "x_t", x_t, symbols="[B, ...]")
    _check.tensor(op, "bank", bank, (None, *x_t.shape[1:]), "[N, ...] with x_t's row shape", like=x_t)
    _check.same_dtype(op, "x_t", x_t, "bank", bank)
    B, N, acc = len(x_t), len(bank), _check.accumulator(x_t.dtype)
    if N == 0 and B > 0:
        raise ValueError(f"{op}: bank must have at least one row, got {_check.describe(bank)}")
    small = []
    for name, value in (("signal", signal), ("sigma", sigma)):
        _check.constant(op, name, _check.tensor(op, name, value, (B,), "[B]", like=x_t))
        small.append(_check.small(value, acc))
    if log_prior is None:
        small.append(x_t.new_empty(0, dtype=acc))
    else:
        _check.constant(op, "log_prior", _check.tensor(op, "log_prior", log_prior, (N,), "[N]", like=x_t))
        small.append(_check.small(log_prior, acc))
    return _check.rows(x_t), _check.rows(bank), *small


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

    Deterministic; logits in float32 (float64 for float64). Time N B D, memory O(B D) and tiles, and O(N B) where
    the bank needs a gradient. Equivalent torch code: `imbdiff/ops/reference/posterior.py`.
    Source: Xu et al. 2023, "Stable target field", eq. 7. Used by OC.
    """
    op = "posterior_mean"
    arguments = _common(op, x_t, bank, signal, sigma, log_prior)
    return call(op, _backends.choose(op, x_t), *arguments)[0].view(x_t.shape)


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

    Deterministic given u. Time N B D, memory O(N B). Equivalent torch code: `imbdiff/ops/reference/posterior.py`.
    Source: Zhang et al. 2024, "Long-tailed diffusion models with oriented calibration", section 4. Used by OC.
    """
    op = "posterior_draw"
    x, rows, s, noise, prior = _common(op, x_t, bank, signal, sigma, log_prior)
    x, rows = x.detach(), rows.detach()
    B, N = len(x), len(rows)
    _check.tensor(op, "u", u, (B,), "[B]", like=x_t)
    _check.tensor(op, "own", own, (B,), "[B]", like=x_t, dtypes=(torch.int64,))
    chosen = _check.choice(op, "gate", gate, reference.GATES)
    counts = [x.new_empty(0, dtype=torch.float64)] * 2
    if gate != "full":
        if counts_x is None or counts_bank is None:
            raise ValueError(f"{op}: gate {gate!r} compares class frequencies; pass counts_x [B] and counts_bank [N]")
        counts = [
            _counts(op, *c, x_t) for c in (("counts_x", counts_x, B, "[B]"), ("counts_bank", counts_bank, N, "[N]"))
        ]
    _check.values(op, "u", u, lambda u: 0 <= u < 1, "in [0, 1)")
    backend = _backends.choose(op, x_t)
    return call(op, backend, x, rows, s, noise, u.double().contiguous(), own.contiguous(), *counts, prior, chosen)[0]


def _counts(op: str, name: str, value: Tensor, size: int, symbols: str, like: Tensor) -> Tensor:
    counted = (*_check.FLOATS, torch.int64, torch.int32)
    _check.tensor(op, name, value, (size,), symbols, like=like, dtypes=counted)
    return _check.values(op, name, value, lambda c: c > 0, "positive").double().contiguous()


def _fake_mean(backend: str, x_t: Tensor, bank: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    acc, B = _check.accumulator(x_t.dtype), x_t.shape[0]
    kept = (2, B)
    if backend == "cpu":  # the largest logits of each 144 rows, and the sums of the weights
        kept = ((len(bank) + 143) // 144 + 1, (B + 15) // 16 * 16)
    return x_t.new_empty(x_t.shape), x_t.new_empty(kept, dtype=acc)


def _fake_mean_bwd(grad: Tensor, x_t: Tensor, bank: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    of_x, of_bank = rest[-1]
    return x_t.new_empty(x_t.shape if of_x else (0,)), bank.new_empty(bank.shape if of_bank else (0,))


def _mean_backward(
    bwd: Callable[..., Any],
    needs: Sequence[bool],
    grads: Sequence[Tensor | None],
    inputs: Sequence[Any],
    saved: Sequence[Tensor],
) -> list[Tensor | None]:
    (grad,), two = grads, list(needs[:2])
    return [None, None] if grad is None else wanted(bwd(grad.contiguous(), *inputs, *saved, two), two)


def _fake_draw(backend: str, x_t: Tensor, *rest: Any) -> Tensor:
    return x_t.new_empty(x_t.shape[0], dtype=torch.int64)


register(
    Op(
        "posterior_mean",
        "posterior",
        reference.posterior_mean,
        _fake_mean,
        keeps_all=True,
        reference_bwd=reference.posterior_mean_bwd,
        fake_bwd=_fake_mean_bwd,
        backward=_mean_backward,
    )
)
register(Op("posterior_draw", "posterior", reference.posterior_draw, _fake_draw))
