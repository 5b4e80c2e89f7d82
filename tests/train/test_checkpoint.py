"""Checkpoints are whole or absent, whatever happens while they are written or afterwards."""

import resource

import pytest
import torch
from safetensors import safe_open

from imbdiff.errors import InputError
from imbdiff.train import checkpoint
from imbdiff.train.checkpoint import Checkpoint
from imbdiff.train.config import TrainConfig
from imbdiff.train.loop import train


def make(step: int, size: int = 100) -> Checkpoint:
    t = {"w": torch.full((size,), float(step))}
    return Checkpoint(step, t, t, {"bad": torch.tensor(0)})


def names(run):
    return sorted(p.name for p in (run / "checkpoints").iterdir())


def test_keeps_the_newest_and_loads_the_newest(tmp_path):
    for step in (5, 10, 15):
        checkpoint.save(tmp_path, make(step), {"a": 1}, keep=2)
    assert names(tmp_path) == ["step-00000010", "step-00000015"]
    found = checkpoint.load_latest(tmp_path, pytest.fail)
    assert found.step == 15
    assert torch.equal(found.model["w"], make(15).model["w"])
    with safe_open(tmp_path / "checkpoints/step-00000015/ema.safetensors", "pt") as f:
        assert f.metadata() == {"config": '{"a": 1}', "step": "15"}


def test_no_checkpoint_yet(tmp_path):
    assert checkpoint.load_latest(tmp_path, pytest.fail) is None


@pytest.mark.parametrize("harm", ["cut", "flip", "gone", "manifest", "empty"])
def test_a_torn_checkpoint_is_skipped_with_a_message(tmp_path, harm):
    for step in (5, 10):
        folder = checkpoint.save(tmp_path, make(step), {}, keep=2)
    file = folder / "ema.safetensors"
    content = bytearray(file.read_bytes())
    if harm == "cut":
        file.write_bytes(content[:-7])
    elif harm == "flip":
        content[-1] ^= 1
        file.write_bytes(content)
    elif harm == "gone":
        file.unlink()
    elif harm == "manifest":
        (folder / "manifest.json").write_text('{"step": 10')
    else:
        for each in folder.iterdir():
            each.unlink()
    said = []
    assert checkpoint.load_latest(tmp_path, said.append).step == 5
    assert len(said) == 1
    assert "skipped torn checkpoint" in said[0]
    assert "step-00000010" in said[0]


def test_nothing_but_torn_checkpoints_is_an_error(tmp_path):
    folder = checkpoint.save(tmp_path, make(5), {}, keep=2)
    (folder / "manifest.json").unlink()
    with pytest.raises(InputError, match="none of the 1 checkpoints .* is whole; --fresh starts over"):
        checkpoint.load_latest(tmp_path, lambda _: None)


@pytest.fixture
def small_files():
    """No file may grow past 1 MB: the write fails inside the library, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_failed_write_leaves_the_earlier_checkpoint(tmp_path, small_files):
    checkpoint.save(tmp_path, make(5), {}, keep=2)
    with pytest.raises(OSError, match="large|File too big|EFBIG|27"):
        checkpoint.save(tmp_path, make(10, size=1_000_000), {}, keep=2)
    assert names(tmp_path) == ["step-00000005"]
    assert checkpoint.load_latest(tmp_path, pytest.fail).step == 5


def test_training_stops_cleanly_on_a_full_disk_and_goes_on_later(tmp_path, monkeypatch):
    """The first checkpoint is written, the second is not and the run says so; with space it goes on from the first."""
    config = TrainConfig(out=str(tmp_path / "run"), steps=4, batch_size=8, checkpoint_every=2)
    write = checkpoint.save_file

    def full(tensors, file, metadata):
        if metadata["step"] == "4":
            raise OSError(28, "No space left on device")
        write(tensors, file, metadata)

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(InputError, match="could not write to .*run: .*No space left.*the same command"):
        train(config)
    assert names(tmp_path / "run") == ["step-00000002"]
    monkeypatch.undo()
    train(config)
    assert names(tmp_path / "run") == ["step-00000002", "step-00000004"]


def test_no_permission_stops_cleanly_too(tmp_path):
    """A file in the place of the folder: nobody may write there, not even an administrator."""
    for place in ("checkpoints", "grids"):
        (tmp_path / place).mkdir()
        (tmp_path / place / place).write_text("")
        with pytest.raises(InputError, match=f"could not write to .*{place}"):
            train(TrainConfig(out=str(tmp_path / place), steps=2, batch_size=8))


def test_names_in_files_are_the_networks_own():
    state = {"net.blocks.0.attn.qkv.weight": torch.ones(1), "methods.coral.head.weight": torch.ones(1)}
    files = checkpoint.file_names(state)
    assert sorted(files) == ["blocks.0.attn.qkv.weight", "methods.coral.head.weight"]
    assert sorted(checkpoint.objective_names(files)) == sorted(state)
