"""Image sets from folders of files, for an evaluation without a run, and back."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch

from imbdiff.data.images import ImageSet
from imbdiff.errors import InputError
from imbdiff.files import write_text

ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
MODES = {"L": 1, "RGB": 3}


def load_pair(real_dir: str | Path, fake_dir: str | Path, labels_csv: str | Path = "") -> tuple[ImageSet, ImageSet]:
    """(real, fake) with common classes, from two folders and a CSV `file,label`, or from trees `<class>/<file>`.

    In the CSV `file` is relative to either folder; a name that is in both has one label. Classes are sorted as numbers
    if all are integers, else as text with its numbers in order.
    """
    folders = [Path(real_dir), Path(fake_dir)]
    found = [_scan(folder) for folder in folders]
    if labels_csv:
        labels = _read_labels(Path(labels_csv), folders, found)
        sides = [{name: label for name, label in labels.items() if name in files} for files in found]
        classes = set(labels.values())
    else:
        trees = [_classes_of(folder) for folder in folders]
        if trees[0] != trees[1]:
            raise InputError(
                f"expected one folder for each class, the same ones in {folders[0]} and {folders[1]}, got only in the "
                f"first: {_some(trees[0] - trees[1])}; only in the second: {_some(trees[1] - trees[0])}; add the empty "
                "folders, or name a CSV of labels"
            )
        sides = [_tree_labels(folder, files) for folder, files in zip(folders, found, strict=True)]
        classes = trees[0]
    names = _sorted(classes)
    real, fake = (_load(folder, side, names) for folder, side in zip(folders, sides, strict=True))
    if real.images.shape[1:] != fake.images.shape[1:]:
        raise InputError(
            f"expected images of one size and mode, got {tuple(real.images.shape[1:])} (channels, height, width) in "
            f"{folders[0]} and {tuple(fake.images.shape[1:])} in {folders[1]}; resize or convert one side"
        )
    return real, fake


def save_images(directory: str | Path, images: ImageSet) -> None:
    """Write `<class>/<number>.png` for images with one or three channels, and `labels.csv` that lists them in order."""
    from PIL import Image

    if images.images.shape[1] not in MODES.values():
        raise InputError(f"PNG files hold one or three channels, got {images.images.shape[1]} in {images.name}")
    for name in images.class_names:
        if not name.strip() or name.startswith(".") or re.search(r'[\\/:*?"<>|\0]', name):
            raise InputError(f"class name {name!r} cannot be the name of a folder; rename the class")
    folder = Path(directory)
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["file", "label"])
    for name in images.class_names:
        (folder / name).mkdir(parents=True, exist_ok=True)
    for number, (image, label) in enumerate(zip(images.images, images.labels.tolist(), strict=True)):
        file = f"{images.class_names[label]}/{number:06d}.png"
        pixels = image[0] if len(image) == 1 else image.permute(1, 2, 0)
        Image.fromarray(pixels.contiguous().cpu().numpy()).save(folder / file)
        table.writerow([file, images.class_names[label]])
    write_text(folder / "labels.csv", text.getvalue())


def _some(names: Iterable[str], most: int = 5) -> str:
    """Names for a message: the first few and the count."""
    listed = _sorted(names)
    return (", ".join(listed[:most]) + (f", ... ({len(listed)} in all)" if len(listed) > most else "")) or "none"


def _natural(text: str) -> list[tuple[int, int, str]]:
    """Sort key in which 2.png comes before 10.png."""
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in re.split(r"([0-9]+)", text) if part]


def _sorted(names: Iterable[str]) -> list[str]:
    names = list(names)
    if all(re.fullmatch(r"[+-]?[0-9]+", name) for name in names):
        return sorted(names, key=lambda name: (int(name), name))
    return sorted(names, key=lambda name: (_natural(name), name))


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _scan(folder: Path) -> set[str]:
    """Image files below a folder, as names relative to it."""
    if not folder.is_dir():
        raise InputError(f"expected a folder of images at {folder}, found none; check the path")
    paths = (p for p in folder.rglob("*") if p.suffix.lower() in ENDINGS and p.is_file())
    files = {p.relative_to(folder).as_posix() for p in paths if not _hidden(p.relative_to(folder))}
    if not files:
        raise InputError(f"{folder} holds no image ({', '.join(ENDINGS)})")
    return files


def _read_labels(file: Path, folders: Sequence[Path], found: Sequence[set[str]]) -> dict[str, str]:
    """file -> label in the order of the CSV, which must list exactly the images of both folders."""
    if not file.is_file():
        raise InputError(f"expected a CSV of labels at {file}, found no file; check the path")
    labels: dict[str, str] = {}
    try:
        with file.open(newline="", encoding="utf-8-sig") as handle:
            table = csv.DictReader(handle)
            if table.fieldnames is None or not {"file", "label"} <= set(table.fieldnames):
                raise InputError(f"{file}: expected the header file,label, got {table.fieldnames or 'an empty file'}")
            for row in table:
                name, label = (row["file"] or "").strip().removeprefix("./"), (row["label"] or "").strip()
                if not name or not label:
                    raise InputError(f"{file}, line {table.line_num}: expected a file and its label, got {row}")
                if labels.setdefault(name, label) != label:
                    raise InputError(
                        f"{file}, line {table.line_num}: {name} has label {label!r} here and {labels[name]!r} before; "
                        "a file name, in one folder or both, has one label"
                    )
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{file} is not a CSV in UTF-8: {error}") from error
    if missing := (found[0] | found[1]) - labels.keys():
        raise InputError(
            f"{file} must list every image, {len(missing)} are missing: {_some(missing)}; add their labels"
        )
    if unknown := labels.keys() - found[0] - found[1]:
        raise InputError(
            f"{file} lists {len(unknown)} files that are neither in {folders[0]} nor in {folders[1]}: "
            f"{_some(unknown)}; names are relative to the folders"
        )
    return labels


def _classes_of(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")}


def _tree_labels(folder: Path, files: set[str]) -> dict[str, str]:
    if astray := [name for name in files if name.count("/") != 1]:
        raise InputError(
            f"without a CSV of labels the images of {folder} must lie in one folder for each class, <class>/<file>; "
            f"these do not: {_some(astray)}"
        )
    return {name: name.split("/")[0] for name in _sorted(files)}


def _load(folder: Path, labels: dict[str, str], names: list[str]) -> ImageSet:
    from PIL import Image

    arrays: list[np.ndarray] = []
    first = ""
    for name in labels:
        try:
            with Image.open(folder / name) as image:
                mode, array = image.mode, np.array(image)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise InputError(f"{folder / name} is not a readable image ({error}); remove or replace it") from error
        if mode not in MODES:
            raise InputError(f"{folder / name}: expected mode L or RGB, 8 bits a channel, got {mode}; convert it")
        if arrays and array.shape != arrays[0].shape:
            raise InputError(
                f"expected images of one size and mode, got {array.shape} (height, width, channels) in {folder / name} "
                f"and {arrays[0].shape} in {folder / first}; resize or convert them"
            )
        first = first or name
        arrays.append(array)
    stack = torch.from_numpy(np.stack(arrays))
    images = stack[:, None] if stack.ndim == 3 else stack.permute(0, 3, 1, 2).contiguous()
    return ImageSet(images, torch.tensor([names.index(label) for label in labels.values()]), tuple(names), folder.name)
