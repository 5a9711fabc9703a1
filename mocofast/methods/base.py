"""What the training loop expects of a method: views, loss, metrics, momentum encoder, schedules."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mocofast.data.interface import Batch, Source
from mocofast.distributed import rank_and_world_size
from mocofast.models.fastest import to_fastest_format
from mocofast.models.pixels import LEVELS, prepare_images
from mocofast.models.sizes import encode
from mocofast.step_parts import FORWARD, step_part

# Returns the value of a number at (step, total_steps). Steps count from 0.
Schedule = Callable[[int, int], float]


class MethodOutput(NamedTuple):
    """The result of a forward pass over the images of this rank.

    loss: () float32, differentiable.
    metrics: {name: () float32}, means over the images. The loop averages every metric over steps
        and ranks. The log line, metrics.jsonl, TensorBoard and the curves show it by its name.
        A method names the same metrics at every step.
    rank: (N,) int32 or None: how many wrong candidates score above the right one, or as high.
    pair: the two embeddings that the loss compares, (N, C) per view or (N, C) and its target, in
        the order of the images. `mocofast.health` looks at them at log lines. None: not told.
    """

    loss: Tensor
    metrics: Mapping[str, Tensor] = MappingProxyType({})
    rank: Tensor | None = None
    pair: tuple[Tensor, Tensor] | None = None


def ranking_output(
    loss: Tensor, positive_rank: Tensor, pair: tuple[Tensor, Tensor] | None = None
) -> MethodOutput:
    """Returns the output of a method that ranks candidates, with the metrics acc1 and acc5.

    positive_rank: (N,) int: how many wrong candidates score above the right one.
    pair: as in MethodOutput.
    acc1, acc5: shares of the images whose right candidate is the first, or among the first five.
    """
    metrics = {f"acc{k}": (positive_rank < k).float().mean() for k in (1, 5)}
    return MethodOutput(loss, metrics, positive_rank, pair)


class Method(nn.Module):
    """A method that pretrains `encoder_q`.

    `encoder_q` is evaluated and exported. Its last layers are `.fc`, `.head` or `.heads`.

    A subclass defines
        forward(*views, update_keys=True, enqueue=True, **fields) -> MethodOutput
    views: `num_views` tensors (N, C, S, S), uint8 or uint16 pixels, or normalised floats. Where
        `takes_local_views`, small views (N, C, s, s) may follow, any number of any sizes.
    fields: the entries of a batch that `batch_fields` names, (N,) int64: "index" (numbers of the
        samples) or "labels".
    update_keys: update the momentum encoder first. With gradient accumulation: True for the first
        micro-batch of an optimiser step only. Always False if the optimiser updates the momentum
        encoder (see mocofast.optim).
    enqueue: write keys into the memory. With gradient accumulation: True for the last micro-batch
        of an optimiser step only.

    pixel_mean, pixel_std: statistics of all C channels, or one value for all channels, on the
        0..255 scale. For uint8 and uint16 views only. 65535 in uint16 is 255 on the scale.

    Under DistributedDataParallel every rank has the same batch size. Buffers are not broadcast at
    every step. Rank 0's buffers are taken once. Every rank keeps its own running statistics of
    BatchNorm, and a checkpoint holds rank 0's.
    """

    num_views = 2
    takes_local_views = False  # multi-crop, see AugmentConfig.local_crops
    joins_sizes = False  # the head sees large and small views together: no sharded form
    batch_fields: tuple[str, ...] = ()
    momentum = 0.0  # m of the moving average, if there is a momentum encoder
    filling_steps = 0  # first steps of a run, which fill the queue and train nothing
    writes_weights = False  # forward passes write parameters: no sharded form
    memory_format: torch.memory_format = torch.channels_last  # of images, see `to_fastest_format`
    encoder_q: nn.Module
    pixel_mean: Tensor | None
    pixel_std: Tensor | None

    def __init__(
        self,
        pixel_mean: Sequence[float] | Tensor | None = None,
        pixel_std: Sequence[float] | Tensor | None = None,
    ) -> None:
        super().__init__()
        if (pixel_mean is None) != (pixel_std is None):
            raise ValueError("pixel_mean and pixel_std belong together: got only one of the two")
        for name, statistics in (("pixel_mean", pixel_mean), ("pixel_std", pixel_std)):
            pixels = None
            if statistics is not None:
                pixels = torch.as_tensor(statistics, dtype=torch.float32).reshape(-1, 1, 1)
            self.register_buffer(name, pixels, persistent=False)
        # Numbers that change over the run, {attribute: schedule}. The attributes are floats, and
        # the loop sets them before every step. In a captured step they are device tensors.
        self.schedules: dict[str, Schedule] = {}
        # Faster ways to run an encoder in training, {attribute: function}, set by the engine.
        self.run: dict[str, Callable[..., Tensor]] = {}
        self.second_stream: torch.cuda.Stream | None = None
        self._synchronized = False

    @property
    def chance_loss(self) -> float | None:
        """The loss of an encoder that has learned nothing, or None if no such level is known."""
        return None

    def describe(self) -> str:
        """Returns a few words about the method for the log."""
        raise NotImplementedError

    def batch_inputs(self, batch: Batch, source: Source) -> dict[str, Tensor]:
        """Returns what `forward` takes beside the views, {name: (N, ...)}, on the CPU.

        The default: the entries of the batch that `batch_fields` names.
        source: of the batch.
        """
        return {name: getattr(batch, name) for name in self.batch_fields}

    def undecayed(self) -> list[nn.Parameter]:
        """Returns parameters without weight decay. The default: none, all are decayed."""
        return []

    def trained_pairs(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """Returns trained parameters, and the momentum encoder's parameters that average them.

        Both lists have the same order. They are empty without a momentum encoder.
        For an optimiser that averages: FusedSGD(queries, ..., ema=(keys, model.momentum)).
        """
        return [], []

    def random_state(self) -> Tensor | None:
        """Returns the state of the method's own generator (uint8) for a checkpoint, or None."""
        return None

    def load_random_state(self, state: Tensor | None) -> None:
        """Continues from the `random_state()` of another run. Every rank calls it."""

    def prepare_step(self, *views: Tensor) -> tuple[Tensor, ...]:
        """Does the host-side work of a step (permutations, exchange of images) before the step.

        The step itself can then be a CUDA graph: forward(*views, step_inputs=prepare_step(*views)).
        An empty result, the default, means: forward(*views).
        """
        return ()

    @contextlib.contextmanager
    def side_stream(self) -> Iterator[Callable[[], None]]:
        """Runs the launches inside the block on a second CUDA stream, where the engine made one.

        `with self.side_stream() as join:` yields `join()`, which makes the current stream wait for
        the results.
        """
        stream = self.second_stream
        if stream is None:
            yield lambda: None
            return
        current = torch.cuda.current_stream()
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            yield lambda: current.wait_stream(stream)

    def keep_buffers_out_of_broadcasts(self) -> None:
        """Stops DistributedDataParallel from broadcasting buffers at every step.

        Call it when all buffers are registered.
        """
        self._ddp_params_and_buffers_to_ignore = [name for name, _ in self.named_buffers()]

    def encode(self, name: str, *images: Tensor) -> Tensor:
        """Returns the output (N, C) of an encoder.

        name: the encoder's attribute, a key of `mocofast.step_parts.FORWARD`.
        images: (N, C, S, S), uint8, uint16 or normalised. Of several sizes: a tensor for every
            size. The outputs have the order of the images, see `mocofast.models.sizes`.
        """
        with step_part(FORWARD[name], images):
            if self.training and name in self.run:
                return self.run[name](*images)
            return encode(getattr(self, name), *map(self.normalize_pixels, images))

    def normalize_pixels(self, images: Tensor) -> Tensor:
        """Normalises uint8 and uint16 images (N, C, S, S); returns other images as they are."""
        if images.dtype not in LEVELS:
            return images
        statistics = cast(Tensor, self.pixel_mean), cast(Tensor, self.pixel_std)
        return prepare_images(images, *statistics, self.memory_format)

    def to_fastest_format(self, device: torch.device, splits: int = 1) -> None:
        """Moves the method to the device, see `models.fastest.to_fastest_format`.

        splits: the most splits of BatchNorm on a rank.
        """
        self.memory_format = to_fastest_format(self, device, splits)

    def check_views(self, local_views: Sequence[Tensor] = (), **views: Tensor) -> None:
        """Checks the views of a forward pass. The first call in train mode takes rank 0's buffers.

        local_views: small views of any sizes.
        Raises ValueError for views of different shapes, TypeError for uint8 and uint16 views
        without pixel statistics, ValueError for statistics of another number of channels.
        """
        (first_name, first), *others = views.items()
        for name, view in others:
            if view.shape != first.shape:
                raise ValueError(
                    f"{name} must have the shape of {first_name}: "
                    f"got {tuple(view.shape)} and {tuple(first.shape)}"
                )
        for view in local_views:
            if view.shape[:2] != first.shape[:2] or view.dtype != first.dtype:
                raise ValueError(
                    f"small views must have the images, channels and type of {first_name}: got "
                    f"{tuple(view.shape)} {view.dtype}, and {tuple(first.shape)} {first.dtype}"
                )
        are_pixels = any(view.dtype in LEVELS for view in views.values())
        if are_pixels and self.pixel_mean is not None:
            count, channels = len(self.pixel_mean), first.shape[1]
            if count not in (1, channels):
                raise ValueError(
                    f"{first_name} must have {count} channels, as pixel_mean and pixel_std: "
                    f"got {channels}"
                )
        if self.pixel_mean is None and are_pixels:
            raise TypeError(
                f"{', '.join(views)}: got {first.dtype} images, but this {type(self).__name__} has "
                "no pixel statistics to normalise the images. Pass pixel_mean and pixel_std (on "
                "the 0..255 scale) to the method, or normalised float images to forward"
            )
        if self.training and not self._synchronized:
            self._synchronize()

    def _synchronize(self) -> None:
        """Takes rank 0's buffers. DistributedDataParallel takes rank 0's parameters."""
        if rank_and_world_size()[1] > 1:
            for buffer in self.buffers():
                dist.broadcast(buffer, 0)
        self._synchronized = True
