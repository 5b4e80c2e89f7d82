"""The whole evaluation on digits: who wins, who is left out, how many images each row may use."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from imbdiff.data.images import ImageSet
from imbdiff.errors import InputError
from imbdiff.evaluation import metrics
from imbdiff.evaluation.classifier import digits
from imbdiff.evaluation.evaluate import evaluate
from imbdiff.evaluation.extractors import load_extractor
from imbdiff.evaluation.features import Extractor, extract
from imbdiff.evaluation.report import ON_RECALL, Report
from imbdiff.evaluation.selection import even_counts, most_even, shuffled, take_evenly

GROUPS = {"head": (0, 1, 2), "medium": (3, 4, 5), "tail": (6, 7, 8, 9)}
NAMES = tuple(map(str, range(10)))
PLAIN = Extractor(lambda images: images.flatten(1).float(), None, "pixels", "0" * 64)


def mixed_digits() -> tuple[torch.Tensor, torch.Tensor]:
    """The digits in random order: theirs is by writer, and parts of it would follow different laws."""
    images, labels = digits()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    return images[order], labels[order]


def per_class(labels: torch.Tensor, start: list[int], stop: list[int]) -> torch.Tensor:
    """Positions of each class's images start .. stop."""
    return torch.cat([(labels == c).nonzero()[:, 0][start[c] : stop[c]] for c in range(10)])


@pytest.fixture(scope="module")
def sets() -> dict[str, ImageSet]:
    """Long-tailed training digits (60 down to 6 a class), held-out digits, fresh ones, and copies of training ones."""
    images, labels = mixed_digits()
    counts = [round(60 * 0.1 ** (c / 9)) for c in range(10)]

    def part(name: str, start: list[int], stop: list[int]) -> ImageSet:
        index = per_class(labels, start, stop)
        return ImageSet(images[index], labels[index], NAMES, name)

    train = part("train", [0] * 10, counts)
    turn = torch.arange(500)
    copies = torch.cat([(train.labels == c).nonzero()[:, 0][turn[:50] % counts[c]] for c in range(10)])
    return {
        "train": train,
        "real": part("held-out digits", [60] * 10, [120] * 10),
        "fresh": part("fresh", [120] * 10, [170] * 10),
        "copies": train.take(copies),
    }


@pytest.fixture(scope="module")
def reports(sets: dict[str, ImageSet]) -> dict[str, Report]:
    extractor = load_extractor("classifier")
    arguments: dict[str, Any] = {"groups": GROUPS, "rank": range(10), "train": sets["train"], "held_out": sets["real"]}
    return {name: evaluate(sets[name], sets["real"], extractor, **arguments) for name in ("fresh", "copies")}


def test_rows_and_protocol(reports: dict[str, Report], sets: dict[str, ImageSet]) -> None:
    report = reports["fresh"]
    assert list(report.rows) == ["all", "head", "medium", "tail", *(f"class {c}" for c in range(10))]
    sizes = {name: (row["n_fake"], row["n_real"]) for name, row in report.rows.items()}
    # Three classes of 50 bound the groups, four classes of the tail share the same 150.
    assert sizes["all"] == (500, 600)
    assert {sizes[g] for g in GROUPS} == {(150, 180)}
    assert {sizes[f"class {c}"] for c in range(10)} == {(50, 60)}
    assert report.protocol["reference"] == "held-out digits"
    assert report.protocol["label_law"] == "balanced"
    assert report.protocol["extractor_sha256"] == load_extractor("classifier").sha256
    assert (report.protocol["k"], report.protocol["evaluation_seed"]) == (5, 0)
    assert report.rows["class 3"]["fid_note"] == "rank-deficient"
    assert report.rows["tail"]["fid_note"] is None
    # Ten classes in every split, read with little doubt; splits of one class each would score one.
    assert 6 < report.rows["all"]["inception_score"] < 10
    assert "inception_score" not in report.rows["tail"]


