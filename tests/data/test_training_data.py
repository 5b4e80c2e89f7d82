from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import tyro

from imbdiff.data import DataConfig, DataOrder, load_training_data, long_tail_counts, long_tail_indices, split_hash
from imbdiff.errors import InputError


def test_digits_by_default() -> None:
    data = load_training_data(DataConfig())
    planned = long_tail_counts(1797 / 10, 10, 20, "exponential")
    assert planned[0] == 179
    # Only 178 zeros exist.
    assert data.counts.tolist() == [178, *planned[1:]] == [178, 128, 92, 66, 47, 34, 24, 17, 12, 8]
    assert torch.equal(data.train_index, long_tail_indices(data.pool.labels, 10, ratio=20, profile="exponential"))
    assert data.groups == {"head": (0, 1, 2), "medium": (3, 4, 5), "tail": (6, 7, 8, 9)}
    assert data.split_hash == split_hash(data.train_index, data.pool.labels[data.train_index])
    assert torch.equal(data.train.counts, data.counts)
    assert torch.equal(data.train.images, data.pool.images[data.train_index])


def test_held_out_is_the_rest_in_file_order() -> None:
    data = load_training_data(DataConfig())
    rest = sorted(set(range(1797)) - set(data.train_index.tolist()))
    assert torch.equal(data.held_out.images, data.pool.images[rest])
    assert data.held_out.labels.tolist() == data.pool.labels[rest].tolist()
    assert len(data.held_out) + len(data.train) == 1797


def test_given_keeps_everything() -> None:
    data = load_training_data(DataConfig(profile="given"))
    assert torch.equal(data.train_index, torch.arange(1797))
    assert len(data.held_out) == 0
    assert data.counts.tolist() == data.pool.counts.tolist()


@pytest.mark.parametrize("options", [{"rotate": 1}, {"class_order": tuple(range(10))}])
def test_given_has_no_class_order(options: dict[str, object]) -> None:
    with pytest.raises(InputError, match=r"'given' .*--data\.class-order and --data\.rotate have no effect"):
        load_training_data(DataConfig(profile="given", **options))  # type: ignore[arg-type]


def test_rotation_moves_the_tail() -> None:
    data = load_training_data(DataConfig(rotate=3, groups="counts"))
    planned = long_tail_counts(1797 / 10, 10, 20, "exponential")
    assert data.counts.tolist() == planned[7:] + planned[:7]
    assert data.groups == {"head": (3, 4), "medium": (5, 6, 7, 8, 9), "tail": (0, 1, 2)}
    order = load_training_data(DataConfig(class_order=(9, 8, 7, 6, 5, 4, 3, 2, 1, 0), rotate=2))
    assert order.groups["head"] == (7, 6, 5)


def test_seed_and_hash() -> None:
    first, again, other = (load_training_data(DataConfig(split_seed=s)).split_hash for s in (0, 0, 1))
    assert first == again != other
    # Frozen: the same split in every release.
    assert first == "2004bd405a4d3fbc66dda8350bff23644eed3e083f2b1b08717d9a3339cc8c4b"


def test_messages_name_the_class(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"leaves no image of class 7 \(7\).* is 179\.7;"):
        load_training_data(DataConfig(ratio=1000))
    np.savez(
        tmp_path / "a.npz", images=np.zeros((3, 2, 2), np.uint8), labels=[0, 2, 2], class_names=["owl", "cat", "dog"]
    )
    with pytest.raises(InputError, match=r"no image of class 1 \(cat\)"):
        load_training_data(DataConfig(source="npz", path=str(tmp_path / "a.npz"), ratio=1))


def test_order_over_the_split() -> None:
    data = load_training_data(DataConfig())
    order = DataOrder(data.train.labels, data.counts, seed=0, prior_exponent=0.0)
    drawn = data.train.labels[order.indices(torch.arange(20_000))]
    assert (torch.bincount(drawn) - 2000).abs().max() < 5 * 1800**0.5


FLAGS = (
    "--source folder --path x --size 32 --profile step --ratio 50 --class-order 1 0 --rotate 1 --split-seed 3 "
    "--groups counts --prior-exponent 0.5 --on-bad-file skip"
)


def test_every_field_is_a_flag() -> None:
    config = tyro.cli(DataConfig, args=FLAGS.split())
    assert config == DataConfig("folder", "x", 32, "step", 50.0, (1, 0), 1, 3, "counts", 0.5, "skip")
    assert tyro.cli(DataConfig, args=[]) == DataConfig()
