"""Which feature space a run is measured in: the digits classifier, Inception, or a function of the user's own."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor

from imbdiff.errors import InputError
from imbdiff.evaluation.features import Extractor
from imbdiff.files import sha256


def load_extractor(spec: str, weights: str = "") -> Extractor:
    """The extractor that `spec` names: `classifier`, `inception` or `path/file.py:function`.

    The function is called as `function(weights)`, or `function()` without weights, and returns what maps
    uint8 [N, C, H, W] to features [N, d]; if that has a method `logits`, it gives the class logits [N, classes].
    """
    if weights and not Path(weights).is_file():
        raise InputError(f"expected the weights of the extractor at {weights!r}, found no file; check the path")
    if spec == "classifier":
        return _classifier(weights)
    if spec == "inception":
        return _inception(weights)
    return _from_file(spec, weights)


def _classifier(weights: str) -> Extractor:
    from imbdiff.evaluation.classifier import WEIGHTS_SHA256, load_classifier

    if weights:
        raise InputError(f"the extractor 'classifier' brings its own weights, got {weights!r}; leave the weights out")
    model = load_classifier()
    return Extractor(model, model.logits, "digits classifier", WEIGHTS_SHA256)


def _inception(weights: str) -> Extractor:
    """Inception-v3 pool features [N, 2048] as TensorFlow computes them (16.1), resized inside by torch-fidelity."""
    try:
        import torch_fidelity
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError as error:
        raise InputError(
            "the extractor 'inception' comes with torch-fidelity, which is missing or cannot be imported "
            f"({error}): pip install 'imbdiff[eval]'"
        ) from error
    if not weights:
        raise InputError(
            "the extractor 'inception' needs the path of its weights (weights-inception-2015-12-05-6726825d.pth, "
            "release v0.2.0 of torch-fidelity), got none; nothing is downloaded for you"
        )
    pool, logits = (FeatureExtractorInceptionV3("imbdiff", [part], weights) for part in ("2048", "logits_unbiased"))

    def three(images: Tensor) -> Tensor:
        return images.expand(-1, 3, -1, -1)

    return Extractor(
        lambda images: pool(three(images))[0],
        lambda images: logits(three(images))[0],
        f"inception, torch-fidelity {torch_fidelity.__version__}",
        sha256(Path(weights)),
    )


def _import(file: Path) -> ModuleType:
    """Run a file as a module under a name of its own, so that two files of one name do not meet."""
    name = f"imbdiff_extractor_{hashlib.sha256(str(file.resolve()).encode()).hexdigest()[:16]}"
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise InputError(f"expected a Python file (.py) with an extractor, got {str(file)!r}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their own module up by name
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise InputError(f"{file} does not import: {type(error).__name__}: {error}") from error
    return module


def _from_file(spec: str, weights: str) -> Extractor:
    path, colon, function = spec.rpartition(":")
    if not colon or not path or not function:
        raise InputError(f"expected an extractor 'classifier', 'inception' or 'path/file.py:function', got {spec!r}")
    file = Path(path)
    if not file.is_file():
        raise InputError(f"expected the extractor's code at {path!r} (from {spec!r}), found no such file")
    module = _import(file)
    make: Any = getattr(module, function, None)
    if not callable(make):
        known = sorted(n for n, v in vars(module).items() if callable(v) and not n.startswith("_"))
        raise InputError(f"{path} has no function {function!r}; it has {', '.join(known) or 'none'}")
    made = make(weights) if weights else make()
    if not callable(made):
        raise InputError(
            f"{spec} must return what maps uint8 images [N, C, H, W] to features [N, d], got {type(made).__name__}"
        )
    logits: Callable[[Tensor], Tensor] | None = getattr(made, "logits", None)
    files = (file, Path(weights)) if weights else (file,)
    return Extractor(made, logits if callable(logits) else None, f"{file.name}:{function}", sha256(*files))
