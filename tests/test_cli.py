"""The command line as a stranger meets it: help, the whole way on a tiny run, and what each mistake answers."""

import json
import subprocess
import sys

import numpy as np
import pytest

from imbdiff.cli import COMMANDS, main


def run(capsys, *args, status=0):
    """(stdout, stderr) of one command."""
    try:
        got = main([str(a) for a in args])
    except SystemExit as end:
        got = end.code or 0
    out = capsys.readouterr()
    assert got == status, out.err
    return out.out, out.err


TINY = ("--steps", 3, "--batch-size", 8, "--sampling.steps", 2, "--sampling.guidance-scale", 2)


@pytest.fixture
def trained(tmp_path, capsys):
    """A run of three steps."""
    run(capsys, "train", "digits", "--out", tmp_path / "run", *TINY)
    return tmp_path / "run"


def test_usage_names_every_command(capsys):
    for args in ([], ["--help"], ["-h"]):
        out, _ = run(capsys, *args)
        assert all(f"  {command} " in out for command in COMMANDS)
    assert run(capsys, "--version")[0].strip() == "0.1.0"


@pytest.mark.parametrize("command", [*COMMANDS, "train digits", "train cifar10-lt", "train images"])
def test_help_of_every_command(capsys, command):
    out, _ = run(capsys, *command.split(), "--help")
    assert f"usage: imbdiff {command}" in out
    assert len(out.splitlines()) > 5


def test_help_teaches_by_examples(capsys):
    assert "imbdiff train digits --out runs/cbdm --methods cbdm" in run(capsys, "train", "--help")[0]
    assert "--extractor resnet56.py:load" in run(capsys, "evaluate", "--help")[0]


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (["trian"], "unknown command 'trian'; did you mean train?"),
        (["paint"], "unknown command 'paint'"),
        (["train", "digits", "--learning-rate", "1"], "--learning-rate"),
        (["train", "digits", "--methods", "cbmd"], "cbmd"),
        (["train", "digits", "--steps", "0"], "--steps must be at least 1, got 0"),
        (["train", "digits", "--batch-size", "10", "--accumulate", "3"], "multiple of --accumulate 3"),
        (["train", "digits", "--keep", "1"], "--keep must be at least 2"),
        (["train", "digits", "--methods", "oc", "oc"], "different names"),
        (["train", "digits", "--methods", "oc", "--oc.weight", "0.5"], "weight is 0 (off) or 1 (on)"),
        (["train", "digits", "--model.size", "DiT-M"], "DiT-S/2"),
        (["train", "digits", "--model.patch-size", "3"], "patch_size must divide image_size 8"),
        (["train", "digits", "--sampling.sampler", "euler"], "the samplers for ddpm are ddpm_ancestral"),
        (["train", "digits", "--data.ratio", "500"], "ratio"),
        (["train", "cifar10-lt"], "--data.path"),
        (["sample", "nowhere"], "no run directory"),
        (["evaluate"], "takes a run directory, or --real and --fake"),
        (["evaluate", "nowhere"], "no run directory"),
        (["evaluate", "--real", "nowhere"], "both --real DIR and --fake DIR"),
        (["compare"], "compare takes run directories"),
        (["compare", "nowhere"], "imbdiff evaluate"),
    ],
    ids=lambda a: " ".join(a) if isinstance(a, list) else "",
)
def test_mistakes(capsys, tmp_path, monkeypatch, args, text):
    monkeypatch.chdir(tmp_path)
    out, err = run(capsys, *args, status=2)
    assert text in " ".join((out + err).replace("│", " ").split())
    assert "Traceback" not in err
    # Settings that can't work leave nothing behind that the mended command would stumble over.
    assert not (tmp_path / "runs").exists()


