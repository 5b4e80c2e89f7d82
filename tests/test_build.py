"""IMBDIFF_BUILD and what it says. What a missing tool looks like is made by CXX, CUDA_HOME and PATH."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from .build import ROOT, build, python

pytestmark = pytest.mark.xdist_group("build")
CXX = os.environ.get("CXX", "g++")
needs_compiler = pytest.mark.skipif(shutil.which(CXX) is None, reason=f"no C++ compiler {CXX} (set CXX)")
USE = """
import torch
from imbdiff import ops
from imbdiff.ops import _backends

x = torch.randn(4, 3, requires_grad=True)
ops.negative_distance_loss(x, tau=1.0).backward()
assert _backends.choose("negative_distance", x) == "reference"
assert x.grad.any()
print(_backends.PROBLEMS["cpu"])
"""


def of_imbdiff(done: subprocess.CompletedProcess[str]) -> list[str]:
    """What the build said of itself."""
    return [line for line in (done.stdout + done.stderr).splitlines() if line.startswith("imbdiff: ")]


def libraries(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("_C*.so"))


@pytest.fixture(scope="module")
def pure(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("none")
    done = build(folder, IMBDIFF_BUILD="none")
    assert done.returncode == 0, done.stderr
    assert of_imbdiff(done) == []
    return folder


def test_none_is_pure_python_and_runs_on_the_reference(pure: Path) -> None:
    assert libraries(pure) == []
    done = python(pure, USE)
    assert done.returncode == 0, done.stderr
    assert "IMBDIFF_BUILD=cpu pip install --no-build-isolation ." in done.stdout


def test_auto_without_a_compiler_says_so_once(tmp_path: Path) -> None:
    done = build(tmp_path, CXX="no-such-compiler", CUDA_HOME="/no/such/toolkit")
    assert done.returncode == 0, done.stderr
    assert of_imbdiff(done) == [
        "imbdiff: installing without compiled operations: no C++ compiler: no-such-compiler not found (set CXX)"
    ]
    assert libraries(tmp_path) == []
    assert python(tmp_path, USE).returncode == 0


@needs_compiler
@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (None, "no CUDA compiler: nvcc not found in CUDA_HOME="),
        ("#!/bin/sh\necho no headers here >&2\nexit 1\n", "bin/nvcc can't compile an empty kernel: no headers here"),
    ],
    ids=["absent", "broken"],
)
def test_cuda_without_a_working_nvcc_fails_early_and_auto_leaves_it_out(
    tmp_path: Path, make: str | None, reason: str
) -> None:
    nvcc = tmp_path / "toolkit" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    if make:
        nvcc.write_text(make)
        nvcc.chmod(0o755)
    asked = build(tmp_path, IMBDIFF_BUILD="cuda", CUDA_HOME=str(tmp_path / "toolkit"))
    assert asked.returncode
    assert "IMBDIFF_BUILD=cuda, but " in asked.stderr
    assert reason in asked.stderr
    assert libraries(tmp_path) == []
    assert "-c csrc" not in asked.stdout  # nothing was compiled before that
    # What auto decides; the compiling itself is every other test's: true compiles and links nothing.
    shutil.copy(shutil.which("true") or "/bin/true", tmp_path / "cxx")
    auto = build(tmp_path, CUDA_HOME=str(tmp_path / "toolkit"), CXX=str(tmp_path / "cxx"))
    (line,) = of_imbdiff(auto)
    assert line.startswith("imbdiff: installing without the CUDA kernels: ")
    assert reason in line


@needs_compiler
def test_cpu_and_cuda_need_a_compiler(tmp_path: Path) -> None:
    for choice in ("cpu", "cuda"):
        done = build(tmp_path, IMBDIFF_BUILD=choice, CXX="no-such-compiler")
        assert done.returncode
        assert f"IMBDIFF_BUILD={choice}, but no C++ compiler: no-such-compiler not found" in done.stderr


def test_mistakes_are_refused(tmp_path: Path) -> None:
    done = build(tmp_path, IMBDIFF_BUILD="gpu")
    assert done.returncode
    assert "IMBDIFF_BUILD must be one of auto, cpu, cuda, none, got 'gpu'" in done.stderr
    if shutil.which("nvcc") and shutil.which(CXX):
        done = build(tmp_path, IMBDIFF_BUILD="cuda", TORCH_CUDA_ARCH_LIST="9.0;Hopper")
        assert done.returncode
        assert "TORCH_CUDA_ARCH_LIST must be like 8.0+PTX;9.0, got 'Hopper' in it" in done.stderr


@needs_compiler
def test_a_library_of_other_schemas_is_refused_at_import(pure: Path, tmp_path: Path) -> None:
    shutil.copytree(pure / "lib", tmp_path / "lib")
    home = Path(torch.__file__).parent
    flags = ["-DTORCH_TARGET_VERSION=0x020a000000000000ULL", "-DIMBDIFF_SCHEMA_HASH=5", f"-isystem{home}/include"]
    source, library = ROOT / "csrc" / "cpu" / "library.cpp", tmp_path / "lib" / "imbdiff" / "_C.so"
    command = [CXX, "-std=c++20", "-fPIC", "-shared", *flags, str(source), "-o", str(library)]
    subprocess.run([*command, f"-L{home}/lib", "-ltorch_cpu"], check=True)
    done = python(tmp_path, "import imbdiff.ops")
    assert done.returncode
    assert "ImportError" in done.stderr
    assert "was built from other schemas (5, this source has" in done.stderr
    assert "build it again: IMBDIFF_BUILD=cpu pip install --no-build-isolation ." in done.stderr
