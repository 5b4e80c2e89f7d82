"""The barriers of the CUDA kernels: one program of all families' drivers, under ThreadSanitizer."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from .emulated import CUDA, HERE, compile_driver, needs_compiler

pytestmark = needs_compiler


@pytest.fixture(scope="module")
def races(tmp_path_factory: pytest.TempPathFactory) -> Path:
    program = tmp_path_factory.mktemp("races") / "races"
    drivers = [flag for driver in sorted(HERE.glob("drive_*.cpp")) for flag in ("-include", driver)]
    built = compile_driver(*drivers, HERE / "races.cpp", "-O1", "-g", "-fsanitize=thread", "-DRACES", "-o", program)
    if built.returncode and "tsan" in built.stderr:
        pytest.skip("this compiler has no ThreadSanitizer")
    assert built.returncode == 0, built.stderr
    if "unexpected memory mapping" in run_races(program, str(0)).stderr:
        pytest.skip("ThreadSanitizer does not run under this kernel's address layout")
    return program


def run_races(program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1"}
    return subprocess.run([str(program), *arguments], capture_output=True, text=True, env=environment, check=False)


def test_no_data_race(races: Path) -> None:
    done = run_races(races)
    assert done.returncode == 0, done.stderr
    assert "WARNING: ThreadSanitizer" not in done.stderr


BARRIERS = sum(path.read_text().count("__syncthreads();") for path in CUDA.glob("*.cu*"))


@pytest.mark.parametrize("barrier", range(BARRIERS))
def test_every_barrier_is_needed(races: Path, barrier: int) -> None:
    """Proof that the test above can fail: without this one __syncthreads a race is reported.

    ThreadSanitizer remembers four accesses to a word, of 256 threads here, so a single run may miss one.
    """
    assert any("WARNING: ThreadSanitizer: data race" in run_races(races, str(barrier)).stderr for _ in range(6))
