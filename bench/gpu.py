"""make gpu: everything that needs a GPU, in eight minutes: tests, compute-sanitizer, benchmarks, and what they said.

Runs with the python it is started by, where torch, triton and pytest are importable: no virtual environment, no
network. The package is built into build/gpu; without nvcc the imbdiff/_C_cuda.so that is there is taken along. Reports
go to $OUT, else to bench/results/<device>.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
BUILT = ROOT / "build" / "gpu"
TEST_FILE = "tests/gpu/test_every_device.py"
# Under the sanitizers: one call of each kernel that is more than a tile or a part, in float32.
SMALL = "test_values_and_gradients and float32 and cuda- and not (40000 or 20000 or D3072)"
SECONDS = 480


class Report:
    """Runs commands until the time is over; each leaves a file of what it printed and a line of the summary."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.end, self.lines, self.failed = folder, time.monotonic() + SECONDS, list[str](), False
        folder.mkdir(parents=True, exist_ok=True)

    def say(self, line: str) -> None:
        print(line, flush=True)
        self.lines.append(line)
        (self.folder / "summary.txt").write_text("\n".join(self.lines) + "\n")

    def run(self, name: str, command: list[str], most: float, **environment: str) -> None:
        start, log = time.monotonic(), self.folder / f"{name}.txt"
        limit = min(most, self.end - start)
        if limit <= 0:
            self.failed = True
            return self.say(f"{name}: not run, the {SECONDS} seconds are over")
        with log.open("w") as out:
            try:
                code: int | str = subprocess.run(
                    command,
                    stdout=out,
                    stderr=subprocess.STDOUT,
                    timeout=limit,
                    # Not in the checkout: its imbdiff/ would come before the one that was built.
                    cwd=BUILT,
                    env={**os.environ, "PYTHONPATH": str(BUILT / "lib"), **environment},
                    check=False,
                ).returncode
            except subprocess.TimeoutExpired:
                code = f"stopped after {limit:.0f} s"
        last = next((line for line in reversed(log.read_text(errors="replace").splitlines()) if line.strip()), "")
        self.failed |= code != 0
        self.say(f"{name}: {'passed' if code == 0 else f'FAILED ({code})'} in {time.monotonic() - start:.0f} s: {last}")


def build() -> str:
    """The package in build/gpu/lib, with every library that can be had; says where the CUDA one is from."""
    nvcc = shutil.which(f"{os.environ.get('CUDA_HOME', '')}/bin/nvcc") or shutil.which("nvcc")
    command = [sys.executable, "setup.py", "build", "--build-base", str(BUILT), "--build-lib", str(BUILT / "lib")]
    switches = {"IMBDIFF_BUILD": "cuda" if nvcc else "auto"}
    subprocess.run(
        [*command, "egg_info", "--egg-base", str(BUILT)], cwd=ROOT, check=True, env={**os.environ, **switches}
    )
    for name in ("_C.so", "_C_cuda.so"):
        to, carried = BUILT / "lib" / "imbdiff" / name, ROOT / "imbdiff" / name
        if not to.exists() and carried.exists():
            shutil.copy2(carried, to)
    if nvcc:
        return f"_C_cuda.so: built with {nvcc}"
    found = (BUILT / "lib" / "imbdiff" / "_C_cuda.so").exists()
    return (
        f"_C_cuda.so: no nvcc here, {'the one in imbdiff/ is taken' if found else 'and none in imbdiff/: not tested'}"
    )


def records(report: Report, folder: Path, since: float) -> None:
    """What `pytest bench/ --record` wrote, as one file where it goes elsewhere: tar xf records.tar -C bench/results."""
    new = [path for path in (ROOT / "bench" / "results").rglob("*.json") if path.stat().st_mtime >= since]
    report.say(f"records: {len(new)}")
    if new and folder.parent != ROOT / "bench" / "results":
        with tarfile.open(folder / "records.tar", "w") as tar:
            for path in new:
                tar.add(path, path.relative_to(ROOT / "bench" / "results"))


def main() -> int:
    if not torch.cuda.is_available():
        print("make gpu: torch sees no GPU here; nothing was run", file=sys.stderr)
        return 1
    device = torch.cuda.get_device_name().replace(" ", "-").lower()
    folder = Path(os.environ.get("OUT") or ROOT / "bench" / "results" / device).resolve()
    BUILT.mkdir(parents=True, exist_ok=True)
    report = Report(folder)
    report.say(f"{device}, torch {torch.__version__}, CUDA {torch.version.cuda}, {time.strftime('%Y-%m-%d')}")
    report.say(build())
    pytest = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"]
    parallel = ["-n", "8"] if importlib.util.find_spec("xdist") else []
    report.run("doctor", [sys.executable, "-m", "imbdiff.cli", "doctor"], 30)
    report.run("tests", [*pytest, "-rs", "-m", "gpu", str(ROOT / "tests" / "gpu"), *parallel], 200)
    sanitizer = shutil.which("compute-sanitizer")
    if not sanitizer:
        report.say("compute-sanitizer: not found, neither memcheck nor racecheck was run")
    for tool in ("memcheck", "racecheck") if sanitizer else ():
        watched = [str(sanitizer), "--tool", tool, "--error-exitcode", "9", *pytest, "-k", SMALL, str(ROOT / TEST_FILE)]
        # Each tensor is an allocation of its own, or a read behind one would be a read of the next.
        report.run(tool, watched, 60, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    since = time.time()
    report.run("bench", [*pytest, str(ROOT / "bench"), "--record", "--patience", "5"], SECONDS)
    records(report, folder, since)
    return int(report.failed)


if __name__ == "__main__":
    raise SystemExit(main())
