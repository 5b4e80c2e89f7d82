"""What each back end can do, which one a call takes, and why the others were refused."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from imbdiff.ops._op import BACKENDS, overload
from imbdiff.ops._schema import SCHEMA_HASH

_LOW = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Capability:
    """One line of the table: an operation on a back end. Dispatch, messages and test cases come from it."""

    device: str
    """Device type, or "any"."""
    dtypes: tuple[torch.dtype, ...]
    most: tuple[int, str] | None = None
    """How many of what the kernel takes: others, factors, neighbours; None: any number."""


def _on(*gpu: str, most: tuple[int, str] | None = None) -> dict[str, Capability]:
    """A reference and a CPU kernel take every type, kernels of a GPU all but float64."""
    every = (*_LOW, torch.float64)
    lines = {"reference": Capability("any", every), "cpu": Capability("cpu", every)}
    return lines | {backend: Capability("cuda", _LOW, most) for backend in gpu}


CAPABILITIES: dict[str, dict[str, Capability]] = {
    "two_branch": _on("triton", "cuda", most=(4, "others")),
    "negative_distance": _on("triton", "cuda"),
    "cosine_contrastive": _on("triton", "cuda"),
    "supcon": _on("triton", "cuda"),
    "distance_hinge": _on("triton", "cuda"),
    "product_of_gaussians": _on("cuda", most=(4, "factors")),
    "gaussian_divergence": _on("triton", "cuda"),
    "gaussian_overlap": _on("triton", "cuda"),
    "posterior_mean": _on("triton"),
    "posterior_draw": _on("cuda"),
    "knn_radius": _on("cuda", most=(32, "neighbours")),
    "ball_count": _on("cuda"),
}

PREFERRED = ("cpu", "reference")
"""What `auto` tries in turn; a back end enters when a committed measurement says that it is the faster one."""


@dataclass
class _State:
    forced: str | None = None


_STATE = _State()
PROBLEMS: dict[str, str] = {}
"""Back ends that are not available here, with the reason; filled by `load` when `imbdiff.ops` is imported."""


@contextlib.contextmanager
def use(backend: str) -> Iterator[None]:
    """Force a back end in this block: "reference", "cpu", "triton", "cuda"; "auto" is the default.

    A call that the named back end cannot serve is an error that says why; there is no silent fallback.
    """
    if backend not in (*BACKENDS, "auto"):
        raise ValueError(f"ops.use: backend must be one of auto, {', '.join(BACKENDS)}, got {backend!r}")
    old, _STATE.forced = _STATE.forced, None if backend == "auto" else backend
    try:
        yield
    finally:
        _STATE.forced = old


def choose(op: str, rows: Tensor, count: int = 0) -> str:
    """The back end for this call, by the table; raises with every back end's reason where none can."""
    if _STATE.forced is not None:
        if refusal(op, _STATE.forced, rows, count):
            raise ValueError(f"{op}: the forced back end cannot run this call. {_reasons(op, rows, count)}")
        return _STATE.forced
    for backend in PREFERRED:
        if not refusal(op, backend, rows, count):
            return backend
    raise ValueError(f"{op}: no back end can run this call. {_reasons(op, rows, count)}")


def refusal(op: str, backend: str, rows: Tensor, count: int = 0) -> str | None:
    """Why `backend` cannot run this call, or None."""
    can = CAPABILITIES[op].get(backend)
    if can is None:
        return "not implemented"
    if can.device not in ("any", rows.device.type):
        return f"needs {can.device} tensors, got {rows.device.type}"
    if rows.dtype not in can.dtypes:
        return f"does not take {rows.dtype}"
    if can.most is not None and count > can.most[0]:
        return f"takes at most {can.most[0]} {can.most[1]}, got {count}"
    return PROBLEMS.get(backend)


def _reasons(op: str, rows: Tensor, count: int) -> str:
    return "; ".join(f"{b}: {refusal(op, b, rows, count) or 'can'}" for b in BACKENDS)


LIBRARIES = {backend: Path(__file__).parents[1] / file for backend, file in [("cpu", "_C.so"), ("cuda", "_C_cuda.so")]}
_COMPILERS = {"cpu": "a C++ compiler", "cuda": "nvcc"}


def load() -> None:
    """Load the compiled libraries that fit this torch, and note why the others are not there."""
    found = {**{backend: _load(path, backend) for backend, path in LIBRARIES.items()}, "triton": _find_triton()}
    PROBLEMS.update({backend: reason for backend, reason in found.items() if reason})


def _load(path: Path, backend: str) -> str | None:
    file, build = path.name, f"IMBDIFF_BUILD={backend} pip install --no-build-isolation ."
    if not path.exists():
        return f"{file} was not built; with {_COMPILERS[backend]}: {build}"
    if backend == "cuda" and torch.version.cuda is None:
        return f"{file} is built, but this torch is a CPU build: install a CUDA build of torch"
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"{file} does not load: {error}; build it again: {build}"
    if (built := overload(f"schema_hash_{backend}")()) != int(SCHEMA_HASH, 16):
        raise ImportError(
            f"{path} was built from other schemas ({built:x}, this source has {SCHEMA_HASH}); build it again: {build}"
        )
    return None if backend == "cpu" else _no_gpu()


def _no_gpu() -> str | None:
    return None if torch.cuda.is_available() else "torch sees no GPU"


def _find_triton() -> str | None:
    from importlib.util import find_spec

    if find_spec("triton") is None:
        return "triton is not installed: pip install triton"
    return _no_gpu()
