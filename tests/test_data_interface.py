"""The order of samples, the ranks' slices of a batch, and the random parameters of views."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
import torch
from scipy import stats
from torchvision.transforms import v2

from mocofast.config import AugmentConfig
from mocofast.data.interface import (
    BatchSlice,
    ViewParams,
    epoch_order,
    first_good,
    sample_view,
    view_augments,
)

V2 = AugmentConfig(jitter=(0.4, 0.4, 0.4, 0.1), jitter_p=0.8, gray_first=False, blur=0.5)
COUNT = (
    4000  # views per test. Enough to distinguish distributions that differ by .05 in probability
)
LEVEL = (
    1e-4  # with about 80 tests, one in 125 seeds would fail a test by chance. The seeds are fixed
)


def sampled(
    augment: AugmentConfig, size: tuple[int, int] = (375, 500), count: int = COUNT
) -> list[ViewParams]:
    return [sample_view(augment, size, seed=3, epoch=2, index=i, view=i % 2) for i in range(count)]


def torchvisions(
    transform: v2.Transform, size: tuple[int, int] = (375, 500), count: int = COUNT
) -> list[dict]:
    image = torch.empty(3, *size, dtype=torch.uint8)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        return [transform.make_params([image]) for _ in range(count)]


def assert_same_distribution(ours: list[float], theirs: list[float]) -> None:
    assert stats.ks_2samp(ours, theirs).pvalue > LEVEL


def assert_frequency(hits: int, probability: float, count: int = COUNT) -> None:
    assert stats.binomtest(hits, count, probability).pvalue > LEVEL


# One, the smallest number that can be shuffled, a prime, a round number.
@pytest.mark.parametrize("count", [1, 2, 97, 1000])
def test_every_epoch_is_a_permutation(count: int) -> None:
    for epoch in range(3):
        assert sorted(epoch_order(count, 7, epoch)) == list(range(count))


def test_every_epoch_is_shuffled_anew_the_first_included() -> None:
    orders = [epoch_order(97, seed, epoch).tolist() for seed in (0, 1) for epoch in range(4)]
    assert list(range(97)) not in orders
    assert len({tuple(order) for order in orders}) == len(orders)


def test_the_order_depends_on_seed_and_epoch_alone() -> None:
    first = epoch_order(97, 5, 3)
    np.random.seed(0)  # noqa: NPY002
    assert np.array_equal(first, epoch_order(97, 5, 3))


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("drop_last", [True, False])
def test_the_slices_of_all_ranks_make_the_batch_of_one_rank(
    world_size: int, drop_last: bool
) -> None:
    batch = 12
    # 97: the last batch holds 1 image, too few for 2 or 3 ranks.
    # 101: the last batch holds 5, and the remainder is dropped so that ranks stay equal.
    for count in (97, 97 + 4):
        order = epoch_order(count, 0, 0)
        whole = BatchSlice(batch, 0, 1, drop_last)
        ranks = [BatchSlice(batch, rank, world_size, drop_last) for rank in range(world_size)]
        assert len({batch_slice.steps(count) for batch_slice in ranks}) == 1
        for step in range(ranks[0].steps(count)):
            parts = [batch_slice.indices(order, step) for batch_slice in ranks]
            together = np.concatenate(parts)
            assert len({len(part) for part in parts}) == 1
            assert np.array_equal(together, whole.indices(order, step)[: len(together)])
            assert len(together) > 0
        full_steps = count // batch
        assert ranks[0].steps(count) - full_steps == int(
            not drop_last and count % batch >= world_size
        )


def test_an_impossible_slice_is_refused_with_the_numbers() -> None:
    with pytest.raises(ValueError, match=r"data\.batch_size .* got 10 on 3 ranks"):
        BatchSlice(10, 0, 3)
    with pytest.raises(ValueError, match=r"got 10, and 9 images"):
        BatchSlice(10).steps(9)


def test_a_slot_is_filled_by_the_next_good_sample_modulo_their_number() -> None:
    asked: list[int] = []

    def is_good(index: int) -> bool:
        asked.append(index)
        return index in (1, 3)

    assert [first_good(slot, 5, is_good) for slot in range(5)] == [1, 1, 3, 3, 1]
    assert asked == [0, 1, 1, 2, 3, 3, 4, 0, 1]  # nobody decodes more than needed
    assert first_good(2, 5, lambda index: False) is None


@pytest.mark.parametrize(
    "size",
    [
        (375, 500),  # a photo
        (8, 8),  # a digit: pixels are coarse, rounding matters
        (60, 400),  # wide: crops often do not fit, and the central crop is taken
        (400, 60),
        (1, 1),
    ],
)
@pytest.mark.parametrize("scale", [(0.2, 1.0), (0.08, 1.0)])
def test_crops_are_distributed_as_torchvisions(
    size: tuple[int, int], scale: tuple[float, float]
) -> None:
    ours = sampled(AugmentConfig(crop_scale=scale), size)
    theirs = torchvisions(v2.RandomResizedCrop(8, scale=scale), size)
    for field in ("top", "left", "height", "width"):
        assert_same_distribution([getattr(p, field) for p in ours], [p[field] for p in theirs])
    assert_same_distribution(
        [p.height / p.width for p in ours], [p["height"] / p["width"] for p in theirs]
    )
    assert_same_distribution(
        [p.height * p.width for p in ours], [p["height"] * p["width"] for p in theirs]
    )
    for p in ours:
        assert p.height > 0
        assert p.width > 0
        assert p.top >= 0
        assert p.left >= 0
        assert p.top + p.height <= size[0]
        assert p.left + p.width <= size[1]


def test_jitter_is_distributed_as_torchvisions() -> None:
    strengths = (0.4, 0.3, 1.5, 0.1)  # all different. 1.5: the factor must not become negative
    ours = [p for p in sampled(replace(V2, jitter=strengths)) if p.order]
    theirs = torchvisions(v2.ColorJitter(*strengths))
    for name in ("brightness", "contrast", "saturation", "hue"):
        assert_same_distribution(
            [getattr(p, name) for p in ours], [p[f"{name}_factor"] for p in theirs]
        )
    orders = Counter(p.order for p in ours)
    assert set(orders) == set(permutations(range(4)))
    assert stats.chisquare(list(orders.values())).pvalue > LEVEL


def test_blur_and_rotation_are_distributed_as_torchvisions() -> None:
    ours = sampled(replace(V2, rotate=15.0))
    blur = torchvisions(v2.GaussianBlur(23, sigma=(0.1, 2.0)))
    assert_same_distribution([p.sigma for p in ours if p.sigma], [p["sigma"][0] for p in blur])
    rotation = torchvisions(v2.RandomRotation(15.0))
    assert_same_distribution([p.angle for p in ours], [p["angle"] for p in rotation])


def test_each_operation_happens_as_often_as_asked_and_independently() -> None:
    ours = sampled(replace(V2, solarize=0.3))
    happens = {
        "jitter": (0.8, [bool(p.order) for p in ours]),
        "gray": (0.2, [p.gray for p in ours]),
        "blur": (0.5, [p.sigma > 0 for p in ours]),
        "solarize": (0.3, [p.solarize for p in ours]),
        "flip": (0.5, [p.flip for p in ours]),
    }
    for probability, hits in happens.values():
        assert_frequency(sum(hits), probability)
    names = list(happens)
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            both = sum(x and y for x, y in zip(happens[a][1], happens[b][1]))
            assert_frequency(both, happens[a][0] * happens[b][0])


def test_what_is_switched_off_never_happens() -> None:
    still = AugmentConfig(jitter=(0, 0, 0, 0), gray=0, blur=0, flip=0, rotate=0)
    for p in sampled(still, count=200):
        assert p[4:14] == (0.0, (), 1.0, 1.0, 1.0, 0.0, False, 0.0, False, False)
        assert not any(p[14:])  # operators for images that are no photos


def test_solarize_switched_off_takes_no_random_number_so_that_old_streams_stay() -> None:
    for with_it, without in zip(
        sampled(replace(V2, solarize=0.5, flip=0.0), count=50), sampled(V2, count=50)
    ):
        assert with_it[:12] == without[:12]
    # The flip is sampled next. These are the flips from before solarize existed.
    assert "".join(str(int(p.flip)) for p in sampled(V2, count=16)) == "1101100111010010"


def test_the_second_view_has_probabilities_of_its_own_where_they_are_given() -> None:
    same = view_augments(V2, 3)
    assert same == (V2, V2, V2)
    augment = replace(V2, blur=1.0, blur_2=0.1, solarize_2=0.2)
    first, second = view_augments(augment, 2)
    assert first == augment
    assert (second.blur, second.solarize) == (0.1, 0.2)
    assert replace(second, blur=1.0, solarize=0.0) == augment
    assert view_augments(replace(augment, blur_2=0.0), 2)[1].blur == 0.0


def test_views_differ_by_seed_epoch_sample_and_view_and_repeat_otherwise() -> None:
    def angle(*key: int) -> float:
        return sample_view(replace(V2, rotate=90.0), (375, 500), *key).angle

    keys = [(s, e, i, v) for s in (0, 1) for e in (0, 1) for i in (0, 1) for v in (0, 1)]
    assert len({angle(*key) for key in keys}) == len(keys)
    assert [angle(*key) for key in reversed(keys)] == [angle(*key) for key in keys][::-1]


def test_the_two_views_of_a_sample_are_independent() -> None:
    pairs = [[sample_view(V2, (375, 500), 0, 0, i, view) for view in (0, 1)] for i in range(COUNT)]
    left, right = ([pair[view].left / pair[view].width for pair in pairs] for view in (0, 1))
    assert stats.spearmanr(left, right).pvalue > LEVEL
    assert_frequency(sum(a.flip == b.flip for a, b in pairs), 0.5)
