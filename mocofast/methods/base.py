"""What the training loop needs of a method: its views, its loss, and which weights follow which."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mocofast.distributed import rank_and_world_size
from mocofast.models.pixels import prepare_images
from mocofast.step_parts import FORWARD, step_part


class MethodOutput(NamedTuple):
    """What a forward pass yields, over this rank's own images."""

    loss: Tensor  # () float32, differentiable
    rank: (
        Tensor | None
    )  # (N,) int32: how many wrong candidates score above the right one; Acc@k is mean(rank < k)


class Method(nn.Module):
    """A method of pretraining `encoder_q`.

    `encoder_q` is what is evaluated and exported, and ends in `.fc`, `.head` or `.heads`. A method with a momentum
    encoder says in `trained_pairs` which weights follow which, with `momentum` as the average's m, which the loop may
    set before any step.

    forward(*views, update_keys=True, enqueue=True, **needed): the loss of this rank's images. views: `num_views`
    tensors (N, 3, S, S), uint8 pixels or normalised floats; needed: what `batch_fields` names of a batch, "index" (the
    samples' numbers) or "labels", each (N,) int64. With gradient accumulation update_keys is True with the first
    micro-batch of an optimiser step only, enqueue with the last only: memories change with the latter. Where the
    optimiser averages (see mocofast.optim), update_keys is False always.

    pixel_mean, pixel_std: the three channels' statistics on the 0..255 scale, needed for uint8 images only.
    Wrapped in DistributedDataParallel every rank has the same batch size. Buffers are kept out of its broadcasts and
    taken from rank 0 once: each rank keeps its own BatchNorm running statistics; those of rank 0 are the model's.
    """

    num_views = 2
    batch_fields: tuple[str, ...] = ()
    momentum = 0.0
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
            raise ValueError("pixel_mean and pixel_std belong together: got one of them only")
        for name, statistics in (("pixel_mean", pixel_mean), ("pixel_std", pixel_std)):
            pixels = (
                None
                if statistics is None
                else torch.as_tensor(statistics, dtype=torch.float32).reshape(3, 1, 1)
            )
            self.register_buffer(name, pixels, persistent=False)
        # How an encoder, by its name here, is trained: the step engine's faster ways (see mocofast.train.engine).
        self.run: dict[str, Callable[[Tensor], Tensor]] = {}
        self.second_stream: torch.cuda.Stream | None = None
        self._synchronized = False

    @property
    def chance_loss(self) -> float | None:
        """The loss of an encoder that knows nothing; None where there is no such level."""
        return None

    def describe(self) -> str:
        """The method in a few words, for the log."""
        raise NotImplementedError

    def trained_pairs(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """Parameters that are trained and followed, and those that follow them as a moving average; none here.

        For an optimiser that averages: FusedSGD(queries, ..., ema=(keys, model.momentum)).
        """
        return [], []

    def random_state(self) -> Tensor | None:
        """The state of a generator of the method's own (uint8), for a checkpoint; None where it has none."""
        return None

    def load_random_state(self, state: Tensor | None) -> None:
        """Continues from `random_state()` of another run; to be called on every rank."""

    def prepare_step(self, *views: Tensor) -> tuple[Tensor, ...]:
        """What a training step needs the host for (to draw a permutation, to exchange images by it), done before the
        step, which then is the same work every time: forward(*views, arranged=arrange(*views)), and just
        forward(*views) where it is empty, as here."""
        return ()

    @contextlib.contextmanager
    def side_stream(self) -> Iterator[Callable[[], None]]:
        """`with self.side_stream() as join:` what is launched inside may run on the GPU beside what follows, until
        `join()`, after which its results may be used."""
        stream = self.second_stream
        if stream is None:
            yield lambda: None
            return
        current = torch.cuda.current_stream()
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            yield lambda: current.wait_stream(stream)

    def keep_buffers_out_of_broadcasts(self) -> None:
        """To be called when all buffers are there: DistributedDataParallel would broadcast them at every step."""
        self._ddp_params_and_buffers_to_ignore = [name for name, _ in self.named_buffers()]

    def encode(self, name: str, images: Tensor) -> Tensor:
        """The output (N, C) of the encoder `name` (one of `FORWARD`) for images (N, 3, S, S), uint8 or normalised."""
        with step_part(FORWARD[name], len(images)):
            if self.training and name in self.run:
                return self.run[name](images)
            return getattr(self, name)(self.prepared(images))

    def prepared(self, images: Tensor) -> Tensor:
        """Images (N, 3, S, S), uint8 or normalised, as encoders take them: normalised."""
        if images.dtype != torch.uint8:
            return images
        return prepare_images(images, cast(Tensor, self.pixel_mean), cast(Tensor, self.pixel_std))

    def check_views(self, **views: Tensor) -> None:
        """ValueError for views of different shapes, TypeError for uint8 ones without pixel statistics; the first call
        in train mode also takes rank 0's buffers."""
        (first_name, first), *others = views.items()
        for name, view in others:
            if view.shape != first.shape:
                raise ValueError(
                    f"{name} must have the shape of {first_name}: got {tuple(view.shape)} and {tuple(first.shape)}"
                )
        if self.pixel_mean is None and any(view.dtype == torch.uint8 for view in views.values()):
            raise TypeError(
                f"{', '.join(views)}: got uint8 images, and this {type(self).__name__} has no pixel statistics to "
                "normalise them with; pass pixel_mean and pixel_std (on the 0..255 scale) to it, or normalised float "
                "images to forward"
            )
        if self.training and not self._synchronized:
            self._synchronize()

    def _synchronize(self) -> None:
        """Takes rank 0's buffers, once. DistributedDataParallel does so for the parameters."""
        if rank_and_world_size()[1] > 1:
            for buffer in self.buffers():
                dist.broadcast(buffer, 0)
        self._synchronized = True
