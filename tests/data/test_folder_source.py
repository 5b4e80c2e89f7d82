from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from imbdiff.data import DataConfig, ImageSet, folder, load_source
from imbdiff.errors import InputError

RNG = np.random.default_rng(0)


def save(path: Path, array: np.ndarray | None = None, mode: str | None = None) -> np.ndarray:
    array = RNG.integers(0, 256, (6, 5, 3), dtype=np.uint8) if array is None else array
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(array)
    (picture.convert(mode) if mode else picture).save(path)
    return array


def load(root: Path, **options: Any) -> ImageSet:
    return load_source(DataConfig(source="folder", path=str(root), **options))


def test_classes_and_files_in_the_order_of_their_names(tmp_path: Path) -> None:
    names = ("owl/b.png", "owl/a.png", "cat/10.png", "cat/9.png", "cat/deep/1.png")
    images = {name: save(tmp_path / name) for name in names}
    got = load(tmp_path)
    assert (got.class_names, got.name) == (("cat", "owl"), tmp_path.name)
    order = ("cat/10.png", "cat/9.png", "cat/deep/1.png", "owl/a.png", "owl/b.png")
    assert np.array_equal(got.images.numpy(), np.stack([images[n] for n in order]).transpose(0, 3, 1, 2))
    assert got.labels.tolist() == [0, 0, 0, 1, 1]


def test_hidden_and_loose_files_are_ignored(tmp_path: Path) -> None:
    save(tmp_path / "cat/a.png")
    save(tmp_path / ".cache/a.png")
    save(tmp_path / "cat/.thumbs/a.png")
    (tmp_path / "cat/.DS_Store").write_bytes(b"no image")
    (tmp_path / "labels.csv").write_text("no image")
    assert (len(load(tmp_path)), load(tmp_path).class_names) == (1, ("cat",))


def test_grey_only_if_all_are_grey(tmp_path: Path) -> None:
    grey = save(tmp_path / "a/1.png", RNG.integers(0, 256, (6, 5), dtype=np.uint8))
    black_and_white = save(tmp_path / "a/2.png", np.eye(6, 5, dtype=bool))
    got = load(tmp_path)
    assert np.array_equal(got.images[:, 0].numpy(), np.stack([grey, black_and_white * np.uint8(255)]))
    assert got.images.shape == (2, 1, 6, 5)
    colour = save(tmp_path / "a/3.png")
    got = load(tmp_path)
    assert got.images.shape == (3, 3, 6, 5)
    assert all(np.array_equal(got.images[0, c].numpy(), grey) for c in range(3))
    assert np.array_equal(got.images[2].numpy(), colour.transpose(2, 0, 1))


@pytest.mark.parametrize(("mode", "channels"), [("RGBA", 3), ("P", 3), ("LA", 1)])
def test_other_modes(mode: str, channels: int, tmp_path: Path) -> None:
    flat = save(tmp_path / "a/1.png", np.full((6, 5, 3), 51, np.uint8), mode)
    assert np.array_equal(load(tmp_path).images[0].numpy(), flat.transpose(2, 0, 1)[:channels])


def break_files(root: Path, count: int) -> None:
    for i in range(count):
        save(root / f"cat/good{i}.png")
    raw = (root / "cat/good0.png").read_bytes()
    for i in range(count):
        (root / f"cat/bad{i}.png").write_bytes(raw[: len(raw) // 2] if i % 2 else b"garbage")


def test_bad_files_stop_and_are_all_counted(tmp_path: Path) -> None:
    break_files(tmp_path, 7)
    with pytest.raises(InputError) as caught:
        load(tmp_path)
    text = str(caught.value)
    assert "7 of 14 files cannot be read" in text
    assert re.findall(r"bad\d", text) == ["bad0", "bad1", "bad2", "bad3", "bad4"]
    assert "--data.on-bad-file skip" in text


def test_bad_files_can_be_skipped(tmp_path: Path) -> None:
    break_files(tmp_path, 2)
    with pytest.warns(UserWarning, match=r"2 of 4 files cannot be read as images: cat/bad0\.png .*cat/bad1\.png"):
        got = load(tmp_path, on_bad_file="skip")
    assert len(got) == 2


def test_class_without_a_readable_image(tmp_path: Path) -> None:
    save(tmp_path / "cat/a.png")
    (tmp_path / "dog").mkdir()
    with pytest.raises(InputError, match="class folder dog holds no readable image"):
        load(tmp_path)
    (tmp_path / "dog/a.png").write_bytes(b"garbage")
    with (
        pytest.warns(UserWarning, match="1 of 2"),
        pytest.raises(InputError, match="class folder dog holds no readable"),
    ):
        load(tmp_path, on_bad_file="skip")


def test_sixteen_bit_images_are_not_clipped_in_silence(tmp_path: Path) -> None:
    save(tmp_path / "cat/a.png", np.full((6, 5), 40000, np.uint16))
    with pytest.raises(InputError, match="more than 8 bits per channel"):
        load(tmp_path)


def test_no_class_folders(tmp_path: Path) -> None:
    save(tmp_path / "a.png")
    with pytest.raises(InputError, match="one folder of images for each class, found no folder"):
        load(tmp_path)


def test_different_sizes_need_a_size(tmp_path: Path) -> None:
    save(tmp_path / "a/1.png")
    save(tmp_path / "a/2.png")
    save(tmp_path / "b/1.png", RNG.integers(0, 256, (9, 7, 3), dtype=np.uint8))
    with pytest.raises(InputError, match=r"a/1\.png is 5x6 and b/1\.png is 7x9.*--data\.size"):
        load(tmp_path)
    assert load(tmp_path, size=4).images.shape == (3, 3, 4, 4)


@pytest.mark.parametrize("wide", [True, False])
def test_size_crops_the_centre(wide: bool, tmp_path: Path) -> None:
    """The shorter side already fits: no resampling, the middle columns (or rows) are taken."""
    shape = (4, 10, 3) if wide else (10, 4, 3)
    array = save(tmp_path / "a/1.png", RNG.integers(0, 256, shape, dtype=np.uint8))
    middle = array[:, 3:7] if wide else array[3:7]
    assert np.array_equal(load(tmp_path, size=4).images[0].numpy(), middle.transpose(2, 0, 1))


def test_size_resizes_the_shorter_side(tmp_path: Path) -> None:
    """Three vertical bars on 24 x 8 pixels become 12 x 4, of which the centre square is the middle bar."""
    bars = np.repeat(np.array([0, 128, 255], np.uint8), 8)[None, :, None].repeat(8, 0).repeat(3, 2)
    save(tmp_path / "a/1.png", bars)
    got = load(tmp_path, size=4).images[0].int()
    assert got.shape == (3, 4, 4)
    assert (got - 128).abs().max() <= 12  # bicubic reaches one pixel over the edges of the bar
    assert (got[:, :, 1:3] - 128).abs().max() <= 3
    assert load(tmp_path, size=16).images.shape == (1, 3, 16, 16)


@pytest.mark.parametrize("size", [0, -4])
def test_bad_size(size: int, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--data\.size must be at least 1"):
        load(tmp_path, size=size)


def test_progress_only_for_many_files_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[int] = []

    def track(files: list[Any], **_: Any) -> list[Any]:
        shown.append(len(files))
        return files

    monkeypatch.setattr("rich.progress.track", track)
    many, few = [(Path("x"), 0)] * 2001, [(Path("x"), 0)] * 2000
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False, raising=False)
    assert list(folder._with_progress(many)) == many
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert list(folder._with_progress(few)) == few
    assert shown == []
    assert list(folder._with_progress(many)) == many
    assert shown == [2001]
