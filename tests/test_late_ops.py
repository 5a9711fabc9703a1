"""Noise and jitter of stains are float64's to rounding, compiled and in PyTorch."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from mocofast.config import AugmentConfig
from mocofast.data import random_numbers, stains, view_ops
from mocofast.data.photometric import compiled
from tests.pictures import neutral

FACTORS = (0x7FEB352D, 0x846CA68B)  # of the hash


def test_the_hash_is_lowbias32_of_unsigned_words() -> None:
    words = np.random.default_rng(0).integers(0, 2**32, 1000, dtype=np.uint32)
    expected = words.astype(np.uint64)
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B), (16, 1)):
        expected ^= expected >> np.uint64(shift)
        expected = expected * np.uint64(factor) & np.uint64(2**32 - 1)
    got = random_numbers.hash_words_(torch.from_numpy(words.view(np.int32).copy()))
    assert np.array_equal(got.numpy().view(np.uint32), expected.astype(np.uint32))


def test_noise_is_normal_with_the_deviation_of_the_view() -> None:
    x = torch.full((3, 13, 64, 64), 30000.0)
    params = [neutral(64)._replace(key=k, noise=n) for k, n in ((1, 0.02), (2, 0.05), (3, 0.0))]
    view_ops.apply_late_ops(x, params, AugmentConfig(noise=0.1), 65535)
    noise = (x - 30000).double() / 65535
    for image, sigma in zip(noise[:2], (0.02, 0.05)):
        assert image.std().item() == pytest.approx(sigma, rel=0.02)
        assert abs(image.mean().item()) < 0.02 * sigma
        assert (image.abs() < sigma).double().mean().item() == pytest.approx(0.6827, abs=0.01)
        flat = image.flatten()
        assert abs(torch.corrcoef(torch.stack((flat[1:], flat[:-1])))[0, 1]) < 0.02
    assert abs(torch.corrcoef(noise[:2].flatten(1))[0, 1]) < 0.02
    assert not noise[2].any()


def test_stains_are_jittered_as_optical_densities_in_float64() -> None:
    densities = np.random.default_rng(0).uniform(0, 0.8, (2, 5, 7, 3))  # haematoxylin, eosin, DAB
    matrix = np.array(stains.STAINS)
    slides = 65535 * 10 ** -(densities @ matrix)
    factor = np.array([[1.1, 0.9, 1.0], [1, 1, 1]])
    offset = np.array([[0, 0.05, -0.05], [0, 0, 0]])
    changed = densities * factor[:, None, None] + offset[:, None, None]
    expected = 65535 * 10 ** -(changed @ matrix)
    x = torch.from_numpy(slides).permute(0, 3, 1, 2).float().contiguous()
    jitter = (torch.from_numpy(factor).float(), torch.from_numpy(offset).float())
    stains.jitter_stains_(x, *jitter, 65535)
    got = x.permute(0, 2, 3, 1).double().numpy()
    assert np.abs(got - expected.clip(0, 65535)).max() <= 1


def unhashed(word: int) -> int:
    """Returns the word whose hash is `word`."""
    second, first = (pow(factor, -1, 2**32) for factor in reversed(FACTORS))
    word ^= word >> 16
    word = word * second % 2**32
    word ^= word >> 15 ^ word >> 30
    word = word * first % 2**32
    return word ^ word >> 16


def key_of(word: int, stream: int, place: int) -> int:
    """Returns the key that has this word at a place of a stream."""
    return (unhashed(unhashed(word) ^ place) - stream) % 2**32


def words_of(key: int, stream: int, count: int) -> np.ndarray:
    """Returns the upper 24 bits of the words of a stream, in float64."""
    keys = torch.tensor([key]).to(torch.uint32).view(torch.int32)
    words = random_numbers.hash_places(keys, stream, count)[0].numpy()
    return (words.view(np.uint32) >> 8).astype(np.float64)


def normal_numbers(key: int, count: int) -> tuple[Tensor, np.ndarray]:
    """Returns normal numbers of streams 2 and 3, and the transform of Box and Muller in float64."""
    half = (count + 1) // 2
    radius = np.sqrt(-2 * np.log1p(-words_of(key, 2, half) / 2**24))
    angle = 2 * math.pi * words_of(key, 3, half) / 2**24
    expected = np.concatenate((radius * np.cos(angle), radius * np.sin(angle)))[:count]
    keys = torch.tensor([key]).to(torch.uint32).view(torch.int32)
    return random_numbers.normal_numbers(keys, 2, count)[0], expected


@pytest.mark.parametrize("count", [1, 2, 7, 200_001])
def test_normal_numbers_are_box_and_mullers_in_float64(count: int) -> None:
    got, expected = normal_numbers(123, count)
    # Multiples of the angle, exact in float32, lose no digits near the roots of sine and cosine.
    np.testing.assert_allclose(got.double().numpy(), expected, rtol=5e-7, atol=1e-15)


# The least and the largest radius, angles of whole quarters of a turn, and their neighbours
EDGES = [0, 0xFFFFFFFF, *(q << 30 for q in (1, 2, 3)), *((q << 30) - 256 for q in (1, 2, 3)), 256]


@pytest.mark.parametrize("stream", [2, 3])
@pytest.mark.parametrize("word", EDGES)
def test_normal_numbers_of_extreme_words(word: int, stream: int) -> None:
    key = key_of(word, stream, 3)
    assert words_of(key, stream, 5)[3] == word >> 8
    got, expected = normal_numbers(key, 9)
    np.testing.assert_allclose(got.double().numpy(), expected, rtol=5e-7, atol=2e-15)
    crops = torch.full((1, 3, 3, 1), 30000, dtype=torch.uint16)
    assert_compiled_equals(crops, AugmentConfig(noise=0.3), [key])


def test_powers_are_those_of_float64() -> None:
    x = torch.linspace(-30, 0, 100_001)
    got = stains.power_of_two_(x.clone())
    np.testing.assert_allclose(got.double().numpy(), 2 ** x.double().numpy(), rtol=2.5e-7)
    whole = torch.arange(-30.0, 1.0)
    assert torch.equal(stains.power_of_two_(whole.clone()), torch.exp2(whole))


@pytest.mark.parametrize("top", [255, 65535])
def test_stains_without_a_change_keep_every_level(top: int) -> None:
    levels = torch.arange(top + 1).float()
    x = torch.stack((levels, levels.flip(0), levels.roll(9))).view(1, 3, 1, -1).contiguous()
    got = x.clone()
    stains.jitter_stains_(got, torch.ones(1, 3), torch.zeros(1, 3), top)
    assert torch.equal(got[x > 0], x[x > 0])
    assert got[x == 0].max() <= 1  # black counts as half a level


@pytest.mark.parametrize(("top", "share"), [(255, 1e-4), (65535, 0.01)])
def test_jittered_stains_are_rounded_as_in_float64(top: int, share: float) -> None:
    """Values near a half may be rounded up for down, more often with finer levels."""
    rng = np.random.default_rng(1)
    levels = rng.integers(0, top + 1, (1, 3, 200, 200))
    factor, offset = rng.uniform(0.8, 1.2, 3), rng.uniform(-0.2, 0.2, 3)
    matrix = np.array(stains.STAINS)
    densities = -np.log10(np.maximum(levels, 0.5) / top)[0].reshape(3, -1)
    amounts = np.linalg.inv(matrix).T @ densities * factor[:, None] + offset[:, None]
    expected = np.rint(np.clip(top * 10 ** -(matrix.T @ amounts), 0, top))
    x = torch.from_numpy(levels).float()
    jitter = (torch.from_numpy(values).float()[None] for values in (factor, offset))
    stains.jitter_stains_(x, *jitter, top)
    error = np.abs(x.numpy().reshape(3, -1) - expected)
    assert error.max() <= 1
    assert np.mean(error > 0) < share


def assert_compiled_equals(crops: Tensor, augment: AugmentConfig, keys: list[int]) -> None:
    """Compares compiled views with PyTorch's. keys: of the views."""
    operators, reason = compiled()
    if operators is None:
        pytest.skip(reason)
    params = [neutral(3)._replace(key=key, noise=augment.noise) for key in keys]
    expected = torch.empty_like(crops)
    view_ops.apply_view_ops(crops, params, augment, expected)
    got = crops.clone()
    operators.make(got, params, augment, got)
    assert np.array_equal(got.numpy(), expected.numpy())
