"""`sample_view` for a whole batch at once, equal bit for bit.

One call of `sample_view` takes 20 us, mostly in Python. This is too slow for a GPU that
makes 50,000 views a second. Here numpy's random generator runs over arrays: Philox 4x64
(Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), and the conversions
of `numpy.random.Generator` from random words to numbers.
The stream is the same for a batch and for single views. The tests compare the two.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from mocofast.config import AugmentConfig
from mocofast.data.interface import CROP_ATTEMPTS, ViewParams


class Views(NamedTuple):
    """`ViewParams` of n views: the same fields in the same order, as arrays (n,)."""

    top: np.ndarray  # int64, as left, height and width
    left: np.ndarray
    height: np.ndarray
    width: np.ndarray
    angle: np.ndarray  # float64, as all factors and sigma
    order: np.ndarray  # (n, 4) int64; -1 for a view without jitter
    brightness: np.ndarray
    contrast: np.ndarray
    saturation: np.ndarray
    hue: np.ndarray
    gray: np.ndarray  # bool, as solarize and flip
    sigma: np.ndarray
    solarize: np.ndarray
    flip: np.ndarray
    vertical_flip: np.ndarray  # bool
    turns: np.ndarray  # int64, as key
    key: np.ndarray
    noise: np.ndarray  # float64


def per_view(views: Views) -> list[ViewParams]:
    """Returns the parameters view by view."""
    columns = {name: column.tolist() for name, column in zip(Views._fields, views)}
    columns["order"] = [tuple(order) if order[0] >= 0 else () for order in columns["order"]]
    return [ViewParams(*row) for row in zip(*columns.values())]


def sample_views(
    augment: AugmentConfig, sizes: np.ndarray, seed: int, epoch: int, index: np.ndarray, view: int
) -> Views:
    """Returns `sample_view(augment, sizes[i], seed, epoch, index[i], view)` for all i.

    sizes: (n, 2) integers, height and width of the decoded images, or (2,) for images
        of one size.
    index: (n,) integers.
    """
    # The crop: first the sizes of all boxes, then their places.
    key = np.array([seed, epoch], dtype=np.uint64)
    sizes = np.broadcast_to(np.asarray(sizes, dtype=np.int64), (len(index), 2))
    box, used = _random_resized_crops(augment, sizes, key, index, view)
    fits = box[:, 2] > 0
    stream = _Stream(key, index, view, first=used)
    every = np.ones(len(index), dtype=bool)
    box[fits, 0] = stream.below(sizes[fits, 0] - box[fits, 2] + 1, fits)
    box[fits, 1] = stream.below(sizes[fits, 1] - box[fits, 3] + 1, fits)
    box[~fits] = _central_crops(sizes[~fits], *augment.crop_ratio)
    # Rotation.
    n = len(index)
    angle = (
        stream.uniform(-augment.rotate, augment.rotate, every) if augment.rotate else np.zeros(n)
    )
    # Jitter: the order of the operators, and their factors.
    order = np.full((n, 4), -1)
    factors = [np.ones(n), np.ones(n), np.ones(n), np.zeros(n)]
    if any(augment.jitter):
        chosen = stream.random(every) < augment.jitter_p
        order[chosen] = stream.permutations(4, chosen)
        bounds = [(max(0.0, 1 - s), 1 + s) for s in augment.jitter[:3]]
        bounds.append((-augment.jitter[3], augment.jitter[3]))
        for factor, (low, high) in zip(factors, bounds):
            factor[chosen] = stream.uniform(low, high, chosen)
    # Grayscale, blur, solarize and flip.
    gray = stream.random(every) < augment.gray
    blurred = stream.random(every) < augment.blur
    sigma = np.zeros(n)
    sigma[blurred] = stream.uniform(*augment.blur_sigma, blurred)
    solarize = (
        stream.random(every) < augment.solarize if augment.solarize else np.zeros(n, dtype=bool)
    )
    flip = stream.random(every) < augment.flip
    # Vertical flip, turns, noise.
    vertical_flip, turns = np.zeros(n, dtype=bool), np.zeros(n, dtype=np.int64)
    keys, noise = np.zeros(n, dtype=np.int64), np.zeros(n)
    if augment.vertical_flip:
        vertical_flip = stream.random(every) < augment.vertical_flip
    if augment.quarter_turns:
        turned = stream.random(every) < augment.quarter_turns
        turns[turned] = (4 * stream.random(turned)).astype(np.int64)
    if augment.noise or augment.hed or any(augment.channel_jitter):
        keys = 1 + ((2**32 - 1) * stream.random(every)).astype(np.int64)
    if augment.noise:
        noise = stream.uniform(0.0, augment.noise, every)
    colour = (order, *factors, gray)
    late = (vertical_flip, turns, keys, noise)
    return Views._make((*box.T, angle, *colour, sigma, solarize, flip, *late))


def _random_resized_crops(
    augment: AugmentConfig, sizes: np.ndarray, key: np.ndarray, index: np.ndarray, view: int
) -> tuple[np.ndarray, np.ndarray]:
    """Samples the sizes of n crops.

    Returns boxes (n, 4) with height and width set (zeros if no attempt fitted), and
    (n,) the number of random words that every view has used.
    """
    scale, (lowest, highest) = augment.crop_scale, map(math.log, augment.crop_ratio)
    box = np.zeros((len(index), 4), dtype=np.int64)
    used = np.full(len(index), 2 * CROP_ATTEMPTS)
    left = np.arange(len(index))  # views without a crop until now
    for attempt in range(CROP_ATTEMPTS):
        if attempt % 2 == 0:
            words = _philox(key, index[left], view, np.full(len(left), attempt // 2))
        area, ratio = _doubles(words[:, 2 * (attempt % 2) :][:, :2]).T
        area = sizes[left, 0] * sizes[left, 1] * (scale[0] + (scale[1] - scale[0]) * area)
        aspect = np.exp(lowest + (highest - lowest) * ratio)
        width = np.rint(np.sqrt(area * aspect)).astype(np.int64)
        height = np.rint(np.sqrt(area / aspect)).astype(np.int64)
        fits = (width > 0) & (width <= sizes[left, 1]) & (height > 0) & (height <= sizes[left, 0])
        rows = left[fits]
        box[rows, 2], box[rows, 3], used[rows] = height[fits], width[fits], 2 * attempt + 2
        left, words = left[~fits], words[~fits]
        if not len(left):
            break
    return box, used


def _central_crops(sizes: np.ndarray, narrowest: float, widest: float) -> np.ndarray:
    """Returns boxes (n, 4): the largest central crops of an allowed aspect ratio."""
    full_height, full_width = sizes.T
    tall = full_width < narrowest * full_height
    wide = full_width > widest * full_height
    height, width = np.rint(full_width / narrowest), np.rint(full_height * widest)
    height = np.where(tall, height.clip(min=1).astype(np.int64), full_height)
    width = np.where(wide, width.clip(min=1).astype(np.int64), full_width)
    return np.stack(((full_height - height) // 2, (full_width - width) // 2, height, width), axis=1)


class _Stream:
    """numpy.random.Generator over n streams at once.

    In all methods, rows (n,) bool selects the streams that take random numbers. r:
    number of selected rows.
    """

    def __init__(self, key: np.ndarray, index: np.ndarray, view: int, first: np.ndarray) -> None:
        """Starts n streams.

        key: (2,) uint64, seed and epoch.
        index, view: as in `sample_views`.
        first: (n,) even integers, the number of words used already.
        """
        self._key, self._index, self._view, self._block = key, index, view, first // 4
        self._words = self._more(5)  # (n, 20), nearly always enough
        self._next = first % 4
        # The upper halves of words whose lower halves were taken.
        self._half = np.zeros(len(index), dtype=np.uint64)
        self._has_half = np.zeros(len(index), dtype=bool)

    def _more(self, blocks: int) -> np.ndarray:
        """Returns the next words of every stream, (n, 4 * blocks) uint64."""
        block = self._block[:, None] + np.arange(blocks)
        self._block = self._block + blocks
        index = np.repeat(self._index, blocks)
        return _philox(self._key, index, self._view, block.ravel()).reshape(-1, 4 * blocks)

    def _take(self, rows: np.ndarray) -> np.ndarray:
        """Takes a word of every selected stream, (r,) uint64."""
        at = self._next[rows]
        if at.max(initial=0) >= self._words.shape[1]:
            self._words = np.hstack((self._words, self._more(1)))
        self._next[rows] = at + 1
        return self._words[rows, at]

    def random(self, rows: np.ndarray) -> np.ndarray:
        """Samples numbers in [0, 1), (r,) float64."""
        return _doubles(self._take(rows))

    def uniform(self, low: float, high: float, rows: np.ndarray) -> np.ndarray:
        """Samples numbers in [low, high), (r,) float64."""
        return low + (high - low) * self.random(rows)

    def _halves(self, rows: np.ndarray) -> np.ndarray:
        """Takes 32 random bits of every selected stream: the lower half of a new word,
        then the upper half.
        """
        old = self._has_half[rows]
        out = self._half[rows]
        fresh = rows.copy()
        fresh[rows] = ~old
        word = self._take(fresh)
        self._half[fresh] = word >> np.uint64(32)
        self._has_half[rows] = ~old
        out[~old] = word & np.uint64(0xFFFFFFFF)
        return out

    def below(self, count: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Samples integers in [0, count), (r,) int64.

        count: (r,) integers from 1 to 2^32 - 1. A count of 1 takes no random number.

        The method is Lemire 2019, "Fast random integer generation in an interval".
        """
        out = np.zeros(len(count), dtype=np.int64)
        count = count.astype(np.uint64)
        waiting = count > 1
        while waiting.any():
            sampling_rows = rows.copy()
            sampling_rows[rows] = waiting
            product = self._halves(sampling_rows) * count[waiting]
            out[waiting] = (product >> np.uint64(32)).astype(np.int64)
            # 2^32 % count words would make small numbers more likely. They are replaced by
            # new words.
            low = product & np.uint64(0xFFFFFFFF)
            waiting[waiting] = low < np.uint64(2**32) % count[waiting]
        return out

    def permutations(self, size: int, rows: np.ndarray) -> np.ndarray:
        """Samples permutations, (r, size) int64: Fisher and Yates' shuffle from the
        last place down.
        """
        out = np.tile(np.arange(size), (int(rows.sum()), 1))
        every = np.arange(len(out))
        for place in range(size - 1, 0, -1):
            other = self._up_to(place, rows)
            out[every, other], out[:, place] = out[:, place].copy(), out[every, other]
        return out

    def _up_to(self, last: int, rows: np.ndarray) -> np.ndarray:
        """Samples integers in [0, last], (r,) int64, as numpy's shuffle does.

        Takes as many bits as `last` has, and takes new bits for a number above `last`.
        """
        sampling_rows = rows.copy()
        out = np.zeros(len(rows), dtype=np.int64)
        while sampling_rows.any():
            out[sampling_rows] = self._halves(sampling_rows) & np.uint64(2 ** last.bit_length() - 1)
            sampling_rows &= out > last
        return out[rows]


