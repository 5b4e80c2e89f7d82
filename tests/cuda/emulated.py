"""The CUDA kernels' arithmetic, indices and barriers, run on the CPU: the threads of a block are threads here.

`test_emulated_<family>.py` has the library of `drive_<family>.cpp` as its fixture `kernels`. References are float64 and
written from the definitions. Every buffer lies between bands of NaN: a read outside poisons the result, a write outside
is found.
"""

from __future__ import annotations

import ctypes
import math
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

HERE = Path(__file__).parent
CUDA = HERE.parents[1] / "csrc/cuda"
COMPILER = os.environ.get("CXX", "g++")
# IMBDIFF_FILL=3: three blocks fill this "GPU", so that small sizes take both the split and the unsplit road.
FLAGS = ["-std=c++20", "-Wno-unknown-pragmas", "-DIMBDIFF_EMULATE", "-DIMBDIFF_FILL=3", f"-I{CUDA}"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BAND = 64  # elements of NaN before and after
# Half a unit in the last place of the rows' dtype, to which gradients are rounded.
ROUNDING = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}

needs_compiler = pytest.mark.skipif(shutil.which(COMPILER) is None, reason=f"no C++ compiler {COMPILER} (set CXX)")


def compile_driver(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [COMPILER, *FLAGS, *map(str, arguments), "-lpthread"]
    return subprocess.run(command, capture_output=True, text=True, check=False)


class Buffer:
    """Rows [n, D] with `gap` elements between them and NaN in the gaps and around; or what a kernel shall write."""

    def __init__(self, shape: Sequence[int], dtype: torch.dtype = torch.float32, gap: int = 0, shift: int = 0) -> None:
        *_, width = shape
        count = math.prod(shape[:-1])
        self.stride = width + gap
        self.whole = torch.full((2 * BAND + shift + count * self.stride,), math.nan, dtype=dtype)
        self.view = self.whole[BAND + shift :].as_strided((count, width), (self.stride, 1), BAND + shift)
        self.pointer = self.view.data_ptr() if self.view.numel() else self.whole[BAND:].data_ptr()

    def fill(self, values: Tensor) -> Buffer:
        self.view.copy_(values.reshape(self.view.shape))
        return self

    def untouched_around(self) -> bool:
        around = self.whole.clone()
        around.as_strided(self.view.shape, self.view.stride(), self.view.storage_offset()).fill_(math.nan)
        return bool(around.isnan().all())


def pointers(*buffers: Buffer | None) -> ctypes.Array[ctypes.c_void_p]:
    return (ctypes.c_void_p * max(1, len(buffers)))(*[b.pointer if b else None for b in buffers])


def rows(shape: tuple[int, int], dtype: torch.dtype, seed: int, gap: int = 0, shift: int = 0) -> Buffer:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return Buffer(shape, dtype, gap, shift).fill(values)


def close(got: Tensor, want: Tensor, dtype: torch.dtype = torch.float32, most: float = 2e-6) -> None:
    """Within a few float32 roundings of the largest, plus the rounding of the output's dtype."""
    assert torch.equal(got.isnan(), want.isnan())
    if not got.numel():
        return
    error, scale = (got.double() - want).abs().nan_to_num(), want.abs().nan_to_num()
    smallest = 6e-8 if dtype == torch.float16 else 1e-30
    assert (error <= most * scale.max() + ROUNDING[dtype] * scale + smallest).all(), error.max()
