"""InstDisc: Non-Parametric Instance Discrimination (Wu et al. 2018, arXiv:1805.01978).

A memory bank has a slot for every image. InfoNCE replaces the paper's noise-contrastive estimation,
as in MoCo's comparison (He et al. 2020, arXiv:1911.05722, section 4.1) and in a later model of
InstDisc's authors. MoCo and InstDisc then differ in the dictionary only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mocofast.config import Config, ConfigError
from mocofast.distributed import SharedGenerator, gather_rows, indices_to_device, shares_of
from mocofast.methods.base import Method, MethodOutput, ranking_output
from mocofast.methods.moco import QUEUE_DTYPES
from mocofast.methods.options import MemoryBankOptions as Options
from mocofast.models.encoders import add_mlp_head, configured_encoder, head_name
from mocofast.models.pixels import pixel_statistics
from mocofast.ops.losses import info_nce


class MemoryBank(Method):
    """An encoder, and a bank with the embedding of every image from its last visit.

    base_encoder, dim, temperature, mlp: as for MoCo.
    images: number of slots in the bank.
    negatives: K, number of slots sampled for every batch. All ranks share the sample, which is
        taken with replacement from the images outside the batch of all ranks. (InstDisc samples
        for every image separately, and may sample the image's own slot.)
    momentum: m of a slot's moving average.
    queue_dtype: type of the stored embeddings.

    State dict: `encoder_q.*`, `bank` (images, C), unit vectors.
    `random_state()` is the state of the sampling of negatives.
    """

    num_views = 1
    batch_fields = ("index",)
    bank: Tensor

    def __init__(
        self,
        base_encoder: Callable[..., nn.Module],
        images: int,
        dim: int = Options.dim,
        negatives: int = Options.queue_size,
        momentum: float = Options.momentum,
        temperature: float = Options.temperature,
        mlp: bool = Options.mlp,
        *,
        queue_dtype: str = Options.queue_dtype,
        pixel_mean: Sequence[float] | Tensor | None = None,
        pixel_std: Sequence[float] | Tensor | None = None,
    ) -> None:
        super().__init__(pixel_mean, pixel_std)
        for name, value in (("images", images), ("dim", dim), ("negatives", negatives)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1: got {value}")
        self.negatives, self.momentum, self.temperature = negatives, momentum, temperature
        self.encoder_q = base_encoder(num_classes=dim)
        head_name(self.encoder_q)  # raises if there is no head
        if mlp:
            add_mlp_head(self.encoder_q)
        self.register_buffer(
            "bank", F.normalize(torch.randn(images, dim), dim=1).to(QUEUE_DTYPES[queue_dtype])
        )
        self.sampler = SharedGenerator()
        # Numbers and embeddings of earlier micro-batches of the same optimiser step.
        self._pending: list[tuple[Tensor, Tensor]] = []
        self.keep_buffers_out_of_broadcasts()

    @property
    def chance_loss(self) -> float:
        """The loss of an encoder that has learned nothing: log(K + 1)."""
        return math.log(self.negatives + 1)

    def describe(self) -> str:
        """Returns the sizes of the bank and of the sample of negatives."""
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
        """Computes the loss of this rank's images. In train mode, updates the slots of the images.

        images: (N, C, S, S). index: (N,) int64, the numbers of the images.
        update_keys: ignored.
        enqueue: with gradient accumulation, True for the last micro-batch only. The slots of all
            micro-batches are then updated.
        step_inputs: the result of `prepare_step(images)`, if the caller has called it.
        """
        self.check_views(images=images)
        v = self.encode("encoder_q", images)  # (N, C), normalised inside info_nce
        batch = gather_rows(index) if self.training else index  # (T,)
        (numbers,) = step_inputs or self.prepare_step(images)
        slots = self.bank[index]  # (N, C)
        loss, positive_rank = info_nce(
            v,
            slots,
            self.bank[self._slots(numbers, batch)],
            temperature=self.temperature,
            negatives_normalized=True,
            return_rank=True,
        )
        if self.training:
            self._pending.append((batch, gather_rows(F.normalize(v.detach().float(), dim=1))))
            if enqueue:
                self._update(*(torch.cat(tensors) for tensors in zip(*self._pending)))
                self._pending.clear()
        return ranking_output(loss, positive_rank, (v, slots))

    def random_state(self) -> Tensor | None:
        """Returns the state of the sampling of negatives, or None before the first sample."""
        return self.sampler.state()

    def load_random_state(self, state: Tensor | None) -> None:
        """Continues the sampling from `random_state()`. None starts it anew."""
        self.sampler.load_state(state)

    def prepare_step(self, *views: Tensor) -> tuple[Tensor, ...]:
        """Samples numbers (K,) int64 of slots outside the batch, equal on all ranks in train mode.

        Raises ConfigError if the batch holds all images.
        """
        (images,) = views
        taken = shares_of(len(images)).total if self.training else len(images)
        free = len(self.bank) - taken
        if free < 1:
            raise ConfigError(
                f"data.batch_size: must leave negatives among the {len(self.bank)} images"
            )
        generator = self.sampler.generator(images.device) if self.training else None
        return indices_to_device(
            [torch.randint(free, (self.negatives,), generator=generator)], images.device
        )

    def _slots(self, numbers: Tensor, batch: Tensor) -> Tensor:
        """Returns slots (K,): numbers[i] = n selects the n-th slot that is not in the batch.

        batch: (B,) int64, numbers of the batch's images.
        """
        # The slot is n plus the number of batch slots before it. A repeated image counts once.
        taken = batch.sort().values
        again = torch.cat([taken.new_zeros(1, dtype=torch.bool), taken[1:] == taken[:-1]])
        taken = taken.masked_fill(again, len(self.bank)).sort().values
        free_before = taken - torch.arange(len(taken), device=taken.device)
        return numbers + torch.searchsorted(free_before, numbers, right=True)

    @torch.no_grad()
    def _update(self, index: Tensor, v: Tensor) -> None:
        """Moves slots `index` (B,) towards embeddings v (B, C).

        For a repeated image the last embedding counts. All its rows are made equal first, so the
        order of writing does not matter.
        """
        same = index[:, None] == index
        last = (same * torch.arange(len(index), device=index.device)).amax(1)
        slots = self.momentum * self.bank[index].float() + (1 - self.momentum) * v[last]
        self.bank.index_copy_(0, index, F.normalize(slots, dim=1).to(self.bank.dtype))


def build(config: Config, images: int = 0, classes: int = 0) -> MemoryBank:
    """Returns a memory bank of `images` slots, with the options of `config.model`."""
    m = cast(Options, config.model)
    mean, std = pixel_statistics(config.augment)
    return MemoryBank(
        configured_encoder(config),
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
