from __future__ import annotations

import io
import os
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from imbdiff.data import DataConfig, ImageSet, load_source
from imbdiff.data.cifar_names import CIFAR10_NAMES, CIFAR100_NAMES
from imbdiff.errors import InputError

RNG = np.random.default_rng(0)
SHAPES = {10: [3, 2, 1, 2, 2], 100: [7]}
NAMES = {10: [f"name{i}" for i in range(10)], 100: [f"fine{i}" for i in range(100)]}
FOLDERS = {10: ("cifar-10-batches-bin", "cifar-10-batches-py"), 100: ("cifar-100-binary", "cifar-100-python")}
Tar = Callable[[Path, dict[str, bytes]], Path]
Python2 = Callable[[Any], bytes]


def batches(classes: int) -> list[tuple[np.ndarray, list[int]]]:
    rng = np.random.default_rng(classes)
    return [
        (rng.integers(0, 256, (n, 3072), dtype=np.uint8), rng.integers(0, classes, n).tolist()) for n in SHAPES[classes]
    ]


def names_of_batches(classes: int) -> list[str]:
    return [f"data_batch_{i}" for i in range(1, 6)] if classes == 10 else ["train"]


def binary_files(classes: int) -> dict[str, bytes]:
    out = {}
    for name, (images, labels) in zip(names_of_batches(classes), batches(classes), strict=True):
        columns = [labels] if classes == 10 else [[99 - y for y in labels], labels]
        out[f"{name}.bin"] = np.concatenate([np.array(columns, np.uint8).T, images], 1).tobytes()
    meta = "batches.meta.txt" if classes == 10 else "fine_label_names.txt"
    return {
        "test_batch.bin" if classes == 10 else "test.bin": b"not read",
        meta: ("\n".join(NAMES[classes]) + "\n\n").encode(),
        # Not in order, as in the official archives.
        **dict(reversed(out.items())),
    }


def python_files(classes: int, dump: Python2) -> dict[str, bytes]:
    out = {}
    for name, (images, labels) in zip(names_of_batches(classes), batches(classes), strict=True):
        entries: dict[str, Any] = {"batch_label": "a batch", "data": images, "filenames": ["a.png"] * len(labels)}
        if classes == 10:
            entries["labels"] = labels
        else:
            entries |= {"fine_labels": labels, "coarse_labels": [99 - y for y in labels]}
        out[name] = dump(entries)
    meta, key = ("batches.meta", "label_names") if classes == 10 else ("meta", "fine_label_names")
    return {
        "test_batch": b"not read",
        meta: dump({"num_vis": 3072, key: NAMES[classes]}),
        **dict(reversed(out.items())),
    }


def load(path: Path, classes: int) -> ImageSet:
    return load_source(DataConfig(source="cifar10" if classes == 10 else "cifar100", path=str(path)))


def check(got: ImageSet, classes: int, names: list[str] | tuple[str, ...] | None = None) -> None:
    images = np.concatenate([images for images, _ in batches(classes)]).reshape(-1, 3, 32, 32)
    assert np.array_equal(got.images.numpy(), images)
    assert got.labels.tolist() == [y for _, labels in batches(classes) for y in labels]
    assert got.class_names == tuple(names or NAMES[classes])
    assert got.name == f"cifar{classes}"


@pytest.mark.parametrize("python", [False, True])
@pytest.mark.parametrize("classes", [10, 100])
def test_archives_and_folders(classes: int, python: bool, tmp_path: Path, tar: Tar, python2_pickle: Python2) -> None:
    files = python_files(classes, python2_pickle) if python else binary_files(classes)
    folder = FOLDERS[classes][python]
    before = sorted(os.listdir(tmp_path))
    archive = tar(tmp_path / "cifar.tar.gz", {f"{folder}/{name}": content for name, content in files.items()})
    check(load(archive, classes), classes)
    assert sorted(os.listdir(tmp_path)) == [*before, "cifar.tar.gz"]  # nothing was extracted
    (tmp_path / "parent" / folder).mkdir(parents=True)
    for name, content in files.items():
        (tmp_path / "parent" / folder / name).write_bytes(content)
    check(load(tmp_path / "parent" / folder, classes), classes)
    check(load(tmp_path / "parent", classes), classes)


