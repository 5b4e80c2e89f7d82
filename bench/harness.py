"""How a benchmark is taken: rivals in turn, in one process, beside a copy and a matrix product measured at that moment.

On a machine that does anything else the ratio of two rivals can move by a factor of four (threads that wait for each
other), so a record says what disturbed it (`floors.Watch`), and one that was disturbed is not kept.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from imbdiff import ops
from imbdiff.ops import _backends

from . import floors, memory, timing

MAIN = "forward+backward"
"""The mode whose extra memory is measured, and which the chart shows. An operation without a gradient has one mode."""


@dataclass
class Case:
    """One operation at one shape. A benchmark's function `case(...)` makes it, here and in fresh processes."""

    op: str
    shape: str
    dtype: str
    modes: Mapping[str, Mapping[str, Callable[[], Any]]]
    """Of each mode the rivals, "imbdiff" first. All rivals of a mode return the same."""
    bytes_moved: Mapping[str, int]
    """What the mathematics has to read and write once, whoever does it."""
    flops: Mapping[str, int]
    absent: Mapping[str, str] = field(default_factory=dict)
    """Rivals that could not be had, with the reason."""


@dataclass
class Record:
    op: str
    shape: str
    dtype: str
    bytes_moved: dict[str, int]
    flops: dict[str, int]
    us: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    """Mode, rival: microseconds of a call, 20th, 50th and 80th percentile."""
    extra_bytes: dict[str, int | None] = field(default_factory=dict)
    """Rival: peak beyond inputs and results in the mode `main`."""
    copy_gb_s: dict[str, float] = field(default_factory=dict)
    """Mode: a copy that moves as many bytes."""
    gemm_gflop_s: float = 0.0
    """In the operation's type."""
    sgemm_gflop_s: float = 0.0
    absent: dict[str, str] = field(default_factory=dict)
    rounds: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Mode: how many rounds count, and how many were taken."""
    disturbed: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.op}-{self.shape}-{self.dtype}"

    @property
    def main(self) -> str:
        return MAIN if MAIN in self.us else next(iter(self.us))

    def ratio(self, mode: str, rival: str) -> float:
        """How many times the time of imbdiff a rival takes, by medians."""
        return self.us[mode][rival][1] / self.us[mode]["imbdiff"][1]

    def of_copy(self, mode: str, rival: str = "imbdiff") -> float:
        """Time of the copy over time of the rival."""
        return self.bytes_moved[mode] / self.copy_gb_s[mode] / 1e3 / self.us[mode][rival][1]

    def of_gemm(self, mode: str, rival: str = "imbdiff") -> float:
        """The same for the matrix product, in float32 where that is faster: a processor may only emulate the others."""
        fastest = max(self.gemm_gflop_s, self.sgemm_gflop_s)
        return self.flops[mode] / fastest / 1e3 / self.us[mode][rival][1]

    def save(self) -> Path:
        folder = floors.RESULTS / floors.device_name()
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"{self.name}.json"
        file.write_text(json.dumps(asdict(self), indent=1) + "\n")
        return file


def compare(make: Callable[..., Case], *args: Any, patience: float = 0.0) -> Record:
    """Takes a record of make(*args). patience: seconds to wait for a steady machine, see `floors.Watch`."""
    torch.manual_seed(0)
    case = make(*args)
    for mode, rivals in case.modes.items():
        check_agreement(case, mode, rivals)
    record = Record(case.op, case.shape, case.dtype, dict(case.bytes_moved), dict(case.flops))
    record.absent, record.facts = dict(case.absent), facts()
    watch = floors.Watch(patience)
    watch.wait()
    record.sgemm_gflop_s = round(floors.gemm(), 1)
    record.gemm_gflop_s = round(floors.gemm(getattr(torch, case.dtype)), 1)
    for mode, rivals in case.modes.items():
        record.copy_gb_s[mode] = round(floors.copy(case.bytes_moved[mode]), 2)
        record.us[mode] = timing.in_turn(rivals, watch.rounds)
        record.rounds[mode] = watch.counts
    record.disturbed = watch.finish()
    for rival in case.modes[record.main]:
        module = f"bench.{make.__module__.rpartition('.')[2]}"
        record.extra_bytes[rival] = memory.extra(module, args, record.main, rival)
    return record


def check_agreement(case: Case, mode: str, rivals: Mapping[str, Callable[[], Any]]) -> None:
    """Rivals that compute something else would be no rivals. This is also the call that compiles."""
    ours, *_ = results = [listed(run()) for run in rivals.values()]
    for rival, theirs in zip(rivals, results, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            error, size = float((a.float() - b.float()).norm()), float(a.float().norm())
            if not error <= (0.01 if case.dtype == "float32" else 0.2) * size:
                raise AssertionError(
                    f"{case.op} {case.shape} {case.dtype} {mode}: {rival} differs by {error:.2g} of {size:.2g}"
                )


def listed(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def ours(f: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
    """imbdiff as it chooses by itself; on a GPU also each of its back ends that is there."""

    def forced(backend: str) -> Callable[..., Any]:
        def run(*inputs: Any) -> Any:
            with ops.use(backend):
                return f(*inputs)

        return run

    there = [b for b in ("triton", "cuda") if torch.cuda.is_available() and b not in _backends.PROBLEMS]
    return {"imbdiff": f} | {backend: forced(backend) for backend in there}


def forward(f: Callable[..., Any], *inputs: Any) -> Callable[[], Any]:
    """The function alone, as in evaluation."""

    def run() -> Any:
        with torch.no_grad():
            return f(*inputs)

    return run


def trained(
    op: str,
    shape: str,
    dtype: str,
    rivals: Mapping[str, Callable[..., Any]],
    leaves: Sequence[Tensor],
    inputs: Sequence[Any],
    bytes_moved: tuple[int, int],
    flops: tuple[int, int],
    absent: Mapping[str, str] | None = None,
) -> Case:
    """A case of two modes, forward and both; bytes and operations are given for each."""
    return Case(
        op=op,
        shape=shape,
        dtype=dtype,
        modes={
            "forward": {name: forward(f, *inputs) for name, f in rivals.items()},
            MAIN: {name: backward(f, leaves, *inputs) for name, f in rivals.items()},
        },
        bytes_moved=dict(zip(("forward", MAIN), bytes_moved, strict=True)),
        flops=dict(zip(("forward", MAIN), flops, strict=True)),
        absent=absent or {},
    )


def backward(f: Callable[..., Any], leaves: Sequence[Tensor], *inputs: Any) -> Callable[[], Any]:
    """Forward, then the gradients for given gradients of the outputs: the same for every rival."""
    given: list[Tensor] = []

    def run() -> Any:
        outputs = listed(f(*inputs))
        if not given:
            generator = torch.Generator(outputs[0].device).manual_seed(0)
            for o in outputs:
                g = torch.randn(o.shape, generator=generator, device=o.device)
                given.append(g.to(o.dtype))
        return torch.autograd.grad(outputs, leaves, given)

    return run


def facts() -> dict[str, Any]:
    # glibc gives large blocks back to the system at once, and every new output is then paid for in page faults.
    kept = " that keeps freed blocks" if "MALLOC_MMAP_THRESHOLD_" in os.environ else ""
    return {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "machine": platform.machine(),
        "allocator": os.environ.get("LD_PRELOAD", "glibc").rpartition("/")[2] + kept,
    }
