from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest

from imbdiff.data import DataConfig, ImageSet, load_source
from imbdiff.errors import InputError

IMAGES = np.random.default_rng(0).integers(0, 256, (5, 4, 3), dtype=np.uint8)
LABELS = np.array([3, 0, 1, 2, 3], dtype=np.uint8)


def idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write(folder: Path, prefix: str = "train-", separator: str = "-", shift: int = 0) -> None:
    (folder / f"{prefix}images{separator}idx3-ubyte").write_bytes(idx(IMAGES + np.uint8(shift)))
    (folder / f"{prefix}labels{separator}idx1-ubyte").write_bytes(idx(LABELS))


def load(folder: Path) -> ImageSet:
    return load_source(DataConfig(source="idx", path=str(folder)))


@pytest.mark.parametrize("separator", ["-", "."])
def test_plain_files(separator: str, tmp_path: Path) -> None:
    write(tmp_path, separator=separator)
    got = load(tmp_path)
    assert np.array_equal(got.images.numpy(), IMAGES[:, None])
    assert (got.labels.tolist(), got.class_names) == ([3, 0, 1, 2, 3], ("0", "1", "2", "3"))


@pytest.mark.parametrize("packed", [("images",), ("labels",), ("images", "labels")])
def test_packed_files(packed: tuple[str, ...], tmp_path: Path) -> None:
    write(tmp_path)
    for file in list(tmp_path.iterdir()):
        if any(word in file.name for word in packed):
            (tmp_path / f"{file.name}.gz").write_bytes(gzip.compress(file.read_bytes()))
            file.unlink()
    assert np.array_equal(load(tmp_path).images.numpy(), IMAGES[:, None])


@pytest.mark.parametrize("train", ["train-", "emnist-train-"])
def test_training_files_are_preferred(train: str, tmp_path: Path) -> None:
    write(tmp_path, "t10k-", shift=1)
    write(tmp_path, train, shift=2)
    assert np.array_equal(load(tmp_path).images.numpy(), IMAGES[:, None] + 2)


def test_plain_twin_is_preferred(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(b"never read")
    assert len(load(tmp_path)) == 5


def test_other_files_alone_will_do(tmp_path: Path) -> None:
    write(tmp_path, "t10k-")
    assert len(load(tmp_path)) == 5


def test_several_sets_are_refused(tmp_path: Path) -> None:
    write(tmp_path, "a-train-")
    write(tmp_path, "b-train-")
    with pytest.raises(
        InputError, match=r"several sets of images .a-train-images-idx3-ubyte, b-train-images-idx3-ubyte"
    ):
        load(tmp_path)


def test_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"expected a file \*images\*idx3\*.*found nothing"):
        load(tmp_path)
    (tmp_path / "readme").touch()
    with pytest.raises(InputError, match="found readme"):
        load(tmp_path)


def test_missing_labels(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "train-labels-idx1-ubyte").unlink()
    with pytest.raises(InputError, match=r"no label file beside it: expected train-labels-idx1-ubyte or"):
        load(tmp_path)


BAD = {
    "swapped": ("images", idx(LABELS), r"not an idx3 file of bytes: it must start with 00000803, got 00000801"),
    "labels as images": ("labels", idx(IMAGES), "not an idx1 file.* 00000801, got 00000803"),
    "float": ("images", b"\x00\x00\x0d\x03" + idx(IMAGES)[4:], "got 00000d03"),
    "empty": ("images", b"", "not an idx3 file"),
    "no header": ("images", idx(IMAGES)[:9], "not an idx3 file"),
    "short": ("images", idx(IMAGES)[:-1], r"expected 76 bytes for shape \(5, 4, 3\), got 75"),
    "long": ("images", idx(IMAGES) + b"x", "expected 76 bytes .* got 77"),
    "huge": ("images", idx(IMAGES)[:4] + b"\xff" * 12 + bytes(60), "expected 79,228,.* bytes"),
    "fewer labels": ("labels", idx(LABELS[:4]), "5 images in train-images-idx3-ubyte and 4 labels in train-labels"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files(case: str, tmp_path: Path) -> None:
    which, content, message = BAD[case]
    write(tmp_path)
    next(tmp_path.glob(f"*{which}*")).write_bytes(content)
    with pytest.raises(InputError, match=message):
        load(tmp_path)


def test_no_images(tmp_path: Path) -> None:
    (tmp_path / "train-images-idx3-ubyte").write_bytes(idx(IMAGES[:0]))
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx(LABELS[:0]))
    with pytest.raises(InputError, match="0 images"):
        load(tmp_path)


def test_damaged_gzip(tmp_path: Path) -> None:
    write(tmp_path)
    packed = gzip.compress((tmp_path / "train-images-idx3-ubyte").read_bytes())
    (tmp_path / "train-images-idx3-ubyte").unlink()
    for content in (packed[:-20], b"not gzip", packed[:15] + b"\xff" * 9 + packed[24:]):
        (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(content)
        with pytest.raises(InputError, match="damaged gzip file"):
            load(tmp_path)