def test_fresh_images_beat_copies_and_most_in_the_tail(reports: dict[str, Report]) -> None:
    fresh, copies = reports["fresh"].rows, reports["copies"].rows
    assert fresh["tail"]["coverage"] > 0.85
    assert copies["tail"]["coverage"] < 0.75
    assert fresh["tail"]["recall"] > copies["tail"]["recall"] + 0.25
    assert fresh["tail"]["fid"] < 0.5 * copies["tail"]["fid"]
    assert fresh["tail"]["kid"] < 0.5 * copies["tail"]["kid"]
    assert all(abs(fresh[g]["kid"]) < 0.1 for g in GROUPS)  # about -0.3 without the care for balanced classes
    assert copies["head"]["coverage"] > copies["medium"]["coverage"] > copies["tail"]["coverage"]
    # Both are digits of the right class: label accuracy cannot tell them apart, memorisation can.
    assert fresh["tail"]["label_accuracy"] == copies["tail"]["label_accuracy"] == 1
    assert all(row["memorisation"] == 0 for row in copies.values())
    assert 0.85 < fresh["tail"]["memorisation"] < 1.15


def test_a_row_is_what_the_metrics_say_of_its_images(sets: dict[str, ImageSet], reports: dict[str, Report]) -> None:
    fake, real = sets["fresh"], sets["real"]
    # Tail: 150 of 4 classes are 38, 38, 37, 37, the first ones of each in the shuffled order; 180 real ones 45 each.
    orders = [shuffled(len(s), 0) for s in (fake, real)]
    f = orders[0][per_class(fake.labels[orders[0]], [0] * 10, [0] * 6 + [38, 38, 37, 37])]
    r = orders[1][per_class(real.labels[orders[1]], [0] * 10, [0] * 6 + [45] * 4)]
    extractor = load_extractor("classifier")
    a, b = (extract(extractor, s.images[i]).features for s, i in ((fake, f), (real, r)))
    labels = (fake.labels[f], real.labels[r])
    row = reports["fresh"].rows["tail"]
    assert row["fid"] == pytest.approx(metrics.frechet_distance(a, b), rel=1e-4)
    assert row["kid"] == pytest.approx(metrics.kernel_distance(a, b, labels=labels)[0], rel=1e-4)  # type: ignore[index]
    assert (row["precision"], row["recall"]) == metrics.precision_recall(b, a, 5)
    assert (row["density"], row["coverage"]) == metrics.density_coverage(b, a, 5)


def test_a_class_that_was_not_drawn_is_left_out_of_both_sides(sets: dict[str, ImageSet]) -> None:
    fake = sets["fresh"].take(sets["fresh"].labels != 8)
    report = evaluate(
        fake, sets["real"], PLAIN, groups=GROUPS, rank=range(10), train=sets["train"], held_out=sets["real"]
    )
    assert report.rows["all"]["classes_left_out"] == report.rows["tail"]["classes_left_out"] == [8]
    assert report.rows["head"]["classes_left_out"] == []
    assert (report.rows["all"]["n_fake"], report.rows["all"]["n_real"]) == (450, 540)
    assert report.rows["tail"]["n_samples"] == 150
    empty = report.rows["class 8"]
    assert empty["classes_left_out"] == [8]
    assert empty["n_fake"] == empty["n_real"] == empty["n_samples"] == 0
    measured = ("coverage", "density", "precision", "recall", "fid", "kid", "label_accuracy", "memorisation")
    assert all(empty[name] is None for name in measured)
    # The rest of the tail is what it would be without the class at all (but for the order, which is by position).
    without = evaluate(
        fake,
        sets["real"].take(sets["real"].labels != 8),
        PLAIN,
        groups={**GROUPS, "tail": (6, 7, 9)},
        rank=range(10),
    )
    assert without.rows["tail"]["n_real"] == report.rows["tail"]["n_real"] == 180
    assert without.rows["tail"]["fid"] == pytest.approx(report.rows["tail"]["fid"], rel=1e-4)
    assert without.rows["tail"]["memorisation"] is None


