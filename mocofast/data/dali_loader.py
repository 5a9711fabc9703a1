"""The DALI loader: DALI decodes every file once. On a GPU it also cuts a crop for every view.

`view_ops` makes the views from the crops. On a CPU `resize` cuts the crops: PyTorch's operator,
compiled, equals PIL's to 1 of 255 and takes less time than DALI's. `sample_view`
gives every random parameter, so the loader has no random state: to resume is to start
at (epoch, step). A thread works ahead of the training loop.

Files of kinds that DALI reads otherwise than PIL, or refuses, are decoded in Python
(`decoding.decode`) and go through DALI as PPM, without loss.

DALI raises for a whole batch if a file of the batch cannot be decoded. The error does
not name the file, and the pipeline cannot be used again. The loader then decodes the
files of the unfinished batches one by one, records the bad files in `skipped`, builds a
new pipeline and continues at the same step. The views of the other samples stay equal
bit for bit.

Damaged entropy data of JPEG files decode to garbage without an error. PIL mostly warns.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from mocofast_kernels.cpu_threads import compute_alone
from nvidia.dali import Pipeline
from torch import Tensor

from mocofast.config import AugmentConfig, DataConfig
from mocofast.data.arrays import PixelFormat
from mocofast.data.crops import views_from_crops, views_from_images
from mocofast.data.dali_pipeline import decode_and_crop
from mocofast.data.deadline import Readers
from mocofast.data.interface import Batch, BatchSlice, Source, labels_of, read_seconds
from mocofast.data.items import Item, content_of
from mocofast.data.journal import Journal
from mocofast.data.planning import BatchPlan, BatchPlanner, Read
from mocofast.data.probing import decode_to_ppm, to_ppm, undecodable, unlike_header
from mocofast.data.producer import Producer
from mocofast.data.ranges import range_of
from mocofast.data.scaled import decode_scaled
from mocofast.errors import describe_error


class DaliLoader:
    """A `mocofast.data.interface.Loader`. The module's docstring describes the handling
    of bad files.

    All images look as `decoding.decode` returns them, to 1 of 255. A jump to any position
    but the next starts a new pipeline, and on a GPU another size of the views, too.
    """

    name = "dali"

    def __init__(
        self,
        source: Source,
        augments: tuple[AugmentConfig, ...],
        batch_slice: BatchSlice,
        seed: int,
        device: torch.device,
        workers: int,
        data: DataConfig | None = None,
        pixels: PixelFormat | None = None,
    ) -> None:
        """Takes the arguments of `mocofast.data.loaders.build_loader`, and:

        workers: number of DALI's threads. On a CPU as many threads more make the views.
        data: of these options `prefetch`, `decode`, `hw_decoder_load` and `preallocate` are used.
        pixels: how images are read that are not 8-bit RGB. DALI does not decode these images.
        """
        self.reason = ""
        data = data or DataConfig()
        batches = _Batches(source, augments, batch_slice, seed, device, workers, data, pixels)
        self.steps_per_epoch = batches.planner.steps
        self.skipped = batches.planner.skipped
        self._device, self._batches = device, batches
        self._producer = Producer(batches, data.prefetch)
        # (epoch, step) of the producer's next batch. None if unknown
        self._position: tuple[int, int] | None = None
        self._after = batches.planner.after
        self._iteration = 0
        # Called at the latest when the interpreter exits: a thread inside DALI must have
        # ended by then.
        self.close = weakref.finalize(self, self._producer.close)

    def keep_journal(self, path: Path) -> None:
        """Keeps a `Journal` of the samples that are being decoded, until `close`."""
        self._batches.journal = Journal(path, self._batches.source.fingerprint())

    def decode_in_python(self, samples: Iterable[int]) -> None:
        """Keeps samples from DALI's decoders. Call it before the first epoch."""
        self._batches.planner.python_only.update(samples)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Yields the batches of steps start .. steps_per_epoch - 1. Ends the iterator
        of the call before.

        The producer starts at once, not with the first batch asked for.
        """
        position = (epoch, start) if start < self.steps_per_epoch else (epoch + 1, 0)
        if position != self._position:
            self._producer.start(*position)
            self._position = position
        self._iteration += 1
        return self._iterate(self._iteration, epoch, start)

    def _iterate(self, iteration: int, epoch: int, start: int) -> Iterator[Batch]:
        for step in range(start, self.steps_per_epoch):
            if iteration != self._iteration:
                return
            self._position = None  # stays unknown if an exception comes
            batch = self._producer.get()
            self._position = self._after(epoch, step)
            for view in batch.views:
                # Another stream made the view. Its memory must not be reused before the current
                # stream has read the view.
                if view.is_cuda:
                    view.record_stream(torch.cuda.current_stream(self._device))
            yield batch


class _Batches:
    """Makes batches in order, from any position. Only one thread at a time may call `next`."""

    def __init__(
        self,
        source: Source,
        augments: tuple[AugmentConfig, ...],
        batch_slice: BatchSlice,
        seed: int,
        device: torch.device,
        workers: int,
        data: DataConfig,
        pixels: PixelFormat | None,
    ) -> None:
        self.source, self._data = source, data
        self.journal: Journal | None = None
        self._batch_size, self._threads = batch_slice.per_rank, max(1, workers)
        self._pixels = pixels
        self._in_memory = pixels is not None or isinstance(source.load(0), np.ndarray)
        self._range = range_of(source)
        self._pool = ThreadPoolExecutor(self._threads, "mocofast-views", compute_alone)
        # Other threads than the makers of views, for which reading would wait.
        self._readers = Readers(self._threads, read_seconds(source), "mocofast-read")
        scaled = data.decode == "scaled"
        self.planner = BatchPlanner(
            source, augments, batch_slice, seed, self._readers, pixels, scaled, self._note
        )
        # The next batch to decode, whose files are being read
        self._ahead: tuple[BatchPlan, list[list[Read]]] | None = None
        self._pipeline: Pipeline | None = None
        # (height, width) of the crops that the pipeline makes on a GPU, for every view
        self._sizes: list[tuple[int, int]] = []
        self._rest: BatchPlan | None = None  # of the batch whose first parts are planned
        # Plans of the batches inside DALI, oldest first
        self._unfinished: deque[BatchPlan] = deque()
        self._next_out = (0, 0)  # (epoch, step) of the next batch that `next` returns
        self._next_plan = (0, 0)  # (epoch, step) of the next batch to plan
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def seek(self, epoch: int, step: int) -> None:
        """Sets the position of the next batch."""
        self._next_out = (epoch, step)
        # A new pipeline is ready sooner than the unfinished batches of the old pipeline.
        self._forget_pipeline()

    def next(self) -> Batch:
        """Returns the next batch. Raises ValueError if no sample of the source can be decoded."""
        parts: list[tuple[Tensor, ...]] = []  # the views of every part
        shown: list[np.ndarray] = []
        while True:
            try:
                plan, outputs = self._run_pipeline()
            except BaseException:
                self._forget_pipeline()
                raise
            if plan.start == 0:  # the first part, or the batch begins again after an error
                parts, shown = [], []
            parts.append(self._views(plan, outputs))
            shown.append(plan.samples)
            if plan.last:
                break
        with torch.cuda.stream(self._stream):  # no effect on a CPU
            views = parts[0] if len(parts) == 1 else tuple(map(torch.cat, zip(*parts)))
        if self._stream is not None:
            # The training may use another stream. Also, the images may lie in memory of DALI,
            # which DALI uses again as soon as they go out of scope.
            self._stream.synchronize()
        self._next_out = self.planner.after(plan.epoch, plan.step)
        index = torch.from_numpy(np.concatenate(shown))
        return Batch(views, index, labels_of(self.source, index))

    def _views(self, plan: BatchPlan, outputs: tuple[Any, ...]) -> tuple[Tensor, ...]:
        """Returns the views of the images of a plan. outputs: DALI's."""
        if self._stream is None:
            numbers = range(len(plan.samples))
            files = [
                [torch.from_numpy(np.asarray(output[i])) for i in numbers] for output in outputs
            ]
            started = [
                views_from_images(
                    files[view % len(files)], params, augment, self._pool, self._threads
                )
                for view, (params, augment) in enumerate(zip(plan.params, plan.augments))
            ]
            for _, calls in started:
                for call in calls:
                    call.result()
            return tuple(views for views, _ in started)
        crops = (torch.from_dlpack(output.as_tensor()) for output in outputs)
        with torch.cuda.stream(self._stream):
            views = tuple(map(views_from_crops, crops, plan.params, plan.augments))
        if not plan.last or plan.start:
            self._stream.synchronize()  # before the images go out of scope
        return views

    def close(self) -> None:
        """Ends the threads and the pipeline."""
        self._readers.close()
        self._pool.shutdown(cancel_futures=True)
        self._forget_pipeline()
        if self.journal is not None:
            self.journal.close()

    # DALI

    def _run_pipeline(self) -> tuple[BatchPlan, tuple[Any, ...]]:
        """Returns the next plan and DALI's outputs. Replaces bad samples until all decode."""
        augments = self.planner.augments_at(self._next_out[0])
        if self._stream is not None and (sizes := [a.shape for a in augments]) != self._sizes:
            self._forget_pipeline()  # its crops have the size of the epoch before
            self._sizes = sizes
        while True:
            if self._pipeline is None:
                self._next_plan = self._next_out
                self._pipeline = self._build(augments)
            try:
                outputs = self._pipeline.run()  # waits for the host, so any stream may read
            except RuntimeError:
                suspects = list(self._unfinished)
                self._forget_pipeline()
                if not self._find_bad(suspects):
                    raise
                continue
            # On a GPU, DALI's slice has raised already for a crop outside of its image.
            if self._stream is None and self._find_unlike_header([o.shape() for o in outputs]):
                self._forget_pipeline()
                continue
            return self._unfinished.popleft(), outputs

    def _build(self, augments: tuple[AugmentConfig, ...]) -> Pipeline:
        pipeline = decode_and_crop(
            self._feed,
            augments,
            self._stream is not None,
            np.ndarray if self._in_memory else bytes,
            self._data,
            len(self.planner.sources),
            batch_size=self._batch_size,
            num_threads=self._threads,
            device_id=self._stream.device_index if self._stream is not None else None,
            prefetch_queue_depth=self._data.prefetch,
            exec_dynamic=True,
        )
        pipeline.build()
        return pipeline

    def _forget_pipeline(self) -> None:
        self._pipeline = self._ahead = self._rest = None
        self._unfinished.clear()

    def _feed(self) -> list[Any]:
        """Returns the input of the next batch. DALI calls it when there is room for a batch."""
        while True:
            plan, reads = self._ahead or self._read_next()
            self._ahead = None
            # The last first: a thread that waits is woken once.
            items = [[self._result(read) for read in reversed(file)][::-1] for file in reads]
            found = [pair for file in items for pair in zip(plan.samples.tolist(), file)]
            bad = {i: item for i, item in found if isinstance(item, str)}
            if not bad:
                break
            self.planner.skipped.update(bad)
            self._rest = self.planner.plan(plan.epoch, plan.step).rest(plan.start)
        self._unfinished.append(plan)
        self._ahead = self._read_next()
        fed: list[Any] = items
        if self._stream is not None:
            for params in plan.params:
                fed.append(np.array([(p.top, p.left) for p in params], dtype=np.int32))
                fed.append(np.array([(p.height, p.width) for p in params], dtype=np.int32))
        return fed

    def _read_next(self) -> tuple[BatchPlan, list[list[Read]]]:
        """Plans the next batch, or the next part of a large batch, and starts to read its files."""
        plan, self._rest = self.planner.parts(self._rest or self.planner.plan(*self._next_plan))
        self._next_plan = (plan.epoch, plan.step)
        if plan.last:
            self._next_plan = self.planner.after(plan.epoch, plan.step)
        self._note(plan.samples)
        reads = [
            self.planner.start_reads(self._item, list(zip(files.tolist(), factors)))
            for files, factors in zip(self.planner.files(plan.samples), plan.factors)
        ]
        self.planner.look_ahead(plan)  # after the reads, which come first
        return plan, reads

    def _note(self, samples: Sequence[int] | np.ndarray) -> None:
        """Notes samples in the journal, beside those inside DALI."""
        if self.journal is not None:
            begun = [plan.samples for plan in self._unfinished] + [self.planner.being_read()]
            self.journal.note([*begun, np.asarray(samples, np.int64)])

    def _result(self, read: Read) -> np.ndarray | str:
        """Returns the content of a file, or why it does not come in time."""
        try:
            return read if isinstance(read, np.ndarray) else self._readers.result(read)
        except TimeoutError as error:
            return describe_error(error)

    def _item(self, file: int, factor: int = 1, in_python: bool = False) -> np.ndarray | str:
        """Returns pixels, the content of a file as uint8, or why the file is bad.

        file: number of `BatchPlanner.files`.
        factor: the image is decoded at 1 / factor of its size, in Python unless the factor is 1.
        """
        item = self.planner.load(file)
        try:
            if self._pixels is not None:
                return np.ascontiguousarray(self._pixels.load(item))
            if isinstance(item, np.ndarray):
                return item
            if factor > 1:
                decoded = decode_scaled(cast("str | bytes", item), lambda size: factor)
                if decoded is None:
                    raise OSError("not a JPEG file any more")
                reason = unlike_header(decoded[1], self.planner.sizes[file])
                return reason or to_ppm(np.asarray(decoded[0]))
            if in_python or isinstance(item, Item) or self.planner.in_python[file]:
                return decode_to_ppm(item, self._range, self.planner.sizes[file])
            return np.frombuffer(content_of(item), np.uint8)
        except Exception as error:  # decoders raise nearly any exception on corrupt files
            return describe_error(error)

    # Bad files

    def _find_bad(self, plans: list[BatchPlan]) -> bool:
        """Finds the files of `plans` that DALI cannot decode. Returns False if DALI got none.

        Python decodes these files from now on, or they are skipped.
        """
        if self._in_memory or not plans:
            return False
        samples = np.unique(np.concatenate([plan.samples for plan in plans]))
        numbers = np.concatenate(self.planner.files(samples))
        numbers = numbers[~self.planner.in_python[numbers]]
        files = [cast("str | bytes", self.planner.load(int(i))) for i in numbers]
        bad = undecodable(files, self.planner.sizes[numbers])
        for i, reason in bad.items():
            file = int(numbers[i])
            if type(self._item(file, in_python=True)) is str:
                self.planner.skipped[self.planner.sample_of(file)] = reason
            else:  # DALI alone refuses the file
                self.planner.in_python[file] = True
        if not bad:  # nvImageCodec decodes what DALI refuses, and DALI does not say which file
            self.planner.in_python[numbers] = True
        return bool(len(numbers))

    def _find_unlike_header(self, shapes: list[list[tuple[int, ...]]]) -> bool:
        """Records the images of the oldest plan whose size differs from the size in
        their header.

        shapes: (height, width, C) of every decoded image, for every file of a sample.

        The crop of such an image may lie outside of the image. Returns False if there are none.
        """
        plan = self._unfinished[0]
        samples = plan.samples.tolist()
        for part, files, factors in zip(shapes, self.planner.files(plan.samples), plan.factors):
            for (height, width, _), file, factor in zip(part, files.tolist(), factors):
                # A scaled image was compared by `_item`.
                stated = self.planner.sizes[file]
                if factor == 1 and (reason := unlike_header((height, width), stated)):
                    self.planner.skipped[self.planner.sample_of(file)] = reason
        return not self.planner.skipped.keys().isdisjoint(samples)
