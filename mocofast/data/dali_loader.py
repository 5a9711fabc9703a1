"""The DALI loader: DALI decodes each file once, and on a GPU cuts a crop per view; `view_ops` does the rest.

On a CPU PyTorch crops and resizes: its operator is PIL's to 1 of 255 and takes a fifth of the time of DALI's.
Every random parameter is `sample_view`'s, so nothing here has a random state: to resume is to start at (epoch,
step). A thread works ahead of the training loop.

A file that cannot be decoded makes DALI raise for a whole batch, without a name, and leaves its pipeline
unusable. The files of the batches under way are then decoded one by one, the bad ones are put on record in
`skipped`, the pipeline is rebuilt and goes on at the same step; other samples come out the same, bit for bit.
What DALI does not notice, this loader cannot: JPEG files with damaged entropy data decode to garbage silently
(PIL too mostly only warns).
"""

from __future__ import annotations

import os
import queue
import threading
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from nvidia.dali import Pipeline, fn, pipeline_def, types
from torch import Tensor
from torch.nn import functional as F

from mocofast.config import AugmentConfig, DataConfig
from mocofast.data.decoding import image_size, undecodable, unlike_header
from mocofast.data.interface import (
    Batch,
    BatchSlice,
    Source,
    ViewParams,
    no_image_decodes,
    source_order,
)
from mocofast.data.sampling import per_view, sample_views
from mocofast.data.view_ops import apply_view_ops

# Pixels of a view that `view_ops` handles in one call. On a CPU its dozen planes should stay in the L2 cache
# (half as fast at 40 views of 224 pixels as at 1); on a GPU more pixels amortise kernel launches.
CHUNK_PIXELS = {"cpu": 224 * 224, "cuda": 128 * 224 * 224}


class _Plan(NamedTuple):
    """A batch before it is decoded."""

    epoch: int
    step: int
    samples: np.ndarray  # (B,) int64: what to decode, bad ones substituted
    params: list[list[ViewParams]]  # one list of B per view


@pipeline_def
def _pipeline(
    read: Any, augments: Sequence[AugmentConfig], on_gpu: bool, kind: type, data: DataConfig
) -> tuple[Any, ...]:
    """On a CPU the decoded images, (H, W, 3) uint8 each; on a GPU, per view, their crops, (B, S, S, 3) uint8.

    read() gives the images, of a kind that `Source.load` has, and, for a GPU, for each view the crops' corners
    (B, 2) and shapes (B, 2), int32.
    """
    extra = 2 * len(augments) if on_gpu else 0
    layout = None if kind is not np.ndarray else ["HWC"] + extra * [""]
    images, *boxes = fn.external_source(
        source=read, num_outputs=1 + extra, batch=True, layout=layout
    )
    if kind is str:
        images = fn.io.file.read(images)
    if kind is not np.ndarray:
        images = fn.decoders.image(
            images,
            device="mixed" if on_gpu else "cpu",
            output_type=types.RGB,
            adjust_orientation=False,
            hw_decoder_load=data.hw_decoder_load,
            preallocate_width_hint=data.preallocate[0],
            preallocate_height_hint=data.preallocate[1],
            jpeg_fancy_upsampling=True,  # as libjpeg, so that both devices see the same pixels
        )
    elif on_gpu:
        images = images.gpu()
    if not on_gpu:
        return (images,)
    # A slice before the resize, not the resize's own region: that would filter in pixels from outside the crop.
    return tuple(
        fn.resize(
            fn.slice(images, corner, shape, axes=(0, 1)),
            size=(augment.size, augment.size),
            interp_type=types.INTERP_LINEAR,
            antialias=True,
        )
        for corner, shape, augment in zip(boxes[::2], boxes[1::2], augments)
    )


