from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from sklearn.datasets import load_digits as sklearn_digits

from imbdiff.data import DataConfig, load_source
from imbdiff.errors import InputError


def test_digits() -> None:
    data = load_source(DataConfig())
    assert data.images.shape == (1797, 1, 8, 8)
    assert data.class_names == tuple("0123456789")
    assert data.counts.tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    levels = [0, 16, 32, 48, 64, 80, 96, 112, 128, 143, 159, 175, 191, 207, 223, 239, 255]
    assert data.images.unique().tolist() == levels
    original = sklearn_digits()
    assert torch.equal(data.images[:, 0], torch.tensor(levels)[torch.from_numpy(original.images).long()])
    assert data.labels.tolist() == original.target.tolist()


def test_digits_without_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(InputError, match=r"scikit-learn.*pip install 'imbdiff\[demo\]'"):
        load_source(DataConfig())


def test_digits_take_no_path() -> None:
    with pytest.raises(InputError, match=r"reads no file, got --data\.path my\.npz: set --data\.source"):
        load_source(DataConfig(path="my.npz"))


@pytest.mark.parametrize("source", ["digits", "npz", "idx", "cifar10"])
def test_size_is_for_folders(source: str) -> None:
    with pytest.raises(InputError, match=r"--data\.size .* folder only"):
        load_source(DataConfig(source=source, path="x", size=8))  # type: ignore[arg-type]


EXPECTED = {
    "npz": r"\.npz file with the keys images and labels",
    "folder": "one folder of images for each class",
    "cifar10": r"cifar-10-binary\.tar\.gz",
    "cifar100": r"cifar-100-binary\.tar\.gz",
    "idx": "train-images-idx3-ubyte",
}


@pytest.mark.parametrize("source", EXPECTED)
def test_missing_paths_say_what_was_expected(source: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=rf"needs --data\.path: expected .*{EXPECTED[source]}"):
        load_source(DataConfig(source=source))  # type: ignore[arg-type]
    with pytest.raises(InputError, match=rf"nothing at .*absent.*expected .*{EXPECTED[source]}"):
        load_source(DataConfig(source=source, path=str(tmp_path / "absent")))  # type: ignore[arg-type]


@pytest.mark.parametrize("source", ["folder", "idx"])
def test_file_where_a_folder_belongs(source: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=rf"is a file: expected .*{EXPECTED[source]}"):
        load_source(DataConfig(source=source, path=str(tmp_path / "file")))  # type: ignore[arg-type]


def test_folder_where_a_file_belongs(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"is a folder: expected an \.npz"):
        load_source(DataConfig(source="npz", path=str(tmp_path)))


@pytest.mark.parametrize("source", EXPECTED)
def test_unreadable_paths(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Permission errors of the operating system, which root never meets, reach the user as InputError."""

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    target = tmp_path / "data"
    target.touch() if source in ("npz", "cifar10", "cifar100") else target.mkdir()
    for name in ("open", "iterdir", "glob"):
        monkeypatch.setattr(Path, name, refuse)
    monkeypatch.setattr("tarfile.open", refuse)
    with pytest.raises(InputError, match="Permission denied"):
        load_source(DataConfig(source=source, path=str(target)))  # type: ignore[arg-type]


def test_unknown_source() -> None:
    with pytest.raises(InputError, match=r"unknown source 'lsun': set --data\.source"):
        load_source(DataConfig(source="lsun", path="x"))  # type: ignore[arg-type]


def test_home_folder_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(InputError, match=rf"nothing at {tmp_path}/absent"):
        load_source(DataConfig(source="npz", path="~/absent"))


def test_import_stays_light() -> None:
    """Only torch and numpy: the command line's --help must not wait for Pillow, scikit-learn or rich."""
    code = "import sys, imbdiff.data; print(sorted({'PIL', 'sklearn', 'rich', 'scipy', 'pickle5'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
