"""Generated images against a balanced reference: all together, head, medium and tail, and class by class."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from imbdiff.data.images import ImageSet
from imbdiff.errors import InputError
from imbdiff.evaluation import metrics
from imbdiff.evaluation.features import Extractor, Features, extract
from imbdiff.evaluation.memorisation import Memorisation, memorisation
from imbdiff.evaluation.report import Report
from imbdiff.evaluation.selection import most_even, shuffled, take_evenly


def evaluate(
    fake: ImageSet,
    real: ImageSet,
    extractor: Extractor,
    *,
    groups: Mapping[str, Sequence[int]],
    rank: Sequence[int],
    train: ImageSet | None = None,
    held_out: ImageSet | None = None,
    k: int = 5,
    seed: int = 0,
    protocol: Mapping[str, Any] | None = None,
    like: Report | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Every metric for "all", each group and each "class <name>", the latter by `rank`: most frequent class first.

    Distances between distributions use the same N in every group, balanced over its classes, and the same n in every
    class; label accuracy and memorisation are means over samples and use every image, averaged over classes (the label
    law is balanced). A class without generated or real images is left out of both sides of its rows, which say so.
    With `like`, distances use no more images than that report did, so that the two compare. Memorisation needs `train`
    and `held_out`. `protocol` is kept with the numbers: sampler, steps, guidance, EMA, ...
    """
    _check(fake, real, groups, rank, train, held_out, k)
    own = {
        "reference": real.name,
        "reference_sha256": _sha256(real),
        "label_law": "balanced",
        "extractor": extractor.name,
        "extractor_sha256": extractor.sha256,
        "k": k,
        "evaluation_seed": seed,
    }
    if clash := sorted(own.keys() & (protocol or {}).keys()):
        raise InputError(f"protocol entries {', '.join(clash)} are written by evaluate itself; give yours other names")

    have = [c for c in rank if fake.counts[c] and real.counts[c]]
    if not have:
        raise InputError(f"no class has both generated ({fake.name}) and real images ({real.name}); check the labels")
    rows = {"all": list(rank), **{name: list(classes) for name, classes in groups.items()}}
    rows |= {f"class {real.class_names[c]}": [c] for c in rank}
    present = {name: [c for c in classes if c in have] for name, classes in rows.items()}

    found_fake = extract(extractor, fake.images, progress=progress)
    found_real = extract(extractor, real.images, progress=progress, probabilities=False)
    memory = memorisation(fake, train, held_out) if train is not None and held_out is not None else None
    sizes = [_sizes(s, rows, present, groups, like, n) for s, n in ((fake, "n_fake"), (real, "n_real"))]

    orders = [shuffled(len(s), seed) for s in (fake, real)]
    report = Report(protocol={**own, **(protocol or {})})
    for name, classes in rows.items():
        used = present[name]
        kind = "all" if name == "all" else "group" if name in groups else "class"
        row: dict[str, Any] = {"kind": kind, "classes": classes, "classes_left_out": sorted(set(classes) - set(used))}
        picks = [take_evenly(s.labels, used, n[name], o) for s, n, o in zip((fake, real), sizes, orders, strict=True)]
        labels = (fake.labels[picks[0]], real.labels[picks[1]])
        row |= _distances(found_fake.features[picks[0]], found_real.features[picks[1]], labels, k=k, seed=seed)
        if kind == "all":
            row |= _inception(found_fake, picks[0])
        row |= _sample_means(fake, found_fake, used, memory)
        report.rows[name] = row
    return report


def _sha256(images: ImageSet) -> str:
    """Hash of pixels and labels: the reference by its content, whatever it is called."""
    digest = hashlib.sha256(str(tuple(images.images.shape)).encode())
    for part in (images.images, images.labels):
        digest.update(part.contiguous().cpu().numpy().tobytes())
    return digest.hexdigest()


def _sizes(
    images: ImageSet,
    rows: Mapping[str, list[int]],
    present: Mapping[str, list[int]],
    groups: Mapping[str, Sequence[int]],
    like: Report | None,
    side: str,
) -> dict[str, int]:
    """How many images each row takes: the same for every group that is not empty, the same for every class."""
    counts = images.counts.tolist()
    per_group = [most_even([counts[c] for c in present[g]]) for g in groups if present[g]]
    per_class = [counts[c] for c in present["all"]]
    for row in like.rows.values() if like else ():
        if row[side]:
            {"group": per_group, "class": per_class, "all": []}[row["kind"]].append(row[side])
    group, each = min(per_group, default=0), min(per_class)
    return {
        name: 0 if not classes else group if name in groups else each * len(classes)
        for name, classes in ((name, present[name]) for name in rows)
    }


