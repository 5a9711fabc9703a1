"""Parameters sampled for a batch equal the parameters of single views, bit for bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mocofast.config import AugmentConfig, DataConfig
from mocofast.data.deadline import Readers
from mocofast.data.interface import (
    BatchSlice,
    ViewParams,
    sample_view,
    source_order,
    view_augments,
)
from mocofast.data.planning import BatchPlanner
from mocofast.data.sampling import Views, _Stream, per_view, sample_views
from mocofast.data.sources import load_datasets
from mocofast.settings import load_recipe
from tests.sampled import stack_views

EVERYTHING = AugmentConfig(
    rotate=10.0,
    jitter_p=0.8,
    blur=0.5,
    solarize=0.2,
    vertical_flip=0.4,
    quarter_turns=0.7,
    channel_jitter=(0.2, 0.1),
    hed=0.05,
    noise=0.1,
)
AUGMENTS = {
    "moco_v1": AugmentConfig(),
    "cifar10": load_recipe("cifar10_r18").augment,
    "digits": load_recipe("digits").augment,
    "everything": EVERYTHING,
    "wide crops": AugmentConfig(crop_ratio=(2.0, 5.0), crop_scale=(0.5, 1.0)),
    "crops only": AugmentConfig(jitter=(0.0, 0.0, 0.0, 0.0), gray=0.0, flip=0.0),
}
SIZES = [
    (32, 32),
    (375, 500),
    (60, 400),  # wide, and tall: most crops do not fit, and often all ten attempts fail
    (400, 60),
    (1, 1),  # only one place for a crop, which takes no random number
]


def assert_equal(got: Views, expected: Views) -> None:
    for name, left, right in zip(Views._fields, got, expected):
        assert np.array_equal(left, right), name


def test_a_batch_of_views_has_the_fields_of_one() -> None:
    assert Views._fields == ViewParams._fields


@pytest.mark.parametrize("augment", AUGMENTS.values(), ids=AUGMENTS)
def test_a_batch_is_sampled_as_its_views_one_by_one(augment: AugmentConfig) -> None:
    # Most indices need more than 32 bits of the counter.
    index = np.random.default_rng(0).integers(0, 2**40, 300)
    for size in SIZES:
        for view in (0, 1):
            expected = stack_views([sample_view(augment, size, 7, 3, int(i), view) for i in index])
            assert_equal(sample_views(augment, np.array(size), 7, 3, index, view), expected)


def test_every_image_of_a_batch_may_have_its_own_size() -> None:
    index = np.arange(200)
    sizes = np.array(SIZES)[index % len(SIZES)]
    views = [
        sample_view(EVERYTHING, (int(h), int(w)), 0, 0, int(i), 1)
        for i, (h, w) in zip(index, sizes)
    ]
    sampled = sample_views(EVERYTHING, sizes, 0, 0, index, 1)
    assert_equal(sampled, stack_views(views))
    assert per_view(sampled) == views


def test_a_large_seed_and_a_late_epoch_are_sampled_alike() -> None:
    expected = stack_views(
        [sample_view(EVERYTHING, (32, 32), 2**63 - 1, 10**6, i, 0) for i in range(50)]
    )
    assert_equal(
        sample_views(EVERYTHING, np.array((32, 32)), 2**63 - 1, 10**6, np.arange(50), 0), expected
    )


def test_nothing_is_sampled_for_an_empty_batch() -> None:
    views = sample_views(EVERYTHING, np.array((32, 32)), 0, 0, np.arange(0), 0)
    assert all(len(column) == 0 for column in views)
    assert per_view(views) == []


def test_numbers_that_numpy_rejects_are_rejected() -> None:
    """A count of 3 2^30 rejects every fourth word, which crops of images never do.

    The streams also need more words than are made at first.
    """
    index, key = np.arange(40), np.array([5, 6], dtype=np.uint64)
    stream = _Stream(key, index, 1, first=np.zeros(40, dtype=np.int64))
    some = index % 3 > 0  # the other streams take fewer words
    ours = []
    for _ in range(12):
        ours.append(stream.below(np.full(int(some.sum()), 3 * 2**30), some))
        ours.append(stream.permutations(4, some)[:, 0])
        ours.append(stream.random(np.ones(40, dtype=bool))[some])
    for column, i in enumerate(index[some]):
        rng = np.random.Generator(np.random.Philox(key=[5, 6], counter=[0, 1, int(i), 1]))
        expected = [
            x
            for _ in range(12)
            for x in (int(rng.integers(0, 3 * 2**30)), rng.permutation(4)[0], rng.random())
        ]
        assert [row[column] for row in ours] == expected


def test_a_batch_planned_ahead_follows_a_sample_that_turned_bad_meanwhile(tmp_path: Path) -> None:
    sizes = [(20 + 3 * i, 50 - 2 * i) for i in range(12)]
    for i, (height, width) in enumerate(sizes):
        Image.new("RGB", (width, height)).save(tmp_path / f"{i:02}.png")
    source = load_datasets(DataConfig(path=str(tmp_path), holdout=0.0, labels="none")).train
    augments = view_augments(AUGMENTS["cifar10"], 2)
    readers = Readers(1, 10.0)
    planner = BatchPlanner(source, augments, BatchSlice(4), 0, readers)
    for epoch in range(2):  # in the second epoch all sizes are known, and views are sampled ahead
        for step in range(3):
            plan = planner.plan(epoch, step)
            if (epoch, step) == (1, 0):
                spoilt = int(source_order(source, 0, 1)[9])
                planner.skipped[spoilt] = "gone"
            slots = BatchSlice(4).indices(source_order(source, 0, epoch), step)
            assert (plan.samples == slots).all() == ((epoch, step) != (1, 2))
            for view, augment in enumerate(augments):
                assert plan.params[view] == [
                    sample_view(augment, sizes[sample], 0, epoch, int(slot), view)
                    for slot, sample in zip(slots, plan.samples)
                ]
    readers.close()
