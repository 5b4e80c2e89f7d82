"""Checkpoints that are whole or absent: written beside, synced, renamed into place, verified when read.

run/checkpoints/step-00002000/
    model.safetensors   weights; the network's under their own names, methods' under "methods."; config in the metadata
    ema.safetensors     the same for the average
    state.safetensors   optimizer moments and running sums
    manifest.json       step, and size and SHA-256 of each file
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from imbdiff.errors import InputError
from imbdiff.files import sha256, sync

FILES = ("model", "ema", "state")


@dataclass(frozen=True)
class Checkpoint:
    """What is restored: a counter and tensors."""

    step: int
    model: dict[str, Tensor]
    ema: dict[str, Tensor]
    state: dict[str, Tensor]


def save(run: Path, checkpoint: Checkpoint, config: Mapping[str, object], keep: int) -> Path:
    """Write a checkpoint and delete all but the newest `keep`. On an OSError the earlier ones are untouched."""
    root = run / "checkpoints"
    final, temporary = root / f"step-{checkpoint.step:08d}", root / f".tmp-{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        files = {}
        for name in FILES:
            file = temporary / f"{name}.safetensors"
            tensors = {k: t.detach().cpu().contiguous() for k, t in getattr(checkpoint, name).items()}
            _write_safetensors(file, tensors, {"config": json.dumps(config), "step": str(checkpoint.step)})
            files[file.name] = {"bytes": file.stat().st_size, "sha256": sha256(file)}
        _write_text(temporary / "manifest.json", json.dumps({"step": checkpoint.step, "files": files}, indent=2))
        sync(temporary)
        if final.exists():
            shutil.rmtree(final)
        temporary.replace(final)
        sync(root)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    for old in _steps(run)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def load_latest(run: Path, warn: Callable[[str], None], device: str = "cpu") -> Checkpoint | None:
    """The newest whole checkpoint, or None where there is none; torn ones are skipped with a message."""
    folders = _steps(run)
    for folder in reversed(folders):
        try:
            return load(folder, device)
        except InputError as error:
            warn(f"skipped {error}")
    if folders:
        raise InputError(
            f"none of the {len(folders)} checkpoints in {run / 'checkpoints'} is whole; --fresh starts over"
        )
    return None


def load(folder: Path, device: str = "cpu") -> Checkpoint:
    """One checkpoint, each file compared with the manifest first."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        for name, facts in manifest["files"].items():
            if (folder / name).stat().st_size != facts["bytes"] or sha256(folder / name) != facts["sha256"]:
                raise InputError(f"torn checkpoint {folder}: {name} differs from the manifest")
        tensors = {name: load_file(folder / f"{name}.safetensors", device=device) for name in FILES}
        return Checkpoint(manifest["step"], **tensors)
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"torn checkpoint {folder}: {error}") from error


def file_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An objective's tensors under the names they have in a file: the network's are the network's own."""
    return {name.removeprefix("net."): t for name, t in state.items()}


def objective_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `file_names`."""
    return {name if name.startswith("methods.") else f"net.{name}": t for name, t in tensors.items()}


def _steps(run: Path) -> list[Path]:
    return sorted((run / "checkpoints").glob("step-*"))


def _write_safetensors(file: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    try:
        save_file(tensors, file, metadata)
    except Exception as error:
        # safetensors wraps a full disk in its own exception type.
        raise error if isinstance(error, OSError) else OSError(str(error)) from error
    sync(file)


def _write_text(file: Path, text: str) -> None:
    file.write_text(text)
    sync(file)
