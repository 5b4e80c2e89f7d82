"""Argument checks of the public operations, in one order and with one form of message.

Order: type, device, rank, shape, dtype, values. Message: operation, argument, what was expected, what came.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} {list(value.shape)} on {value.device}"
    return f"{type(value).__name__} {value!r}"


def tensor(
    op: str,
    name: str,
    value: object,
    shape: Sequence[int | None] | None = None,
    symbols: str = "",
    *,
    like: Tensor | None = None,
    dtypes: Sequence[torch.dtype] = FLOATS,
) -> Tensor:
    """`value` if it is a tensor on `like`'s device with this shape (None: any size; shape None: any rank >= 1)."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor {symbols}, got {describe(value)}")
    if like is not None and value.device != like.device:
        raise ValueError(f"{op}: {name} must be on {like.device} as the first argument is, got {describe(value)}")
    if shape is None:
        if value.ndim == 0:
            raise ValueError(f"{op}: {name} must be {symbols}, got a scalar")
    elif value.shape != shape and (
        value.ndim != len(shape) or any(want not in (None, got) for want, got in zip(shape, value.shape, strict=True))
    ):
        sizes = ", ".join("any" if want is None else str(want) for want in shape)
        raise ValueError(f"{op}: {name} must be {symbols} = [{sizes}], got {describe(value)}")
    if value.dtype not in dtypes:
        names = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise TypeError(f"{op}: {name} must be one of {names}, got {describe(value)}")
    return value


def same(op: str, name: str, value: object, first: str, like: Tensor) -> Tensor:
    """`value` if it is a tensor of `like`'s device, shape and dtype."""
    if isinstance(value, Tensor) and (value.shape, value.dtype, value.device) == (like.shape, like.dtype, like.device):
        return value
    return same_dtype(op, first, like, name, tensor(op, name, value, like.shape, f"{first}'s shape", like=like))


def same_dtype(op: str, first: str, a: Tensor, name: str, b: Tensor) -> Tensor:
    if a.dtype != b.dtype:
        raise TypeError(f"{op}: {name} must have {first}'s dtype {a.dtype}, got {describe(b)}")
    return b


def constant(op: str, name: str, value: Tensor) -> Tensor:
    """An argument through which no gradient flows; asking for one is refused rather than answered with None."""
    if value.requires_grad:
        raise ValueError(f"{op}: {name} is a constant of this operation; pass {name}.detach(), got requires_grad=True")
    return value


def positive(op: str, name: str, value: float) -> float:
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{op}: {name} must be a positive finite number, got {value!r}")
    return float(value)


def choice(op: str, name: str, value: str, names: Sequence[str]) -> int:
    """The index of `value` among `names`."""
    if value not in names:
        raise ValueError(f"{op}: {name} must be one of {', '.join(map(repr, names))}, got {value!r}")
    return names.index(value)


def values(op: str, name: str, value: Tensor, allowed: Callable[[float], bool], symbols: str) -> Tensor:
    """Refuses values outside an interval, by the extremes: a mask of all takes several times as long.

    On the CPU only: elsewhere, and while compiling, looking at them would wait for the device.
    """
    if value.device.type == "cpu" and not torch.compiler.is_compiling() and value.numel():
        for extreme in value.aminmax():  # NaN where any is
            if not allowed(extreme.item()):
                raise ValueError(f"{op}: {name} must be {symbols}, got {extreme.item():g} in {describe(value)}")
    return value


def finite(op: str, name: str, value: Tensor) -> Tensor:
    return values(op, name, value, lambda v: abs(v) < math.inf, "finite")


def row_weight(op: str, weight: Tensor | None, x: Tensor) -> Tensor:
    """[N] in the accumulator's type, or empty for all ones."""
    acc = accumulator(x.dtype)
    if weight is None:
        return x.new_empty(0, dtype=acc)
    return small(constant(op, "weight", tensor(op, "weight", weight, x.shape[:1], "[N]", like=x)), acc)


def small(value: Tensor, dtype: torch.dtype) -> Tensor:
    """`value` dense and of this type. Asks first: a conversion of nothing costs as much as all checks of a call."""
    return value if value.dtype == dtype and value.is_contiguous() else value.to(dtype).contiguous()


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """Sums and statistics: float64 for float64 inputs, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def rows(x: Tensor) -> Tensor:
    """[B, ...] as [B, D] whose rows are dense; a view wherever the layout allows: a channel slice is not copied."""
    flat = x if x.ndim == 2 else x.reshape(x.shape[0], math.prod(x.shape[1:]))
    return flat if flat.shape[1] <= 1 or flat.stride(1) == 1 else flat.contiguous()