def _distances(a: Tensor, b: Tensor, labels: tuple[Tensor, Tensor], *, k: int, seed: int) -> dict[str, Any]:
    kid = metrics.kernel_distance(a, b, seed=seed, labels=labels)
    precision, recall = metrics.precision_recall(b, a, k)
    density, coverage = metrics.density_coverage(b, a, k)
    fid = metrics.frechet_distance(a, b)
    return {
        "n_fake": len(a),
        "n_real": len(b),
        "coverage": coverage,
        "density": density,
        "precision": precision,
        "recall": recall,
        "fid": fid,
        # N rows span N - 1 directions: at N <= d a covariance is singular and FID is far above its large-N value.
        "fid_note": "rank-deficient" if fid is not None and min(len(a), len(b)) <= a.shape[1] else None,
        "kid": kid[0] if kid else None,
        "kid_std": kid[1] if kid else None,
    }


def _inception(fake: Features, pick: Tensor) -> dict[str, Any]:
    score = metrics.inception_score(fake.probabilities[pick]) if fake.probabilities is not None else None
    return {"inception_score": score[0] if score else None, "inception_score_std": score[1] if score else None}


def _sample_means(fake: ImageSet, found: Features, classes: list[int], memory: Memorisation | None) -> dict[str, Any]:
    accuracies = []
    # A classifier of other classes (Inception's 1008) has nothing to say about these labels.
    if found.probabilities is not None and found.probabilities.shape[1] == fake.num_classes:
        for c in classes:
            own = fake.labels == c
            accuracies.append(metrics.label_accuracy(found.probabilities[own], fake.labels[own]))
    known = [a for a in accuracies if a is not None]
    return {
        "n_samples": sum(int(fake.counts[c]) for c in classes),
        "label_accuracy": sum(known) / len(known) if known else None,
        "memorisation": memory.ratio(classes) if memory else None,
        "memorisation_left_out": [c for c in classes if c in memory.left_out] if memory else [],
        "memorisation_biased_low": [c for c in classes if c in memory.biased_low] if memory else [],
    }


def _check(
    fake: ImageSet,
    real: ImageSet,
    groups: Mapping[str, Sequence[int]],
    rank: Sequence[int],
    train: ImageSet | None,
    held_out: ImageSet | None,
    k: int,
) -> None:
    if (train is None) != (held_out is None):
        given, missing = ("held_out", "train") if train is None else ("train", "held_out")
        raise InputError(
            f"memorisation compares training with held-out images: got {given} without {missing}; give both"
        )
    if k < 1:
        raise InputError(f"k, the number of neighbours, must be at least 1, got {k}")
    for other in (real, train, held_out):
        if other is None:
            continue
        if other.images.shape[1:] != fake.images.shape[1:]:
            raise InputError(
                f"{fake.name} and {other.name} must have one image shape, got {tuple(fake.images.shape[1:])} and "
                f"{tuple(other.images.shape[1:])}; resize or convert one of them"
            )
        if other.class_names != fake.class_names:
            raise InputError(
                f"{fake.name} and {other.name} must have the same classes in the same order, got {fake.num_classes} "
                f"({', '.join(fake.class_names[:5])}, ...) and {other.num_classes} "
                f"({', '.join(other.class_names[:5])}, ...); map one to the other"
            )
    if sorted(rank) != list(range(fake.num_classes)):
        raise InputError(
            f"rank must name each class 0..{fake.num_classes - 1} once, most frequent first, got {list(rank)}"
        )
    for name, classes in groups.items():
        if name == "all" or name.startswith("class "):
            raise InputError(f"a group cannot be called {name!r}, a row of the report has that name; rename the group")
        if len(set(classes)) != len(classes) or not set(classes) <= set(rank):
            raise InputError(
                f"group {name!r} must name classes 0..{fake.num_classes - 1}, each once, got {list(classes)}"
            )
