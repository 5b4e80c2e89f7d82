"""From images to the feature vectors that the distances are measured in."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from imbdiff.errors import InputError


@dataclass(frozen=True)
class Extractor:
    """A feature space: uint8 [N, C, H, W] -> features [N, d] and, where the network classifies, logits [N, classes].

    `sha256` names code and weights: two numbers compare only if they were measured in the same space.
    """

    features: Callable[[Tensor], Tensor]
    logits: Callable[[Tensor], Tensor] | None
    name: str
    sha256: str


@dataclass(frozen=True)
class Features:
    """What `extract` found: features float64 [N, d]; class probabilities float64 [N, classes] or None. On the CPU."""

    features: Tensor
    probabilities: Tensor | None


def _module(function: Callable[[Tensor], Tensor] | None) -> nn.Module | None:
    """The network behind a function: itself, or the object whose method it is."""
    owner = function if isinstance(function, nn.Module) else getattr(function, "__self__", None)
    return owner if isinstance(owner, nn.Module) else None


@contextmanager
def _evaluating(*functions: Callable[[Tensor], Tensor] | None) -> Iterator[None]:
    """Switch dropout and batch statistics off, and put every switch back afterwards."""
    modules = [part for function in functions if (root := _module(function)) for part in root.modules()]
    before = [part.training for part in modules]
    try:
        for part in modules:
            part.training = False
        yield
    finally:
        for part, training in zip(modules, before, strict=True):
            part.training = training


def _rows(name: str, what: str, function: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """Run a batch and check that a finite [N, d] came back; float64 on the CPU."""
    root = _module(function)
    home = next(root.parameters(), None) if root else None
    out = function(images if home is None else images.to(home.device))
    if not isinstance(out, Tensor) or out.ndim != 2 or len(out) != len(images):
        got = f"a tensor of shape {tuple(out.shape)}" if isinstance(out, Tensor) else type(out).__name__
        raise InputError(
            f"extractor {name}: {what} of {len(images)} images must be a tensor [{len(images)}, d], got {got}"
        )
    out = out.double().cpu()
    if not out.isfinite().all():
        bad = int((~out.isfinite().all(1)).sum())
        raise InputError(
            f"extractor {name}: {what} of {bad} of {len(images)} images are not finite; check its weights and precision"
        )
    return out


@torch.no_grad()
def extract(
    extractor: Extractor,
    images: Tensor,
    batch: int = 256,
    progress: Callable[[int, int], None] | None = None,
    probabilities: bool = True,
) -> Features:
    """Features and softmax probabilities of images uint8 [N, C, H, W], in batches; `progress(done, total)` after each.

    `probabilities=False` spares the second forward pass where only distances are wanted.
    """
    if not len(images):
        raise InputError(f"extractor {extractor.name}: expected at least one image, got none")
    logits = extractor.logits if probabilities else None
    features, classes = [], []
    with _evaluating(extractor.features, logits):
        for start in range(0, len(images), batch):
            part = images[start : start + batch]
            features.append(_rows(extractor.name, "features", extractor.features, part))
            if logits is not None:
                classes.append(_rows(extractor.name, "logits", logits, part).softmax(1))
            if progress is not None:
                progress(start + len(part), len(images))
    return Features(torch.cat(features), torch.cat(classes) if classes else None)
