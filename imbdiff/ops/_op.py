"""What makes an operation: schema, fake, one derivative, and an implementation for each back end.

For an operation `f` and each back end the library holds `imbdiff::f_<backend>` and `imbdiff::f_bwd_<backend>`, all with
the schema of `_schema.py`. The compiled back ends (cpu, cuda) are implemented by the libraries under these names, the
Python ones (reference, triton) here. Every forward has the same fake and the same derivative, which calls the backward
of its own back end. A public function asks `_backends.choose` which one to call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
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
    reference: Callable[..., tuple[Tensor, ...]]
    """Plain torch, forward only."""
    reference_bwd: Callable[..., Any]
    """Plain torch, usually `torch.func.vjp` of the reference."""
    fake: Callable[..., tuple[Tensor, ...]]
    """(back end, ...) -> outputs as that back end allocates them: new and contiguous."""
    fake_bwd: Callable[..., Any]
    setup: Callable[[Any, tuple[Any, ...], tuple[Tensor, ...]], None]
    """Saves what the derivative needs."""
    backward: Callable[..., Any]
    """(ctx, call, *grads) -> gradients of the arguments; `call` is the backward operation of the same back end."""


REGISTRY: dict[str, Op] = {}


def register(op: Op) -> Op:
    """Define the operation for every back end; implementations of compiled back ends come with their library."""
    REGISTRY[op.name] = op
    for backend in BACKENDS:
        forward, backward = f"{op.name}_{backend}", f"{op.name}_bwd_{backend}"
        _LIBRARY.define(forward + SCHEMAS[op.name])
        _LIBRARY.define(backward + SCHEMAS[f"{op.name}_bwd"])
        if backend == "reference":
            _LIBRARY.impl(forward, _detached(op.reference), "CompositeExplicitAutograd")
            _LIBRARY.impl(backward, op.reference_bwd, "CompositeExplicitAutograd")
        elif backend == "triton":
            _LIBRARY.impl(forward, _launcher(op.name, op.name), "CUDA")
            _LIBRARY.impl(backward, _launcher(op.name, f"{op.name}_bwd"), "CUDA")
        torch.library.register_fake(f"imbdiff::{forward}", partial(op.fake, backend))
        torch.library.register_fake(f"imbdiff::{backward}", op.fake_bwd)
        torch.library.register_autograd(
            f"imbdiff::{forward}", _derivative(op, backward), setup_context=_setup(op.setup), lib=_LIBRARY
        )
        torch.library.register_autograd(f"imbdiff::{backward}", _no_second_derivative(op.name), lib=_LIBRARY)
    return op


def overload(name: str) -> Any:
    """The callable `imbdiff::name`, without the packet's overload resolution."""
    return getattr(torch.ops.imbdiff, name).default


def _detached(reference: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor, ...]]:
    def forward(*args: Any) -> tuple[Tensor, ...]:
        with torch.no_grad():
            return reference(*args)

    return forward


def _launcher(module: str, name: str) -> Callable[..., Any]:
    """The Triton launcher, imported when it is first called: `import imbdiff` must not import triton."""

    def launch(*args: Any) -> Any:
        from importlib import import_module

        return getattr(import_module(f"imbdiff.kernels.{FAMILY[module]}"), name)(*args)

    return launch


FAMILY = {"two_branch": "two_branch", "negative_distance": "contrast"}
"""The family, that is the file's stem in every room, of each operation."""


def _setup(setup: Callable[[Any, tuple[Any, ...], tuple[Tensor, ...]], None]) -> Callable[..., None]:
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.set_materialize_grads(False)
        setup(ctx, inputs, output)

    return setup_context


def _derivative(op: Op, backward: str) -> Callable[..., Any]:
    def derivative(ctx: Any, *grads: Tensor | None) -> Any:
        return op.backward(ctx, overload(backward), *grads)

    return derivative


def _no_second_derivative(name: str) -> Callable[..., Any]:
    def refuse(ctx: Any, *grads: Any) -> Any:
        raise NotImplementedError(
            f"imbdiff.ops: {name} has no second derivative; the plain-torch form in imbdiff.ops.reference has"
        )

    return refuse


def wanted(grads: Sequence[Tensor]) -> list[Tensor | None]:
    """Gradients that were asked for; an implementation returns an empty tensor of shape [0] for the others."""
    return [g if g.dim() > 1 else None for g in grads]
