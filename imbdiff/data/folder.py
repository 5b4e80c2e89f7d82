"""Images from a folder tree, root/<class>/<image>."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from imbdiff.data.images import ImageSet
from imbdiff.errors import InputError

_NAMED = 5
_MANY_FILES = 2000


def load_folder(root: Path, size: int | None = None, on_bad_file: Literal["stop", "skip"] = "stop") -> ImageSet:
    """Classes and files in the order of their names; RGB, or one channel if every image has a single one.

    Every file that is not hidden must be a readable image. All are read before an error is raised: its count is whole.
    """
    if size is not None and size < 1:
        raise InputError(f"--data.size must be at least 1 pixel, got {size}")
    class_names = tuple(sorted(d.name for d in root.iterdir() if d.is_dir() and not d.name.startswith(".")))
    if not class_names:
        raise InputError(f"{root}: expected one folder of images for each class, found no folder; set --data.path")
    files = [(file, label) for label, name in enumerate(class_names) for file in _visible_files(root / name)]
    images: list[np.ndarray] = []
    labels: list[int] = []
    bad: list[str] = []
    first: Path | None = None
    clash = ""
    for file, label in _with_progress(files):
        try:
            image = _read_image(file, size)
        except MemoryError:
            raise
        except Exception as error:  # Pillow's decoders raise nearly anything on a damaged file
            # Pillow's own text for an unknown format repeats the whole path.
            unknown = type(error).__name__ == "UnidentifiedImageError"
            reason = "no known image format" if unknown else str(error) or type(error).__name__
            bad.append(f"{file.relative_to(root)} ({reason})")
            continue
        first = first or file
        if images and image.shape[:2] != images[0].shape[:2]:
            clash = clash or f"{_describe(first, root, images[0])} and {_describe(file, root, image)}"
        else:
            images.append(image)
        labels.append(label)
    if bad:
        _report(root, bad, len(files), on_bad_file)
    empty = sorted(set(range(len(class_names))) - set(labels))
    if empty:
        raise InputError(f"{root}: class folder {class_names[empty[0]]} holds no readable image: add some or remove it")
    if clash:
        raise InputError(
            f"{root}: images differ in size ({clash}): set --data.size to resize and crop them to one size"
        )
    return ImageSet(_stack(images), torch.tensor(labels), class_names, root.name)


def _visible_files(folder: Path) -> list[Path]:
    inside = (f for f in folder.rglob("*") if not any(part.startswith(".") for part in f.relative_to(folder).parts))
    return sorted(f for f in inside if f.is_file())


def _with_progress(files: list[tuple[Path, int]]) -> Iterable[tuple[Path, int]]:
    if len(files) <= _MANY_FILES or not sys.stderr.isatty():
        return files
    from rich.console import Console
    from rich.progress import track

    return track(files, description="reading images", console=Console(stderr=True))


def _read_image(file: Path, size: int | None) -> np.ndarray:
    """uint8 [H, W] for a single-channel image, else [H, W, 3]."""
    from PIL import Image

    with Image.open(file) as opened:
        if opened.mode in ("F", "I") or opened.mode.startswith("I;"):
            # Pillow would clip these to 255 in silence.
            raise ValueError(f"mode {opened.mode}: more than 8 bits per channel; convert it")
        image = opened.convert("L" if opened.mode in ("1", "L", "LA") else "RGB")
    if size is not None:
        width, height = (max(size, round(side * size / min(image.size))) for side in image.size)
        left, top = (width - size) // 2, (height - size) // 2
        image = image.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + size, top + size))
    return np.asarray(image)


def _stack(images: list[np.ndarray]) -> torch.Tensor:
    """[N, C, H, W]; grey images become RGB where some image has colour."""
    colour = any(image.ndim == 3 for image in images)
    height, width = images[0].shape[:2]
    out = torch.empty(len(images), 3 if colour else 1, height, width, dtype=torch.uint8)
    for target, image in zip(out, images, strict=True):
        # Grey [H, W] broadcasts over the channels, which is what grey means in RGB.
        target.copy_(torch.from_numpy(image.transpose(2, 0, 1).copy() if image.ndim == 3 else image.copy()))
    return out


def _describe(file: Path, root: Path, image: np.ndarray) -> str:
    return f"{file.relative_to(root)} is {image.shape[1]}x{image.shape[0]}"


def _report(root: Path, bad: list[str], total: int, on_bad_file: Literal["stop", "skip"]) -> None:
    shown = "; ".join(bad[:_NAMED]) + ("; ..." if len(bad) > _NAMED else "")
    text = f"{root}: {len(bad)} of {total} files cannot be read as images: {shown}"
    if on_bad_file == "stop":
        raise InputError(f"{text}. Repair or remove them, or leave them out with --data.on-bad-file skip")
    warnings.warn(f"{text}. Skipped", stacklevel=3)
