"""Images from MNIST-style idx files (magic number, dimensions as big-endian int32, raw bytes)."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np
import torch

from imbdiff.data.images import ImageSet
from imbdiff.errors import InputError


def load_idx(folder: Path) -> ImageSet:
    """The pair of image and label files in `folder`; the training pair where there are several."""
    image_file = _choose(folder)
    stem = image_file.name.removesuffix(".gz").replace("images", "labels").replace("idx3", "idx1")
    label_file = next((f for f in (folder / stem, folder / f"{stem}.gz") if f.is_file()), None)
    if label_file is None:
        raise InputError(f"{folder}: {image_file.name} has no label file beside it: expected {stem} or {stem}.gz")
    images, labels = _read(image_file, 3), _read(label_file, 1)
    if len(images) == 0 or len(images) != len(labels):
        raise InputError(
            f"{folder}: expected one label for each image, got {len(images)} images in {image_file.name} "
            f"and {len(labels)} labels in {label_file.name}"
        )
    names = tuple(str(c) for c in range(int(labels.max()) + 1))
    return ImageSet(torch.from_numpy(images[:, None]), torch.from_numpy(labels.astype(np.int64)), names, folder.name)


def _choose(folder: Path) -> Path:
    files = sorted(f for f in folder.glob("*images*idx3*") if f.is_file())
    if not files:
        there = ", ".join(sorted(f.name for f in folder.iterdir())[:5]) or "nothing"
        raise InputError(f"{folder}: expected a file *images*idx3* such as train-images-idx3-ubyte(.gz); found {there}")
    # The plain file stands for its compressed twin, which sorts behind it.
    unique = list({f.name.removesuffix(".gz"): f for f in reversed(files)}.values())
    chosen = [f for f in unique if f.name.startswith("train")] or [f for f in unique if "train" in f.name] or unique
    if len(chosen) > 1:
        raise InputError(
            f"{folder}: several sets of images ({', '.join(sorted(f.name for f in chosen))}): keep one pair there"
        )
    return chosen[0]


def _read(file: Path, dimensions: int) -> np.ndarray:
    raw = file.read_bytes()
    if file.suffix == ".gz":
        try:
            raw = gzip.decompress(raw)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise InputError(f"{file}: damaged gzip file ({error}): download it again") from error
    magic, header = bytes([0, 0, 8, dimensions]), 4 + 4 * dimensions
    if raw[:4] != magic or len(raw) < header:
        raise InputError(
            f"{file}: not an idx{dimensions} file of bytes: it must start with {magic.hex()}, got {raw[:4].hex()}"
        )
    shape = struct.unpack(f">{dimensions}I", raw[4:header])
    expected = header + math.prod(shape)
    if len(raw) != expected:
        raise InputError(f"{file}: expected {expected:,} bytes for shape {shape}, got {len(raw):,}: download it again")
    return np.frombuffer(raw, np.uint8, offset=header).reshape(shape).copy()
