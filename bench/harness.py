"""How a benchmark is taken: rivals in turn, in one process, beside a copy and a matrix product measured at that moment.

On a machine that does anything else the ratio of two rivals can move by a factor of four (threads that wait for each
other), so a record counts only if the matrix product runs at 90 % of its best of this session, before and after.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
_BEST_GEMM = [0.0]


@dataclass
class Record:
    """One operation at one shape: microseconds of each rival (20th, 50th and 80th percentile) and the floors."""

    name: str
    bytes_moved: int
    flops: int
    rivals: dict[str, tuple[float, float, float]] = field(default_factory=dict)
    copy_gb_s: float = 0.0
    gemm_gflop_s: float = 0.0
    disturbed: bool = False
    facts: dict[str, Any] = field(default_factory=dict)

    def ratio(self, rival: str, ours: str = "imbdiff") -> float:
        """How many times faster than `rival`, by medians."""
        return self.rivals[rival][1] / self.rivals[ours][1]

    @property
    def copy_us(self) -> float:
        """Time in which a copy would move the operation's bytes."""
        return self.bytes_moved / self.copy_gb_s / 1e3

    def save(self) -> Path:
        folder = RESULTS / device_name()
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"{self.name}.json"
        file.write_text(json.dumps(self.__dict__, indent=1) + "\n")
        return file


def device_name() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name().replace(" ", "-").lower()
    return f"cpu-{torch.get_num_threads()}-threads"


def compare(
    name: str, rivals: Mapping[str, Callable[[], object]], *, bytes_moved: int, flops: int = 0, rounds: int = 15
) -> Record:
    """Run every rival `rounds` times in turn after one warm-up, floors before and after."""
    record = Record(name, bytes_moved, flops, facts=facts())
    before = gemm()
    for run in rivals.values():
        run()
    times: dict[str, list[float]] = {rival: [] for rival in rivals}
    for _ in range(rounds):
        for rival, run in rivals.items():
            times[rival].append(timed(run))
    record.rivals = {rival: percentiles(values) for rival, values in times.items()}
    record.copy_gb_s = copy(bytes_moved)
    after = gemm()
    _BEST_GEMM[0] = max(_BEST_GEMM[0], before, after)
    record.gemm_gflop_s = max(before, after)
    record.disturbed = min(before, after) < 0.9 * _BEST_GEMM[0]
    return record


def timed(run: Callable[[], object]) -> float:
    """Microseconds of one call, the device's work included."""
    synchronise()
    start = time.perf_counter()
    run()
    synchronise()
    return (time.perf_counter() - start) * 1e6


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def percentiles(values: list[float]) -> tuple[float, float, float]:
    ordered = sorted(values)
    return ordered[len(ordered) // 5], statistics.median(ordered), ordered[(4 * len(ordered)) // 5]


def gemm(n: int = 2048) -> float:
    """GFLOP/s of a float32 matrix product, best of three."""
    a = torch.randn(n, n)
    return 2 * n**3 / min(timed(lambda: a @ a) for _ in range(3)) / 1e3


def copy(bytes_moved: int) -> float:
    """GB/s, read and written, of a copy that moves as many bytes."""
    source = torch.randn(max(bytes_moved // 8, 1024))
    target = torch.empty_like(source)
    target.copy_(source)
    return bytes_moved / statistics.median(timed(lambda: target.copy_(source)) for _ in range(9)) / 1e3


def extra_memory(run: Callable[[], object]) -> int:
    """Bytes by which one call raises the process's peak; call it first, in a fresh process."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    run()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024


def facts() -> dict[str, Any]:
    return {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "machine": platform.machine(),
        "allocator": os.environ.get("LD_PRELOAD", "default"),
    }