def test_print_config_trains_nothing(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out, _ = run(capsys, "train", "cifar10-lt", "--print-config", "--methods", "cbdm", "oc", "--cbdm.tau", "0.5")
    config = json.loads(out)
    assert config["methods"] == ["cbdm", "oc"]
    assert config["cbdm"]["tau"] == 0.5
    assert config["model"]["size"] == "DiT-S/2"
    assert list(tmp_path.iterdir()) == []


def test_the_whole_way(capsys, trained, tmp_path):
    """train, sample, evaluate, compare, and the samples measured again as plain folders."""
    out, _ = run(capsys, "sample", trained, "--per-class", 4, "--png")
    assert str(trained / "samples" / "grid.png") in out
    with np.load(trained / "samples" / "samples.npz") as f:
        assert f["images"].shape == (40, 8, 8, 1)
        assert f["images"].dtype == np.uint8
        assert np.bincount(f["labels"]).tolist() == [4] * 10
    protocol = json.loads((trained / "samples" / "sampling.json").read_text())
    assert (protocol["sampler"], protocol["steps"], protocol["guidance_scale"]) == ("ddim", 2, 2)

    out, _ = run(capsys, "evaluate", trained, "--per-class", 30)
    assert "fresh real images" in out
    report = json.loads((trained / "report" / "report.json").read_text())
    assert report["protocol"]["split_sha256"] == json.loads((trained / "split.json").read_text())["sha256"]
    assert report["rows"]["tail"]["n_fake"] == report["rows"]["head"]["n_fake"] == 72
    copies = json.loads((trained / "report" / "copies" / "report.json").read_text())
    assert copies["rows"]["tail"]["memorisation"] == 0
    assert copies["rows"]["tail"]["label_accuracy"] == 1

    out, _ = run(capsys, "compare", trained, "--out", tmp_path / "table.md")
    assert "head / medium / tail" in (tmp_path / "table.md").read_text()
    assert "Not like for like" not in out

    png = trained / "samples" / "png"
    out, _ = run(
        capsys, "evaluate", "--real", png, "--fake", png, "--labels", png / "labels.csv", "--out", tmp_path / "folders",
        "--k", 2,
    )  # fmt: skip
    rows = json.loads((tmp_path / "folders" / "report.json").read_text())["rows"]
    assert rows["all"]["fid"] == pytest.approx(0, abs=1e-3)
    assert rows["all"]["coverage"] == 1


def test_samples_are_used_again_only_if_they_are_the_ones_wanted(capsys, trained):
    run(capsys, "evaluate", trained, "--per-class", 30)
    file = trained / "samples" / "samples.npz"
    first = file.stat().st_mtime_ns
    run(capsys, "evaluate", trained, "--per-class", 30)
    assert file.stat().st_mtime_ns == first
    run(capsys, "evaluate", trained, "--per-class", 30, "--steps", 3)
    assert file.stat().st_mtime_ns > first


def test_sampling_is_a_function_of_seed_and_number(capsys, trained):
    def drawn(*more):
        run(capsys, "sample", trained, *more)
        with np.load(trained / "samples" / "samples.npz") as f:
            return f["images"]

    few, more, other = drawn("--per-class", 2), drawn("--per-class", 3), drawn("--per-class", 2, "--seed", 1)
    assert (np.abs(more[:20].astype(int) - few) <= 1).all()
    assert not (few == other).all()


def test_a_changed_data_set_is_noticed(capsys, trained):
    facts = json.loads((trained / "split.json").read_text())
    (trained / "split.json").write_text(json.dumps({**facts, "sha256": "1" * 64}))
    _, err = run(capsys, "evaluate", trained, "--per-class", 3, status=2)
    assert "has changed: its split was 111111111111" in err


def test_your_own_npz_with_a_test_set_as_reference(capsys, tmp_path):
    """Data that is long-tailed already, flow path, a reference file, an extractor of the user's."""
    rng = np.random.default_rng(0)
    for name, counts in (("train", (40, 20, 6)), ("test", (30, 30, 30))):
        labels = np.repeat(np.arange(3), counts)
        images = np.clip(rng.normal(60 + 60 * labels[:, None, None, None], 20, (len(labels), 8, 8, 3)), 0, 255)
        np.savez(tmp_path / f"{name}.npz", images=images.astype(np.uint8), labels=labels)
    (tmp_path / "net.py").write_text("def features():\n    return lambda x: x.float().mean((2, 3)) / 255\n")
    run(
        capsys, "train", "images", "--out", tmp_path / "run", "--data.source", "npz", "--data.path",
        tmp_path / "train.npz", "--model.size", "tiny", "--diffusion.path", "flow", *TINY,
    )  # fmt: skip
    run(
        capsys, "evaluate", tmp_path / "run", "--per-class", 12, "--reference", tmp_path / "test.npz",
        "--extractor", f"{tmp_path / 'net.py'}:features",
    )  # fmt: skip
    report = json.loads((tmp_path / "run" / "report" / "report.json").read_text())
    assert report["rows"]["tail"]["label_accuracy"] is None
    assert report["rows"]["tail"]["memorisation"] > 0
    assert "but the fresh images" in report["protocol"]["reference"]


def test_doctor(capsys):
    out, _ = run(capsys, "doctor")
    assert "torch" in out
    assert "GPU" in out
    assert "pip install 'imbdiff[eval]'" in out or "torch_fidelity" in out


def test_demo_in_small(capsys, tmp_path):
    run(capsys, "demo", "--out", tmp_path / "demo", "--steps", 3, "--per-class", 30)
    table = (tmp_path / "demo" / "comparison.md").read_text()
    for row in ("ddpm", "cbdm", "copies of training images", "fresh real images"):
        assert f"| {row} " in table
    assert "Not like for like" not in table


def test_import_is_light():
    """`import imbdiff` and its ops bring torch and nothing else that is heavy."""
    heavy = ["sklearn", "matplotlib", "PIL", "rich", "tyro", "safetensors", "diffusers", "transformers", "torchmetrics"]
    code = f"import sys; from imbdiff import ops; print([m for m in {heavy} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"
