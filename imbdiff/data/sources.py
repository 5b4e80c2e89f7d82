"""From a DataConfig to the images it names."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from imbdiff.data.arrays import load_npz
from imbdiff.data.cifar import load_cifar
from imbdiff.data.config import DataConfig
from imbdiff.data.folder import load_folder
from imbdiff.data.idx import load_idx
from imbdiff.data.images import ImageSet
from imbdiff.errors import InputError

_EXPECTED = {
    "npz": "an .npz file with the keys images and labels",
    "folder": "a folder that holds one folder of images for each class",
    "cifar10": "a CIFAR-10 archive (cifar-10-binary.tar.gz or cifar-10-python.tar.gz) or its extracted folder",
    "cifar100": "a CIFAR-100 archive (cifar-100-binary.tar.gz or cifar-100-python.tar.gz) or its extracted folder",
    "idx": "a folder with MNIST-style files such as train-images-idx3-ubyte and train-labels-idx1-ubyte (or their .gz)",
}
_FOLDER_ONLY = ("folder", "idx")


def load_source(config: DataConfig) -> ImageSet:
    """All images of the source; raises InputError that says what was expected where, and what was there."""
    if config.size is not None and config.source != "folder":
        raise InputError(
            f"--data.size resizes the images of --data.source folder only, got source {config.source}: leave it out"
        )
    if config.source == "digits":
        if config.path:
            raise InputError(
                f"source digits comes with scikit-learn and reads no file, got --data.path {config.path}: "
                f"set --data.source to one of {', '.join(_EXPECTED)}"
            )
        return load_digits()
    path = _existing_path(config)
    try:
        if config.source == "npz":
            return load_npz(path)
        if config.source == "folder":
            return load_folder(path, size=config.size, on_bad_file=config.on_bad_file)
        if config.source == "idx":
            return load_idx(path)
        return load_cifar(path, num_classes=10 if config.source == "cifar10" else 100)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error}; expected {_EXPECTED[config.source]}") from error


def load_digits() -> ImageSet:
    """scikit-learn's 1,797 handwritten digits, 8x8, one channel, 0..16 scaled to 0..255."""
    try:
        from sklearn.datasets import load_digits as sklearn_digits
    except ImportError as error:
        raise InputError(
            "source digits needs scikit-learn, which is not installed: run pip install 'imbdiff[demo]' "
            "or set --data.source and --data.path to your own data"
        ) from error
    data = sklearn_digits()
    images = np.rint(data.images * 255 / 16).astype(np.uint8)[:, None]
    labels = data.target.astype(np.int64)
    return ImageSet(torch.from_numpy(images), torch.from_numpy(labels), tuple("0123456789"), "digits")


def _existing_path(config: DataConfig) -> Path:
    if config.source not in _EXPECTED:
        raise InputError(
            f"unknown source {config.source!r}: set --data.source to digits or one of {', '.join(_EXPECTED)}"
        )
    expected = _EXPECTED[config.source]
    if not config.path:
        raise InputError(f"source {config.source} needs --data.path: expected {expected}")
    path = Path(config.path).expanduser()
    if not path.exists():
        raise InputError(f"nothing at {path} (--data.path): expected {expected}")
    if config.source in _FOLDER_ONLY and not path.is_dir():
        raise InputError(f"{path} is a file: expected {expected}; set --data.path")
    if config.source == "npz" and not path.is_file():
        raise InputError(f"{path} is a folder: expected {expected}; set --data.path")
    return path