@pytest.mark.parametrize("python", [False, True])
@pytest.mark.parametrize("classes", [10, 100])
def test_standard_names_without_a_list(
    classes: int, python: bool, tmp_path: Path, tar: Tar, python2_pickle: Python2
) -> None:
    files = python_files(classes, python2_pickle) if python else binary_files(classes)
    files = {name: content for name, content in files.items() if "meta" not in name and "names" not in name}
    names = CIFAR10_NAMES if classes == 10 else CIFAR100_NAMES
    assert (len(set(names)), list(names)) == (classes, sorted(names))
    check(load(tar(tmp_path / "c.tar.gz", files), classes), classes, names)


@pytest.mark.parametrize("meta", [b"one\ntwo\n", b""])
def test_wrong_number_of_names(meta: bytes, tmp_path: Path, tar: Tar, python2_pickle: Python2) -> None:
    with pytest.raises(InputError, match="expected 10 class names, got"):
        load(tar(tmp_path / "c.tar.gz", binary_files(10) | {"batches.meta.txt": meta}), 10)
    bad = python2_pickle({"label_names": meta.decode().split()})
    with pytest.raises(InputError, match="expected 10 class names, got"):
        load(tar(tmp_path / "c.tar.gz", python_files(10, python2_pickle) | {"batches.meta": bad}), 10)


def test_missing_batch(tmp_path: Path, tar: Tar) -> None:
    files = binary_files(10)
    del files["data_batch_4.bin"]
    with pytest.raises(InputError, match=r"expected .*data_batch_4\.bin.*found batches\.meta\.txt, data_batch_1\.bin"):
        load(tar(tmp_path / "c.tar.gz", files), 10)


def test_the_other_set(tmp_path: Path, tar: Tar) -> None:
    with pytest.raises(InputError, match=r"expected the CIFAR-10 .*found none of them.*set --data\.source"):
        load(tar(tmp_path / "c.tar.gz", binary_files(100)), 10)
    with pytest.raises(InputError, match=r"expected the CIFAR-100 training files train\.bin"):
        load(tmp_path, 100)


@pytest.mark.parametrize("cut", [1, 1500, 3073 * 3])
def test_cut_records(cut: int, tmp_path: Path, tar: Tar) -> None:
    files = binary_files(10)
    files["data_batch_1.bin"] = files["data_batch_1.bin"][:-cut]
    with pytest.raises(InputError, match=r"data_batch_1\.bin: expected records of 3073 bytes"):
        load(tar(tmp_path / "c.tar.gz", files), 10)


def test_labels_out_of_range(tmp_path: Path, tar: Tar, python2_pickle: Python2) -> None:
    files = binary_files(10)
    files["data_batch_2.bin"] = b"\x0a" + files["data_batch_2.bin"][1:]
    with pytest.raises(InputError, match=r"labels must lie in 0\.\.9, got \d\.\.10"):
        load(tar(tmp_path / "c.tar.gz", files), 10)
    files = python_files(100, python2_pickle)
    files["train"] = python2_pickle({"data": batches(100)[0][0], "fine_labels": [1, 2, 3, 4, 5, 6, 100]})
    with pytest.raises(InputError, match=r"labels must lie in 0\.\.99, got 1\.\.100"):
        load(tar(tmp_path / "c.tar.gz", files), 100)


