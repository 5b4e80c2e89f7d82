"""CIFAR-10 and CIFAR-100 from the official archives, binary or Python version, packed or extracted."""

from __future__ import annotations

import lzma
import tarfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from imbdiff.data.cifar_names import CIFAR10_NAMES, CIFAR100_NAMES
from imbdiff.data.images import ImageSet
from imbdiff.data.pickles import read_pickled_dict
from imbdiff.errors import InputError

_PIXELS = 3 * 32 * 32


@dataclass(frozen=True)
class _Layout:
    """What the training files of one set are called. The binary ones are the same names with .bin."""

    batches: tuple[str, ...]
    label_bytes: int  # CIFAR-100 records start with the coarse label; the fine one is the last byte before the pixels
    label_key: str
    names_text: str
    names_pickle: str
    names_key: str
    names: tuple[str, ...]


_LAYOUTS = {
    10: _Layout(
        batches=tuple(f"data_batch_{i}" for i in range(1, 6)),
        label_bytes=1,
        label_key="labels",
        names_text="batches.meta.txt",
        names_pickle="batches.meta",
        names_key="label_names",
        names=CIFAR10_NAMES,
    ),
    100: _Layout(
        batches=("train",),
        label_bytes=2,
        label_key="fine_labels",
        names_text="fine_label_names.txt",
        names_pickle="meta",
        names_key="fine_label_names",
        names=CIFAR100_NAMES,
    ),
}


def load_cifar(path: Path, num_classes: int) -> ImageSet:
    """Training images in official order (fine labels for CIFAR-100) from a .tar.gz or an extracted folder."""
    layout = _LAYOUTS[num_classes]
    binary = [f"{batch}.bin" for batch in layout.batches]
    files = _read_files(path, {*binary, *layout.batches, layout.names_text, layout.names_pickle})
    if all(name in files for name in binary):
        parts = [_decode_binary(files[name], layout.label_bytes, f"{path}: {name}") for name in binary]
    elif all(name in files for name in layout.batches):
        parts = [_decode_pickle(files[name], layout.label_key, f"{path}: {name}") for name in layout.batches]
    else:
        raise InputError(
            f"{path}: expected the CIFAR-{num_classes} training files {', '.join(binary)} (or the same without .bin), "
            f"found {', '.join(sorted(files)) or 'none of them'}: download the archive again or set --data.source"
        )
    labels = np.concatenate([part[1] for part in parts])
    if labels.min() < 0 or labels.max() >= num_classes:
        raise InputError(
            f"{path}: labels must lie in 0..{num_classes - 1}, got {labels.min()}..{labels.max()}: damaged"
        )
    images = np.concatenate([part[0] for part in parts]).reshape(-1, 3, 32, 32)
    names = _class_names(files, layout, path)
    return ImageSet(torch.from_numpy(images), torch.from_numpy(labels), names, f"cifar{num_classes}")


def _read_files(path: Path, wanted: set[str]) -> dict[str, bytes]:
    """Contents of the wanted files by base name; archive members go to memory and never to disk."""
    if path.is_dir():
        found = sorted(f for pattern in ("*", "*/*") for f in path.glob(pattern) if f.name in wanted and f.is_file())
        return {f.name: f.read_bytes() for f in found}
    out: dict[str, bytes] = {}
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                name = member.name.rsplit("/", 1)[-1]
                # Regular files only: a link could point out of the archive.
                if name in wanted and member.isreg() and (stream := archive.extractfile(member)):
                    out[name] = stream.read()
                    if len(out[name]) != member.size:
                        raise EOFError(f"{name} is cut short")
    except (tarfile.TarError, EOFError, OSError, zlib.error, lzma.LZMAError) as error:
        raise InputError(f"{path}: damaged or no tar archive ({error}): download it again") from error
    return out


def _decode_binary(raw: bytes, label_bytes: int, where: str) -> tuple[np.ndarray, np.ndarray]:
    record = label_bytes + _PIXELS
    if not raw or len(raw) % record:
        raise InputError(f"{where}: expected records of {record} bytes, got {len(raw):,} bytes: download it again")
    records = np.frombuffer(raw, np.uint8).reshape(-1, record)
    return records[:, label_bytes:], records[:, label_bytes - 1].astype(np.int64)


def _decode_pickle(raw: bytes, label_key: str, where: str) -> tuple[np.ndarray, np.ndarray]:
    batch = read_pickled_dict(raw, where)
    if not {"data", label_key} <= batch.keys():
        raise InputError(f"{where}: expected the entries data and {label_key}, found {', '.join(map(str, batch))}")
    images, numbers = batch["data"], batch[label_key]
    # Asked before numpy sees them: it raises its own errors on nested lists.
    flat = isinstance(numbers, np.ndarray) or (isinstance(numbers, list) and all(isinstance(y, int) for y in numbers))
    labels = np.asarray(numbers) if flat else np.empty(0, object)
    if not isinstance(images, np.ndarray) or images.dtype != np.uint8 or images.shape != (len(images), _PIXELS):
        raise InputError(f"{where}: data must be a uint8 array [N, {_PIXELS}]: download the archive again")
    if labels.dtype.kind not in "iu" or labels.shape != (len(images),) or not len(images):
        raise InputError(
            f"{where}: expected one whole-number label for each of {len(images)} images: download it again"
        )
    return images, labels.astype(np.int64)


def _class_names(files: dict[str, bytes], layout: _Layout, path: Path) -> tuple[str, ...]:
    if layout.names_text in files:
        names = files[layout.names_text].decode("utf-8", "replace").split()
    elif layout.names_pickle in files:
        entries = read_pickled_dict(files[layout.names_pickle], f"{path}: {layout.names_pickle}").get(layout.names_key)
        names = [str(n, "utf-8") if isinstance(n, bytes) else str(n) for n in entries or ()]
    else:
        return layout.names
    if len(names) != len(layout.names):
        raise InputError(f"{path}: expected {len(layout.names)} class names, got {len(names)}: download it again")
    return tuple(names)
