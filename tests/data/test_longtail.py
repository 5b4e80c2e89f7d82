from __future__ import annotations

import hashlib
import heapq
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from imbdiff.data import long_tail_counts, long_tail_indices, split_hash
from imbdiff.data.longtail import ranked_classes
from imbdiff.errors import InputError

REAL = Path(__file__).parents[3] / "shared" / "data" / "cifar10_lt100_train.npz"

FACTORS = (0.1, 0.05, 0.02, 0.01, 0.005, 0.002, 0.001)
TOTALS = {
    "CIFAR10-LT": (5000.0, 10, (20431, 17023, 13996, 12406, 11203, 10011, 9324)),
    "CIFAR100-LT": (500.0, 100, (19573, 15907, 12608, 10847, 9502, 8155, 7361)),
    "TinyImageNet200-LT": (500.0, 200, (39072, 31711, 25082, 21549, 18836, 16132, 14548)),
}


@pytest.mark.parametrize("name", TOTALS)
def test_exponential_totals_are_the_published_ones(name: str) -> None:
    n_max, classes, totals = TOTALS[name]
    ratios = [round(1 / f) for f in FACTORS]
    assert tuple(sum(long_tail_counts(n_max, classes, r, "exponential")) for r in ratios) == totals


def test_exponential_counts_of_each_class() -> None:
    counts = [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]
    assert long_tail_counts(5000.0, 10, 100, "exponential") == counts
    hundred = long_tail_counts(500.0, 100, 100, "exponential")
    assert (hundred[0], hundred[-1]) == (500, 5)
    assert long_tail_counts(500.0, 100, 1000, "exponential").count(0) == 10
    assert long_tail_counts(500.0, 200, 1000, "exponential").count(0) == 20


def test_n_max_is_not_rounded() -> None:
    imagenet, places = 1281167 / 1000, 1803460 / 365
    counts = long_tail_counts(imagenet, 1000, 100, "exponential")
    assert (sum(counts), counts[0], counts[-1]) == (275288, 1281, 12)
    assert sum(long_tail_counts(1281, 1000, 100, "exponential")) == 275249
    counts = long_tail_counts(places, 365, 100, "exponential")
    assert (sum(counts), counts[0], counts[-1]) == (388960, 4940, 49)
    assert sum(long_tail_counts(4940, 365, 100, "exponential")) == 388880


def test_step_counts() -> None:
    assert long_tail_counts(5000.0, 10, 100, "step") == [5000] * 5 + [50] * 5
    assert long_tail_counts(50.5, 3, 10, "step") == [50, 5, 5]


def test_one_class_and_ratio_one() -> None:
    assert long_tail_counts(7.9, 1, 100, "exponential") == [7]
    assert long_tail_counts(7.9, 1, 100, "step") == [7]
    assert long_tail_counts(7.9, 3, 1, "exponential") == [7, 7, 7]
    assert long_tail_indices(torch.zeros(7, dtype=torch.int64), 1, ratio=100, profile="exponential").sort()[
        0
    ].tolist() == list(range(7))


@pytest.mark.parametrize("ratio", [0.5, 0.0, -3.0, float("nan"), float("inf")])
def test_bad_ratio(ratio: float) -> None:
    with pytest.raises(InputError, match=r"finite number >= 1.*--data\.ratio"):
        long_tail_counts(10.0, 3, ratio, "exponential")


def test_given_has_no_counts() -> None:
    with pytest.raises(InputError, match="'given' has no class counts"):
        long_tail_counts(10.0, 3, 10, "given")


