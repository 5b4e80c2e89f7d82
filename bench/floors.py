"""What the machine can do at this moment, and whether it is doing anything else."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import torch

from .timing import typical

RESULTS = Path(__file__).parent / "results"
_BEST = [0.0]
"""GFLOP/s of the best product of this session."""


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def device_name() -> str:
    """Folder of the records: what is in it may be compared with each other."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name().replace(" ", "-").lower()
    return f"cpu-{torch.backends.cpu.get_cpu_capability().lower()}-{torch.get_num_threads()}-threads"


def gemm(dtype: torch.dtype = torch.float32) -> float:
    """GFLOP/s of a matrix product."""
    n = 8192 if torch.cuda.is_available() else 2048
    a = torch.randn(n, n, device=device()).to(dtype)
    return 2 * n**3 / typical(lambda: a @ a) / 1e3


def copy(bytes_moved: int) -> float:
    """GB/s, read and written, of a copy that moves as many bytes."""
    source = torch.randn(max(bytes_moved // 8, 1024), device=device())
    target = torch.empty_like(source)
    return 2 * source.nbytes / typical(lambda: target.copy_(source)) / 1e3


class Watch:
    """Notices a machine that is not ours alone, in three ways.

    Other processes' time on our cores, from the start of the watch; a float32 product slower than 90 % of the best of
    this session; or of the best that was ever recorded for this device, which a session on a busy machine can't reach.
    """

    MOST_ELSEWHERE = 0.1
    LEAST_GEMM = 0.9

    def __init__(self) -> None:
        self.start = (time.perf_counter(), busy_seconds(), own_seconds())
        self.gemms = [gemm()]

    def finish(self) -> list[str]:
        """Why what was measured since the start should not be kept; empty: it may be."""
        self.gemms.append(gemm())
        wall, busy, own = time.perf_counter(), busy_seconds(), own_seconds()
        elsewhere = (busy - self.start[1] - (own - self.start[2])) / (wall - self.start[0])
        _BEST[0] = max(_BEST[0], *self.gemms)
        best = max(_BEST[0], best_recorded())
        reasons = []
        if elsewhere > self.MOST_ELSEWHERE:
            reasons.append(f"other processes used {elsewhere:.2f} cores")
        if min(self.gemms) < self.LEAST_GEMM * best:
            reasons.append(f"matrix product at {min(self.gemms):.0f} GFLOP/s, best known for this device {best:.0f}")
        return reasons


def best_recorded() -> float:
    records = (RESULTS / device_name()).glob("*.json")
    return max((json.loads(file.read_text())["sgemm_gflop_s"] for file in records), default=0.0)


def busy_seconds() -> float:
    """Time for which the cores that we may use were not idle, since the machine started; 0 where nothing tells."""
    if not Path("/proc/stat").exists():
        return 0.0
    ours = {f"cpu{core}" for core in os.sched_getaffinity(0)}
    ticks = 0
    for line in Path("/proc/stat").read_text().splitlines():
        name, *fields = line.split()
        if name in ours:
            user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, fields[:8])
            ticks += user + nice + system + irq + softirq + steal
    return ticks / os.sysconf("SC_CLK_TCK")


def own_seconds() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system if busy_seconds() else 0.0