def test_one_rare_class_bounds_every_group_but_no_mean_over_samples(sets: dict[str, ImageSet]) -> None:
    keep = torch.ones(500, dtype=torch.bool)
    keep[sets["fresh"].labels == 9] = False
    keep[(sets["fresh"].labels == 9).nonzero()[:4, 0]] = True
    report = evaluate(
        sets["fresh"].take(keep), sets["real"], load_extractor("classifier"), groups=GROUPS, rank=range(9, -1, -1)
    )
    # 4 images of class 9 allow 5, 5, 5 and 4 of the tail's classes: 19 in every group, 4 in every class.
    assert [report.rows[g]["n_fake"] for g in GROUPS] == [19, 19, 19]
    assert [report.rows[g]["n_samples"] for g in GROUPS] == [150, 150, 154]
    assert {row["n_fake"] for row in report.rows.values() if row["kind"] == "class"} == {4}
    # Recall needs five other generated images, coverage five other real ones.
    assert report.rows["class 0"]["recall"] is None
    assert report.rows["class 0"]["coverage"] is not None
    assert list(report.rows)[4:6] == ["class 9", "class 8"]
    # Four wrong images of class 9 weigh as much as fifty right ones of another class: the label law is balanced.
    labels = sets["fresh"].labels[keep]
    swapped = torch.where(labels == 9, 0, labels)
    swapped[(labels == 0).nonzero()[:4, 0]] = 9
    fake = ImageSet(sets["fresh"].images[keep], swapped, NAMES, "swapped")
    rows = evaluate(fake, sets["real"], load_extractor("classifier"), groups=GROUPS, rank=range(10)).rows
    assert rows["class 9"]["label_accuracy"] == 0
    assert rows["tail"]["label_accuracy"] == pytest.approx(0.75)


def test_an_empty_group_and_a_foreign_classifier(sets: dict[str, ImageSet]) -> None:
    foreign = Extractor(PLAIN.features, lambda images: images.flatten(1)[:, :13].float() / 255, "13 classes", "")
    groups = {"many": tuple(range(10)), "few": ()}
    report = evaluate(sets["fresh"], sets["real"], foreign, groups=groups, rank=range(10))
    assert report.rows["few"]["n_fake"] == 0
    assert report.rows["few"]["fid"] is None
    assert report.rows["many"]["n_fake"] == 500
    assert report.rows["all"]["label_accuracy"] is None
    assert report.rows["all"]["inception_score"] > 1


def test_protocol_entries_are_kept_and_never_overwritten(sets: dict[str, ImageSet]) -> None:
    arguments: dict[str, Any] = {"groups": GROUPS, "rank": range(10)}
    report = evaluate(sets["fresh"], sets["real"], PLAIN, **arguments, k=3, seed=7, protocol={"sampler": "ddim"})
    assert report.protocol["sampler"] == "ddim"
    assert (report.protocol["k"], report.protocol["evaluation_seed"]) == (3, 7)
    with pytest.raises(InputError, match="protocol entries k, reference are written by evaluate itself"):
        evaluate(sets["fresh"], sets["real"], PLAIN, **arguments, protocol={"k": 3, "reference": "mine"})
    other = sets["real"].take(torch.arange(len(sets["real"])).flip(0))
    assert (
        evaluate(sets["fresh"], other, PLAIN, **arguments).protocol["reference_sha256"]
        != report.protocol["reference_sha256"]
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": range(9)}, "rank must name each class 0..9 once"),
        ({"groups": {"tail": (9, 10)}}, r"group 'tail' must name classes 0..9, each once, got \[9, 10\]"),
        ({"groups": {"tail": (9, 9)}}, "each once"),
        ({"groups": {"all": (1,)}}, "a group cannot be called 'all'"),
        ({"groups": {"class 1": (1,)}}, "a group cannot be called 'class 1'"),
        ({"k": 0}, "must be at least 1, got 0"),
        ({"train": "real"}, "got train without held_out; give both"),
        ({"held_out": "real"}, "got held_out without train; give both"),
        ({"real": "wide"}, r"must have one image shape, got \(1, 8, 8\) and \(1, 8, 9\)"),
        (
            {"real": "renamed"},
            r"must have the same classes in the same order, got 10 \(0, 1, 2, 3, 4, ...\) and 10 \(a, ",
        ),
        ({"train": "renamed", "held_out": "real"}, "must have the same classes"),
        ({"fake": "ones", "real": "twos"}, "no class has both generated .* and real images"),
    ],
)
def test_what_cannot_be_evaluated(sets: dict[str, ImageSet], change: dict[str, Any], message: str) -> None:
    real = sets["real"]
    known = {
        **sets,
        "wide": ImageSet(torch.zeros(10, 1, 8, 9, dtype=torch.uint8), torch.arange(10), NAMES, "wide"),
        "renamed": ImageSet(real.images, real.labels, tuple("abcdefghij"), "renamed"),
        "ones": real.take(real.labels == 1),
        "twos": real.take(real.labels == 2),
    }
    arguments: dict[str, Any] = {"fake": "fresh", "real": "real", "groups": GROUPS, "rank": range(10), **change}
    arguments = {key: known[value] if isinstance(value, str) else value for key, value in arguments.items()}
    with pytest.raises(InputError, match=message):
        evaluate(arguments.pop("fake"), arguments.pop("real"), PLAIN, **arguments)


