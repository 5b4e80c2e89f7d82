"""What can be known of the CUDA library without a GPU: setup.py builds it, it spills nothing, links, loads, registers.

The CPU build of torch has all headers but no libtorch_cuda.so; an all but empty library of that name stands in for it.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from ..build import ROOT, build, python

# Of each file: kernels for an architecture, and registers that a thread may use. Two blocks of 256 threads share the
# 65536 of a multiprocessor: 128 each. Row kernels want three blocks or more, but for the backward of four factors:
# its threads have ten loads in flight each.
KERNELS = {
    "contrast": (24, 128),  # 6 of 3 dtypes, 6 of none
    "gaussian": (12, 128),  # values of 3 kinds, slopes of 3 kinds x 2 sides, 3 of none
    "neighbours": (3, 128),
    "posterior": (2, 128),
    "product": (26, 96),  # forward and backward of 3 dtypes x 4 counts, 2 of none
    "two_branch": (35, 80),  # forward and backward of 3 dtypes x 5 counts, finish of 5 counts
}

pytestmark = [
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed: nothing to compile with"),
    pytest.mark.xdist_group("nvcc"),
]


@dataclass
class Kernel:
    name: str
    architecture: str
    stack: int
    spilled: int
    registers: int


def run(*command: object) -> str:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where IMBDIFF_BUILD=cuda built, from the objects of the installation where those are current."""
    folder = tmp_path_factory.mktemp("nvcc")
    for objects in (ROOT / "build").glob("imbdiff.*"):
        shutil.copytree(objects, folder / objects.name)
    done = build(folder, IMBDIFF_BUILD="cuda")
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def library(built: Path) -> Path:
    return built / "lib" / "imbdiff" / "_C_cuda.so"


def kernels(log: str) -> list[Kernel]:
    pattern = (
        r"Compiling entry function '(\S+)' for '(sm_\d+)'\n.*\n\s*(\d+) bytes stack frame, (\d+) bytes spill stores,"
        r" (\d+) bytes spill loads\n.*Used (\d+) registers"
    )
    return [Kernel(m[1], m[2], int(m[3]), int(m[4]) + int(m[5]), int(m[6])) for m in re.finditer(pattern, log)]


@pytest.mark.parametrize("family", sorted(path.stem for path in (ROOT / "csrc/cuda").glob("*.cu")))
def test_no_kernel_spills(built: Path, family: str) -> None:
    count, most_registers = KERNELS[family]
    found = kernels((built / "imbdiff._C_cuda" / f"{family}.log").read_text())
    assert {k.architecture for k in found} == {"sm_80", "sm_90"}
    assert len(found) == 2 * count
    bad = [k for k in found if k.stack or k.spilled or k.registers > most_registers]
    assert not bad, bad


def test_undefined_symbols_are_the_stable_interface(library: Path) -> None:
    undefined = [line.split()[-1] for line in run("nm", "-D", "--undefined-only", library).splitlines()]
    of_torch = [name for name in undefined if re.search(r"torch|c10|2at|aten|cuda|cu[A-Z]", name)]
    assert "aoti_torch_get_current_cuda_stream" in of_torch
    assert [name for name in of_torch if not re.match(r"(aoti_)?torch_", name)] == []


def test_needed_libraries(library: Path) -> None:
    """libtorch_cuda.so is asked for by name; the CUDA runtime is inside."""
    needed = run("readelf", "-d", library)
    assert "[libtorch_cuda.so]" in needed
    assert "libcudart" not in needed


def test_loads_and_registers(built: Path) -> None:
    program = f"""
import ctypes
import torch
import imbdiff.ops
from imbdiff.ops._backends import CAPABILITIES, LIBRARIES
from imbdiff.ops._schema import SCHEMA_HASH, SCHEMAS

if torch.version.cuda is None:
    ctypes.CDLL({str(built / "imbdiff._C_cuda" / "libtorch_cuda.so")!r})
    torch.ops.load_library(str(LIBRARIES["cuda"]))
assert torch.ops.imbdiff.schema_hash_cuda() == int(SCHEMA_HASH, 16)
claimed = {{op for op, table in CAPABILITIES.items() if "cuda" in table}}
for name in SCHEMAS:
    there = torch._C._dispatch_has_kernel_for_dispatch_key(f"imbdiff::{{name}}_cuda", "CUDA")
    assert there == (name.removesuffix("_bwd") in claimed), name
"""
    done = python(built, program)
    assert done.returncode == 0, done.stderr
