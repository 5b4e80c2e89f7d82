"""knn_radius and ball_count, which have no gradient: products of half the pairs, and no matrix of distances."""

import pytest
import torch

from imbdiff import ops

from .floors import device
from .harness import Case, forward, ours

CHUNK = 1024


def squared_distances(a, b):
    """By chunks of rows, centred, in float32: (first row, distances)."""
    centre = b.float().mean(0)
    b = b.float() - centre
    norm = b.square().sum(1)
    for start in range(0, len(a), CHUNK):
        part = a[start : start + CHUNK].float() - centre
        yield start, torch.addmm(part.square().sum(1)[:, None] + norm, part, b.T, alpha=-2)


def chunked_radius(x, k):
    radii = []
    for start, distance in squared_distances(x, x):
        i = torch.arange(len(distance), device=x.device)
        distance[i, start + i] = torch.inf
        radii.append(distance.topk(k, largest=False).values[:, -1])
    return torch.cat(radii).clamp_min(0).sqrt()


def chunked_count(points, centers, radii):
    balls, inhabitants = [], 0
    for _, distance in squared_distances(points, centers):
        inside = distance < radii
        balls.append(inside.sum(1))
        inhabitants = inhabitants + inside.sum(0)
    return torch.cat(balls), inhabitants


def features(N, D, dtype):
    return torch.randn(N, D, device=device()).relu().to(getattr(torch, dtype))


def one_mode(op, N, D, dtype, rivals, inputs, flops):
    return Case(
        op=op,
        shape=f"{N}x{D}",
        dtype=dtype,
        modes={"forward": {name: forward(f, *inputs) for name, f in rivals.items()}},
        bytes_moved={"forward": sum(x.nbytes for x in inputs if isinstance(x, torch.Tensor))},
        flops={"forward": flops},
    )


def radius(N, D, dtype, k=5):
    rivals = ours(ops.knn_radius) | {"chunked": chunked_radius}
    return one_mode("knn_radius", N, D, dtype, rivals, (features(N, D, dtype), k), N * N * D)


def count(N, D, dtype, k=5):
    centers = features(N, D, dtype)
    inputs = features(N, D, dtype), centers, ops.knn_radius(centers, k, squared=True)
    return one_mode("ball_count", N, D, dtype, ours(ops.ball_count) | {"chunked": chunked_count}, inputs, 2 * N * N * D)


def case(op, *shape):
    return {"knn_radius": radius, "ball_count": count}[op](*shape)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("op", ["knn_radius", "ball_count"])
def test_neighbours(compare, op, dtype):
    compare(case, op, 10_000, 2048, dtype)
