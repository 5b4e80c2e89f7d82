"""Every committed configuration compiles for sm_80, sm_90 and sm_100 without a GPU, within the device's resources.

A worker process runs the launchers on CPU tensors with `JITFunction.run` replaced by a recorder, so that what is
compiled is what would be launched, specialisation included; this file is that worker too, since interpreted kernels
cannot be compiled. Results are kept by content in $IMBDIFF_AOT_CACHE (default ~/.cache/imbdiff-aot).
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="ahead-of-time compilation needs triton")
pytestmark = pytest.mark.xdist_group("aot")

TARGETS = (80, 90, 100)
SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
TENSOR_CORE = {80: r"\bmma\.sync", 90: r"\bwgmma\.", 100: r"\btcgen05\.mma|\bmma\.sync"}
MODULES = ("rows", "two_branch", "engine", "lse", "contrast", "cosine", "matrices", "posterior", "gaussian")


def launches(torch: Any) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Names and calls that reach every line of every table; float16, which shares bfloat16's, for one target."""
    two_branch, contrast = (importlib.import_module(f"imbdiff.kernels.{m}") for m in ("two_branch", "contrast"))
    B, low, half, full = 64, torch.bfloat16, torch.float16, torch.float32
    for dtype, sizes in [
        (low, ((128, 4), (512, 4), (512, 0), (16384, 4))),
        (half, ((16384, 4),)),
        (full, ((128, 4), (16384, 4))),
    ]:
        for D, K in sizes:
            own, *others = (torch.zeros(B, D, dtype=dtype) for _ in range(1 + K))
            small = (torch.zeros(K, B), torch.zeros(K, 3), [0.0] * K)
            name = f"two_branch {dtype} D={D} K={K}"
            yield name, lambda o=own, r=others, s=small: two_branch.two_branch(o, o, r, *s)
            args = (torch.zeros(B), small[0], own, own, others, *small, small[0], [True] * (1 + K))
            yield name, lambda a=args: two_branch.two_branch_bwd(*a)
    # Each line of the engine's tables with one loss, where it is tight with the one that keeps most in registers.
    x, grad, ones = torch.zeros(256, 2048), torch.ones(()), torch.ones(256)
    none, labels = ones[:0], torch.zeros(256, dtype=torch.int64)
    losses = {
        "negative_distance": ((x, ones), (ones, none), (0.5, False, True)),
        "distance_hinge": ((), (none,), (1.0, 0.5)),
        "cosine_contrastive": ((x, ones), (ones, none), (0.5, True)),
        "supcon": ((labels, ones), (ones, none), (0.5,)),
    }
    for loss, dtype, D in [
        ("supcon", low, 64), ("distance_hinge", low, 128), ("cosine_contrastive", low, 256),
        ("negative_distance", low, 2048), ("cosine_contrastive", full, 128), ("supcon", half, 128),
    ]:  # fmt: skip
        rest, saved, settings = losses[loss]
        args = tuple(x[:, :D].to(dtype).contiguous() if a is x else a for a in (x, *rest))
        name = f"{loss} {dtype} D={D}"
        yield name, lambda f=loss, a=args, s=settings: getattr(contrast, f)(*a, *s)
        yield name, lambda f=loss, a=args, k=saved, s=settings: getattr(contrast, f"{f}_bwd")(grad, *a, *k, *s)
    posterior = importlib.import_module("imbdiff.kernels.posterior")
    for dtype in (low, half, full):
        args = (x.to(dtype), x.to(dtype), ones, ones, ones)
        yield f"posterior_mean {dtype}", lambda a=args: posterior.posterior_mean(*a)
        saved = (torch.zeros_like(args[0]), torch.zeros(2, 256), [True, True])
        yield f"posterior_mean {dtype}", lambda a=args, k=saved: posterior.posterior_mean_bwd(k[0], *a, *k)
    gaussian, all_of = importlib.import_module("imbdiff.kernels.gaussian"), [True] * 4
    matrix, gaussian.MANY = torch.zeros(1, 256, 256), 0
    for dtype, kind, form in [(low, 0, 0), (half, 2, 1), (full, 0, 1), (full, 1, 0), (full, 2, 0)]:
        four, name = [x[None].to(dtype)] * 4, f"gaussian {dtype} kind={kind}"
        yield name, lambda a=four, k=kind: gaussian.gaussian_divergence(*a, k)
        yield name, lambda a=four, k=kind: gaussian.gaussian_divergence_bwd(matrix, *a, k, matrix, none, all_of)
        mask, pairs = (torch.ones(256, 256, dtype=torch.bool), 0) if kind == 1 else (none.bool(), 1)
        extra = (labels, labels, mask, ones, kind, form, 1.0, 1.0, pairs, True, True, all_of)
        yield name, lambda a=four, e=extra: gaussian.gaussian_overlap(*(v[0] for v in a), *e)


def tool(name: str) -> str:
    import triton

    return str(Path(triton.__file__).parent / "backends/nvidia/bin" / name)