def _doubles(words: np.ndarray) -> np.ndarray:
    """Returns the upper 53 bits of words as numbers in [0, 1)."""
    return (words >> np.uint64(11)) * 2.0**-53


def _philox(key: np.ndarray, index: np.ndarray, view: int, block: np.ndarray) -> np.ndarray:
    """Returns words (n, 4) uint64 of `sample_view`'s generators: Philox 4x64 with 10 rounds.

    block: (n,) integers, the block of every generator, from 0.
    """
    # numpy's generator advances the counter before it makes a block.
    n = len(index)
    c0, c1 = (block + 1).astype(np.uint64), np.ones(n, dtype=np.uint64)
    c2, c3 = index.astype(np.uint64), np.full(n, view, dtype=np.uint64)
    k0, k1 = key
    for _ in range(10):
        high0, low0 = _multiply(0xD2E7470EE14C6C93, c0)
        high1, low1 = _multiply(0xCA5A826395121157, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        with np.errstate(over="ignore"):
            k0, k1 = k0 + np.uint64(0x9E3779B97F4A7C15), k1 + np.uint64(0xBB67AE8584CAA73B)
    return np.stack((c0, c1, c2, c3), axis=1)


def _multiply(constant: int, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the upper and the lower 64 bits of constant * x, from products of 32 bits."""
    half, mask = np.uint64(32), np.uint64(0xFFFFFFFF)
    high, low = np.uint64(constant >> 32), np.uint64(constant & 0xFFFFFFFF)
    upper, lower = x >> half, x & mask
    middle = high * lower
    middle += (low * lower) >> half
    carry = low * upper
    carry += middle & mask
    upper *= high
    upper += middle >> half
    upper += carry >> half
    return upper, np.uint64(constant) * x
