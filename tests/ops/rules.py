"""What every operation is held to, on whatever back end and device: shared by test_every_op.py and tests/gpu."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from imbdiff.ops import _backends
from imbdiff.ops._op import call

from .case import Case
from .cases import CASES

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")]


def back_ends(op: str, device: str) -> list[str]:
    """Those that the table gives this device. What the CPU lacks is left out; what a GPU lacks, `runs` skips aloud."""
    table = _backends.CAPABILITIES[op]
    found = [b for b, can in table.items() if can.device in ("any", device)]
    return [b for b in found if device == "cuda" or b not in _backends.PROBLEMS]


def gpu_marks(backend: str) -> list[pytest.MarkDecorator]:
    problem = _backends.PROBLEMS.get(backend)
    return [*GPU, pytest.mark.skipif(problem is not None, reason=f"{backend}: {problem}")]


def runs(device: str, dtypes: list[torch.dtype] = DTYPES) -> list[Any]:
    """(case, backend, dtype) for every line of the table on that device; the reference needs no test on the GPU."""
    return [
        pytest.param(
            case,
            backend,
            dtype,
            id=f"{case.op}-{case.label}-{backend}-{str(dtype)[6:]}",
            marks=gpu_marks(backend) if device == "cuda" else [],
        )
        for case in CASES
        for backend in back_ends(case.op, device)
        for dtype in dtypes
        if dtype in _backends.CAPABILITIES[case.op][backend].dtypes and (device, backend) != ("cuda", "reference")
    ]


def mapped(value: Any, change: Any) -> Any:
    """The tensors of an argument list, changed; the rest as it is."""
    if isinstance(value, list | tuple):
        return type(value)(mapped(v, change) for v in value)
    return change(value) if isinstance(value, Tensor) else value


def double(value: Any) -> Any:
    return mapped(value, lambda x: x.double() if x.is_floating_point() else x)


def moved(value: Any, device: str) -> Any:
    """On the device with the strides kept: `.to` would make an expanded or sliced tensor dense."""

    def move(x: Tensor) -> Tensor:
        if x.device.type == device:
            return x
        whole = x.as_strided((x.untyped_storage().nbytes() // x.element_size(),), (1,), 0)
        return whole.to(device).as_strided(x.shape, x.stride(), x.storage_offset())

    return mapped(value, move)


def rows(args: Any) -> Tensor:
    """The first tensor among the arguments."""
    return args[0][0] if isinstance(args[0], list) else args[0]


def upstream(out: Any) -> list[Tensor]:
    return [torch.randn_like(o) if o.is_floating_point() else o for o in out]


def gradients(case: Case, backend: str, args: Any, grads: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs, and gradients of the rows for these gradients of the outputs."""
    args, fresh = case.leaves(args)
    out = call(case.op, backend, *args)
    used = [(o, g) for o, g in zip(out, grads, strict=True) if o.requires_grad]
    loss = sum((o * g.to(o)).sum() for o, g in used)
    got = torch.autograd.grad(loss, fresh) if used and rows(args).numel() else [torch.zeros_like(x) for x in fresh]
    return [o.detach() for o in out], list(got)


def error_ratio_holds(got: Tensor, exact: Tensor, plain: float, factor: float, eps: float, condition: float) -> bool:
    """err(kernel) <= factor * (err(plain torch) + eps * max|exact| * (1 + condition)), and finite.

    `condition` is the relative size of what cancels; eps is that of the result, or of the rows where they are rounded.
    """
    if not exact.numel():
        return got.shape == exact.shape
    size = max(float(exact.abs().max()), float(condition > 0 and exact.ndim == 0))
    bound = factor * (plain + eps * size * (1 + condition))
    return bool(got.isfinite().all()) and float((got.double() - exact).abs().max()) <= bound


def plain_errors(case: Case, args: Any, grads: list[Tensor]) -> list[list[float]]:
    """The reference's largest error in each output and each gradient of the rows, in the type of the rows.

    In float64 nothing more exact is at hand, and what is taken for exact has this error itself: there it is that of
    float32, at the rows rounded to it, in units of float64.
    """
    given, unit = (args, grads), 1.0
    if rows(args).dtype == torch.float64:
        given = mapped(given, lambda x: x.float() if x.is_floating_point() else x)
        unit = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
    both = (gradients(case, "reference", *given), gradients(case, "reference", *double(given)))
    pairs = (zip(*part, strict=True) for part in zip(*both, strict=True))
    return [[unit * float((p.double() - e).abs().max()) if e.numel() else 0.0 for p, e in part] for part in pairs]


def check_values_and_gradients(case: Case, backend: str, dtype: torch.dtype, device: str) -> None:
    """Against the reference in float64 on the CPU, beside the reference in the same dtype there."""
    args = case.make(dtype)
    shapes = call(case.op, "reference", *args)
    grads = upstream(shapes)
    types = [[o.dtype for o in shapes], [x.dtype for x in case.leaves(args)[1]]]
    exact = gradients(case, "reference", double(args), double(grads))
    plain = plain_errors(case, args, grads)
    got = moved(gradients(case, backend, moved(args, device), moved(grads, device)), "cpu")
    for part, factor in ((0, 2), (1, 3)):
        for g, p, e, dtype_of in zip(got[part], plain[part], exact[part], types[part], strict=True):
            assert (g.dtype, g.shape) == (dtype_of, e.shape)
            if not e.is_floating_point():
                assert torch.equal(g, e)
                continue
            eps = torch.finfo(dtype if case.rounds_rows else g.dtype).eps
            condition = case.condition(args) * (case.cancels(double(args), double(grads)) if part else 1.0)
            assert error_ratio_holds(g, e, p, factor, eps, condition)


def check_deterministic(op: str, backend: str, device: str) -> None:
    """Twenty repeats of the largest case, bit by bit; on the CPU with one and with two threads."""
    case = max((c for c in CASES if c.op == op), key=lambda c: rows(c.make(torch.float32)).numel())
    args = moved(case.make(torch.float32), device)
    grads = [torch.ones_like(o) for o in call(op, "reference", *args)]
    first = gradients(case, backend, args, grads)
    try:
        for repeat in range(20):
            torch.set_num_threads(1 + repeat % 2)
            again = gradients(case, backend, args, grads)
            for a, b in zip([*first[0], *first[1]], [*again[0], *again[1]], strict=True):
                assert torch.equal(a, b)
    finally:
        torch.set_num_threads(1)
