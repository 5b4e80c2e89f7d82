"""What makes an operation: schema, fake, one derivative, and an implementation for each back end.

For an operation `f` and each back end the library holds `imbdiff::f_<backend>` and `imbdiff::f_bwd_<backend>`, all with
the schema of `_schema.py`. The compiled back ends (cpu, cuda) are implemented by the libraries under these names, the
Python ones (reference, triton) here. These are plain functions of tensors; the derivative is `call`, a thin
`autograd.Function` around the two, which calls the backward of the back end that ran the forward.

Why not `torch.library.register_autograd`: with a list of tensors it costs 240 microseconds a call, more than the
kernels of a batch of images take. `call` costs 30 and is traced by torch.compile all the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from imbdiff.ops._schema import SCHEMAS

BACKENDS = ("reference", "cpu", "triton", "cuda")
_LIBRARY = torch.library.Library("imbdiff", "DEF")
for _backend in ("cpu", "cuda"):
    _LIBRARY.define(f"schema_hash_{_backend}() -> int")


@dataclass(frozen=True)
class Op:
    """An operation's facts. Arguments of all functions are those of the schema."""

    name: str
    family: str
    """The file's stem in every room: csrc/cpu, csrc/cuda, kernels, ops, tests/ops, bench."""
    reference: Callable[..., Any]
    """Plain torch, forward only."""
    fake: Callable[..., Any]
    """(back end, ...) -> outputs as that back end allocates them: new and contiguous."""
    outputs: int = 1
    """How many of the outputs `call` returns; the others are kept for the backward."""
    keeps_all: bool = False
    """Whether the outputs that `call` returns are kept too."""
    reference_bwd: Callable[..., Any] | None = None
    """Plain torch, usually the vjp of the reference; None: `backward`, if any, needs what is kept only."""
    fake_bwd: Callable[..., Any] | None = None
    backward: Callable[..., Sequence[Tensor | None]] | None = None
    """(bwd, needs, grads, inputs, saved) -> gradients of the differentiable tensors of `inputs`, in their order.

    `bwd` is the backward operation of the same back end, if there is one, `needs` says of each tensor (lists spread
    out) whether its gradient is wanted, `grads` are the outputs' gradients, None where an output was not used, `saved`
    the outputs that are kept.
    """


REGISTRY: dict[str, Op] = {}
_CALLS: dict[str, Any] = {}
_LISTS: dict[str, list[int]] = {}
"""Positions of the arguments that are lists of tensors."""


def register(op: Op) -> Op:
    """Define the operation for every back end; implementations of compiled back ends come with their library."""
    REGISTRY[op.name] = op
    _define(op.name, op.family, op.reference, op.fake)
    if op.reference_bwd is not None and op.fake_bwd is not None:
        fake_bwd = op.fake_bwd
        _define(f"{op.name}_bwd", op.family, op.reference_bwd, lambda backend, *args: fake_bwd(*args))
    return op


def _define(name: str, family: str, reference: Callable[..., Any], fake: Callable[..., Any]) -> None:
    def launch(*args: Any) -> Any:
        # Imported when it is first called: `import imbdiff` must not import triton.
        return getattr(import_module(f"imbdiff.kernels.{family}"), name)(*args)

    def plain(*args: Any) -> Any:
        with torch.no_grad():
            return reference(*args)

    arguments = SCHEMAS[name].partition(")")[0].split(",")
    _LISTS[name] = [i for i, argument in enumerate(arguments) if "Tensor[]" in argument]
    for backend in BACKENDS:
        _LIBRARY.define(f"{name}_{backend}{SCHEMAS[name]}")
        torch.library.register_fake(f"imbdiff::{name}_{backend}", partial(fake, backend), lib=_LIBRARY)
        _CALLS[f"{name}_{backend}"] = overload(f"{name}_{backend}")
    _LIBRARY.impl(f"{name}_reference", plain, "CompositeExplicitAutograd")
    _LIBRARY.impl(f"{name}_triton", launch, "CUDA")


def overload(name: str) -> Any:
    """The callable `imbdiff::name`, without the packet's overload resolution."""
    return getattr(torch.ops.imbdiff, name).default


