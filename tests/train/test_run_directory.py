"""A run directory of another configuration, another split or another program is never written over."""

import json
from dataclasses import replace

import pytest

from imbdiff.data import DataConfig
from imbdiff.errors import InputError
from imbdiff.train.config import TrainConfig
from imbdiff.train.loop import train
from imbdiff.train.run import load_run


@pytest.fixture
def config(tmp_path):
    return TrainConfig(out=str(tmp_path / "run"), steps=2, batch_size=8)


def test_another_config_stops_with_a_diff(config):
    train(config)
    with pytest.raises(InputError) as error:
        train(replace(config, steps=3, data=DataConfig(ratio=10.0)))
    text = str(error.value)
    assert "steps: 2 -> 3" in text
    assert "data.ratio: 20.0 -> 10.0" in text
    assert "--fresh" in text
    assert "seed" not in text


def test_fresh_starts_over_and_keeps_what_is_not_the_runs(config, tmp_path):
    run = train(config)
    (run / "notes.txt").write_text("mine")
    train(replace(config, seed=7), fresh=True)
    assert json.loads((run / "config.json").read_text())["seed"] == 7
    assert (run / "notes.txt").read_text() == "mine"
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 1


def test_a_run_may_be_moved(config, tmp_path):
    run = train(config)
    run.rename(tmp_path / "moved")
    train(replace(config, out=str(tmp_path / "moved")))


def test_a_changed_split_stops(config):
    run = train(config)
    facts = json.loads((run / "split.json").read_text())
    (run / "split.json").write_text(json.dumps({**facts, "sha256": "0" * 64}))
    with pytest.raises(InputError, match="split.json.*\n.*sha256: 0000"):
        train(config)


def test_a_directory_of_something_else_is_refused(config, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("...")
    for fresh in (False, True):
        with pytest.raises(InputError, match="holds no run but thesis.tex; choose another --out"):
            train(config, fresh=fresh)
    assert (tmp_path / "run" / "thesis.tex").exists()


def test_no_permission(config, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot use run directory .*file"):
        train(replace(config, out=str(tmp_path / "file" / "run")))


def test_the_split_is_on_record(config):
    facts = json.loads((train(config) / "split.json").read_text())
    assert facts["counts"] == [178, 128, 92, 66, 47, 34, 24, 17, 12, 8]
    assert len(facts["sha256"]) == 64
    assert facts["groups"] == {"head": [0, 1, 2], "medium": [3, 4, 5], "tail": [6, 7, 8, 9]}
    assert facts["image_shape"] == [1, 8, 8]


@pytest.mark.parametrize(
    ("file", "content", "text"),
    [
        ("config.json", None, "is no run directory: it has no config.json"),
        ("config.json", "{", "config.json is damaged"),
        ("config.json", '{"steps": 3, "spam": 1}', "TrainConfig has no setting spam"),
    ],
)
def test_loading_what_is_no_run(config, file, content, text):
    run = train(config)
    (run / file).unlink() if content is None else (run / file).write_text(content)
    with pytest.raises(InputError, match=text):
        load_run(run, print)


def test_loading_before_the_first_checkpoint(config, tmp_path):
    run = train(config)
    for folder in (run / "checkpoints").iterdir():
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
    with pytest.raises(InputError, match="has no checkpoint yet; the first comes at step 500"):
        load_run(run, print)
