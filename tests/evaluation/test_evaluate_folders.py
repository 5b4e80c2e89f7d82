"""Image folders and label files: round trips, and a message for everything that can be wrong with them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from imbdiff.data.images import ImageSet
from imbdiff.errors import InputError
from imbdiff.evaluation.folders import load_pair, save_images


def images(n: int, names: tuple[str, ...], channels: int = 1, seed: int = 0, name: str = "set") -> ImageSet:
    g = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (n, channels, 5, 4), generator=g, dtype=torch.uint8)
    return ImageSet(pixels, torch.arange(n).flip(0) % len(names), names, name)


def write(file: Path, size: tuple[int, int] = (4, 5), mode: str = "L", value: int = 0) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value if mode == "L" else None).save(file)


def labels(folder: Path, text: str) -> Path:
    file = folder / "labels.csv"
    file.write_text(text)
    return file


@pytest.mark.parametrize("channels", [1, 3])
def test_what_is_saved_comes_back_through_the_labels(tmp_path: Path, channels: int) -> None:
    real, fake = images(24, ("2", "9", "10"), channels, 0), images(24, ("2", "9", "10"), channels, 1)
    save_images(tmp_path / "real", real)
    save_images(tmp_path / "fake", fake)
    # The label files are equal: the same names with the same labels.
    assert (tmp_path / "real/labels.csv").read_text() == (tmp_path / "fake/labels.csv").read_text()
    found = load_pair(tmp_path / "real", tmp_path / "fake", tmp_path / "real/labels.csv")
    for before, after in zip((real, fake), found, strict=True):
        assert torch.equal(before.images, after.images)
        assert torch.equal(before.labels, after.labels)
        assert after.class_names == ("2", "9", "10")
    assert [s.name for s in found] == ["real", "fake"]


def test_what_is_saved_comes_back_as_a_tree(tmp_path: Path) -> None:
    real, fake = images(12, ("ant", "bee")), images(5, ("ant", "bee"), seed=1)
    fake = fake.take(fake.labels == 1)  # no ant was drawn: the folder is there, empty
    save_images(tmp_path / "real", real)
    save_images(tmp_path / "fake", fake)
    a, b = load_pair(tmp_path / "real", tmp_path / "fake")
    order = torch.cat([(real.labels == c).nonzero()[:, 0] for c in (0, 1)])  # trees are read class by class
    assert torch.equal(a.images, real.images[order])
    assert torch.equal(b.images, fake.images)
    assert b.class_names == ("ant", "bee")
    assert b.counts.tolist() == [0, len(fake)]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("10", "9", "-1"), ("-1", "9", "10")),
        (("10", "9", "x"), ("9", "10", "x")),
        (("n10", "n9", "a"), ("a", "n9", "n10")),
    ],
)
def test_classes_sort_as_people_would(tmp_path: Path, names: tuple[str, ...], expected: tuple[str, ...]) -> None:
    for side in "rf":
        for i, _ in enumerate(names):
            write(tmp_path / side / f"{i}.png", value=i)
    file = labels(tmp_path, "file,label\n" + "".join(f"{i}.png,{n}\n" for i, n in enumerate(names)))
    real, _ = load_pair(tmp_path / "r", tmp_path / "f", file)
    assert real.class_names == expected
    assert [real.class_names[c] for c in real.labels] == list(names)
    assert real.images[:, 0, 0, 0].tolist() == [0, 1, 2]


def test_label_files_may_be_joined_and_carry_more_columns(tmp_path: Path) -> None:
    write(tmp_path / "r/a.png")
    write(tmp_path / "f/a.png")
    write(tmp_path / "f/sub/b.bmp", value=7)
    (tmp_path / "f/.cache").mkdir()
    write(tmp_path / "f/.cache/c.png")
    file = tmp_path / "l.csv"
    file.write_bytes("\ufefflabel,file,note\r\nx,a.png,1\r\ny,./sub/b.bmp,2\r\nx,a.png,3\r\n".encode())
    real, fake = load_pair(tmp_path / "r", tmp_path / "f", file)
    assert real.counts.tolist() == [1, 0]
    assert fake.counts.tolist() == [1, 1]
    assert int(fake.images[1, 0, 0, 0]) == 7


GOOD = "file,label\na.png,x\nb.png,y\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name,class\na.png,x\n", r"expected the header file,label, got \['name', 'class'\]"),
        ("", "expected the header file,label, got an empty file"),
        ("file,label\na.png,x\n", "must list every image, 1 are missing: b.png; add their labels"),
        (GOOD + "c.png,x\n", "lists 1 files that are neither in .*: c.png; names are relative"),
        (GOOD + "../r/a.png,x\n", r"lists 1 files that are neither in .*: \.\./r/a.png"),
        (GOOD + "a.png,y\n", "line 4: a.png has label 'y' here and 'x' before"),
        (GOOD + "c.png\n", "line 4: expected a file and its label"),
        (GOOD + "c.png, \n", "line 4: expected a file and its label"),
    ],
)
def test_label_files_that_are_wrong(tmp_path: Path, text: str, message: str) -> None:
    for name in ("r/a.png", "f/a.png", "f/b.png"):
        write(tmp_path / name)
    with pytest.raises(InputError, match=message):
        load_pair(tmp_path / "r", tmp_path / "f", labels(tmp_path, text))


def test_label_files_that_are_no_text(tmp_path: Path) -> None:
    write(tmp_path / "r/a.png")
    with pytest.raises(InputError, match=r"expected a CSV of labels at .*, found no file"):
        load_pair(tmp_path / "r", tmp_path / "r", tmp_path / "none.csv")
    with pytest.raises(InputError, match="is not a CSV in UTF-8"):
        load_pair(tmp_path / "r", tmp_path / "r", tmp_path / "r/a.png")


def test_missing_images_are_counted(tmp_path: Path) -> None:
    for i in range(12):
        write(tmp_path / f"r/{i}.png")
    with pytest.raises(InputError, match=r"11 are missing: 1.png, 2.png, 3.png, 4.png, 5.png, \.\.\. \(11 in all\)"):
        load_pair(tmp_path / "r", tmp_path / "r", labels(tmp_path, "file,label\n0.png,x\n"))


def test_folders_that_are_wrong(tmp_path: Path) -> None:
    write(tmp_path / "r/x/a.png")
    with pytest.raises(InputError, match=r"expected a folder of images at .*none, found none"):
        load_pair(tmp_path / "r", tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no image"):
        load_pair(tmp_path / "r", tmp_path / "empty")
    write(tmp_path / "f/y/a.png")
    with pytest.raises(InputError, match="only in the first: x; only in the second: y"):
        load_pair(tmp_path / "r", tmp_path / "f")
    for astray in ("s/a.png", "t/x/deep/a.png"):
        write(tmp_path / astray)
        (tmp_path / astray[0] / "x").mkdir(exist_ok=True)
        with pytest.raises(InputError, match=r"one folder for each class, <class>/<file>; these do not: .*a\.png"):
            load_pair(tmp_path / "r", tmp_path / astray[0])


@pytest.mark.parametrize(
    ("size", "mode", "message"),
    [
        ((5, 5), "L", r"one size and mode, got \(5, 5\) .*b.png and \(5, 4\) in .*a.png"),
        ((4, 5), "RGB", r"one size and mode, got \(5, 4, 3\)"),
        ((4, 5), "RGBA", "expected mode L or RGB, 8 bits a channel, got RGBA; convert it"),
        ((4, 5), "I;16", "expected mode L or RGB, 8 bits a channel, got I;16"),
    ],
)
def test_images_that_do_not_fit(tmp_path: Path, size: tuple[int, int], mode: str, message: str) -> None:
    write(tmp_path / "r/x/a.png")
    write(tmp_path / "r/x/b.png", size, mode)
    with pytest.raises(InputError, match=message):
        load_pair(tmp_path / "r", tmp_path / "r")


def test_the_two_sides_must_fit(tmp_path: Path) -> None:
    write(tmp_path / "r/x/a.png")
    write(tmp_path / "f/x/a.png", mode="RGB")
    with pytest.raises(InputError, match=r"one size and mode, got \(1, 5, 4\) .* and \(3, 5, 4\)"):
        load_pair(tmp_path / "r", tmp_path / "f")


def test_a_broken_image_is_named(tmp_path: Path) -> None:
    g = np.random.default_rng(0)
    write(tmp_path / "r/x/a.png")
    Image.fromarray(g.integers(0, 256, (50, 40), dtype=np.uint8)).save(tmp_path / "cut.png")
    for content in (b"not a picture", (tmp_path / "cut.png").read_bytes()[:900]):
        (tmp_path / "r/x/b.png").write_bytes(content)
        with pytest.raises(InputError, match=r"x/b.png is not a readable image .*; remove or replace it"):
            load_pair(tmp_path / "r", tmp_path / "r")


def test_what_cannot_be_saved(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="one or three channels, got 2"):
        save_images(tmp_path, images(2, ("a",), channels=2))
    for name in ("a/b", "..", "", " "):
        with pytest.raises(InputError, match="cannot be the name of a folder"):
            save_images(tmp_path, images(2, ("a", name)))
