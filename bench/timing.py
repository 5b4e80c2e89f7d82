"""Microseconds of a call: blocks of calls, so that neither the clock nor the launch of one call decides."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

BLOCK_US = 2000
"""Calls of one rival are made in blocks at least this long."""
LONG_US = 20_000
"""Before a block comes a call that is not timed, so that caches are as the rival's own last call left them; where a
call takes longer than this, what lies in the caches before it makes no difference."""
ROUNDS = 15

Run = Callable[[], Any]


def in_turn(runs: Mapping[str, Run], rounds: Callable[[Run, int], list[Any]]) -> dict[str, list[float]]:
    """20th, 50th and 80th percentile for each, a block of each in every round. Call each once before: compilation.

    rounds(take, count) calls `take` about that often and returns the results that count: `floors.Watch.rounds`.
    """
    blocks = {name: block(run) for name, run in runs.items()}
    first = {name: timed() for name, (_, timed) in blocks.items()}
    count = affordable(ROUNDS, sum(first[name] * calls for name, (calls, _) in blocks.items()))
    taken = rounds(lambda: {name: timed() for name, (_, timed) in blocks.items()}, count)
    return {name: percentiles([times[name] for times in taken]) for name in runs}


def affordable(rounds: int, us: float) -> int:
    """What takes seconds (KeOps without a GPU, bfloat16 products on a processor without them) must not take minutes."""
    return max(2, min(rounds, int(20e6 / us)))


def percentiles(values: list[float]) -> list[float]:
    ordered = sorted(values)
    at = [ordered[len(ordered) // 5], statistics.median(ordered), ordered[(4 * len(ordered)) // 5]]
    return [round(value, 2) for value in at]


def typical(run: Run) -> float:
    """The median alone, of a run that is measured by itself."""
    if (first := on_cpu(run, 1)()) > 5e6:
        return first
    calls, timed = block(run)
    first = timed()
    return statistics.median([first, *(timed() for _ in range(affordable(6, calls * first)))])


def block(run: Run) -> tuple[int, Run]:
    """(calls, f): f makes that many calls and returns the microseconds of one."""
    loop = on_gpu if torch.cuda.is_available() else on_cpu
    first = max(on_cpu(run, 1)(), 0.1)
    calls = max(1, math.ceil(BLOCK_US / first))
    timed = loop(run, calls)

    def warmed() -> float:
        run()
        return timed()

    return calls, warmed if first < LONG_US else timed


def on_cpu(run: Run, calls: int) -> Callable[[], float]:
    def timed() -> float:
        synchronise()
        start = time.perf_counter()
        for _ in range(calls):
            run()
        synchronise()
        return (time.perf_counter() - start) * 1e6 / calls

    return timed


def on_gpu(run: Run, calls: int) -> Callable[[], float]:
    """A CUDA graph of the calls, which leaves Python out of the time; where a call cannot be captured, the calls."""
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(calls):
                run()
    except RuntimeError:
        torch.cuda.synchronize()
        return between_events(lambda: [run() for _ in range(calls)], calls)
    return between_events(graph.replay, calls)


def between_events(work: Run, calls: int) -> Callable[[], float]:
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def timed() -> float:
        start.record()
        work()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) * 1e3 / calls

    return timed


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
