"""Distances between two sets of features, in float64. A value that N is too small for is None, not a guess."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from imbdiff import ops
from imbdiff.random import words


def _root(matrix: Tensor) -> Tensor:
    """Symmetric square root of a positive semi-definite matrix; eigenvalues that rounded below zero count as zero."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T


def frechet_from_moments(m1: Tensor, s1: Tensor, m2: Tensor, s2: Tensor) -> float:
    """||m1 - m2||^2 + Tr(S1 + S2 - 2 (S1 S2)^{1/2}) of two Gaussians, means [d], covariances [d, d].

    Tr (S1 S2)^{1/2} is the sum of the square roots of the eigenvalues of the symmetric S1^{1/2} S2 S1^{1/2}.
    Dowson and Landau 1982; Heusel et al. 2017.
    """
    root = _root(s1)
    product = root @ s2 @ root
    cross = torch.linalg.eigvalsh((product + product.T) / 2).clamp_min(0).sqrt().sum()
    return float((m1 - m2).square().sum() + s1.trace() + s2.trace() - 2 * cross)


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean [d] and unbiased covariance [d, d] of the rows of x [N, d], N >= 2."""
    mean = x.mean(0)
    centred = x - mean
    return mean, centred.T @ centred / (len(x) - 1)


def frechet_distance(a: Tensor, b: Tensor) -> float | None:
    """Frechet distance (FID when the features are Inception's) of features a [N, d], b [M, d]; None below two rows.

    Biased upwards for small N, so values compare only at equal N.
    """
    if min(len(a), len(b)) < 2:
        return None
    # Rounding can carry the difference of traces a little below zero.
    return max(0.0, frechet_from_moments(*moments(a), *moments(b)))


def _kernel_sum(a: Tensor, b: Tensor, chunk: int = 1024) -> float:
    """Sum over all pairs of (x.y / d + 1)^3."""
    return sum(float((part @ b.T / a.shape[1] + 1).pow(3).sum()) for part in a.split(chunk))


def _mmd(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """Unbiased squared maximum mean discrepancy of two mixtures with equal weights, from rows of each component.

    Pairs of a row with itself are left out. With one component each this is the usual estimate.
    """

    def between(x: Tensor, y: Tensor) -> float:
        return _kernel_sum(x, y) / (len(x) * len(y))

    def within(parts: Sequence[Tensor]) -> float:
        total = 0.0
        for i, x in enumerate(parts):
            itself = float((x.square().sum(1) / x.shape[1] + 1).pow(3).sum())
            total += (_kernel_sum(x, x) - itself) / (len(x) * (len(x) - 1))
            total += 2 * sum(between(x, y) for y in parts[i + 1 :])
        return total / len(parts) ** 2

    cross = sum(between(x, y) for x in a for y in b) / (len(a) * len(b))
    return within(a) + within(b) - 2 * cross


def kernel_distance(
    a: Tensor,
    b: Tensor,
    subsets: int = 100,
    subset_size: int = 1000,
    seed: int = 0,
    labels: tuple[Tensor, Tensor] | None = None,
) -> tuple[float, float | None] | None:
    """KID: unbiased MMD^2 of a [N, d], b [M, d] with k(x, y) = (x.y / d + 1)^3; mean and std over random subsets.

    If either set has at most `subset_size` rows, one estimate from all rows and no std; None below two rows.
    That one takes `labels` ([N], [M]) of sets balanced over classes: two rows of such a set share a class less often
    than two rows of different sets, so the usual estimate is below zero for equal laws; pairs are then averaged class
    by class (None if a class has one row). Binkowski et al. 2018. Subsets are functions of (seed, subset number).
    """
    if min(len(a), len(b)) < 2:
        return None
    if min(len(a), len(b)) <= subset_size:
        parts = (
            [[a], [b]]
            if labels is None
            else [[x[y == c] for c in y.unique()] for x, y in zip((a, b), labels, strict=True)]
        )
        return (_mmd(*parts), None) if min(len(x) for part in parts for x in part) > 1 else None

    def subset(x: Tensor, which: str) -> Tensor:
        return x[words(seed, f"kid/{which}", torch.arange(len(x)), 1)[:, 0].argsort(stable=True)[:subset_size]]

    found = [_mmd([subset(a, f"a/{i}")], [subset(b, f"b/{i}")]) for i in range(subsets)]
    values = torch.tensor(found, dtype=torch.float64)
    return float(values.mean()), float(values.std(correction=0))


def inception_score(probabilities: Tensor, splits: int = 10) -> tuple[float, float] | None:
    """exp of mean KL(p(y|x) || p(y)) over probabilities [N, classes]: mean and std over splits in the order given.

    Salimans et al. 2016. None below one row a split. Rows sorted by class would give every split one class.
    """
    if len(probabilities) < splits:
        return None
    scores = []
    for part in probabilities.tensor_split(splits):
        marginal = part.mean(0)
        divergence = torch.special.xlogy(part, part) - torch.special.xlogy(part, marginal)
        scores.append(divergence.sum(1).mean().exp())
    values = torch.stack(scores)
    return float(values.mean()), float(values.std(correction=0))


def precision_recall(real: Tensor, fake: Tensor, k: int) -> tuple[float | None, float | None]:
    """Improved precision and recall of real [N, d], fake [M, d]: shares of one set inside the other's k-NN balls.

    precision = mean_j [exists i: ||f_j - r_i|| < R_k(r_i)], recall the converse; None where a set has no k other rows.
    Kynkaanniemi et al. 2019, section 2, with a strict inequality.
    """

    def inside(query: Tensor, centre: Tensor) -> float | None:
        if not len(query) or k >= len(centre):
            return None
        balls, _ = ops.ball_count(query, centre, ops.knn_radius(centre, k, squared=True))
        return float((balls > 0).double().mean())

    return inside(fake, real), inside(real, fake)


def density_coverage(real: Tensor, fake: Tensor, k: int) -> tuple[float | None, float | None]:
    """Density and coverage of real [N, d], fake [M, d]; None where real has no k other rows.

    density = mean_j #{i: ||f_j - r_i|| < R_k(r_i)} / k, coverage = mean_i [exists j: ||f_j - r_i|| < R_k(r_i)].
    Naeem et al. 2020, section 3.
    """
    if not len(fake) or k >= len(real):
        return None, None
    balls, inhabitants = ops.ball_count(fake, real, ops.knn_radius(real, k, squared=True))
    return float(balls.double().mean()) / k, float((inhabitants > 0).double().mean())


def label_accuracy(probabilities: Tensor, labels: Tensor) -> float | None:
    """Share of images, probabilities [N, classes], that the classifier gives their own label [N]; None for no image."""
    return float((probabilities.argmax(1) == labels).double().mean()) if len(labels) else None
