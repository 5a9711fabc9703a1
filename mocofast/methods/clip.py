"""CLIP: Contrastive Language-Image Pre-training (Radford et al. 2021, arXiv:2103.00020).

An image must find its caption among the captions of the batch of all ranks, and a caption its
image. The temperature is learned. SigLIP's sigmoid loss (Zhai et al. 2023, arXiv:2303.15343) judges
every pair alone.

With a queue, small batches have many negatives: momentum towers make the keys, as MoCo does.
Images look for texts in a queue of texts, and texts for images in a queue of images, as BriVL does
(Huo et al. 2021, arXiv:2103.06561).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from mocofast.config import Config
from mocofast.data.captions import captions_of
from mocofast.data.interface import Batch, Source
from mocofast.distributed import gather_rows, rank_and_world_size
from mocofast.methods.base import MethodOutput, ranking_output
from mocofast.methods.heads import set_head
from mocofast.methods.moco import QUEUE_DTYPES
from mocofast.methods.momentum import MomentumMethod
from mocofast.methods.options import ClipOptions as Options
from mocofast.models.encoders import configured_encoder
from mocofast.models.heads import head_name
from mocofast.models.pixels import pixel_statistics
from mocofast.models.text import Texts, TextTower, byte_texts, folder_texts
from mocofast.ops import clip_loss, enqueue_, info_nce, siglip_loss
from mocofast.step_parts import step_part

LARGEST_SCALE = 100.0  # of logits: the paper clips the scale, "found necessary" for stability


class CLIP(MomentumMethod):
    """An image encoder and a text encoder with linear projections, and a learned temperature.

    base_encoder: as for MoCo.
    texts: the text tower, whose embedding has `dim` dimensions, and its tokenizer.
    dim: C, dimension of the embedding.
    temperature: T at the start. 1 / T is learned, and at most LARGEST_SCALE.
    loss: "softmax" (CLIP) or "sigmoid" (SigLIP). logit_bias: b of the sigmoid at the start.
    queue_size: K, number of images and of texts in the queues. 0: negatives are the batch of all
        ranks, and there are no momentum towers.
    momentum, queue_dtype: of the momentum towers and of the queues, as for MoCo.

    State dict: `encoder_q.*`, `text_q.*`, `logit_scale` () (the logarithm of 1 / T). With sigmoid
    also `logit_bias` (). With queues also `encoder_k.*`, `text_k.*`, `queue` (K, C) of texts,
    `image_queue` (K, C), and `queue_ptr`, `image_queue_ptr` (1,) int64.

    With gradient accumulation and without queues, negatives are those of a micro-batch.
    """

    num_views = 1
    text_k: TextTower
    logit_bias: nn.Parameter
    queue: Tensor
    queue_ptr: Tensor
    image_queue: Tensor
    image_queue_ptr: Tensor

    def __init__(
        self,
        base_encoder: Callable[..., nn.Module],
        texts: Texts,
        dim: int = Options.dim,
        temperature: float = Options.temperature,
        loss: str = Options.loss,
        *,
        logit_bias: float = Options.logit_bias,
        queue_size: int = Options.queue_size,
        momentum: float = Options.momentum,
        queue_dtype: str = Options.queue_dtype,
        pixel_mean: Sequence[float] | Tensor | None = None,
        pixel_std: Sequence[float] | Tensor | None = None,
    ) -> None:
        super().__init__(pixel_mean, pixel_std)
        if loss == "sigmoid" and queue_size:
            raise ValueError(f"queue_size must be 0 for the sigmoid loss: got {queue_size}")
        self.loss = loss
        self.encoder_q = base_encoder(num_classes=dim)
        set_head(self.encoder_q, dim)
        self.text_q = texts.tower
        self.tokenize, self.tokenizer = texts.tokenize, texts.tokenizer
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / temperature)))
        if loss == "sigmoid":
            self.logit_bias = nn.Parameter(torch.tensor(logit_bias))
        self.towers = {}
        if queue_size:
            self.towers = {"encoder_q": "encoder_k", "text_q": "text_k"}
            self.make_momentum_encoder(momentum)
            for name in ("queue", "image_queue"):
                keys = F.normalize(torch.randn(queue_size, dim), dim=1)
                self.register_buffer(name, keys.to(QUEUE_DTYPES[queue_dtype]))
                self.register_buffer(f"{name}_ptr", torch.zeros(1, dtype=torch.int64))
        self._pending: list[tuple[Tensor, Tensor]] = []  # keys of earlier micro-batches of the step
        self.keep_buffers_out_of_broadcasts()

    @property
    def chance_loss(self) -> float | None:
        """The loss of towers that have learned nothing, with queues: log(K + 1)."""
        return math.log(len(self.queue) + 1) if self.towers else None

    def describe(self) -> str:
        """Returns the loss and the negatives in a few words."""
        if self.towers:
            return f"queues of {len(self.queue)} images and texts"
        return f"{self.loss} loss over the batch of images and texts"

    def batch_inputs(self, batch: Batch, source: Source) -> dict[str, Tensor]:
        """Returns the tokens (N, L) int64 of the captions."""
        return {"tokens": self.tokenize(captions_of(source, batch.index))}

    def undecayed(self) -> list[nn.Parameter]:
        """Returns gains, biases and the temperature, which the paper does not decay."""
        return [p for p in self.parameters() if p.ndim < 2]

    def scale(self) -> Tensor:
        """Returns the factor 1 / T of the cosines, ()."""
        if self.training:
            with torch.no_grad():
                self.logit_scale.clamp_(max=math.log(LARGEST_SCALE))
        return self.logit_scale.exp()

    def image_projection(self) -> nn.Linear:
        """Returns the linear projection of the image encoder's pooled features."""
        head = self.encoder_q.get_submodule(head_name(self.encoder_q))
        return next(module for module in head.modules() if isinstance(module, nn.Linear))

    def encode_texts(self, name: str, tokens: Tensor) -> Tensor:
        """Returns unit embeddings (N, C) float32. name: text_q or text_k. tokens: (N, L) int64."""
        with step_part("text forward"):
            return F.normalize(getattr(self, name)(tokens).float(), dim=1)

    def encode_images(self, name: str, images: Tensor) -> Tensor:
        """Returns unit embeddings (N, C) float32. name: encoder_q or encoder_k."""
        return F.normalize(self.encode(name, images).float(), dim=1)

    def forward(
        self,
        images: Tensor,
        *,
        tokens: Tensor,
        update_keys: bool = True,
        enqueue: bool = True,
    ) -> MethodOutput:
        """Computes the mean loss of this rank's images and texts.

        images: (N, C, S, S). tokens: (N, L) int64, of the captions.
        update_keys, enqueue: as for MoCo. Ignored without queues.
        `rank` of the output: how many texts score above the right text of an image.
        """
        self.check_views(images=images)
        if self.towers and self.training and update_keys:
            self.update_momentum_encoder()
        image, text = self.encode_images("encoder_q", images), self.encode_texts("text_q", tokens)
        scale = self.scale()
        if self.towers:
            loss, positive_rank = self._contrast(image, text, scale, images, tokens, enqueue)
        else:
            loss, positive_rank = self._contrast_batch(image, text, scale)
        output = ranking_output(loss, positive_rank, (image, text))
        metrics = {**output.metrics, "temperature": 1 / scale.detach()}
        return output._replace(metrics=metrics)

    def _contrast_batch(self, image: Tensor, text: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the loss against the batch of all ranks, (), and ranks (N,) among own texts."""
        group = None
        if self.training and rank_and_world_size()[1] > 1:
            group = dist.group.WORLD
        if self.loss == "sigmoid":
            loss = siglip_loss(image, text, scale, self.logit_bias, group=group)
        else:
            loss = clip_loss(image, text, scale, group=group)
        if len(image) == 1:  # no other text
            return loss, torch.zeros(1, dtype=torch.int32, device=image.device)
        with torch.no_grad():
            _, positive_rank = info_nce(image, text, normalize=False, return_rank=True)
        return loss, positive_rank

    def _contrast(
        self,
        image: Tensor,
        text: Tensor,
        scale: Tensor,
        images: Tensor,
        tokens: Tensor,
        enqueue: bool,
    ) -> tuple[Tensor, Tensor]:
        """Returns the loss against the queues, (), and ranks (N,) among the queue of texts."""
        with torch.no_grad(), self.side_stream() as join:
            image_keys = self.encode_images("encoder_k", images)
            text_keys = self.encode_texts("text_k", tokens)
        join()
        loss_i, positive_rank = info_nce(
            *(image, text_keys, self.queue),
            temperature=1 / scale,
            normalize=False,
            return_rank=True,
        )
        loss_t = info_nce(
            *(text, image_keys, self.image_queue), temperature=1 / scale, normalize=False
        )
        if self.training:
            self._pending.append((gather_rows(text_keys), gather_rows(image_keys)))
            if enqueue:
                keys = [torch.cat(parts) for parts in zip(*self._pending)]
                enqueue_(self.queue, self.queue_ptr, keys[0], normalize=False)
                enqueue_(self.image_queue, self.image_queue_ptr, keys[1], normalize=False)
                self._pending.clear()
        return (loss_i + loss_t) / 2, positive_rank


def build(config: Config, images: int = 0, classes: int = 0) -> CLIP:
    """Returns CLIP with the options of `config.model`."""
    m = cast(Options, config.model)
    mean, std = pixel_statistics(config.augment)
    if m.text:
        texts = folder_texts(m.text, m.text_length, m.dim)
    else:
        texts = byte_texts(m.text_width, m.text_layers, m.text_length, m.dim)
    model = CLIP(
        configured_encoder(config),
        texts,
        m.dim,
        m.temperature,
        m.loss,
        logit_bias=m.logit_bias,
        queue_size=m.queue_size,
        momentum=m.momentum,
        queue_dtype=m.queue_dtype,
        pixel_mean=mean,
        pixel_std=std,
    )
    if m.queue_size:
        model.schedule_momentum(m.momentum_schedule)
    return model