class DaliLoader:
    """See `mocofast.data.interface.Loader`. Bad files: see this module's docstring.

    Images of 16 bits, alpha, palettes, CMYK or one channel come out as `torchvision_loader.decode` has them,
    to 1 of 255; EXIF orientation is not applied. Moving to another position than the next starts a new pipeline.
    """

    name = "dali"

    def __init__(
        self,
        source: Source,
        augments: tuple[AugmentConfig, ...],
        shard: BatchSlice,
        seed: int,
        device: torch.device,
        workers: int,
        data: DataConfig | None = None,
    ) -> None:
        """augments: one per view. workers: threads that decode, and as many that augment where device is a CPU.
        data: for `prefetch`, `hw_decoder_load` and `preallocate`."""
        self.reason = ""
        data = data or DataConfig()
        batches = _Batches(source, augments, shard, seed, device, workers, data)
        self.steps_per_epoch = batches.steps
        self.skipped = batches.skipped
        self._device = device
        self._producer = _Producer(batches, data.prefetch)
        self._position: tuple[int, int] | None = (
            None  # (epoch, step) that the producer hands out next
        )
        self._iteration = 0
        # At the latest when the interpreter exits: a thread inside DALI must not outlive it.
        self.close = weakref.finalize(self, self._producer.close)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Steps start .. steps_per_epoch - 1 of an epoch, made from now on. Ends the iteration before."""
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
            self._position = None  # unknown where an exception comes
            batch = self._producer.get()
            self._position = (
                (epoch, step + 1) if step + 1 < self.steps_per_epoch else (epoch + 1, 0)
            )
            for view in batch.views:
                if (
                    view.is_cuda
                ):  # made on another stream: its memory must not be reused under this one's hands
                    view.record_stream(torch.cuda.current_stream(self._device))
            yield batch


class _Producer:
    """A thread that keeps `ahead` batches ready, into the next epochs too."""

    def __init__(self, batches: _Batches, ahead: int) -> None:
        self._batches = batches
        self._thread: threading.Thread | None = None
        self._stopped = threading.Event()
        self._ready: queue.Queue[Batch | BaseException] = queue.Queue(ahead)

    def start(self, epoch: int, step: int) -> None:
        self.stop()
        self._batches.seek(epoch, step)
        self._stopped.clear()
        self._thread = threading.Thread(target=self._run, name="mocofast-dali", daemon=True)
        self._thread.start()

    def get(self) -> Batch:
        item = self._ready.get()
        if isinstance(item, BaseException):
            raise item
        return item

    def stop(self) -> None:
        """Waits for the batch in the making, at most."""
        if self._thread is None:
            return
        self._stopped.set()
        while self._thread.is_alive():
            self._drain()  # so that a `put` under way ends
            self._thread.join(0.01)
        self._drain()
        self._thread = None

    def close(self) -> None:
        self.stop()
        self._batches.close()

    def _drain(self) -> None:
        while not self._ready.empty():
            self._ready.get()

    def _run(self) -> None:
        while not self._stopped.is_set():
            try:
                self._ready.put(self._batches.next())
            except BaseException as error:  # the training loop's to see
                self._ready.put(error)
                return


class _Batches:
    """Makes batches in order, from any position. Not thread-safe: one thread at a time calls `next`."""

    def __init__(
        self,
        source: Source,
        augments: tuple[AugmentConfig, ...],
        shard: BatchSlice,
        seed: int,
        device: torch.device,
        workers: int,
        data: DataConfig,
    ) -> None:
        self.steps = shard.steps(len(source))
        self.skipped: dict[int, str] = {}
        self._source, self._augments, self._slice, self._seed = source, augments, shard, seed
        self._device, self._threads, self._data = device, max(1, workers), data
        self._kind = type(source.load(0))
        self._sizes = np.zeros(
            (len(source), 2), dtype=np.int32
        )  # (height, width); 0 where not known yet
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0))  # of the last epoch asked for
        self._pool = _single_threaded_pool(self._threads)
        self._pipeline: Pipeline | None = None
        self._under_way: deque[_Plan] = deque()  # what DALI works on, oldest first
        self._delivered = self._planned = (
            0,
            0,
        )  # (epoch, step) of the next batch to hand out, and to plan
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def seek(self, epoch: int, step: int) -> None:
        """The next batch will be this one."""
        self._delivered = (epoch, step)
        self._forget_pipeline()  # a new one is sooner ready than the batches that this one has under way

    def next(self) -> Batch:
        """The next batch, finished. Raises ValueError where no sample of the source can be decoded."""
        try:
            plan, outputs = self._decoded()
        except BaseException:
            self._forget_pipeline()
            raise
        if self._stream is None:
            images = [torch.from_dlpack(outputs[0][i]) for i in range(len(plan.samples))]
            views = tuple(
                self._cut(images, params, augment)
                for params, augment in zip(plan.params, self._augments)
            )
        else:
            with torch.cuda.stream(self._stream):
                views = tuple(
                    self._augmented(torch.from_dlpack(crops.as_tensor()), params, augment)
                    for crops, params, augment in zip(outputs, plan.params, self._augments)
                )
            self._stream.synchronize()  # before `outputs`, which DALI may write to again, goes out of scope
        self._delivered = self._after(plan.epoch, plan.step)
        labels = (
            None
            if self._source.labels is None
            else torch.from_numpy(self._source.labels[plan.samples])
        )
        return Batch(views, torch.from_numpy(plan.samples), labels)

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)
        self._forget_pipeline()

    # DALI

    def _decoded(self) -> tuple[_Plan, tuple[Any, ...]]:
        while True:
            if self._pipeline is None:
                self._planned = self._delivered
                self._pipeline = self._build()
            try:
                outputs = (
                    self._pipeline.run()
                )  # waits for the host, so that any stream may read them
            except RuntimeError:
                suspects = list(self._under_way)
                self._forget_pipeline()
                if not self._find_bad(suspects):
                    raise
                continue
            if self._stream is None and self._missized(
                outputs[0].shape(), self._under_way[0].samples
            ):
                self._forget_pipeline()
                continue
            return self._under_way.popleft(), outputs

    def _missized(self, shapes: list[tuple[int, ...]], samples: np.ndarray) -> bool:
        """Puts images of another size than their header's on record: their crops may lie outside of them.
        (On a GPU DALI's slice raises where they do.)"""
        for (height, width, _), index in zip(shapes, samples.tolist()):
            if why := unlike_header((height, width), self._sizes[index]):
                self.skipped[index] = why
        return not self.skipped.keys().isdisjoint(samples.tolist())

    def _build(self) -> Pipeline:
        on_gpu = self._device.type == "cuda"
        pipeline = _pipeline(
            self._feed,
            self._augments,
            on_gpu,
            self._kind,
            self._data,
            batch_size=self._slice.batch_size // self._slice.world_size,
            num_threads=self._threads,
            device_id=self._stream.device_index if self._stream is not None else None,
            prefetch_queue_depth=self._data.prefetch,
            exec_dynamic=True,
        )
        pipeline.build()
        return pipeline

    def _forget_pipeline(self) -> None:
        self._pipeline = None
        self._under_way.clear()

    def _find_bad(self, plans: list[_Plan]) -> bool:
        """Puts the undecodable files of these batches on record; False where there is none."""
        if self._kind is np.ndarray or not plans:
            return False
        samples = np.unique(np.concatenate([plan.samples for plan in plans]))
        files = [cast("str | bytes", self._source.load(int(i))) for i in samples]
        bad = undecodable(files, self._sizes[samples])
        self.skipped.update({int(samples[position]): reason for position, reason in bad.items()})
        return bool(bad)

    # Planning, called by DALI whenever it is ready for one batch more

    def _feed(self) -> list[Any]:
        plan = self._plan(*self._planned)
        self._planned = self._after(plan.epoch, plan.step)
        self._under_way.append(plan)
        fed: list[Any] = [list(self._pool.map(self._item, plan.samples.tolist()))]
        for params in plan.params if self._stream is not None else ():
            fed.append(np.array([(p.top, p.left) for p in params], dtype=np.int32))
            fed.append(np.array([(p.height, p.width) for p in params], dtype=np.int32))
        return fed

    def _item(self, index: int) -> np.ndarray:
        """Pixels, or the bytes of a path or file."""
        item = self._source.load(index)
        return (
            item
            if isinstance(item, np.ndarray)
            else np.frombuffer(os.fsencode(item), dtype=np.uint8)
        )

    def _plan(self, epoch: int, step: int) -> _Plan:
        if self._order[0] != epoch:
            self._order = (epoch, source_order(self._source, self._seed, epoch))
        slots = self._slice.indices(self._order[1], step)
        list(self._pool.map(self._is_good, slots.tolist()))  # reads unknown headers side by side
        samples = np.array([self._first_good(slot) for slot in slots.tolist()], dtype=np.int64)
        sizes = self._sizes[samples]
        params = [
            per_view(sample_views(augment, sizes, self._seed, epoch, slots, view))
            for view, augment in enumerate(self._augments)
        ]
        return _Plan(epoch, step, samples, params)

    def _is_good(self, index: int) -> bool:
        """False for samples known to be bad; looks up the size of one met for the first time."""
        if index in self.skipped:
            return False
        if not self._sizes[index, 0]:
            item = self._source.load(index)
            try:
                self._sizes[index] = (
                    item.shape[:2] if isinstance(item, np.ndarray) else image_size(item)
                )
            except Exception as error:  # PIL raises nearly any exception on corrupt headers
                self.skipped[index] = f"{type(error).__name__}: {error}"
                return False
        return True

    def _first_good(self, slot: int) -> int:
        count = len(self._source)
        for offset in range(count):
            index = (slot + offset) % count
            if self._is_good(index):
                return index
        raise no_image_decodes(self._source, self.skipped)

    def _after(self, epoch: int, step: int) -> tuple[int, int]:
        return (epoch, step + 1) if step + 1 < self.steps else (epoch + 1, 0)

    # Augmentation

    def _cut(
        self, images: list[Tensor], params: list[ViewParams], augment: AugmentConfig
    ) -> Tensor:
        """Images (H, W, 3) on the CPU -> (B, 3, S, S) views, channels-last, by all threads."""
        views = torch.empty((len(images), augment.size, augment.size, 3), dtype=torch.uint8)
        chunk = max(1, CHUNK_PIXELS["cpu"] // augment.size**2)

        def work(start: int) -> None:
            part = slice(start, start + chunk)
            for view, image, p in zip(views[part], images[part], params[part]):
                crop = image[p.top : p.top + p.height, p.left : p.left + p.width].permute(2, 0, 1)[
                    None
                ]
                view.copy_(
                    F.interpolate(crop, view.shape[:2], mode="bilinear", antialias=True)[0].permute(
                        1, 2, 0
                    )
                )
            apply_view_ops(views[part], params[part], augment, views[part])

        list(self._pool.map(work, range(0, len(images), chunk)))
        return views.permute(0, 3, 1, 2)

    def _augmented(self, crops: Tensor, params: list[ViewParams], augment: AugmentConfig) -> Tensor:
        """(B, S, S, 3) crops -> (B, 3, S, S) views, channels-last, in memory of PyTorch's."""
        views = torch.empty_like(crops)
        chunk = max(1, CHUNK_PIXELS["cuda"] // augment.size**2)
        for start in range(0, len(crops), chunk):
            part = slice(start, start + chunk)
            apply_view_ops(crops[part], params[part], augment, views[part])
        return views.permute(0, 3, 1, 2)


def _single_threaded_pool(threads: int) -> ThreadPoolExecutor:
    """Threads whose own PyTorch operators use one core each."""
    used = torch.get_num_threads()
    all_started = threading.Barrier(threads + 1)

    def start() -> None:
        torch.get_num_threads()  # a thread's first question sets its number to the default, whatever was set before
        torch.set_num_threads(1)
        all_started.wait()

    pool = ThreadPoolExecutor(threads, "mocofast-views", initializer=start)
    for _ in range(threads):
        pool.submit(int)
    all_started.wait()
    torch.set_num_threads(
        used
    )  # the setting is each thread's own, but the default of later threads is not
    return pool
