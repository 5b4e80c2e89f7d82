"""Feature extractors: the digits classifier, a function from a file, Inception, and what is checked of each."""

from __future__ import annotations

import hashlib
import json
import sys
import types
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from imbdiff.errors import InputError
from imbdiff.evaluation import classifier
from imbdiff.evaluation.extractors import load_extractor
from imbdiff.evaluation.features import Extractor, extract

IMAGES = torch.randint(0, 256, (7, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def test_the_classifier_reads_the_digits_it_was_trained_on() -> None:
    images, labels = classifier.digits()
    assert sorted(images.unique().tolist()) == [round(v * 255 / 16) for v in range(17)]
    found = extract(load_extractor("classifier"), images)
    assert found.features.shape == (1797, 64)
    assert found.features.dtype == torch.float64
    assert found.probabilities is not None
    torch.testing.assert_close(found.probabilities.sum(1), torch.ones(1797, dtype=torch.float64))
    assert float((found.probabilities.argmax(1) == labels).double().mean()) > 0.995
    # A singular covariance would make every Frechet distance in this space rank-deficient.
    assert int(torch.linalg.matrix_rank(found.features.T.cov())) == 64


def test_the_weights_are_the_ones_the_code_names() -> None:
    raw = classifier.WEIGHTS.read_bytes()
    assert hashlib.sha256(raw).hexdigest() == classifier.WEIGHTS_SHA256 == load_extractor("classifier").sha256
    assert len(raw) < 350_000
    with safe_open(classifier.WEIGHTS, "pt") as file:
        recipe = json.loads(file.metadata()["recipe"])
    assert recipe == json.loads(json.dumps(classifier.asdict(classifier.Recipe())))


def test_the_classifier_refuses_other_weights(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    classifier.save_classifier(classifier.DigitsClassifier(), path)
    with pytest.raises(InputError, match=r"should have SHA-256 .* do not compare; install imbdiff again"):
        classifier.load_classifier(path)
    with pytest.raises(InputError, match=r"expected the digits classifier at .*, found no file"):
        classifier.load_classifier(tmp_path / "none.safetensors")
    with pytest.raises(InputError, match="brings its own weights"):
        load_extractor("classifier", str(path))
    with pytest.raises(InputError, match=r"one-channel 8x8 images, got \(3, 8, 8\)"):
        load_extractor("classifier").features(IMAGES.expand(-1, 3, -1, -1))


def test_a_saved_classifier_is_the_same_file_each_time(tmp_path: Path) -> None:
    model = classifier.DigitsClassifier()
    assert len({classifier.save_classifier(model, tmp_path / f"{i}") for i in range(5)}) == 1


def test_training_learns_and_repeats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(classifier, "Recipe", lambda: recipe)
    recipe = types.SimpleNamespace(learning_rate=3e-3, weight_decay=0.01, label_smoothing=0.05, batch=64, epochs=2)
    images, labels = classifier.digits()
    state = torch.random.get_rng_state()
    first, second, other = (classifier.train_classifier(seed, images[:1000], labels[:1000]) for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(first.head.weight, second.head.weight)
    assert not torch.equal(first.head.weight, other.head.weight)
    assert float((first.logits(images[1000:]).argmax(1) == labels[1000:]).double().mean()) > 0.8


def test_without_scikit_learn_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(InputError, match=r"pip install 'imbdiff\[demo\]'"):
        classifier.digits()


CODE = """
from dataclasses import dataclass
import torch
from pathlib import Path

@dataclass
class Mean:
    scale: float = 1.0
    def __call__(self, images):
        return images.float().mean((2, 3)) * self.scale
    def logits(self, images):
        return self(images).expand(-1, 3)

def plain():
    return lambda images: images.float().flatten(1)

def make(path=None):
    return Mean(float(Path(path).read_text())) if path else Mean()

def number():
    return 3
def flat():
    return lambda images: images.float().flatten()
def text():
    return lambda images: "seven"
def infinite():
    return lambda images: images.float().flatten(1) / 0
"""


@pytest.fixture
def code(tmp_path: Path) -> Path:
    file = tmp_path / "mine.py"
    file.write_text(CODE)
    return file


def test_a_function_from_a_file(code: Path, tmp_path: Path) -> None:
    weights = tmp_path / "w.txt"
    weights.write_text("2.0")
    without, with_weights = load_extractor(f"{code}:make"), load_extractor(f"{code}:make", str(weights))
    a, b = extract(without, IMAGES, batch=3), extract(with_weights, IMAGES)
    assert torch.equal(2 * a.features, b.features)
    torch.testing.assert_close(a.features, IMAGES.double().mean((2, 3)), rtol=1e-6, atol=0)
    assert a.probabilities is not None
    torch.testing.assert_close(a.probabilities, torch.full((7, 3), 1 / 3, dtype=torch.float64))
    assert without.name == "mine.py:make"
    assert without.sha256 == hashlib.sha256(CODE.encode()).hexdigest()
    assert with_weights.sha256 == hashlib.sha256(CODE.encode() + b"2.0").hexdigest()
    plain = load_extractor(f"{code}:plain")
    assert plain.logits is None
    assert extract(plain, IMAGES).probabilities is None


def test_two_files_of_one_name_do_not_meet(tmp_path: Path) -> None:
    values = []
    for value in (1, 2):
        file = tmp_path / str(value) / "same.py"
        file.parent.mkdir()
        file.write_text(f"VALUE = {value}\ndef make():\n    return lambda x: x.float().flatten(1) * 0 + VALUE\n")
        values.append(load_extractor(f"{file}:make"))
    assert [float(extract(e, IMAGES).features[0, 0]) for e in values] == [1, 2]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (
            "nothing",
            "has no function 'nothing'; it has Mean, Path, dataclass, flat, infinite, make, number, plain, text",
        ),
        ("number", "must return what maps uint8 images .* to features .*, got int"),
    ],
)
def test_what_a_file_must_offer(code: Path, function: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_extractor(f"{code}:{function}")


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("flat", r"mine.py:flat: features of 7 images must be a tensor \[7, d\], got a tensor of shape \(448,\)"),
        ("text", r"features of 7 images must be a tensor \[7, d\], got str"),
        ("infinite", "features of 7 of 7 images are not finite"),
    ],
)
def test_what_an_extractor_must_return(code: Path, function: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        extract(load_extractor(f"{code}:{function}"), IMAGES)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("resnet", "expected an extractor 'classifier', 'inception' or 'path/file.py:function', got 'resnet'"),
        ("none.py:make", "expected the extractor's code at 'none.py' .* found no such file"),
        (":make", "expected an extractor"),
        ("file.py:", "expected an extractor"),
    ],
)
def test_specs_that_name_nothing(spec: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_extractor(spec)


def test_files_that_are_no_code_or_weights(tmp_path: Path, code: Path) -> None:
    (tmp_path / "notes.txt").write_text("def make(): ...")
    with pytest.raises(InputError, match=r"expected a Python file \(.py\)"):
        load_extractor(f"{tmp_path}/notes.txt:make")
    (tmp_path / "broken.py").write_text("import nothing_of_this_name")
    with pytest.raises(InputError, match=r"broken\.py does not import: ModuleNotFoundError"):
        load_extractor(f"{tmp_path}/broken.py:make")
    with pytest.raises(InputError, match=r"expected the weights of the extractor at 'no\.pth', found no file"):
        load_extractor(f"{code}:make", "no.pth")


class Switches(nn.Module):
    """Dropout would zero everything; a part that was in eval mode before must be so afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.dropout, self.frozen = nn.Dropout(1.0), nn.Dropout(0.5).eval()

    def forward(self, images: Tensor) -> Tensor:
        return self.dropout(images.float().flatten(1) * self.scale)

    def logits(self, images: Tensor) -> Tensor:
        return self(images)[:, :2]


def test_extract_runs_in_eval_mode_and_puts_it_back() -> None:
    module, steps = Switches(), []
    found = extract(
        Extractor(module, module.logits, "switches", ""), IMAGES, 3, lambda done, total: steps.append((done, total))
    )
    assert torch.equal(found.features, IMAGES.flatten(1).double())
    assert not found.features.requires_grad
    assert found.probabilities is not None
    assert (module.training, module.dropout.training, module.frozen.training) == (True, True, False)
    assert steps == [(3, 7), (6, 7), (7, 7)]
    assert extract(Extractor(module, module.logits, "switches", ""), IMAGES, probabilities=False).probabilities is None
    with pytest.raises(InputError, match="expected at least one image, got none"):
        extract(Extractor(module, None, "switches", ""), IMAGES[:0])


def test_inception_names_the_extra_and_its_weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(InputError, match=r"pip install 'imbdiff\[eval\]'"):
        load_extractor("inception")

    class Stand(nn.Module):
        """The interface of torch-fidelity: a tuple of the features that were asked for, RGB bytes only."""

        def __init__(self, name: str, features_list: list[str], feature_extractor_weights_path: str) -> None:
            super().__init__()
            self.width = {"2048": 2048, "logits_unbiased": 1008}[features_list[0]]
            assert len(features_list) == 1
            assert feature_extractor_weights_path == str(weights)

        def forward(self, images: Tensor) -> tuple[Tensor]:
            assert images.shape[1] == 3
            assert images.dtype == torch.uint8
            return (images.float().mean((1, 2, 3))[:, None].expand(-1, self.width),)

    package, module = types.ModuleType("torch_fidelity"), types.ModuleType("inner")
    package.__version__ = "0.4.0"  # type: ignore[attr-defined]
    module.FeatureExtractorInceptionV3 = Stand  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch_fidelity", package)
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", module)
    with pytest.raises(InputError, match="needs the path of its weights"):
        load_extractor("inception")
    weights = tmp_path / "inception.pth"
    weights.write_bytes(b"weights")
    loaded = load_extractor("inception", str(weights))
    found = extract(loaded, IMAGES)
    assert found.features.shape == (7, 2048)
    assert found.probabilities is not None
    assert found.probabilities.shape == (7, 1008)
    assert loaded.name == "inception, torch-fidelity 0.4.0"
    assert loaded.sha256 == hashlib.sha256(b"weights").hexdigest()
