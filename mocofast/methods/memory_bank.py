"""InstDisc: Unsupervised Feature Learning via Non-Parametric Instance Discrimination (Wu et al. 2018,
arXiv:1805.01978), a memory bank with a slot for every image.

Its noise-contrastive estimation is replaced by InfoNCE, as in MoCo's comparison (He et al. 2020, arXiv:1911.05722,
section 4.1) and in the later model of InstDisc's authors, so that methods differ in their dictionary only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mocofast.config import Config, ConfigError, ModelConfig
from mocofast.distributed import SharedGenerator, all_gather, rank_and_world_size, to_device
from mocofast.methods.base import Method, MethodOutput
from mocofast.methods.moco import QUEUE_DTYPES
from mocofast.models.encoders import add_mlp_head, build_encoder, head_name
from mocofast.models.pixels import pixel_statistics
from mocofast.ops.losses import info_nce


class MemoryBank(Method):
    """An encoder, and a bank of its embeddings of every image, each from when the image was last seen.

    base_encoder, dim, temperature, mlp: as MoCo's. images: how many slots the bank has.
    negatives: K slots drawn for every batch, with replacement, from those of images outside the batch of all ranks,
        which share them. (InstDisc draws for every image apart, its own slot included.)
    momentum: m of a slot's moving average.
    queue_dtype: how the bank is stored.

    State dict: `encoder_q.*`, `bank` (images, C), unit vectors; `random_state` is the negatives'.
    """

    num_views = 1
    batch_fields = ("index",)
    bank: Tensor

    def __init__(
        self,
        base_encoder: Callable[..., nn.Module],
        images: int,
        dim: int = ModelConfig.dim,
        negatives: int = ModelConfig.queue_size,
        momentum: float = 0.5,
        temperature: float = ModelConfig.temperature,
        mlp: bool = ModelConfig.mlp,
        *,
        queue_dtype: str = ModelConfig.queue_dtype,
        pixel_mean: Sequence[float] | Tensor | None = None,
        pixel_std: Sequence[float] | Tensor | None = None,
    ) -> None:
        super().__init__(pixel_mean, pixel_std)
        for name, value in (("images", images), ("dim", dim), ("negatives", negatives)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1: got {value}")
        self.negatives, self.momentum, self.temperature = negatives, momentum, temperature
        self.encoder_q = base_encoder(num_classes=dim)
        head_name(self.encoder_q)  # raises where there is no head
        if mlp:
            add_mlp_head(self.encoder_q)
        self.register_buffer(
            "bank", F.normalize(torch.randn(images, dim), dim=1).to(QUEUE_DTYPES[queue_dtype])
        )
        self.draws = SharedGenerator()
        self._pending: list[
            tuple[Tensor, Tensor]
        ] = []  # of micro-batches that wait for their step's last one
        self.keep_buffers_out_of_broadcasts()

    @property
    def chance_loss(self) -> float:
        """InfoNCE of an encoder that knows nothing: log(K + 1)."""
        return math.log(self.negatives + 1)

    def describe(self) -> str:
        """The sizes of bank and sample."""
        return f"memory bank of {len(self.bank)} images, {self.negatives} negatives"

    def forward(
        self,
        images: Tensor,
        *,
        index: Tensor,
        update_keys: bool = True,
        enqueue: bool = True,
        step_inputs: tuple[Tensor, ...] = (),
    ) -> MethodOutput:
        """Loss of this rank's images (N, 3, S, S); in train mode also updates their slots, index (N,) int64.

        With gradient accumulation, slots are updated with enqueue=True, for all micro-batches since the last time.
        arranged: what `prepare_step` made of these images, where the caller has called it.
        """
        self.check_views(images=images)
        v = self.encode("encoder_q", images)  # (N, C), normalised inside info_nce
        batch = all_gather(index) if self.training else index  # (W*N,)
        (numbers,) = step_inputs or self.prepare_step(images)
        loss, rank = info_nce(
            v,
            self.bank[index],
            self.bank[self._slots(numbers, batch)],
            temperature=self.temperature,
            negatives_normalized=True,
            return_rank=True,
        )
        if self.training:
            self._pending.append((batch, all_gather(F.normalize(v.detach().float(), dim=1))))
            if enqueue:
                self._update(*(torch.cat(parts) for parts in zip(*self._pending)))
                self._pending.clear()
        return MethodOutput(loss, rank)

    def random_state(self) -> Tensor | None:
        """That of the negatives; None before the first ones."""
        return self.draws.state()

    def load_random_state(self, state: Tensor | None) -> None:
        """Draws on from `random_state()`, afresh from None."""
        self.draws.load_state(state)

    def prepare_step(self, *views: Tensor) -> tuple[Tensor, ...]:
        """K random numbers (K,) int64 of slots that are not in the batch, equal on all ranks in train mode."""
        (images,) = views
        free = len(self.bank) - len(images) * (rank_and_world_size()[1] if self.training else 1)
        if free < 1:
            raise ConfigError(
                f"data.batch_size: must leave negatives among the {len(self.bank)} images"
            )
        generator = self.draws.generator(images.device) if self.training else None
        return to_device(
            [torch.randint(free, (self.negatives,), generator=generator)], images.device
        )

    def _slots(self, numbers: Tensor, batch: Tensor) -> Tensor:
        """Slots (K,): of number n is the n-th slot outside `batch` (B,)."""
        # It is n + as many slots of the batch as stand before it; an image counts once, however often it is there.
        taken = batch.sort().values
        again = torch.cat([taken.new_zeros(1, dtype=torch.bool), taken[1:] == taken[:-1]])
        taken = taken.masked_fill(again, len(self.bank)).sort().values
        free_before = taken - torch.arange(len(taken), device=taken.device)
        return numbers + torch.searchsorted(free_before, numbers, right=True)

    @torch.no_grad()
    def _update(self, index: Tensor, v: Tensor) -> None:
        """Moves slots `index` (B,) towards v (B, C). Of an image that came more than once, the last counts, whatever
        the order of writing: its rows are all the same."""
        same = index[:, None] == index
        last = (same * torch.arange(len(index), device=index.device)).amax(1)
        slots = self.momentum * self.bank[index].float() + (1 - self.momentum) * v[last]
        self.bank.index_copy_(0, index, F.normalize(slots, dim=1).to(self.bank.dtype))


def build(config: Config, images: int) -> MemoryBank:
    """A bank of as many images as the data have, with the options of `config.model`."""
    m = config.model
    mean, std = pixel_statistics(config.augment)
    return MemoryBank(
        build_encoder(m.arch, config.augment.size),
        images,
        m.dim,
        m.queue_size,
        m.momentum,
        m.temperature,
        m.mlp,
        queue_dtype=m.queue_dtype,
        pixel_mean=mean,
        pixel_std=std,
    )