def test_indices_follow_the_published_code() -> None:
    """Against the protocol as the papers run it: global seed, np.where, shuffle in place, truncate."""
    labels = np.random.RandomState(3).randint(0, 5, 400)
    state = np.random.get_state()
    np.random.seed(7)
    expected = []
    for k in range(5):
        where = np.where(labels == k)[0]
        np.random.shuffle(where)
        expected.extend(where[: int(80.0 * 0.1 ** (k / 4))].tolist())
    np.random.set_state(state)
    got = long_tail_indices(torch.from_numpy(labels), 5, ratio=10, profile="exponential", seed=7)
    assert got.dtype == torch.int64
    assert got.tolist() == expected
    # The global generator, which other code may rely on, is left alone.
    assert np.array_equal(np.random.get_state()[1], state[1])


def test_seed_changes_images_but_not_counts() -> None:
    labels = torch.arange(300) % 3
    first, second = (long_tail_indices(labels, 3, ratio=10, profile="step", seed=s) for s in (0, 1))
    assert not torch.equal(first, second)
    assert torch.bincount(labels[first]).tolist() == torch.bincount(labels[second]).tolist() == [100, 10, 10]


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_bad_seed(seed: int) -> None:
    with pytest.raises(InputError, match=r"--data\.split-seed"):
        long_tail_indices(torch.tensor([0, 1]), 2, ratio=1, profile="step", seed=seed)


def test_class_order_is_the_frequency_rank() -> None:
    labels = torch.arange(300) % 3
    index = long_tail_indices(labels, 3, ratio=100, profile="exponential", class_order=(2, 0, 1))
    assert torch.bincount(labels[index]).tolist() == [10, 1, 100]
    assert labels[index].tolist() == [2] * 100 + [0] * 10 + [1]


def test_rotation() -> None:
    assert ranked_classes(4) == (0, 1, 2, 3)
    assert ranked_classes(4, rotate=1) == (1, 2, 3, 0)
    assert ranked_classes(4, rotate=-1) == (3, 0, 1, 2)
    assert ranked_classes(4, (3, 1, 0, 2), rotate=6) == (0, 2, 3, 1)


@pytest.mark.parametrize("order", [(0, 1), (0, 1, 1), (1, 2, 3), (0, 1, 2, 3)])
def test_bad_class_order(order: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"each class 0\.\.2 once.*--data\.class-order"):
        ranked_classes(3, order)


def test_given_keeps_everything_in_file_order() -> None:
    labels = torch.tensor([1, 0, 1, 1])
    assert long_tail_indices(labels, 2, ratio=20, profile="given").tolist() == [0, 1, 2, 3]


def test_class_with_fewer_images_than_planned_keeps_all() -> None:
    labels = torch.tensor([0] * 3 + [1] * 17)
    index = long_tail_indices(labels, 2, ratio=2, profile="exponential")
    assert torch.bincount(labels[index]).tolist() == [3, 5]


@pytest.mark.parametrize("profile", ["exponential", "given"])
def test_class_without_images_in_the_source(profile: str) -> None:
    with pytest.raises(InputError, match=r"no image of class 1 \(cat\)"):
        long_tail_indices(
            torch.tensor([0, 2, 2]),
            3,
            ratio=1,
            profile=profile,
            class_names=("dog", "cat", "owl"),  # type: ignore[arg-type]
        )


def test_ratio_too_large_names_the_largest_that_works() -> None:
    labels = torch.arange(150) % 3  # 50 images a class
    with pytest.raises(
        InputError, match=r"no image of class 2 .*keeps one image of every class is 50; set --data\.ratio"
    ):
        long_tail_indices(labels, 3, ratio=51, profile="exponential")
    with pytest.raises(InputError, match=r"no image of class 0 .*every class is 50;"):
        long_tail_indices(labels, 3, ratio=51, profile="exponential", class_order=(1, 2, 0))