def resources(kernel: Any, sm: int) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(kernel.asm["cubin"])
        cubin.flush()
        text = subprocess.run([tool("cuobjdump"), "-res-usage", cubin.name], capture_output=True, text=True, check=True)
    usage = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text.stdout)}
    ptx = kernel.asm["ptx"]
    return {
        "registers": usage["REG"], "stack": usage["STACK"], "local": usage["LOCAL"], "shared": kernel.metadata.shared,
        "tensor_core": bool(re.search(TENSOR_CORE[sm], ptx)),
        "wide_loads": bool(re.search(r"ld\.global[.\w:]*\.v4\.b32|cp\.async\.cg", ptx)),
    }  # fmt: skip


def work() -> list[dict[str, Any]]:
    import torch
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend
    from triton.runtime.jit import JITFunction, create_function_from_signature

    kernels = [importlib.import_module(f"imbdiff.kernels.{module}") for module in MODULES]
    source = "".join(Path(module.__file__ or "").read_text() for module in kernels) + triton.__version__
    cache = Path(os.environ.get("IMBDIFF_AOT_CACHE") or Path.home() / ".cache/imbdiff-aot")
    cache.mkdir(parents=True, exist_ok=True)
    found: dict[str, dict[str, Any]] = {}
    tiles = set()

    def record(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        keys = ("ROWS", "COLUMNS", "DEPTH", "num_warps", "num_stages", "WHOLE", "OUTPUT")
        tiles.add((self.__name__, *(kwargs.get(key, 0) for key in keys)))
        for capability in (90,) if "torch.float16" in name else TARGETS:
            target = GPUTarget("cuda", capability, 32)
            backend = make_backend(target)
            bound, specialization, _ = create_function_from_signature(self.signature, self.params, backend)(
                *args, **kwargs
            )
            options, signature, constants, attrs = self._pack_args(backend, kwargs, bound, specialization, None)
            fixed = sorted((path, getattr(value, "__name__", repr(value))) for path, value in constants.items())
            facts = repr(
                (self.__name__, capability, signature, fixed, sorted(attrs), kwargs["num_warps"], options.num_stages)
            )
            key = hashlib.sha256((source + facts).encode()).hexdigest()
            if key in found:
                continue
            file = cache / f"{key}.json"
            if not file.exists():
                compiled = triton.compile(ASTSource(self, signature, constants, attrs), target, options.__dict__)
                new = file.with_suffix(f".{os.getpid()}")
                new.write_text(json.dumps(resources(compiled, capability)))
                new.replace(file)
            found[key] = {"kernel": self.__name__, "case": name, "sm": capability, **json.loads(file.read_text())}

    JITFunction.run = record
    for name, call in launches(torch):  # noqa: B007 (record reads it)
        call()
    rows, engine = (kernels[MODULES.index(module)] for module in ("rows", "engine"))
    committed = {("sum_kernel", *tile[:2], 0, tile.warps, 0, 0, 0) for tile in rows.CONFIGS}
    for kernel, table in [("forward_kernel", engine.FORWARD), ("backward_kernel", engine.BACKWARD)]:
        committed |= {(kernel, *line) for lines in table.values() for line in lines.values()}
    assert committed <= tiles, f"not compiled: {committed - tiles}"
    return list(found.values())


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    run = subprocess.run([sys.executable, __file__], capture_output=True, text=True, env=environment, check=False)
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads(run.stdout)


def show(entries: list[dict[str, Any]]) -> str:
    return "\n".join(map(str, entries))


def test_every_kernel_and_target(compiled: list[dict[str, Any]]) -> None:
    kernels = {
        "sum_kernel", "finish_kernel", "grad_kernel", "norm_kernel", "forward_kernel", "backward_kernel",
        "product_kernel", "gather_kernel", "matrix_kernel", "slope_kernel", "push_kernel",
    }  # fmt: skip
    assert {(e["kernel"], e["sm"]) for e in compiled} == {(kernel, sm) for kernel in kernels for sm in TARGETS}


def test_nothing_spills(compiled: list[dict[str, Any]]) -> None:
    spilled = [e for e in compiled if e["stack"] or e["local"]]
    assert not spilled, show(spilled)


def test_shared_memory(compiled: list[dict[str, Any]]) -> None:
    large = [e for e in compiled if e["shared"] > SHARED[e["sm"]]]
    assert not large, show(large)


def test_tensor_cores_take_16_bit_products_and_only_those(compiled: list[dict[str, Any]]) -> None:
    rounded = ("forward_kernel", "backward_kernel")  # every other kernel counts in float32
    wrong = [e for e in compiled if e["tensor_core"] != (e["kernel"] in rounded and "float32" not in e["case"])]
    assert not wrong, show(wrong)


def test_aligned_rows_are_read_16_bytes_at_a_time(compiled: list[dict[str, Any]]) -> None:
    # finish_kernel reads little, the kernels of Gaussians make 16 terms of a value that they read.
    others = ("finish_kernel", "matrix_kernel", "slope_kernel")
    narrow = [e for e in compiled if e["kernel"] not in others and not e["wide_loads"]]
    assert not narrow, show(narrow)


if __name__ == "__main__":
    print(json.dumps(work()))
