from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from imbdiff.data import DataConfig, ImageSet, load_source
from imbdiff.errors import InputError

RNG = np.random.default_rng(0)
LABELS = np.array([0, 1, 2, 1])


def load(path: Path, **arrays: Any) -> ImageSet:
    file = path / "mine.npz"
    np.savez(file, **arrays)
    return load_source(DataConfig(source="npz", path=str(file)))


def image(*shape: int) -> np.ndarray:
    return RNG.integers(0, 256, (4, *shape), dtype=np.uint8)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_channels_last(channels: int, tmp_path: Path) -> None:
    images = image(5, 6, channels)
    got = load(tmp_path, images=images, labels=LABELS)
    assert np.array_equal(got.images.numpy(), images.transpose(0, 3, 1, 2))
    assert got.images.is_contiguous()
    assert (got.labels.tolist(), got.class_names, got.name) == ([0, 1, 2, 1], ("0", "1", "2"), "mine")


def test_no_channels(tmp_path: Path) -> None:
    images = image(5, 6)
    assert np.array_equal(load(tmp_path, images=images, labels=LABELS).images.numpy(), images[:, None])


@pytest.mark.parametrize("channels", [1, 3])
def test_channels_first_where_it_is_clear(channels: int, tmp_path: Path) -> None:
    images = image(channels, 5, 6)
    assert np.array_equal(load(tmp_path, images=images, labels=LABELS).images.numpy(), images)


def test_ambiguous_layout_is_channels_last(tmp_path: Path) -> None:
    assert load(tmp_path, images=image(3, 5, 1), labels=LABELS).images.shape == (4, 1, 3, 5)


@pytest.mark.parametrize("names", [np.array(["cat", "dog", "émeu"]), np.array([b"cat", b"dog", "émeu".encode()])])
def test_class_names(names: np.ndarray, tmp_path: Path) -> None:
    got = load(tmp_path, images=image(2, 2), labels=LABELS.astype(np.uint8), class_names=names)
    assert got.class_names == ("cat", "dog", "émeu")


def test_wrong_keys_are_listed(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"wanted the keys images \(uint8.* labels .*; found arr_0, targets; rename"):
        load(tmp_path, targets=LABELS, arr_0=image(2, 2))
    with pytest.raises(InputError, match="found images;"):
        load(tmp_path, images=image(2, 2))


BAD = {
    "float images": ({"images": image(2, 2) / 255.0}, r"images must be uint8 0\.\.255, got float64"),
    "signed images": ({"images": image(2, 2).astype(np.int64)}, "uint8 .* got int64"),
    "flat images": ({"images": image(12)}, r"\[N, H, W, C\].* got \(4, 12\)"),
    "too many channels": ({"images": image(5, 6, 7)}, r"up to 4 channels.* got \(4, 5, 6, 7\)"),
    "float labels": ({"labels": LABELS * 1.0}, "labels must be integers .* got float64"),
    "bool labels": ({"labels": LABELS > 0}, "labels must be integers .* got bool"),
    "one-hot labels": ({"labels": np.eye(4, dtype=int)}, r"labels must be integers \[N\], got int64 \(4, 4\)"),
    "negative labels": ({"labels": LABELS - 1}, "labels must count from 0, got -1"),
    "fewer labels": ({"labels": LABELS[:3]}, "4 images and 3 labels"),
    "nothing": ({"images": image(2, 2)[:0], "labels": LABELS[:0]}, "0 images and 0 labels"),
    "huge label": ({"labels": np.array([0, 1, 2, 2**63], np.uint64)}, "without gaps, got label 9223372036854775808"),
    "huge label, names": ({"labels": LABELS + 2**40, "class_names": np.array(["a"])}, "1 class_names for labels up to"),
    "few names": ({"class_names": np.array(["a", "b"])}, "2 class_names for labels up to 2"),
    "numbers as names": ({"class_names": np.arange(3)}, r"class_names must be text \[C\], got int64"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arrays(case: str, tmp_path: Path) -> None:
    change, message = BAD[case]
    with pytest.raises(InputError, match=message):
        load(tmp_path, **({"images": image(2, 2), "labels": LABELS} | change))


class Bomb:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return Path.touch, (self.file,)


@pytest.mark.parametrize("key", ["images", "labels", "class_names"])
def test_object_arrays_are_refused_unread(key: str, tmp_path: Path) -> None:
    arrays = {"images": image(2, 2), "labels": LABELS, key: np.array([Bomb(tmp_path / "ran")] * 4, dtype=object)}
    with pytest.raises(InputError, match="refused: an array of Python objects"):
        load(tmp_path, **arrays)
    assert not (tmp_path / "ran").exists()
    # The bomb is live: numpy asked to unpickle sets it off.
    np.load(tmp_path / "mine.npz", allow_pickle=True)[key]
    assert (tmp_path / "ran").exists()


def test_not_an_npz(tmp_path: Path) -> None:
    file = tmp_path / "x.npz"
    for content in (b"", b"garbage", b"\x93NUMPY\x01\x00"):
        file.write_bytes(content)
        with pytest.raises(InputError, match=r"is not an \.npz file"):
            load_source(DataConfig(source="npz", path=str(file)))


def test_damaged_npz(tmp_path: Path) -> None:
    load(tmp_path, images=image(20, 20), labels=LABELS)
    file = tmp_path / "mine.npz"
    raw = bytearray(file.read_bytes())
    raw[400:420] = bytes(20)
    file.write_bytes(raw)
    with pytest.raises(InputError, match=r"damaged \.npz file"):
        load_source(DataConfig(source="npz", path=str(file)))
    file.write_bytes(raw[:-50])
    with pytest.raises(InputError, match=r"not an \.npz file"):
        load_source(DataConfig(source="npz", path=str(file)))
