"""Images from a numpy .npz file."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch

from imbdiff.data.images import ImageSet
from imbdiff.errors import InputError

_KEYS = ("images", "labels", "class_names")
_WANTED = "images (uint8 [N, H, W, C] or [N, H, W]), labels (integers [N]) and optionally class_names (text [C])"


def load_npz(path: Path) -> ImageSet:
    """Read images, labels and optional class_names; nothing in the file is unpickled."""
    found = _read_arrays(path)
    if not {"images", "labels"} <= found.keys():
        raise InputError(f"{path}: wanted the keys {_WANTED}; found {', '.join(sorted(found)) or 'none'}; rename them")
    images, labels = _check_images(found["images"], path), _check_labels(found["labels"], path)
    if len(images) == 0 or len(images) != len(labels):
        raise InputError(
            f"{path}: expected one label for each image, got {len(images)} images and {len(labels)} labels"
        )
    if "class_names" in found:
        names = _check_names(found["class_names"], path)
    elif labels.max() >= len(labels):
        # Also keeps a stray label of a billion from becoming a billion class names.
        raise InputError(
            f"{path}: labels must number the classes from 0 without gaps, got label {labels.max()} "
            f"with {len(labels)} images; renumber them"
        )
    else:
        names = tuple(str(c) for c in range(int(labels.max()) + 1))
    if labels.max() >= len(names):
        raise InputError(f"{path}: {len(names)} class_names for labels up to {labels.max()}: name every class")
    return ImageSet(torch.from_numpy(images), torch.from_numpy(labels.astype(np.int64)), names, path.stem)


def _read_arrays(path: Path) -> dict[str, np.ndarray]:
    # Asked first: what is no zip file numpy takes for a pickle or a bare .npy array.
    with path.open("rb") as file:
        if not zipfile.is_zipfile(file):
            raise InputError(f"{path} is not an .npz file: expected one from numpy.savez with the keys {_WANTED}")
    try:
        with np.load(path, allow_pickle=False) as file:
            # Other entries are named, not read: they may be large or anything at all.
            return {key: np.asarray(file[key]) if key in _KEYS else np.empty(0) for key in file.files}
    except (ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        if "allow_pickle" in str(error):
            raise InputError(
                f"{path}: refused: an array of Python objects is a pickle, not data; save images as uint8, labels as "
                "int64 and class_names as text with numpy.savez"
            ) from error
        raise InputError(f"{path}: damaged .npz file ({error}): write it again with numpy.savez") from error


def _check_images(images: np.ndarray, path: Path) -> np.ndarray:
    """uint8 [N, C, H, W] from any accepted layout."""
    if images.dtype != np.uint8:
        raise InputError(f"{path}: images must be uint8 0..255, got {images.dtype}: scale and convert them first")
    if images.ndim == 3:
        return np.ascontiguousarray(images[:, None])
    if images.ndim == 4 and images.shape[1] in (1, 3) and images.shape[3] not in (1, 3):
        return np.ascontiguousarray(images)
    if images.ndim == 4 and images.shape[3] <= 4:
        return np.ascontiguousarray(images.transpose(0, 3, 1, 2))
    raise InputError(f"{path}: images must be [N, H, W, C] with up to 4 channels, or [N, H, W], got {images.shape}")


def _check_labels(labels: np.ndarray, path: Path) -> np.ndarray:
    if labels.dtype.kind not in "iu" or labels.ndim != 1:
        raise InputError(f"{path}: labels must be integers [N], got {labels.dtype} {labels.shape}: convert them first")
    if len(labels) and labels.min() < 0:
        raise InputError(f"{path}: labels must count from 0, got {labels.min()}: renumber the classes")
    return labels


def _check_names(names: np.ndarray, path: Path) -> tuple[str, ...]:
    if names.dtype.kind not in "US" or names.ndim != 1:
        raise InputError(f"{path}: class_names must be text [C], got {names.dtype} {names.shape}")
    return tuple(n.decode() if isinstance(n, bytes) else n for n in names.tolist())
