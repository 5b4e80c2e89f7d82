"""Peak memory of one call beyond its inputs and results, measured in a process that does nothing else.

On a CPU: two calls to warm up (compilation, thread pools, packing buffers that libraries keep), then the process's
peak is set back to what it holds now (`/proc/self/clear_refs`), one call, and the peak is read (`VmHWM`). glibc is told
to return every block above 64 KiB at once, so that nothing of the earlier calls is there to be used again. This sees
scratch of any origin, torch's or not; the system counts pages of each processor in batches, so half a megabyte either
way means nothing. On a GPU it is the peak of torch's allocator.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
RETURN_AT_ONCE = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_ARENA_MAX": "1"}


def extra(module: str, args: tuple[Any, ...], mode: str, rival: str) -> int | None:
    """Bytes of a rival of `module.case(*args)`; None where the system does not tell."""
    if not (torch.cuda.is_available() or Path("/proc/self/clear_refs").exists()):
        return None
    # At the end of the path: the imbdiff to be measured is the one that this process has.
    program = f"import sys; sys.path.append({str(ROOT)!r}); from bench.memory import main; "
    program += f"main({module!r}, {args!r}, {mode!r}, {rival!r})"
    environment = {key: value for key, value in os.environ.items() if key != "LD_PRELOAD"} | RETURN_AT_ONCE
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"extra memory of {rival} in {module}:\n{done.stderr}")
    return int(json.loads(done.stdout.splitlines()[-1]))


def main(module: str, args: tuple[Any, ...], mode: str, rival: str) -> None:
    run = importlib.import_module(module).case(*args).modes[mode][rival]
    print(json.dumps(of(run)))


def of(run: Callable[[], Any]) -> int:
    for _ in range(2):
        run()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = run()
        return torch.cuda.max_memory_allocated() - before - held(result)
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = peak()
    result = run()
    return max(peak() - before - held(result), 0)


def peak() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def held(result: Any) -> int:
    tensors = [result] if isinstance(result, torch.Tensor) else result
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())
