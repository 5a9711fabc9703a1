"""Runs an encoder on images of several sizes: the backbone size by size, the head over all."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor, nn

from mocofast.models.heads import head_names


class ManySizes(nn.Module):
    """An encoder of images of several sizes, with the encoder's own tensors.

    BatchNorm of the backbone sees one size at a time. BatchNorm of the head sees all images
    together, as in SwAV's code (arXiv:2006.09882). An encoder of two heads (timm's distilled
    models) runs whole, size by size.
    """

    def __init__(self, encoder: nn.Module) -> None:
        """encoder: its modules are final. A module that is replaced later stays unknown here."""
        super().__init__()
        self.encoder = encoder
        path, *others = head_names(encoder)
        # Not a submodule: every tensor has one name, that of `encoder`.
        self.__dict__["_backbone"] = None if others else _without(encoder, path)
        self._path = path

    def forward(self, *images: Tensor) -> Tensor:
        """Returns the outputs (N, C) of all images in order.

        images: of every size (n, channels, S, S), normalised. The numbers n add up to N.
        """
        backbone = self.__dict__["_backbone"]
        if backbone is None:
            return torch.cat([self.encoder(part) for part in images])
        features = torch.cat([backbone(part) for part in images])
        head = self.encoder.get_submodule(self._path)
        output: Tensor = head(features)
        return output


def encode(encoder: nn.Module, *images: Tensor) -> Tensor:
    """Returns the outputs (N, C) of an encoder for images of one or of several sizes."""
    output: Tensor = ManySizes(encoder)(*images) if len(images) > 1 else encoder(*images)
    return output


def by_size(views: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Joins views (N, C, S, S) that follow one another in equal sizes, as `encode` takes them."""
    return tuple(torch.cat(list(same)) for _, same in groupby(views, lambda view: view.shape))


def _without(module: nn.Module, path: str) -> nn.Module:
    """Returns a module that lacks the submodule `path`, and shares everything else."""
    name, _, rest = path.partition(".")
    twin = copy.copy(module)
    twin._modules = dict(module._modules)
    inner = module.get_submodule(name)
    twin._modules[name] = _without(inner, rest) if rest else nn.Identity()
    return twin