def call(name: str, backend: str, *args: Any) -> tuple[Tensor, ...]:
    """The operation's leading outputs on this back end, with their derivative."""
    op = REGISTRY[name]
    if op.backward is None or not torch.is_grad_enabled():
        return forward(name, backend, args)[: op.outputs]
    # autograd sees the tensors that are arguments, not those in lists: the lists are spread out.
    flat, lengths = list(args), [len(args[i]) for i in _LISTS[name]]
    for i in reversed(_LISTS[name]):
        flat[i : i + 1] = args[i]
    if torch.compiler.is_compiling():
        # Its tracer refuses a function of autograd that gets one tensor twice.
        seen = [any(x is y for y in flat[:i]) for i, x in enumerate(flat)]
        flat = [x.view_as(x) if again and isinstance(x, Tensor) else x for x, again in zip(flat, seen, strict=True)]
    out = _Derivative.apply(name, backend, lengths, *flat)
    return out if isinstance(out, tuple) else (out,)


def forward(name: str, backend: str, args: Sequence[Any]) -> tuple[Tensor, ...]:
    """All outputs."""
    out = _CALLS[f"{name}_{backend}"](*args)
    return out if isinstance(out, tuple) else (out,)


def derive(
    name: str,
    backend: str,
    needs: Sequence[bool],
    grads: Sequence[Tensor | None],
    args: Sequence[Any],
    kept: Sequence[Tensor],
) -> Sequence[Tensor | None]:
    """The operation's `backward`, whose results refuse to be differentiated again."""
    derivative = REGISTRY[name].backward
    assert derivative is not None
    bwd = _CALLS.get(f"{name}_bwd_{backend}")
    if not torch.is_grad_enabled():  # by far the most calls, and a guard that changes nothing takes microseconds
        return derivative(bwd, needs, grads, args, kept)
    with torch.no_grad():
        got = derivative(bwd, needs, grads, args, kept)
    if torch.compiler.is_compiling():
        return got
    spread = [x for a in args for x in (a if isinstance(a, list) else [a])]
    inputs = [x for x in (*grads, *spread, *kept) if isinstance(x, Tensor)]
    return [g if g is None else NoSecondDerivative.apply(name, g, *inputs) for g in got]


def wanted(gradients: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor | None]:
    """None where no gradient was asked for; a backward operation returns an empty tensor there."""
    return [g if need else None for g, need in zip(gradients, needs, strict=True)]


class _Derivative(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, name: str, backend: str, lengths: list[int], *flat: Any) -> Any:
        args = list(flat)
        for i, n in zip(_LISTS[name], lengths, strict=True):
            args[i : i + n] = [args[i : i + n]]
        out = forward(name, backend, args)
        n = REGISTRY[name].outputs
        kept = out if REGISTRY[name].keeps_all else out[n:]
        ctx.set_materialize_grads(False)
        ctx.name, ctx.backend, ctx.lengths, ctx.kept = name, backend, lengths, len(kept)
        ctx.constants = [None if isinstance(x, Tensor) else x for x in flat]
        ctx.save_for_backward(*kept, *[x for x in flat if isinstance(x, Tensor)])
        return out[0] if n == 1 else out[:n]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        tensors = ctx.saved_tensors
        rest = iter(tensors[ctx.kept :])
        args = [next(rest) if constant is None else constant for constant in ctx.constants]
        for i, n in zip(_LISTS[ctx.name], ctx.lengths, strict=True):
            args[i : i + n] = [args[i : i + n]]
        needs = ctx.needs_input_grad[3:]
        got = derive(ctx.name, ctx.backend, needs, grads, args, tensors[: ctx.kept])
        return (None, None, None, *got, *[None] * (len(needs) - len(got)))


class NoSecondDerivative(torch.autograd.Function):
    """Without it `create_graph=True` would give gradients that a second backward silently takes for constants."""

    @staticmethod
    def forward(ctx: Any, name: str, gradient: Tensor, *inputs: Tensor | None) -> Tensor:
        ctx.name = name
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise NotImplementedError(
            f"imbdiff.ops: {ctx.name} has no second derivative; the plain-torch form in imbdiff.ops.reference has"
        )
