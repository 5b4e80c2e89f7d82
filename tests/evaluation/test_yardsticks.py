"""The sets a run is measured against: what the model never saw stays unseen, and every row has one N."""

import pytest
import torch

from imbdiff.data import DataConfig, ImageSet, load_training_data
from imbdiff.errors import InputError
from imbdiff.evaluation.yardsticks import comparison_sets, copies


@pytest.fixture(scope="module")
def digits():
    return load_training_data(DataConfig())


def rows(images):
    return {bytes(x) for x in images.images.flatten(1).numpy()}


def test_fresh_images_are_in_no_other_set(digits):
    sets = comparison_sets(digits, 100)
    fresh = rows(sets.fresh)
    for other in (sets.train, sets.held_out, sets.reference):
        assert not fresh & rows(other)
    assert rows(sets.held_out) | rows(sets.train) == rows(sets.reference)
    assert len(fresh) + len(sets.reference) == len(digits.pool)


def test_each_group_has_as_many_fresh_images(digits):
    counts = comparison_sets(digits, 100).fresh.counts
    # All 178 images of class 0 are trained on, and class 1 has 54 left: two thirds of them, twice, are the 72 of head.
    assert counts.tolist() == [0, 36, 36, 24, 24, 24, 18, 18, 18, 18]
    assert comparison_sets(digits, 10).fresh.counts.tolist() == [0, 15, 15, 10, 10, 10, 8, 8, 7, 7]


def test_copies_go_through_the_training_images_in_turn(digits):
    fake = copies(digits.train, 20)
    assert fake.counts.tolist() == [20] * 10
    assert rows(fake) <= rows(digits.train)
    assert len(rows(fake.take((fake.labels == 9).nonzero()[:, 0]))) == 8


def test_an_external_reference(digits):
    other = ImageSet(digits.pool.images, digits.pool.labels, tuple("abcdefghij"), "test.npz")
    sets = comparison_sets(digits, 30, other)
    assert sets.reference.class_names == digits.pool.class_names
    assert sets.fresh.counts.tolist() == [30] * 6 + [23, 23, 22, 22]
    assert len(sets.reference) + len(sets.fresh) == len(other)
    assert not rows(sets.reference) & rows(sets.fresh)
    with pytest.raises(InputError, match="has 11 classes, the training data 10"):
        comparison_sets(digits, 30, ImageSet(other.images, other.labels, tuple("abcdefghijk"), "test.npz"))


def test_without_unseen_images_the_reference_says_what_it_is(digits):
    pool = digits.train
    data = type(digits)(pool, torch.arange(len(pool)), digits.counts, digits.groups, digits.split_hash)
    sets = comparison_sets(data, 30)
    assert sets.fresh is None
    assert sets.held_out is None
    assert sets.reference.name == "the training images themselves"
