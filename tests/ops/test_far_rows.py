"""Rows more than 2^31 elements apart, and refusals that no machine at hand can provoke by itself."""

from types import SimpleNamespace

import pytest
import torch

from imbdiff import ops
from imbdiff.ops import _backends

STRIDE = 2**30 + 16


def far(x):
    """The same three rows, the third one 2^31 + 32 elements after the first; the memory between is never touched."""
    memory = torch.empty(2 * STRIDE + x.shape[1], dtype=x.dtype)
    return memory.as_strided(x.shape, (STRIDE, 1)).copy_(x).detach().requires_grad_()


def two_branch(x):
    base, terms = ops.two_branch_loss(x, torch.ones_like(x), [torch.zeros_like(x)], torch.ones(1, 3), torch.ones(1, 3))
    return base.sum() + terms.sum()


def negative_distance(x):
    return ops.negative_distance_loss(x, tau=x.shape[1])


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("D", [5, 3000], ids=["narrow", "wide"])
@pytest.mark.parametrize("loss", [two_branch, negative_distance])
def test_rows_more_than_2_to_the_31_elements_apart(loss, D, backend):
    if _backends.PROBLEMS.get(backend):
        pytest.skip(_backends.PROBLEMS[backend])
    x = torch.randn(3, D, dtype=torch.bfloat16).requires_grad_()
    with ops.use(backend):
        results = [(value := loss(rows), *torch.autograd.grad(value, rows)) for rows in (x, far(x.detach()))]
    for near, apart in zip(*results, strict=True):
        assert torch.equal(near, apart)


@pytest.mark.parametrize(
    ("op", "backend"),
    [(op, b) for op, table in _backends.CAPABILITIES.items() for b, can in table.items() if can.device == "cuda"],
)
def test_float64_is_refused_on_a_gpu_by_name(op, backend):
    rows = SimpleNamespace(device=torch.device("cuda"), dtype=torch.float64)
    assert _backends.refusal(op, backend, rows) == "does not take torch.float64"


def two_branch_of(rows):
    return ops.two_branch_loss(rows[0], rows[0], rows, torch.ones(len(rows), 2), torch.ones(len(rows), 3))


def product_of(rows):
    return ops.product_of_gaussians(rows, [0.0] * len(rows))


@pytest.mark.parametrize(("op", "call"), [("two_branch", two_branch_of), ("product_of_gaussians", product_of)])
def test_lists_longer_than_a_back_end_takes_are_refused(op, call, monkeypatch):
    limited = _backends.Capability("any", (torch.float32,), most=(4, "tensors"))
    monkeypatch.setitem(_backends.CAPABILITIES[op], "reference", limited)
    rows = list(torch.randn(5, 2, 3))
    with ops.use("reference"):
        call(rows[:4])
        with pytest.raises(ValueError, match="takes at most 4 tensors, got 5"):
            call(rows)
