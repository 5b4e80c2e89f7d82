"""How the Gaussian operations take a log-variance, and when a matrix of all pairs is refused."""

from __future__ import annotations

import math
import os

import torch
from torch import Tensor

from imbdiff.ops import _check


def logvar(op: str, name: str, value: Tensor | float, mean_name: str, mean: Tensor) -> Tensor:
    """Like its mean [..., D], or one number a row [..., 1], which is kept in the accumulator's type."""
    acc, one = _check.accumulator(mean.dtype), (*mean.shape[:-1], 1)
    if isinstance(value, int | float):
        if not math.isfinite(value):
            raise ValueError(f"{op}: {name} must be finite, got {value!r}")
        return mean.new_full(one, value, dtype=acc)
    if isinstance(value, Tensor) and value.ndim == 0:
        _check.tensor(op, name, value.view(1), (1,), "a scalar", like=mean)
        return value.to(acc).expand(one).contiguous()
    if isinstance(value, Tensor) and value.shape == one:
        return _check.small(_check.tensor(op, name, value, one, "[..., 1]", like=mean), acc)
    symbols = f"{mean_name}'s shape, that with a last 1, or a scalar"
    _check.same_dtype(op, mean_name, mean, name, _check.tensor(op, name, value, mean.shape, symbols, like=mean))
    return value if value.stride(-1) == 1 else value.contiguous()


def refuse_what_does_not_fit(op: str, size: tuple[int, ...], like: Tensor, copies: int, instead: str) -> None:
    """An allocation that cannot succeed, refused with its size before it takes the machine down."""
    GiB = 2**30
    needed = math.prod(size) * (8 if like.dtype == torch.float64 else 4) * copies / GiB
    # Small ones fit, and while compiling the sizes may be symbols.
    if torch.compiler.is_compiling() or needed < 0.25:
        return
    free = free_bytes(like.device)
    if free is not None and needed > free / GiB:
        shape = " x ".join(map(str, size))
        raise ValueError(
            f"{op}: the {shape} matrix{'' if copies == 1 else ' and its gradient'} would take {needed:.1f} GiB, "
            f"{like.device} has {free / GiB:.1f} GiB free; {instead}"
        )


def free_bytes(device: torch.device) -> int | None:
    """What can be allocated there now; None where nobody can say."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    if device.type != "cpu":
        return None
    try:
        with open("/proc/meminfo") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        names = ("SC_AVPHYS_PAGES", "SC_PAGE_SIZE")
        return math.prod(map(os.sysconf, names)) if set(names) <= os.sysconf_names.keys() else None
