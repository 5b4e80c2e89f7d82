"""Triton kernels without a GPU: interpreted, in a process of their own.

Triton decides at its import whether it interprets, and other tests must not find an interpreting one. So a file
`test_triton_*.py` is one test that runs pytest on that file in a process with TRITON_INTERPRET=1. For a single test:
TRITON_INTERPRET=1 pytest tests/kernels/test_triton_contrast.py -k nan
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
BAND = 37  # elements of NaN before and after a buffer; odd, so that buffers are unaligned too


class Interpreted(pytest.Module):
    def collect(self) -> Iterator[pytest.Item]:
        yield Process.from_parent(self, name="interpreted")


class Process(pytest.Item):
    def runtest(self) -> None:
        environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(self.path)]
        environment["TRITON_INTERPRET"] = "1"
        run = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=self.config.rootpath)
        if run.returncode:
            pytest.fail(f"{' '.join(command)}\n{run.stdout[-8000:]}{run.stderr[-2000:]}", pytrace=False)


def pytest_pycollect_makemodule(module_path: Path, parent: Any) -> pytest.Module | None:
    if INTERPRETED or not module_path.name.startswith("test_triton_") or not importlib.util.find_spec("triton"):
        return None
    return Interpreted.from_parent(parent, path=module_path)


if INTERPRETED and importlib.util.find_spec("triton"):
    from triton.runtime import interpreter

    _patch = interpreter._patch_lang_tensor

    def _patched(tensor: Any, scope: Any) -> None:
        # triton 3.6 takes int() of an array of one element as a loop bound; numpy 2.4 refuses that.
        _patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = _patched


@pytest.fixture
def guard() -> Callable[..., Tensor]:
    """The same values inside a buffer of NaN (of -1, for integers), `gap` NaN between rows."""

    def place(x: Tensor, gap: int = 0) -> Tensor:
        n, width = (x.shape[0], x.shape[1] + gap) if x.ndim == 2 else (1, x.numel())
        nothing = torch.nan if x.is_floating_point() else -1
        buffer = torch.full((2 * BAND + n * width,), nothing, dtype=x.dtype)
        strides = (width, 1) if x.ndim == 2 else x.stride()
        return buffer.as_strided(x.shape, strides, BAND).copy_(x)

    return place


@pytest.fixture
def bands(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[Tensor, int]]]:
    """What launchers allocate starts as NaN and lies between bands of NaN, which are checked at the end of the test."""
    buffers: list[tuple[Tensor, int]] = []
    empty, new_empty = torch.empty, torch.Tensor.new_empty

    def allocate(shape: tuple[Any, ...], dtype: torch.dtype) -> Tensor:
        shape = torch.Size(shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape)
        buffer = torch.full((2 * BAND + shape.numel(),), torch.nan, dtype=dtype)
        buffers.append((buffer, shape.numel()))
        return buffer[BAND : BAND + shape.numel()].view(shape)

    def guarded(self: Tensor, *shape: Any, dtype: torch.dtype | None = None, **options: Any) -> Tensor:
        if options:  # the interpreter's own
            return new_empty(self, *shape, dtype=dtype, **options)
        return allocate(shape, dtype or self.dtype)

    monkeypatch.setattr(torch.Tensor, "new_empty", guarded)
    monkeypatch.setattr(torch, "empty", lambda *s, dtype=None, device=None: allocate(s, dtype) if dtype else empty(*s))
    yield buffers
    for buffer, size in buffers:
        assert buffer[:BAND].isnan().all(), "written before the start of an output"
        assert buffer[BAND + size :].isnan().all(), "written behind the end of an output"


@pytest.fixture
def close() -> Callable[..., None]:
    """Error against float64 at most `factor` times (the error of plain torch + eps of the largest value + `slack`)."""

    def check(got: Tensor, exact: Tensor, plain: Tensor, factor: float = 2.0, slack: float = 0.0) -> None:
        assert got.shape == exact.shape
        assert got.isfinite().all()
        if exact.numel() == 0:
            return
        eps = torch.finfo(got.dtype).eps
        # Interpreted stores of bfloat16 truncate, an error of up to eps where rounding makes half: within this bound.
        bound = factor * ((plain.double() - exact).abs().max() + eps * exact.abs().max() + slack)
        error = (got.double() - exact).abs().max()
        assert error <= bound, f"error {error:.2e} above {bound:.2e}"

    return check