@pytest.mark.parametrize("profile", ["exponential", "step"])
@pytest.mark.parametrize("per_class", [1, 2, 7, 49, 98, 103, 179.7])
def test_the_largest_ratio_it_names_does_work(profile: str, per_class: float) -> None:
    labels = torch.arange(round(10 * per_class)) % 10
    with pytest.raises(InputError) as caught:
        long_tail_indices(labels, 10, ratio=1e6, profile=profile)  # type: ignore[arg-type]
    named = float(str(caught.value).split("every class is ")[1].split(";")[0])
    index = long_tail_indices(labels, 10, ratio=named, profile=profile)  # type: ignore[arg-type]
    assert torch.bincount(labels[index], minlength=10).min() == 1
    with pytest.raises(InputError, match="leaves no image"):
        long_tail_indices(labels, 10, ratio=named + 0.02, profile=profile)  # type: ignore[arg-type]


def test_split_hash_is_sha256_of_little_endian_int64() -> None:
    indices, labels = torch.tensor([5, 1, 300]), torch.tensor([0, 0, 1])
    raw = struct.pack("<6q", 5, 1, 300, 0, 0, 1)
    assert split_hash(indices, labels) == hashlib.sha256(raw).hexdigest()
    assert split_hash(indices.flip(0), labels) != split_hash(indices, labels)


@pytest.fixture(scope="module")
def cifar10_lt() -> tuple[np.ndarray, np.ndarray]:
    """Positions in the official training order and labels of the published CIFAR-10-LT at ratio 100."""
    if not REAL.is_file():
        pytest.skip(f"{REAL.name} is not in a folder shared/data beside the repository")
    with np.load(REAL, allow_pickle=False) as file:
        return file["indices"].astype(np.int64), file["labels"].astype(np.int64)


def test_cifar10_lt_order_within_each_class(cifar10_lt: tuple[np.ndarray, np.ndarray]) -> None:
    """Kept = sorted positions of the class at the places p_k[:n_k], so both sort alike, whatever the positions are."""
    indices, labels = cifar10_lt
    places = long_tail_indices(torch.arange(50000) // 5000, 10, ratio=100, profile="exponential", seed=0).numpy()
    assert np.array_equal(places // 5000, labels)
    for k in range(10):
        assert np.array_equal(np.argsort(indices[labels == k]), np.argsort(places[labels == k])), f"class {k}"
    # All of class 0 is kept, so there the positions themselves are known.
    assert np.array_equal(np.sort(indices[labels == 0])[places[:5000]], indices[labels == 0])


def test_cifar10_lt_indices_exactly(cifar10_lt: tuple[np.ndarray, np.ndarray]) -> None:
    """On labels that agree with all that the published subset says of the official ones, the split is the same.

    Each kept image has a known place in its class, so between two of them a known number of others of the class must
    lie. Earliest deadline first fills the gaps if that is possible at all; a wrong place makes it impossible.
    """
    indices, labels = cifar10_lt
    places = long_tail_indices(torch.arange(50000) // 5000, 10, ratio=100, profile="exponential", seed=0).numpy() % 5000
    official = np.full(50000, -1)
    official[indices] = labels
    opening: dict[int, list[tuple[int, int, int]]] = {}
    for k in range(10):
        by_place = np.argsort(places[labels == k])
        position = [-1, *indices[labels == k][by_place].tolist(), 50000]
        place = [-1, *places[labels == k][by_place].tolist(), 5000]
        for i in range(len(place) - 1):
            opening.setdefault(position[i], []).append((position[i + 1], k, place[i + 1] - place[i] - 1))
    waiting = [demand for demand in opening[-1] if demand[2]]
    heapq.heapify(waiting)
    for position in range(50000):
        for demand in opening.get(position, []):
            if demand[2]:
                heapq.heappush(waiting, demand)
        if official[position] < 0:
            deadline, k, count = heapq.heappop(waiting)
            assert position < deadline
            official[position] = k
            if count > 1:
                heapq.heappush(waiting, (deadline, k, count - 1))
    assert np.bincount(official).tolist() == [5000] * 10
    got = long_tail_indices(torch.from_numpy(official), 10, ratio=100, profile="exponential", seed=0)
    assert np.array_equal(got.numpy(), indices)
