"""tap_loss: the identity on h, the loss beside it, and both gradients in one."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from imbdiff import ops
from imbdiff.ops import _op

LABELS = torch.tensor([0, 1, 0, 1, 2, 2])
KINDS = {
    "negative_distance": {"tau": 0.5, "per_dim": True, "include_self": False, "per_row": True},
    "dispersive": {"tau": 0.5},
    "distance_hinge": {"margin": 2.5, "per_dim": True},
    "cosine_contrastive": {"tau": 0.2, "weight": torch.rand(6)},
    "supcon": {"labels": LABELS},
}
PLAIN = {
    "negative_distance": ops.negative_distance_loss,
    "dispersive": lambda h, tau: ops.negative_distance_loss(h, tau=tau, per_dim=True),
    "distance_hinge": ops.distance_hinge_loss,
    "cosine_contrastive": ops.cosine_contrastive_loss,
    "supcon": ops.supcon_loss,
}
LAYOUTS = {
    "dense": lambda: torch.randn(6, 4, 3, 5),
    "channels_last": lambda: torch.randn(6, 4, 3, 5).to(memory_format=torch.channels_last),
    "permuted": lambda: torch.randn(6, 5, 3, 4).permute(0, 3, 1, 2),
    "slice": lambda: torch.randn(6, 8, 3, 5)[:, 2:6],
    "steps": lambda: torch.randn(6, 4, 3, 10)[..., ::2],
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_values_and_both_gradients(kind, layout):
    h = LAYOUTS[layout]().requires_grad_()
    up = torch.randn_like(h)
    out, loss = ops.tap_loss(h, kind, **KINDS[kind])
    assert (out.data_ptr(), out.shape, out.stride()) == (h.data_ptr(), h.shape, h.stride())
    (got,) = torch.autograd.grad((out * up).sum() + 0.3 * loss, h)
    want_loss = PLAIN[kind](h, **KINDS[kind])
    (want,) = torch.autograd.grad((h * up).sum() + 0.3 * want_loss, h)
    torch.testing.assert_close(loss, want_loss)
    torch.testing.assert_close(got, want)
    assert got.stride() == h.stride() or layout in ("slice", "steps")


def test_either_output_may_be_left_out():
    h = torch.randn(6, 10, requires_grad=True)
    out, loss = ops.tap_loss(h, "dispersive", tau=1.0)
    (alone,) = torch.autograd.grad(loss, h, retain_graph=True)
    torch.testing.assert_close(alone, torch.autograd.grad(PLAIN["dispersive"](h, 1.0), h)[0])
    (identity,) = torch.autograd.grad(out.sum(), h)
    assert torch.equal(identity, torch.ones_like(h))


@pytest.mark.parametrize("layout", ["dense", "channels_last", "permuted"])
def test_a_dense_map_is_read_in_place(layout, monkeypatch):
    """The rows that the operation sees lie in h's storage."""
    seen = []
    for name, real in list(_op._CALLS.items()):
        monkeypatch.setitem(_op._CALLS, name, lambda *a, real=real: seen.append(a) or real(*a))
    h = LAYOUTS[layout]().requires_grad_()
    out, loss = ops.tap_loss(h, "dispersive", tau=1.0)
    (out.sum() + loss).backward()
    assert seen[0][0].data_ptr() == seen[1][1].data_ptr() == h.data_ptr()


def test_negatives_follow_the_order_of_the_rows():
    h = LAYOUTS["channels_last"]()
    negatives = torch.randn(3, 4, 3, 5)
    _, loss = ops.tap_loss(h, "negative_distance", tau=30.0, negatives=negatives)
    torch.testing.assert_close(loss, ops.negative_distance_loss(h, tau=30.0, negatives=negatives))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_types(dtype):
    h = torch.randn(6, 4, 5).to(dtype).requires_grad_()
    out, loss = ops.tap_loss(h, "cosine_contrastive")
    assert (out.dtype, loss.dtype) == (dtype, torch.float64 if dtype == torch.float64 else torch.float32)
    (out.float().sum() + loss).backward()
    assert h.grad.dtype == dtype


def test_without_gradient_and_without_rows():
    h = torch.randn(6, 4)
    out, loss = ops.tap_loss(h, "dispersive", tau=1.0)
    assert not out.requires_grad
    assert not loss.requires_grad
    out, loss = ops.tap_loss(torch.randn(0, 4, requires_grad=True), "dispersive", tau=1.0)
    (out.sum() + loss).backward()
    assert loss == 0


@pytest.mark.parametrize("use_h", [True, False])
def test_overwriting_what_was_tapped_is_noticed(use_h):
    h = torch.randn(6, 4, requires_grad=True) * 1
    out, loss = ops.tap_loss(h, "dispersive", tau=1.0)
    with torch.no_grad():
        h.zero_()
    with pytest.raises(RuntimeError, match="modified (by an )?inplace"):
        (out.sum() + loss if use_h else loss).backward()


def test_a_second_derivative_is_refused_by_name():
    h = torch.randn(6, 4, requires_grad=True)
    _, loss = ops.tap_loss(h, "supcon", labels=LABELS)
    (g,) = torch.autograd.grad(loss, h, create_graph=True)
    with pytest.raises(NotImplementedError, match="supcon has no second derivative"):
        g.sum().backward()


@pytest.mark.parametrize("kind", KINDS)
def test_compiles_into_one_graph(kind):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def block(h, w):
        h, loss = ops.tap_loss(h @ w, kind, **KINDS[kind])
        return h.relu().mean() + 0.5 * loss

    compiled = torch.compile(block, fullgraph=True, backend=counter)
    for _ in range(4):
        args = [torch.randn(6, 7, 8, requires_grad=True), torch.randn(8, 8, requires_grad=True)]
        for a, b in zip(
            torch.autograd.grad(compiled(*args), args), torch.autograd.grad(block(*args), args), strict=True
        ):
            torch.testing.assert_close(a, b)
    assert counter.frame_count == 1


h = torch.zeros(3, 4)


@pytest.mark.parametrize(
    ("args", "more", "error", "text"),
    [
        ((h, "infonce"), {}, ValueError, "tap_loss: kind must be one of 'negative_distance', .*, got 'infonce'"),
        ((h, "dispersive"), {"margin": 1.0}, TypeError, "kind 'dispersive' takes tau, include_self; got margin"),
        ((h, "dispersive"), {}, TypeError, "tap_loss: kind 'dispersive' needs tau"),
        ((h, "supcon"), {}, TypeError, "kind 'supcon' needs labels"),
        (([1.0], "cosine_contrastive"), {}, TypeError, "tap_loss: h must be a tensor"),
        ((h, "supcon"), {"labels": torch.zeros(2).long()}, ValueError, r"supcon_loss: labels must be \[N\] = \[3\]"),
        ((h, "dispersive"), {"tau": -1.0}, ValueError, "tau must be a positive finite number, got -1.0"),
    ],
)
def test_refusals(args, more, error, text):
    with pytest.raises(error, match=text):
        ops.tap_loss(*args, **more)
