"""Walks the registry and the capability table: what is declared there is tested here, on the back ends at hand."""

import itertools
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from imbdiff import ops
from imbdiff.ops import _backends, _op
from imbdiff.ops._op import REGISTRY, call, overload

from .cases import CASES
from .rules import back_ends, check_deterministic, check_values_and_gradients, gradients, rows, runs

RUNS, FLOAT32 = runs("cpu"), runs("cpu", [torch.float32])


@pytest.mark.parametrize(("case", "backend", "dtype"), RUNS)
def test_values_and_gradients(case, backend, dtype):
    check_values_and_gradients(case, backend, dtype, "cpu")


@pytest.mark.parametrize(("case", "backend", "dtype"), FLOAT32)
def test_outputs_are_new_and_laid_out_as_the_fake_says(case, backend, dtype):
    args = case.make(dtype)
    out = _flat(overload(f"{case.op}_{backend}")(*args))
    fake = _flat(REGISTRY[case.op].fake(backend, *args))
    for o, f in zip(out, fake, strict=True):
        assert (o.shape, o.dtype, o.stride()) == (f.shape, f.dtype, f.stride())
        assert o.is_contiguous()


@pytest.mark.parametrize(("case", "backend", "dtype"), FLOAT32)
def test_opcheck(case, backend, dtype, monkeypatch):
    """Both directions; the backward with the arguments that a training step gives it."""
    args, leaves = case.leaves(case.make(dtype))
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    op = REGISTRY[case.op]
    torch.library.opcheck(
        overload(f"{case.op}_{backend}"), case.make(dtype), test_utils=tests[: 2 + bool(rows(args).numel())]
    )
    if not leaves or op.fake_bwd is None:
        return
    seen = []
    name = f"{case.op}_bwd_{backend}"
    monkeypatch.setitem(_op._CALLS, name, lambda *a: seen.append(a) or overload(name)(*a))
    torch.autograd.grad(sum(o.sum() for o in call(case.op, backend, *args)), leaves)
    arguments = [_detached(a) for a in seen[0]]
    out, fake = _flat(overload(name)(*arguments)), _flat(op.fake_bwd(*arguments))
    for o, f in zip(out, fake, strict=True):
        assert (o.shape, o.dtype) == (f.shape, f.dtype)
        assert o.stride() == f.stride() or not o.numel()
    torch.library.opcheck(overload(name), arguments, test_utils=tests[:2])


def _flat(out):
    return [out] if isinstance(out, torch.Tensor) else [x for o in out for x in _flat(o)]


def _detached(value):
    if isinstance(value, torch.Tensor):
        return value.detach()
    return [_detached(v) for v in value] if isinstance(value, list) else value


@pytest.mark.parametrize(("case", "backend", "dtype"), FLOAT32)
def test_every_subset_of_requires_grad(case, backend, dtype):
    args = case.make(dtype)
    shapes = call(case.op, "reference", *args)
    everything = gradients(case, backend, args, [torch.ones_like(o) for o in shapes])
    n = len(case.leaves(args)[1])
    if not (n and rows(args).numel()):
        pytest.skip("no gradient to compare")
    for needs in itertools.product([False, True], repeat=n):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            some, fresh = case.leaves(args)
            for x, need in zip(fresh, needs, strict=True):
                x.requires_grad_(need)
            out = call(case.op, backend, *some)
            assert any(o.requires_grad for o in out) == any(needs)
            if any(needs):
                sum(o.sum() for o in out).backward()
        for x, need, want in zip(fresh, needs, everything[1], strict=True):
            assert (x.grad is not None) == need
            if need:
                assert torch.equal(x.grad, want)


@pytest.mark.parametrize("op", [op for op in REGISTRY if REGISTRY[op].backward])
def test_a_second_derivative_is_refused_by_name(op):
    case = next(c for c in CASES if c.op == op)
    for backend in back_ends(op, "cpu"):
        args, fresh = case.leaves(case.make(torch.float32))
        out = call(op, backend, *args)[0]
        (g,) = torch.autograd.grad(out.sum(), fresh[:1], create_graph=True)
        with pytest.raises(NotImplementedError, match=f"{op} has no second derivative.*imbdiff.ops.reference"):
            g.sum().backward()


@pytest.mark.parametrize("op", REGISTRY)
def test_deterministic_over_repeats_and_threads(op):
    for backend in back_ends(op, "cpu"):
        if backend != "reference":
            check_deterministic(op, backend, "cpu")


CAPABILITIES = ["default", "avx2", "avx512"]


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_instruction_set(capability):
    """The same values and gradients under each: this file, and what depends on the tile, with the choice forced."""
    if CAPABILITIES.index(capability) > CAPABILITIES.index(torch.backends.cpu.get_cpu_capability().lower()):
        pytest.skip(f"this processor has no {capability}")
    if "cpu" not in back_ends("two_branch", "cpu"):
        pytest.skip(f"no compiled CPU library: {_backends.PROBLEMS['cpu']}")
    files = [__file__, str(Path(__file__).with_name("test_posterior.py"))]
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *files]
    done = subprocess.run(
        [*command, "-k", "(test_values_and_gradients and cpu) or in_one_batch"],
        env={**os.environ, "ATEN_CPU_CAPABILITY": capability},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout


def test_forcing_a_back_end(monkeypatch):
    x = torch.randn(2, 3)
    with ops.use("reference"):
        ops.two_branch_loss(x, x)
    with (
        ops.use("triton"),
        pytest.raises(ValueError, match="forced back end cannot.*triton: needs cuda tensors, got cpu"),
    ):
        ops.two_branch_loss(x, x)
    with (
        pytest.raises(ValueError, match="backend must be one of auto, reference, cpu, triton, cuda, got 'fast'"),
        ops.use("fast"),
    ):
        pass
    monkeypatch.setitem(_backends.PROBLEMS, "cpu", "gone")
    with ops.use("cpu"), pytest.raises(ValueError, match="cpu: gone"):
        ops.two_branch_loss(x, x)
    ops.two_branch_loss(x, x)  # auto falls back to the reference


def test_compiles_once_over_steps():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def loss(own, target, other, weight, scales):
        base, terms = ops.two_branch_loss(own, target, [other], weight, scales, margin=[0.5])
        return base.mean() + terms.mean(1).sum()

    compiled = torch.compile(loss, fullgraph=True, backend=counter)
    for _ in range(10):
        args = [torch.randn(4, 2, 3, 3, requires_grad=i != 1) for i in range(3)] + [torch.rand(1, 4), torch.rand(1, 3)]
        got = torch.autograd.grad(compiled(*args), [args[0], args[2]])
        want = torch.autograd.grad(loss(*args), [args[0], args[2]])
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b)
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    "loss",
    [
        lambda x, l: ops.gaussian_divergence(x, l, x, l).sum(),
        lambda x, l: ops.two_branch_loss(x, l.detach(), [x, x], torch.ones(2, 5), torch.ones(2, 3))[1].sum(),
        lambda x, l: ops.posterior_mean(x, x, torch.ones(5), torch.ones(5)).square().sum(),
    ],
    ids=["gaussian_divergence", "two_branch", "posterior_mean"],
)
def test_a_tensor_that_is_an_argument_twice_compiles(loss):
    torch._dynamo.reset()
    args = [torch.randn(5, 3, requires_grad=True) for _ in range(2)]
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(*args), args, allow_unused=True)
    want = torch.autograd.grad(loss(*args), args, allow_unused=True)
    torch.testing.assert_close(got, want)
