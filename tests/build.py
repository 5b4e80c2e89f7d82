"""The build, run as pip runs it, into a folder of the caller's: `setup.py build` needs neither pip nor a network."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
SWITCHES = ("IMBDIFF_BUILD", "TORCH_CUDA_ARCH_LIST", "CUDA_HOME", "CXX", "MAX_JOBS")


def build(folder: Path, **switches: str) -> subprocess.CompletedProcess[str]:
    """The package under folder/lib, objects under folder; every switch that is not given is at its default."""
    environment = {key: value for key, value in os.environ.items() if key not in SWITCHES} | switches
    command = [sys.executable, "setup.py", "build", "--build-base", str(folder), "--build-lib", str(folder / "lib")]
    # Without egg_info's files in the checkout: another build may be writing them.
    command += ["egg_info", "--egg-base", str(folder)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def python(folder: Path, program: str) -> subprocess.CompletedProcess[str]:
    """Run a program on the package that `build` left there."""
    environment = {**os.environ, "PYTHONPATH": str(folder / "lib")}
    command = [sys.executable, "-c", program]
    # In that folder: -c puts the current one before PYTHONPATH, and in the checkout that would be the checkout's.
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