DATA = np.zeros((7, 3072), np.uint8)
BAD_ENTRIES = {
    "no labels": ({"data": DATA}, "expected the entries data and fine_labels, found data"),
    "coarse only": ({"data": DATA, "coarse_labels": [0] * 7}, "found data, coarse_labels"),
    "list as data": ({"data": [1, 2], "fine_labels": [0] * 7}, "data must be a uint8 array"),
    "narrow data": ({"data": DATA[:, :3000].copy(), "fine_labels": [0] * 7}, "data must be a uint8 array"),
    "fewer labels": ({"data": DATA, "fine_labels": [0] * 6}, "one whole-number label for each of 7 images"),
    "text labels": ({"data": DATA, "fine_labels": ["a"] * 7}, "one whole-number label"),
    "ragged labels": ({"data": DATA, "fine_labels": [[1], [1, 2]]}, "train: "),
    "empty": ({"data": DATA[:0], "fine_labels": []}, "one whole-number label for each of 0 images"),
}


@pytest.mark.parametrize("case", BAD_ENTRIES)
def test_bad_entries(case: str, tmp_path: Path, tar: Tar, python2_pickle: Python2) -> None:
    entries, message = BAD_ENTRIES[case]
    with pytest.raises(InputError, match=message):
        load(tar(tmp_path / "c.tar.gz", {"train": python2_pickle(entries)}), 100)


@pytest.mark.parametrize("where", ["data_batch_1", "data_batch_3", "batches.meta"])
def test_code_in_an_archive_is_refused(where: str, tmp_path: Path, tar: Tar, python2_pickle: Python2) -> None:
    class Code:
        def __reduce__(self) -> Any:
            return os.system, (f"echo > {tmp_path / 'ran'}",)

    raw = pickle.dumps({"data": Code(), "labels": [0]}, 2)
    files = python_files(10, python2_pickle) | {where: raw}
    message = rf"{where}: refused: the archive contains code \({os.name}\.system\), not data; nothing was executed"
    with pytest.raises(InputError, match=message):
        load(tar(tmp_path / "c.tar.gz", files), 10)
    assert not (tmp_path / "ran").exists()
    pickle.loads(raw)  # the bomb is live
    assert (tmp_path / "ran").exists()


def test_damaged_archives(tmp_path: Path, tar: Tar) -> None:
    whole = tar(tmp_path / "c.tar.gz", binary_files(10)).read_bytes()
    file = tmp_path / "bad.tar.gz"
    middle = len(whole) // 2
    flipped = whole[:middle] + bytes(b ^ 255 for b in whole[middle : middle + 99]) + whole[middle + 99 :]
    for content in (b"", b"garbage" * 200, whole[: len(whole) // 2], whole[:30], flipped):
        file.write_bytes(content)
        with pytest.raises(InputError, match=r"damaged or no tar archive|expected the CIFAR-10 training files"):
            load(file, 10)


def test_cut_uncompressed_tar(tmp_path: Path, tar: Tar) -> None:
    plain = tmp_path / "c.tar"
    with tarfile.open(tar(tmp_path / "c.tar.gz", binary_files(100))) as source, tarfile.open(plain, "w") as target:
        for member in source:
            target.addfile(member, source.extractfile(member))
    check(load(plain, 100), 100)
    raw = plain.read_bytes()
    place = raw.index(b"train.bin")
    plain.write_bytes(raw[: place + 5000])
    with pytest.raises(InputError, match="damaged or no tar archive"):
        load(plain, 100)


def test_members_never_reach_the_disk_or_follow_links(tmp_path: Path) -> None:
    """A path that climbs out is just a name, and links are not followed."""
    secret = tmp_path / "secret"
    secret.write_bytes(binary_files(100)["train.bin"])
    archive = tmp_path / "inner" / "c.tar.gz"
    archive.parent.mkdir()
    with tarfile.open(archive, "w:gz") as out:
        member = tarfile.TarInfo("../../escaped/train.bin")
        content = binary_files(100)["train.bin"]
        member.size = len(content)
        out.addfile(member, io.BytesIO(content))
    check(load(archive, 100), 100, CIFAR100_NAMES)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["c.tar.gz", "inner", "secret"]
    with tarfile.open(archive, "w:gz") as out:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
            member = tarfile.TarInfo("train.bin")
            member.type, member.linkname = kind, str(secret)
            out.addfile(member)
    with pytest.raises(InputError, match="found none of them"):
        load(archive, 100)
