"""Plans of batches: which samples a batch shows, and the parameters of their views,
before decoding.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from mocofast.config import AugmentConfig
from mocofast.data.arrays import PixelFormat
from mocofast.data.deadline import Call, Readers
from mocofast.data.decoding import read_header
from mocofast.data.interface import (
    BatchSlice,
    Source,
    ViewParams,
    first_good,
    no_image_decodes,
    source_order,
    view_sources,
)
from mocofast.data.items import Item, opened
from mocofast.data.probing import accepts
from mocofast.data.ranges import range_of
from mocofast.data.sampling import per_view, sample_views
from mocofast.data.scaled import SCALABLE, scaled_factor, scaled_params
from mocofast.errors import describe_error

# Pixels of the images that are decoded together: 200 MB of RGB. A larger batch is decoded in parts.
DECODED_AT_ONCE = 1 << 26
# Views whose parameters are sampled together: 2 us a view, and 47 us for the views of 16 images
SAMPLED_AT_ONCE = 512
# Bytes of a file that is read once, for its header and its pixels, in the first epoch. The headers
# of SAMPLED_AT_ONCE views are read ahead, so at most 128 MiB are kept.
KEPT_BYTES = 1 << 18

# What a file gives: its content, uint8, or a call that returns the content, or why it is bad.
Read: TypeAlias = "np.ndarray | Call[np.ndarray | str]"


class BatchPlan(NamedTuple):
    """A batch of B images before decoding, or a part of a batch."""

    epoch: int
    step: int
    samples: np.ndarray  # (B,) int64: the samples to decode, after substitution of bad samples
    # The parameters of B views, for every view. Crops are in pixels of the decoded image
    params: list[list[ViewParams]]
    augments: tuple[AugmentConfig, ...]  # the augmentation of every view
    # (B,) for every file of a sample: images are decoded at 1 / factor of their size (`scaled`)
    factors: list[list[int]]
    start: int = 0  # number of the first image in the whole batch
    last: bool = True  # the batch ends with this part

    def rest(self, count: int) -> BatchPlan:
        """Returns the plan without the first `count` images."""
        return self._replace(
            samples=self.samples[count:],
            params=[view[count:] for view in self.params],
            factors=[factors[count:] for factors in self.factors],
            start=self.start + count,
        )

    def first(self, count: int) -> BatchPlan:
        """Returns the plan of the first `count` images, fewer than all."""
        return self._replace(
            samples=self.samples[:count],
            params=[view[:count] for view in self.params],
            factors=[factors[:count] for factors in self.factors],
            last=False,
        )


class BatchPlanner:
    """Plans batches at any position. Reads the header of every image file once, for the
    image's size, and to know whether DALI may decode the file.

    Samples of N pairs of files have 2 N files: all first files, then all second files.
    """

    def __init__(
        self,
        source: Source,
        augments: tuple[AugmentConfig, ...],
        batch_slice: BatchSlice,
        seed: int,
        readers: Readers,
        pixels: PixelFormat | None = None,
        scaled: bool = False,
        note: Callable[[Sequence[int]], None] = lambda samples: None,
    ) -> None:
        """Takes the arguments of `mocofast.data.loaders.build_loader`, and:

        readers: threads that read headers.
        pixels: how images are read that are not 8-bit RGB.
        scaled: data.decode is scaled.
        note: called with the samples whose headers are read next.
        """
        self._pixels, self._scaled, self._note = pixels, scaled, note
        self.steps = batch_slice.steps(len(source))
        self.skipped: dict[int, str] = {}  # bad samples: {index: reason}. Callers may add samples
        self.python_only: set[int] = set()  # samples that DALI is known to refuse
        self.sources = view_sources(source)  # of the files of a sample
        files = len(self.sources) * len(source)
        # (height, width) of the image of every file, 0 if not known yet
        self.sizes = np.zeros((files, 2), dtype=np.int32)
        # True for files that are decoded in Python: DALI reads their kind otherwise, or may end
        # the process. Known where the size is known
        self.in_python = np.zeros(files, dtype=bool)
        self._scalable = np.zeros(files, dtype=bool)  # True for JPEG files
        self._source, self._augments, self._slice = source, augments, batch_slice
        self._seed, self._readers = seed, readers
        self._dali_range = range_of(source).of_type  # DALI knows no other range
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0))  # the last epoch, and its order
        # Views of batches of that epoch that are sampled: {step: (samples, parameters)}
        self._sampled: dict[int, tuple[np.ndarray, list[list[ViewParams]]]] = {}
        self._ahead = 0  # steps of that epoch whose headers are read, or being read
        self._headers: dict[int, Call[None]] = {}  # headers that are being read: {sample: call}
        self._contents: dict[int, bytes] = {}  # of small files, read with their headers

    def plan(self, epoch: int, step: int) -> BatchPlan:
        """Returns the plan of a batch. Raises ValueError if all samples are bad."""
        if self._order[0] != epoch:
            self._order = (epoch, source_order(self._source, self._seed, epoch))
            self._sampled.clear()
            self._contents.clear()
            self._ahead = 0
        slots = self._slice.indices(self._order[1], step)
        self._start_headers(slots)
        for slot in reversed(slots.tolist() if self._headers else []):  # wakes this thread seldom
            self._answer(slot)
        samples = slots
        if not self.skipped.keys().isdisjoint(slots.tolist()):
            samples = np.array([self._shown(slot) for slot in slots.tolist()], dtype=np.int64)
        augments, files = self.augments_at(epoch), self.files(samples)
        sizes = [self.sizes[numbers] for numbers in files]
        params = self._params(epoch, step, slots, samples)
        factors = [[1] * len(samples) for _ in files]
        if self._scaled:
            for first, numbers in enumerate(files):
                own, augments_of = params[first :: len(files)], augments[first :: len(files)]
                for i in np.flatnonzero(self._scalable[numbers]).tolist():
                    size: tuple[int, int] = tuple(sizes[first][i].tolist())
                    factor = scaled_factor([view[i] for view in own], augments_of)
                    factors[first][i] = factor
                    for view in own:
                        view[i] = scaled_params(view[i], size, factor)
        return BatchPlan(epoch, step, samples, params, augments, factors)

    def look_ahead(self, plan: BatchPlan) -> None:
        """Starts to read the headers of the batches after the last plan, whose views are sampled
        together.
        """
        stop = min(plan.step + 1 + self._together(len(plan.samples)), self.steps)
        for step in range(max(self._ahead, plan.step + 1), stop):
            self._start_headers(self._slice.indices(self._order[1], step))
        self._ahead = max(self._ahead, stop)

    def being_read(self) -> np.ndarray:
        """Returns the samples whose headers are being read, (n,) int64."""
        left = [index for index, header in self._headers.items() if not header.done()]
        return np.array(left, dtype=np.int64)

    def _together(self, images: int) -> int:
        """Returns the number of batches of some images whose views are sampled together."""
        return SAMPLED_AT_ONCE // (len(self._augments) * max(1, images))

    def _params(
        self, epoch: int, step: int, slots: np.ndarray, samples: np.ndarray
    ) -> list[list[ViewParams]]:
        """Returns the parameters of B views, for every view.

        slots: (B,) int64, the samples of the order. samples: (B,) int64, the samples to decode.

        Samples the views of the next batches together with those of this batch, as far as all
        sizes are known and no sample is bad: NumPy's calls take most of the time of a batch.
        """
        known = self._sampled.pop(step, None)
        if known is not None and np.array_equal(known[0], samples):
            return known[1]
        batches, shown = [slots], [samples]
        for later in range(step + 1, min(step + self._together(len(slots)), self.steps)):
            own = self._slice.indices(self._order[1], later)
            bad = not self.skipped.keys().isdisjoint(own.tolist())
            if bad or not self._sizes_known(own).all():
                break
            batches.append(own)
            shown.append(own)
        index = np.concatenate(batches)
        sizes = [self.sizes[numbers] for numbers in self.files(np.concatenate(shown))]
        views = [
            per_view(
                sample_views(augment, sizes[view % len(sizes)], self._seed, epoch, index, view)
            )
            for view, augment in enumerate(self.augments_at(epoch))
        ]
        begin = len(slots)
        for later, own in enumerate(shown[1:], step + 1):
            part = slice(begin, begin := begin + len(own))
            self._sampled[later] = own, [view[part] for view in views]
        return [view[: len(slots)] for view in views]

    def files(self, samples: np.ndarray) -> list[np.ndarray]:
        """Returns numbers of files, (B,) int64 for every file of a sample. samples: (B,) int64."""
        return [samples + part * len(self._source) for part in range(len(self.sources))]

    def sample_of(self, file: int) -> int:
        """Returns the sample of a file."""
        return file % len(self._source)

    def load(self, file: int) -> str | bytes | np.ndarray | Item:
        """Returns what `Source.load` returns for a file."""
        part, sample = divmod(file, len(self._source))
        return self.sources[part].load(sample)

    def start_reads(
        self, read: Callable[[int, int], np.ndarray | str], files: list[tuple[int, int]]
    ) -> list[Read]:
        """Returns the contents that came with headers, and calls of `read` for all other files.

        files: numbers, and the factors of `BatchPlan`.
        """
        reads: list[Any] = [self.take(file) for file, _ in files]
        missing = [i for i, (_, factor) in enumerate(files) if factor > 1 or reads[i] is None]
        calls = self._readers.submit_all(read, [files[i] for i in missing])
        for i, call in zip(missing, calls):
            reads[i] = call
        return reads

    def take(self, file: int) -> np.ndarray | None:
        """Returns the content that was read with the header of a file, uint8, once. Then None."""
        content = self._contents.pop(file, None)
        return None if content is None else np.frombuffer(content, np.uint8)

    def augments_at(self, epoch: int) -> tuple[AugmentConfig, ...]:
        """Returns the augmentation of every view in an epoch."""
        return tuple(augment.at(epoch) for augment in self._augments)

    def after(self, epoch: int, step: int) -> tuple[int, int]:
        """Returns the (epoch, step) of the next batch."""
        return (epoch, step + 1) if step + 1 < self.steps else (epoch + 1, 0)

    def _shown(self, slot: int) -> int:
        shown = first_good(slot, len(self._source), self._is_good)
        if shown is None:
            raise no_image_decodes(self._source, self.skipped)
        return shown

    def parts(self, plan: BatchPlan) -> tuple[BatchPlan, BatchPlan | None]:
        """Returns the images of a plan that are decoded first, together, and the rest of the plan.

        The first part has at least one image, and at most DECODED_AT_ONCE pixels beside it.
        """
        files = zip(self.files(plan.samples), plan.factors)
        pixels = np.sum(
            [self.sizes[n].astype(np.int64).prod(1) // np.square(f) for n, f in files], axis=0
        )
        if pixels.sum() <= DECODED_AT_ONCE:
            return plan, None
        count = max(1, int(np.searchsorted(pixels.cumsum(), DECODED_AT_ONCE, side="right")))
        return (plan, None) if count == len(pixels) else (plan.first(count), plan.rest(count))

    def _sizes_known(self, samples: np.ndarray) -> np.ndarray:
        """Returns (B,) bool: the sizes of all files of a sample are known."""
        return np.all([self.sizes[numbers, 0] > 0 for numbers in self.files(samples)], axis=0)

    def _is_good(self, index: int) -> bool:
        """Returns False for a bad sample, also for a file that cannot be read in time."""
        self._start_headers(np.array([index]))
        self._answer(index)
        return index not in self.skipped

    def _start_headers(self, samples: np.ndarray) -> None:
        """Starts to read the headers of new samples. samples: (n,) int64."""
        unknown = samples[~self._sizes_known(samples)].tolist()
        new = [
            i for i in dict.fromkeys(unknown) if i not in self._headers and i not in self.skipped
        ]
        if new:
            self._note(new)
            calls = self._readers.submit_all(self._read_headers, [(index,) for index in new])
            self._headers.update(zip(new, calls))

    def _answer(self, index: int) -> None:
        """Waits for the headers of a sample, at most as long as the readers wait."""
        if (header := self._headers.pop(index, None)) is None:
            return
        try:
            self._readers.result(header)
        except TimeoutError as error:
            self.skipped[index] = describe_error(error)

    def _read_headers(self, index: int) -> None:
        """Notes the sizes of a new sample and who decodes the files, or why the sample is bad."""
        for file in range(index, len(self.sizes), len(self._source)):
            item = self.load(file)
            try:
                self._read_header(file, item)
            except Exception as error:  # PIL raises nearly any exception on corrupt headers
                self.skipped[index] = describe_error(error)
                return

    def _read_header(self, file: int, item: str | bytes | np.ndarray | Item) -> None:
        if isinstance(item, np.ndarray):
            self.sizes[file] = item.shape[:2]
            return
        if self._pixels is not None:
            self.sizes[file] = self._pixels.size(item)
            return
        content = small_content(item)
        try:
            header = read_header(content)
        except Exception:
            if content is item:
                raise
            header = read_header(item)  # the error names the file
        by_dali = self._dali_range and self.sample_of(file) not in self.python_only
        self.in_python[file] = not (by_dali and accepts(content, header))
        is_file = isinstance(item, (str, bytes))
        self._scalable[file] = is_file and header.format in SCALABLE
        if isinstance(content, bytes) and len(content) <= KEPT_BYTES and not self.in_python[file]:
            self._contents[file] = content
        self.sizes[file] = header.height, header.width


def small_content(file: str | bytes | Item) -> str | bytes | Item:
    """Returns the content of a path's file of up to KEPT_BYTES, and every other item as it is.

    Raises OSError.
    """
    if not isinstance(file, str):
        return file
    with opened(file) as content:
        small = os.fstat(content.fileno()).st_size <= KEPT_BYTES
        return content.read() if small else file
