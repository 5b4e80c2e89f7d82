"""What can be known of the CUDA library without a GPU: it compiles, spills nothing, links, loads and registers.

The CPU build of torch has all headers but no libtorch_cuda.so; an empty library of that name stands in for it.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from imbdiff.ops._schema import SCHEMA_HASH

CSRC = Path(__file__).parents[2] / "csrc/cuda"
TORCH = Path(torch.__file__).parent
INCLUDES = [f"-I{TORCH / 'include'}", f"-I{TORCH / 'include/torch/csrc/api/include'}"]
HASH = int(SCHEMA_HASH, 16)
DEFINES = ["-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000ULL", f"-DIMBDIFF_SCHEMA_HASH={HASH}"]
ARCHITECTURES = ["arch=compute_80,code=[sm_80,compute_80]", "arch=compute_90,code=sm_90"]
NVCC = [
    "nvcc", "-std=c++20", "-O3", "-Xptxas", "-v", "-Xcompiler", "-fPIC,-fvisibility=hidden",
    *(word for a in ARCHITECTURES for word in ("-gencode", a)), *DEFINES, *INCLUDES,
]  # fmt: skip
# Two blocks of 256 threads share the 65536 registers of a multiprocessor: 128 each. Row kernels want three or more.
MOST_REGISTERS = {"two_branch": 80, "contrast": 128}

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
def build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("nvcc")


@pytest.fixture(scope="module")
def logs(build: Path) -> dict[str, str]:
    """What ptxas said of each family."""
    return {f: run(*NVCC, "-c", CSRC / f"{f}.cu", "-o", build / f"{f}.o") for f in MOST_REGISTERS}


@pytest.fixture(scope="module")
def library(build: Path, logs: dict[str, str]) -> Path:
    stub, path = build / "libtorch_cuda.so", build / "_C_cuda.so"
    source = build / "stub.c"
    # The only symbol that is taken from it; the others are in libtorch_cpu.
    source.write_text("int aoti_torch_get_current_cuda_stream(int device, void** stream) { return 1; }\n")
    run("g++", "-x", "c", source, "-shared", "-fPIC", "-Wl,-soname,libtorch_cuda.so", "-o", stub)
    flags = ["-std=c++20", "-fPIC", "-fvisibility=hidden", *DEFINES, *INCLUDES]
    run("g++", *flags, "-c", CSRC / "library.cpp", "-o", build / "library.o")
    objects = [build / f"{f}.o" for f in (*logs, "library")]
    run(
        "nvcc", "-shared", "-cudart", "static", *objects, "-o", path, f"-L{build}", f"-L{TORCH / 'lib'}",
        "-Xlinker", "--no-as-needed,-ltorch_cuda", "-ltorch_cpu", "-lc10", "-Xlinker", f"-rpath,{build}",
    )  # fmt: skip
    return path


def kernels(log: str) -> list[Kernel]:
    pattern = (
        r"Compiling entry function '(\S+)' for '(sm_\d+)'\n.*\n\s*(\d+) bytes stack frame, (\d+) bytes spill stores,"
        r" (\d+) bytes spill loads\n.*Used (\d+) registers"
    )
    return [Kernel(m[1], m[2], int(m[3]), int(m[4]) + int(m[5]), int(m[6])) for m in re.finditer(pattern, log)]


# forward and backward of 3 dtypes x 5 counts, finish of 5 counts; 7 kernels of 3 dtypes, 2 of none.
@pytest.mark.parametrize(("family", "count"), [("two_branch", 35), ("contrast", 23)])
def test_no_kernel_spills(logs: dict[str, str], family: str, count: int) -> None:
    found = kernels(logs[family])
    assert {k.architecture for k in found} == {"sm_80", "sm_90"}
    assert len(found) == 2 * count
    bad = [k for k in found if k.stack or k.spilled or k.registers > MOST_REGISTERS[family]]
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


def test_loads_and_registers(library: Path) -> None:
    program = f"""
import torch
import imbdiff.ops
from imbdiff.ops._schema import SCHEMA_HASH, SCHEMAS

torch.ops.load_library({str(library)!r})
assert torch.ops.imbdiff.schema_hash_cuda() == int(SCHEMA_HASH, 16)
for name in SCHEMAS:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"imbdiff::{{name}}_cuda", "CUDA"), name
"""
    run(sys.executable, "-c", program)
