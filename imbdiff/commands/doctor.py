"""imbdiff doctor: what is here, what is missing, and the command that adds it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
from dataclasses import dataclass

import torch
import tyro
from rich.console import Console
from rich.table import Table

from imbdiff import __version__
from imbdiff.ops._schema import SCHEMA_HASH
from imbdiff.train.log import say

EXTRAS = {
    "demo": ("sklearn", "matplotlib"),
    "diffusers": ("diffusers", "transformers", "accelerate"),
    "lora": ("peft",),
    "text": ("transformers",),
    "eval": ("torch_fidelity",),
    "log": ("tensorboardX",),
    "xformers": ("xformers",),
}
USED_FOR = {
    "demo": "digits data, classifier reports, plots",
    "diffusers": "networks and pipelines of diffusers",
    "lora": "low-rank fine-tuning",
    "text": "text encoders",
    "eval": "Inception features",
    "log": "TensorBoard",
    "xformers": "memory-efficient attention",
}


@dataclass(frozen=True)
class DoctorCommand:
    """Show versions, the GPU, and which extras are present or missing, with the command that adds each."""


def main(args: list[str]) -> int:
    tyro.cli(DoctorCommand, prog="imbdiff doctor", args=args)
    console = Console()
    say(console, f"imbdiff {__version__}, Python {platform.python_version()}, {platform.platform()}")
    for name in ("torch", "triton", "numpy", "safetensors", "tyro", "rich", "pillow"):
        say(console, f"  {name:12} {version(name) or 'missing'}")
    say(console, describe_gpu())
    say(console, f"CPU: {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
    show_backends(console)
    table = Table("extra", "packages", "for", "add with", box=None, header_style="bold")
    for extra, modules in EXTRAS.items():
        missing = [m for m in modules if importlib.util.find_spec(m) is None]
        state = ", ".join(f"{m} missing" if m in missing else m for m in modules)
        table.add_row(extra, state, USED_FOR[extra], f"pip install 'imbdiff\\[{extra}]'" if missing else "present")
    console.print(table)
    return 0


def show_backends(console: Console) -> None:
    """Which back ends the operations can take here, and why not the others."""
    from imbdiff.ops import _backends
    from imbdiff.ops._op import BACKENDS, REGISTRY

    say(console, f"operations: {', '.join(REGISTRY)}; schemas {SCHEMA_HASH}")
    for path in _backends.LIBRARIES.values():
        say(console, f"  {path.name:12} {'built' if path.exists() else 'not built'}")
    say(console, "back ends:")
    for backend in BACKENDS:
        ready = "ready" if backend in _backends.PREFERRED else f'ready, where ops.use("{backend}") asks for it'
        say(console, f"  {backend:12} {_backends.PROBLEMS.get(backend, ready)}")


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def describe_gpu() -> str:
    if not torch.cuda.is_available():
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "a CPU build"
        return f"GPU: none seen by torch ({built}); everything runs on the CPU"
    devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return "GPU: " + ", ".join(f"{d.name} (sm_{d.major}{d.minor}, {d.total_memory / 2**30:.0f} GiB)" for d in devices)
