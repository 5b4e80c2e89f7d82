"""Distances between feature sets: closed forms, enumeration, and other people's implementations."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from imbdiff.evaluation import metrics


def gaussian(n: int, d: int, seed: int, scale: float = 1.0, shift: float = 0.0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=g, dtype=torch.float64) * scale + shift


def spd(d: int, seed: int) -> Tensor:
    x = gaussian(2 * d, d, seed)
    return x.T @ x / d


def zeros(d: int) -> Tensor:
    return torch.zeros(d, dtype=torch.float64)


def test_frechet_of_diagonal_gaussians() -> None:
    v1, v2 = torch.tensor([1.0, 4.0, 9.0]).double(), torch.tensor([4.0, 1.0, 0.25]).double()
    m1, m2 = torch.tensor([1.0, 0.0, 2.0]).double(), torch.tensor([0.0, 0.0, 5.0]).double()
    expected = 1 + 9 + (1 - 2) ** 2 + (2 - 1) ** 2 + (3 - 0.5) ** 2
    assert metrics.frechet_from_moments(m1, v1.diag(), m2, v2.diag()) == pytest.approx(expected, rel=1e-14)


def test_frechet_of_covariances_that_do_not_commute() -> None:
    # In two dimensions Tr (AB)^{1/2} = sqrt(Tr AB + 2 sqrt(det A det B)).
    a, b = spd(2, 0), spd(2, 1)
    cross = math.sqrt(float((a @ b).trace()) + 2 * math.sqrt(float(torch.det(a) * torch.det(b))))
    expected = float(a.trace() + b.trace()) - 2 * cross
    assert not torch.allclose(a @ b, b @ a)
    assert metrics.frechet_from_moments(zeros(2), a, zeros(2), b) == pytest.approx(expected, rel=1e-12)


def test_frechet_of_singular_covariances() -> None:
    # Rank one each: Tr (u u' v v')^{1/2} = |u.v|.
    u, v = gaussian(1, 6, 2)[0], gaussian(1, 6, 3)[0]
    expected = float(u @ u + v @ v - 2 * (u @ v).abs())
    found = metrics.frechet_from_moments(zeros(6), torch.outer(u, u), zeros(6), torch.outer(v, v))
    assert found == pytest.approx(expected, rel=1e-6)


def test_frechet_is_zero_on_itself_and_symmetric() -> None:
    a, b = gaussian(50, 8, 4), gaussian(60, 8, 5, 2.0)
    assert metrics.frechet_distance(a, a) == pytest.approx(0, abs=1e-10)
    assert metrics.frechet_distance(a, b) == pytest.approx(metrics.frechet_distance(b, a), rel=1e-10)


def test_frechet_of_samples_nears_the_gaussians() -> None:
    # Standard deviation over seeds is about 0.06 here, so 0.3 is five of them.
    a, b = gaussian(20000, 4, 6), gaussian(20000, 4, 7, 2.0, 1.0)
    assert metrics.frechet_distance(a, b) == pytest.approx(4 * 1 + 4 * (2 - 1) ** 2, abs=0.3)


def test_moments_are_unbiased() -> None:
    x = gaussian(12, 3, 8)
    mean, covariance = metrics.moments(x)
    np.testing.assert_allclose(covariance.numpy(), np.cov(x.numpy(), rowvar=False), rtol=1e-12)
    np.testing.assert_allclose(mean.numpy(), x.numpy().mean(0), rtol=1e-12)


def test_kernel_distance_is_the_mean_over_distinct_pairs() -> None:
    a, b = gaussian(5, 3, 9), gaussian(7, 3, 10, shift=0.5)

    def k(x: Tensor, y: Tensor) -> float:
        return float((x @ y / 3 + 1) ** 3)

    def within(x: Tensor) -> float:
        return float(np.mean([k(x[i], x[j]) for i in range(len(x)) for j in range(len(x)) if i != j]))

    expected = within(a) + within(b) - 2 * float(np.mean([k(x, y) for x in a for y in b]))
    found = metrics.kernel_distance(a, b)
    assert found is not None
    assert found[0] == pytest.approx(expected, rel=1e-10)
    assert found[1] is None


def test_kernel_distance_is_unbiased() -> None:
    # Equal laws: the estimates scatter about zero, some below. The bias of the V-statistic would be about 0.3.
    found = [metrics.kernel_distance(gaussian(20, 4, 2 * s), gaussian(20, 4, 2 * s + 1)) for s in range(200)]
    values = torch.tensor([v[0] for v in found if v], dtype=torch.float64)
    assert values.min() < 0
    assert abs(float(values.mean())) < 4 * float(values.std()) / math.sqrt(200)
    assert 4 * float(values.std()) / math.sqrt(200) < 0.15


def test_kernel_distance_of_balanced_sets_is_unbiased() -> None:
    # Three classes far apart, five rows of each: the usual estimate is about 2 * (0 - share of like pairs) below zero.
    labels = torch.arange(15) % 3
    offset = 3 * torch.eye(3, dtype=torch.float64)[labels]
    pairs = [(gaussian(15, 3, 2 * s) + offset, gaussian(15, 3, 2 * s + 1) + offset) for s in range(200)]
    for given_labels, biased in ((None, True), ((labels, labels), False)):
        found = [metrics.kernel_distance(a, b, labels=given_labels) for a, b in pairs]
        values = torch.tensor([v[0] for v in found if v], dtype=torch.float64)
        bound = 4 * float(values.std()) / math.sqrt(200)
        assert (float(values.mean()) < -bound) == biased
        assert abs(float(values.mean())) > bound or not biased
    assert metrics.kernel_distance(pairs[0][0][:4], pairs[0][1], labels=(labels[:4], labels)) is None


def test_kernel_distance_weighs_classes_equally() -> None:
    a, b = gaussian(5, 3, 30), gaussian(6, 3, 31, shift=0.5)
    la, lb = torch.tensor([0, 0, 0, 1, 1]), torch.tensor([0, 1, 1, 0, 1, 1])

    def k(x: Tensor, y: Tensor) -> float:
        return float((x @ y / 3 + 1) ** 3)

    def term(x: Tensor, lx: Tensor, y: Tensor, ly: Tensor, same: bool) -> float:
        means = []
        for c in (0, 1):
            for e in (0, 1):
                i, j = ((l == v).nonzero()[:, 0].tolist() for l, v in ((lx, c), (ly, e)))
                means.append(np.mean([k(x[p], y[q]) for p in i for q in j if not (same and p == q)]))
        return float(np.mean(means))

    expected = term(a, la, a, la, True) + term(b, lb, b, lb, True) - 2 * term(a, la, b, lb, False)
    found = metrics.kernel_distance(a, b, labels=(la, lb))
    assert found is not None
    assert found[0] == pytest.approx(expected, rel=1e-10)


def test_kernel_distance_over_subsets() -> None:
    a, b = gaussian(300, 4, 11), gaussian(250, 4, 12, shift=0.5)
    full = metrics.kernel_distance(a, b)
    some = metrics.kernel_distance(a, b, subsets=60, subset_size=100, seed=3)
    assert full is not None
    assert some is not None
    assert some[1] is not None
    assert some[1] > 0
    assert some[0] == pytest.approx(full[0], abs=4 * some[1] / math.sqrt(60))
    assert some == metrics.kernel_distance(a, b, subsets=60, subset_size=100, seed=3)
    assert some != metrics.kernel_distance(a, b, subsets=60, subset_size=100, seed=4)


class Projection(nn.Module):
    """A seeded random projection as torchmetrics wants its extractors."""

    num_features = 12

    def __init__(self) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.register_buffer("weight", torch.randn(192, 12, generator=g) / 20)

    def forward(self, images: Tensor) -> Tensor:
        return torch.tanh(images.flatten(1).float() / 127.5 - 1) @ self.weight


@pytest.fixture(scope="module")
def two_sets() -> tuple[Tensor, Tensor, Projection]:
    g = torch.Generator().manual_seed(1)
    real = torch.randint(0, 256, (120, 3, 8, 8), generator=g, dtype=torch.uint8)
    fake = torch.randint(40, 256, (100, 3, 8, 8), generator=g, dtype=torch.uint8)
    return real, fake, Projection()


def test_frechet_agrees_with_torchmetrics(two_sets: tuple[Tensor, Tensor, Projection]) -> None:
    real, fake, module = two_sets
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of that library, not of ours
        from torchmetrics.image.fid import FrechetInceptionDistance

        theirs = FrechetInceptionDistance(feature=module, normalize=False)
        theirs.update(real, real=True)
        theirs.update(fake, real=False)
        value = float(theirs.compute())
    assert metrics.frechet_distance(module(real).double(), module(fake).double()) == pytest.approx(value, rel=1e-6)
    assert value > 0.1


def test_kernel_distance_agrees_with_torchmetrics(two_sets: tuple[Tensor, Tensor, Projection]) -> None:
    real, fake, module = two_sets
    real = real[:100]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torchmetrics.image.kid import KernelInceptionDistance

        # Subsets of all rows: every one of them is the full-set estimate.
        theirs = KernelInceptionDistance(feature=module, subsets=2, subset_size=100)
        theirs.update(real, real=True)
        theirs.update(fake, real=False)
        value = float(theirs.compute()[0])
    found = metrics.kernel_distance(module(real).double(), module(fake).double())
    assert found is not None
    assert found[0] == pytest.approx(value, rel=1e-4)
    assert value > 0.01


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize(("n", "m", "shift"), [(80, 60, 0.0), (50, 90, 0.7), (40, 40, 3.0)])
def test_manifold_metrics_agree_with_prdc(n: int, m: int, shift: float, k: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from prdc import compute_prdc

        real, fake = gaussian(n, 6, n), gaussian(m, 6, m + 1, shift=shift)
        theirs = compute_prdc(real.numpy(), fake.numpy(), k)
    precision, recall = metrics.precision_recall(real, fake, k)
    density, coverage = metrics.density_coverage(real, fake, k)
    ours = {"precision": precision, "recall": recall, "density": density, "coverage": coverage}
    assert ours == pytest.approx({name: float(value) for name, value in theirs.items()}, abs=1e-12)


def test_manifold_metrics_of_a_set_against_itself() -> None:
    x = gaussian(60, 8, 13)
    assert metrics.precision_recall(x, x, 3) == (1.0, 1.0)
    # k - 1 neighbours and the row itself; the k-th neighbour lies on the sphere, which does not count.
    assert metrics.density_coverage(x, x, 3) == (pytest.approx(1.0, abs=1e-15), 1.0)


def test_far_away_sets_share_nothing() -> None:
    a, b = gaussian(20, 3, 14), gaussian(20, 3, 15, shift=100)
    assert metrics.precision_recall(a, b, 3) == (0, 0)
    assert metrics.density_coverage(a, b, 3) == (0, 0)


def test_inception_score_closed_forms() -> None:
    uniform = torch.full((100, 7), 1 / 7, dtype=torch.float64)
    assert metrics.inception_score(uniform) == (pytest.approx(1.0), pytest.approx(0.0, abs=1e-12))
    sure = torch.eye(4, dtype=torch.float64).repeat(10, 1)
    assert metrics.inception_score(sure) == (pytest.approx(4.0), pytest.approx(0.0, abs=1e-12))
    # Two classes, p and 1 - p in turn: the marginal is even, so the score is 2 exp(-entropy).
    p = torch.tensor([[0.9, 0.1], [0.1, 0.9]], dtype=torch.float64).repeat(10, 1)
    entropy = -(0.9 * math.log(0.9) + 0.1 * math.log(0.1))
    assert metrics.inception_score(p) == (pytest.approx(2 * math.exp(-entropy)), pytest.approx(0.0, abs=1e-12))


def test_inception_score_splits_follow_the_order() -> None:
    sure = torch.eye(2, dtype=torch.float64).repeat_interleave(10, 0)
    assert metrics.inception_score(sure, splits=1) == (pytest.approx(2.0), 0.0)
    assert metrics.inception_score(sure, splits=2) == (pytest.approx(1.0), pytest.approx(0.0, abs=1e-12))
    mixed = torch.cat([sure[:10], sure[5:15]])  # first half one class, second half both
    assert metrics.inception_score(mixed, splits=2) == (pytest.approx(1.5), pytest.approx(0.5))


def test_label_accuracy() -> None:
    p = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4], [0.3, 0.7]])
    assert metrics.label_accuracy(p, torch.tensor([0, 1, 1, 1])) == 0.75
    assert metrics.label_accuracy(p[:0], torch.tensor([], dtype=torch.int64)) is None


def test_too_few_rows_give_none() -> None:
    one, many = gaussian(1, 3, 16), gaussian(9, 3, 17)
    for a, b in ((one, many), (many, one), (many[:0], many)):
        assert metrics.frechet_distance(a, b) is None
        assert metrics.kernel_distance(a, b) is None
    assert metrics.inception_score(torch.full((9, 2), 0.5)) is None
    # Precision and density ask for k other real rows, recall for k other fake ones.
    assert metrics.precision_recall(many[:3], many, 3) == (None, pytest.approx(1.0))
    assert metrics.precision_recall(many, many[:3], 3) == (pytest.approx(1.0), None)
    assert metrics.density_coverage(many[:3], many, 3) == (None, None)
    assert metrics.density_coverage(many, many[:0], 3) == (None, None)
    assert metrics.precision_recall(many, many[:0], 3) == (None, None)
    assert metrics.precision_recall(many, many[:4], 3)[1] is not None
