"""The barriers of the CUDA kernels: one program of all families' drivers, under ThreadSanitizer."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from .emulated import CUDA, HERE, compile_driver, needs_compiler

pytestmark = [needs_compiler, pytest.mark.xdist_group("races")]
DRIVERS = sorted(HERE.glob("drive_*.cpp"))
SOURCE = [*(flag for driver in DRIVERS for flag in ("-include", driver)), HERE / "races.cpp", "-DRACES"]


@pytest.fixture(scope="module")
def races(tmp_path_factory: pytest.TempPathFactory) -> Path:
    program = tmp_path_factory.mktemp("races") / "races"
    built = compile_driver(*SOURCE, "-O1", "-g", "-fsanitize=thread", "-o", program)
    if built.returncode and "tsan" in built.stderr:
        pytest.skip("this compiler has no ThreadSanitizer")
    assert built.returncode == 0, built.stderr
    if "unexpected memory mapping" in run_races(program).stderr:
        pytest.skip("ThreadSanitizer does not run under this kernel's address layout")
    return program


@pytest.fixture(scope="module")
def users() -> dict[int, int]:
    """Of each barrier, by its number in the source, the first driver that has it."""
    driver, found = -1, {}
    for line in compile_driver(*SOURCE, "-E").stdout.splitlines():
        if line.startswith("#"):
            driver = next((i for i, path in enumerate(DRIVERS) if f'"{path}"' in line), driver)
        found |= {int(number): driver for number in re.findall(r"\b(\d+) == emulate::omitted", line)}
    return found


def run_races(program: Path, *arguments: int) -> subprocess.CompletedProcess[str]:
    """Arguments: a driver, a barrier to leave out. Without a driver nothing is run."""
    environment = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1"}
    command = [str(program), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


@pytest.mark.parametrize("driver", range(len(DRIVERS)), ids=[path.stem for path in DRIVERS])
def test_no_data_race(races: Path, driver: int) -> None:
    done = run_races(races, driver)
    assert done.returncode == 0, done.stderr
    assert "WARNING: ThreadSanitizer" not in done.stderr


BARRIERS = sum(path.read_text().count("__syncthreads();") for path in CUDA.glob("*.cu*"))


def test_every_barrier_is_found(users: dict[int, int]) -> None:
    assert sorted(users) == list(range(BARRIERS))
    assert -1 not in users.values()


@pytest.mark.parametrize("barrier", range(BARRIERS))
def test_every_barrier_is_needed(races: Path, users: dict[int, int], barrier: int) -> None:
    """Proof that the first test can fail: without this one __syncthreads a race is reported.

    ThreadSanitizer remembers four accesses to a word, of 256 threads here, so a single run may miss one.
    """
    race = "WARNING: ThreadSanitizer: data race"
    assert any(race in run_races(races, users[barrier], barrier).stderr for _ in range(6))
