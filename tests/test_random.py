"""Philox against published vectors, and what makes draws a function of the sample number alone."""

import numpy as np
import pytest
import torch

from imbdiff import random

KNOWN = [  # counter, key, result: the known-answer vectors that the authors publish with Random123
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN)
def test_philox_known_answers(counter, key, result):
    words = random.philox(tuple(torch.tensor([c]) for c in counter), key)
    assert tuple(int(w) for w in words) == result


def test_philox_against_numpys():
    """numpy has Philox-4x64; this checks the 4x32 rounds against an independent big-integer version."""

    def rounds(c, k):
        for _ in range(10):
            p0, p1 = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
            c = ((p1 >> 32) ^ c[1] ^ k[0], p1 & 0xFFFFFFFF, (p0 >> 32) ^ c[3] ^ k[1], p0 & 0xFFFFFFFF)
            k = ((k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF)
        return c

    values = np.random.default_rng().integers(0, 2**32, (50, 6)).tolist()
    for *counter, k0, k1 in values:
        words = random.philox(tuple(torch.tensor([c]) for c in counter), (k0, k1))
        assert tuple(int(w) for w in words) == rounds(counter, (k0, k1))


def test_a_draw_depends_on_its_number_alone():
    index = torch.tensor([5, 2**40 + 3, 0, 17])
    together = random.normal(3, "noise", index, (3, 5))
    for i, number in enumerate(index):
        assert torch.equal(random.normal(3, "noise", number[None], (3, 5))[0], together[i])
    # More of the same stream begins with what was there before.
    assert torch.equal(random.uniform(3, "a", index, (9,))[:, :4], random.uniform(3, "a", index, (4,)))


@pytest.mark.parametrize(
    ("seed", "stream", "number"), [(4, "noise", 5), (3, "noise2", 5), (3, "noise", 6), (3, "noise", 5 + 2**32)]
)
def test_seed_stream_and_number_all_matter(seed, stream, number):
    base = random.uniform(3, "noise", torch.tensor([5]), (16,))
    assert not (random.uniform(seed, stream, torch.tensor([number]), (16,)) == base).any()


def test_moments():
    index = torch.arange(20_000)
    u = random.uniform(0, "u", index, (10,)).double()
    assert u.min() >= 0
    assert u.max() < 1
    assert abs(u.mean() - 0.5) < 4 * (1 / 12 / u.numel()) ** 0.5
    n = random.normal(0, "n", index, (11,)).double()
    assert abs(n.mean()) < 4 / n.numel() ** 0.5
    assert abs(n.var() - 1) < 4 * (2 / n.numel()) ** 0.5
    assert abs((n**4).mean() - 3) < 4 * (96 / n.numel()) ** 0.5
    assert torch.corrcoef(n.T).fill_diagonal_(0).abs().max() < 5 / len(n) ** 0.5


def test_empty_and_compiled():
    assert random.normal(0, "n", torch.arange(0), (3, 2)).shape == (0, 3, 2)
    compiled = torch.compile(lambda i: random.uniform(1, "c", i, (6,)), fullgraph=True, backend="aot_eager")
    index = torch.arange(8)
    assert torch.equal(compiled(index), random.uniform(1, "c", index, (6,)))