@pytest.mark.parametrize(
    ("available", "total"), [((5, 5, 5), 15), ((3, 3, 4), 10), ((4, 9, 9), 14), ((0, 2), 1), ((7,), 7), ((), 0)]
)
def test_the_largest_even_split(available: tuple[int, ...], total: int) -> None:
    assert most_even(available) == total
    if available:
        with pytest.raises(ValueError, match="cannot be split evenly"):
            even_counts(available, total + 1)


def test_every_smaller_total_splits_evenly_too() -> None:
    available = (6, 4, 9, 4, 5)
    for total in range(most_even(available) + 1):
        counts = even_counts(available, total)
        assert sum(counts) == total
        assert max(counts) - min(counts) <= 1
        assert all(c <= n for c, n in zip(counts, available, strict=True))


def test_images_are_dealt_in_turn() -> None:
    labels = torch.tensor([2, 2, 0, 1, 1, 0, 2, 0])
    assert take_evenly(labels, (2, 0, 1), 8, torch.arange(8)).tolist() == [0, 2, 3, 1, 5, 4, 6, 7]
    assert take_evenly(labels, (0, 2), 3, torch.arange(8)).tolist() == [2, 0, 5]
    assert take_evenly(labels, (0, 2), 0, torch.arange(8)).tolist() == []


def test_noise_lifts_recall_while_the_rest_falls() -> None:
    """The figures in every report's note on recall: copies of 8 digits a class, without and with noise of 60 levels."""
    images, labels = mixed_digits()
    train = per_class(labels, [0] * 10, [8] * 10)
    held_out = per_class(labels, [8] * 10, [999] * 10)
    real = ImageSet(images[held_out], labels[held_out], NAMES, "held-out")
    pick = train[torch.arange(960) // 96 * 8 + torch.arange(960) % 8]
    noise = torch.randn(960, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    found = {}
    for spread in (0, 60):
        noisy = images[pick] + spread * noise
        fake = ImageSet(noisy.round().clamp(0, 255).to(torch.uint8), labels[pick], NAMES, f"noise {spread}")
        rows = evaluate(fake, real, load_extractor("classifier"), groups={}, rank=range(10)).rows
        classes = [row for row in rows.values() if row["kind"] == "class"]
        columns = ("recall", "label_accuracy", "fid")
        found[spread] = {c: sum(row[c] for row in classes) / len(classes) for c in columns}
    said = re.findall(r"from ([0-9.]+) to ([0-9.]+)", ON_RECALL.replace("\n", " "))
    for metric, pair in zip(("recall", "label_accuracy", "fid"), said, strict=True):
        measured = [found[0][metric], found[60][metric]]
        assert measured == pytest.approx([float(v) for v in pair], rel=0.02, abs=0.006), metric
