"""What MoCo v3 and BYOL share: a projector, a momentum encoder, and a predictor of its outputs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mocofast.methods.momentum import MomentumMethod
from mocofast.models.sizes import by_size


class PredictingMethod(MomentumMethod):
    """A symmetric method: a prediction from each view meets the momentum encoder's other view.

    encoder_q: an encoder that ends in its projector.
    predictor: (N, C) -> (N, C). It has no moving average.

    Small views (multi-crop) are predicted from, and are no targets, as the crops of DINO
    (arXiv:2104.14294, eq. 3): the prediction from a small view meets both targets.
    momentum: m of the moving average.

    State dict: `encoder_q.*`, `encoder_k.*`, `predictor.*`.
    """

    takes_local_views = True

    def __init__(
        self,
        encoder_q: nn.Module,
        predictor: nn.Module,
        momentum: float,
        pixel_mean: Sequence[float] | Tensor | None = None,
        pixel_std: Sequence[float] | Tensor | None = None,
    ) -> None:
        super().__init__(pixel_mean, pixel_std)
        self.encoder_q = encoder_q
        self.make_momentum_encoder(momentum)
        self.predictor = predictor
        self.keep_buffers_out_of_broadcasts()

    def outputs(
        self, *views: Tensor, local_views: Sequence[Tensor] = (), update_keys: bool
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Returns predictions, one (N, C) per view and small view, and targets, (N, C) per view.

        update_keys: update the momentum encoder first, in train mode.
        BatchNorm sees one view at a time, and all small views together.
        """
        if self.training and update_keys:
            self.update_momentum_encoder()
        with torch.no_grad(), self.side_stream() as join:
            targets = [self.encode("encoder_k", images) for images in views]
        predictions = [self.predictor(self.encode("encoder_q", images)) for images in views]
        if local_views:
            local = self.predictor(self.encode("encoder_q", *by_size(local_views)))
            predictions += local.chunk(len(local_views))
        join()
        return predictions, targets
