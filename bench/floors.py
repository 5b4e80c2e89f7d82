"""What the machine can do at this moment, and whether it is doing anything else."""

from __future__ import annotations

import functools
import json
import os
import platform
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

from .timing import on_cpu, typical

T = TypeVar("T")
RESULTS = Path(__file__).parent / "results"


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def device_name() -> str:
    """Folder of the records: what is in it may be compared with each other."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name().replace(" ", "-").lower()
    return f"cpu-{processor()}-{torch.backends.cpu.get_cpu_capability()}-{torch.get_num_threads()}-threads".lower()


def processor() -> str:
    """Vendor, family and model where Linux tells: one instruction set is run by processors of very different speed."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    found = re.search(r"^vendor_id\s*: (.+)\ncpu family\s*: (.+)\nmodel\s*: (.+)$", info, re.M)
    return "-".join(found.groups()) if found else platform.machine()


def gemm(dtype: torch.dtype = torch.float32, measure: Callable[[Callable[[], Any]], float] = typical) -> float:
    """GFLOP/s of a matrix product."""
    a = square(dtype)
    return 2 * len(a) ** 3 / measure(lambda: a @ a) / 1e3


@functools.cache
def square(dtype: torch.dtype) -> torch.Tensor:
    n = 8192 if torch.cuda.is_available() else 2048
    return torch.randn(n, n, device=device()).to(dtype)


def copy(bytes_moved: int) -> float:
    """GB/s, read and written, of a copy that moves as many bytes."""
    source = torch.randn(max(bytes_moved // 8, 1024), device=device())
    target = torch.empty_like(source)
    return 2 * source.nbytes / typical(lambda: target.copy_(source)) / 1e3


class Watch:
    """Notices a machine that is not ours alone, in two ways.

    Other processes' time on our cores, from the start of the watch. And a float32 product slower than 90 % of the best
    that is known: of this watch, or ever recorded for this device, which a session on a busy machine can't reach. Other
    tenants of a machine come and go within seconds, so a round of calls is begun when the product is fast, and kept if
    it still is afterwards. What decides is the product alone, never the times of the round.
    """

    MOST_ELSEWHERE = 0.1
    LEAST_GEMM = 0.9
    LEAST_ROUNDS = 5
    PAUSE = 0.5

    def __init__(self, patience: float) -> None:
        """patience: seconds to spend on waiting, and on rounds that are not kept."""
        self.clock, self.busy, self.own = time.perf_counter(), busy_seconds(), own_seconds()
        self.patience, self.reasons = patience, list[str]()
        self.counts = (0, 0)  # rounds that were kept and taken, last
        self.best = max(gemm(), best_recorded())

    def steady(self) -> bool:
        return gemm(measure=lambda run: on_cpu(run, 1)()) >= self.LEAST_GEMM * self.best

    def wait(self) -> bool:
        """Until the machine is steady. False: the patience is over."""
        while not self.steady():
            if self.patience <= 0:
                return False
            time.sleep(self.PAUSE)
            self.patience -= self.PAUSE
        return True

    def rounds(self, take: Callable[[], T], count: int) -> list[T]:
        """Results of `take` from a steady machine, `count` of them or fewer; where it never is one, of any."""
        taken: list[tuple[bool, T]] = []
        least = min(count, self.LEAST_ROUNDS)
        while sum(steady for steady, _ in taken) < count:
            before, start = self.wait(), time.perf_counter()
            result = take()
            steady = before and self.steady()
            taken.append((steady, result))
            if not steady:
                self.patience -= time.perf_counter() - start
                if self.patience <= 0 and len(taken) >= least:
                    break
        kept = [result for steady, result in taken if steady]
        self.counts = (len(kept), len(taken))
        if len(kept) >= least:
            return kept
        speed = f"a matrix product reached {self.LEAST_GEMM * self.best:.0f} GFLOP/s"
        self.reasons.append(f"{speed} in {len(kept)} of {len(taken)} rounds only")
        return [result for _, result in taken]

    def finish(self) -> list[str]:
        """Why what was measured since the start should not be kept; empty: it may be."""
        wall, busy, own = time.perf_counter() - self.clock, busy_seconds() - self.busy, own_seconds() - self.own
        if (elsewhere := (busy - own) / wall) > self.MOST_ELSEWHERE:
            self.reasons.append(f"other processes used {elsewhere:.2f} cores")
        return self.reasons


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
