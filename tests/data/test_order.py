from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from imbdiff.data import DataOrder, order
from imbdiff.errors import InputError

COUNTS = torch.tensor([120, 40, 9, 3])
# Not sorted by label, as a user's own data need not be.
LABELS = torch.repeat_interleave(torch.arange(4), COUNTS)[
    torch.randperm(172, generator=torch.Generator().manual_seed(1))
]
EXPONENTS = (1.0, 0.5, 0.0, -1.0)


def make(exponent: float, seed: int = 0) -> DataOrder:
    return DataOrder(LABELS, COUNTS, seed, exponent)


def test_an_epoch_shows_each_image_once() -> None:
    got = make(1.0).indices(torch.arange(3 * 172)).view(3, 172)
    assert torch.equal(got.sort(dim=1)[0], torch.arange(172).expand(3, 172))
    assert not torch.equal(got[0], got[1])
    assert not torch.equal(got[1], got[2])
    assert not torch.equal(got[0], torch.arange(172))


def test_a_shuffle_is_uniform() -> None:
    """Over many epochs each image takes each place about equally often (chi-square, 5 sigma)."""
    labels, epochs = torch.zeros(6, dtype=torch.int64), 1000
    got = DataOrder(labels, torch.tensor([6]), 4).indices(torch.arange(6 * epochs)).view(epochs, 6)
    table = torch.zeros(6, 6).index_put_((got, torch.arange(6).expand_as(got)), torch.tensor(1.0), accumulate=True)
    chi2 = ((table - epochs / 6) ** 2 / (epochs / 6)).sum()
    assert chi2 < 25 + 5 * 50**0.5


@settings(max_examples=30, deadline=None)
@given(
    keys=st.lists(st.integers(0, 2000) | st.integers(0, 2**40), min_size=1, max_size=40),
    cut=st.integers(0, 40),
    exponent=st.sampled_from(EXPONENTS),
)
def test_a_key_has_one_answer_however_batches_are_cut(keys: list[int], cut: int, exponent: float) -> None:
    whole = make(exponent).indices(torch.tensor(keys))
    used = make(exponent)
    parts = [used.indices(torch.tensor(part, dtype=torch.int64)) for part in (keys[:cut], keys[cut:])]
    assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(used.indices(torch.tensor(keys[::-1])), whole.flip(0))


@pytest.mark.parametrize("exponent", EXPONENTS)
def test_seed_changes_the_order(exponent: float) -> None:
    keys = torch.arange(172)
    assert not torch.equal(make(exponent, 0).indices(keys), make(exponent, 1).indices(keys))


def test_only_two_permutations_are_kept() -> None:
    data = make(1.0)
    for epoch in range(6):
        data.indices(torch.tensor([172 * epoch]))
    assert sorted(data._permutations) == [4, 5]


@pytest.mark.parametrize("exponent", [0.5, 0.0, -1.0, 2.0])
def test_classes_follow_the_prior(exponent: float) -> None:
    draws = 60_000
    got = make(exponent).indices(torch.arange(draws))
    expected = COUNTS.double() ** exponent
    expected /= expected.sum()
    frequency = torch.bincount(LABELS[got], minlength=4) / draws
    bound = 5 * (expected * (1 - expected) / draws).sqrt()
    assert ((frequency - expected).abs() < bound).all()


def test_images_within_a_class_are_uniform() -> None:
    got = make(0.0).indices(torch.arange(60_000))
    for label, count in enumerate(COUNTS.tolist()):
        mine = got[LABELS[got] == label]
        seen = torch.bincount(mine, minlength=172)[label == LABELS].double()
        expected = len(mine) / count
        assert ((seen - expected) ** 2 / expected).sum() < (count - 1) + 5 * (2 * (count - 1)) ** 0.5


@pytest.mark.parametrize("exponent", [0.5, 0.0, -1.0])
def test_empty_classes_are_never_drawn(exponent: float) -> None:
    labels = torch.tensor([1, 1, 3])
    got = DataOrder(labels, torch.tensor([0, 2, 0, 1, 0]), 0, exponent).indices(torch.arange(2000))
    assert got.unique().tolist() == [0, 1, 2]


@pytest.mark.parametrize(("word", "expected"), [(0, 0), (0xFFFFFFFF, 171)])
def test_extreme_draws_stay_in_range(word: int, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(order, "words", lambda seed, stream, key, count: torch.full((len(key), count), word))
    labels = LABELS.sort()[0]
    for exponent in (0.5, 0.0, 0.1, 0.3, -1.0):
        assert DataOrder(labels, COUNTS, 0, exponent).indices(torch.arange(3)).tolist() == [expected] * 3
    # Empty classes at either end are passed over too.
    got = DataOrder(torch.tensor([1, 1, 3]), torch.tensor([0, 2, 0, 1, 0]), 0, 0.5).indices(torch.arange(3))
    assert got.tolist() == [min(expected, 2)] * 3


def test_classes_own_their_lower_edge(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shares are [low, high): u = 1/2 of two equal classes is the second one's."""
    monkeypatch.setattr(order, "words", lambda seed, stream, key, count: torch.full((len(key), count), 2**31))
    data = DataOrder(torch.tensor([0, 0, 1, 1]), torch.tensor([2, 2]), 0, 0.0)
    assert data.indices(torch.arange(1)).tolist() == [3]


def test_the_last_edge_of_the_prior_is_exactly_one() -> None:
    """Rounding of the sum must not leave a gap below 1."""
    for classes in range(2, 400):
        edges = order._prior_cdf(torch.arange(1, classes), 0.5)
        assert edges.dtype == torch.float64
        assert edges[-1] == 1


def test_extreme_exponents_stay_finite() -> None:
    assert LABELS[make(500.0).indices(torch.arange(100))].unique().tolist() == [0]
    assert LABELS[make(-500.0).indices(torch.arange(100))].unique().tolist() == [3]


@pytest.mark.parametrize("exponent", [float("nan"), float("inf")])
def test_bad_exponent(exponent: float) -> None:
    with pytest.raises(InputError, match=r"finite.*--data\.prior-exponent"):
        make(exponent)


@pytest.mark.parametrize("counts", [[120, 40, 9, 2], [120, 40, 9], [120, 40, 12, 0]])
def test_counts_must_describe_the_labels(counts: list[int]) -> None:
    with pytest.raises(InputError, match="do not describe the 172 labels"):
        DataOrder(LABELS, torch.tensor(counts), 0)
    with pytest.raises(InputError, match="do not describe the 0 labels"):
        DataOrder(torch.zeros(0, dtype=torch.int64), torch.tensor([0]), 0)


def test_the_order_is_the_same_in_every_release() -> None:
    """Frozen values: a change here changes every run that is resumed across the release."""
    labels, counts, keys = torch.tensor([0, 1, 0, 2, 0, 1, 0, 0]), torch.tensor([5, 2, 1]), torch.arange(10)
    frozen = {1.0: [7, 6, 2, 5, 1, 3, 0, 4, 4, 2], 0.5: [1, 3, 7, 4, 4, 3, 2, 6, 2, 7]}
    for exponent, expected in frozen.items():
        assert DataOrder(labels, counts, 42, exponent).indices(keys).tolist() == expected


@pytest.mark.gpu
@pytest.mark.parametrize("exponent", EXPONENTS)
def test_the_order_is_the_same_on_a_gpu(exponent: float) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    keys: Tensor = torch.arange(1000)
    got = DataOrder(LABELS.cuda(), COUNTS.cuda(), 0, exponent).indices(keys.cuda())
    assert got.is_cuda
    assert torch.equal(got.cpu(), make(exponent).indices(keys))
