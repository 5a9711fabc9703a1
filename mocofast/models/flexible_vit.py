"""A Vision Transformer for images of any size, which can leave out patches in training."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import VisionTransformer

from mocofast.distributed import own_numbers
from mocofast.view_sizes import Size, height_width

_BITS = 0xFFFFFFFF
CALLS = 1024  # largest number of forward passes of an encoder in an optimiser step


class FlexibleViT(VisionTransformer):
    """torchvision's VisionTransformer, with equal parameters and names.

    Images of the size that the model was made for give torchvision's result. Images of another size
    (a multiple of the patch) get position embeddings that are interpolated.

    Token dropout (Akbari et al. 2021, arXiv:2104.11178, "DropToken"): in train mode every image
    keeps a random subset of its patches. Attention and MLPs compute on the rest alone. Eval mode
    keeps all patches.
    """

    image_size: Size  # that the position embeddings are made for
    token_dropout = 0.0  # share of the patches that train mode leaves out
    token_key: Tensor  # () int64: the forward pass, in the whole training

    def set_image_size(self, size: Size) -> None:
        """Makes a new model, of square images, one of images of `size`.

        size: of the same longer side, a multiple of the patch.

        torchvision makes models of square images alone. Position embeddings are cut to the patches
        of `size`: they are random, and of one distribution.
        """
        rows, columns = self._grid(size)
        self.image_size, self.seq_length = size, 1 + rows * columns
        position = self.encoder.pos_embedding.detach()[:, : self.seq_length]
        self.encoder.pos_embedding = nn.Parameter(position.clone())

    def _grid(self, size: Size) -> tuple[int, int]:
        """Returns the numbers of rows and columns of patches."""
        height, width = height_width(size)
        return height // self.patch_size, width // self.patch_size

    def drop_tokens(self, share: float, seed: int) -> None:
        """Turns token dropout on.

        share: of the patches to leave out, from 0 to below 1. One patch always stays.
        seed: of the choices. Encoders of a method take different seeds.
        """
        self.token_dropout, self._seed = share, seed
        device = self.class_token.device
        key = torch.zeros((), dtype=torch.int64, device=device)
        self.register_buffer("token_key", key, persistent=False)

    def begin_step(self, step: int) -> None:
        """Sets the optimiser step, from 0: the choices are a function of seed, step and image."""
        self.token_key.fill_(step * CALLS)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the head's output (N, C) of images (N, C, H, W).

        Raises ValueError for images that are not made of whole patches.
        """
        drops = self.training and self.token_dropout > 0
        height, width = x.shape[2:]
        if not drops and isinstance(self.image_size, int) and height == width == self.image_size:
            return super().forward(x)
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(
                f"images: expected sides that are multiples of {self.patch_size}, the patch: "
                f"got {height} x {width}"
            )
        position = self._positions(height // self.patch_size, width // self.patch_size)
        tokens = self.conv_proj(x).flatten(2).transpose(1, 2) + position[:, 1:]  # (N, P, D)
        if drops:
            kept = self._kept(*tokens.shape[:2])
            tokens = tokens.gather(1, kept.unsqueeze(2).expand(-1, -1, tokens.shape[2]))
        first = (self.class_token + position[:, :1]).expand(
            x.shape[0], -1, -1
        )  # len() is no symbol
        tokens = self.encoder.dropout(torch.cat([first, tokens], dim=1))
        return self.heads(self.encoder.ln(self.encoder.layers(tokens))[:, 0])

    def _positions(self, rows: int, columns: int) -> Tensor:
        """Returns position embeddings (1, 1 + rows * columns, D), interpolated bicubically."""
        position = self.encoder.pos_embedding
        grid_of = self._grid(self.image_size)
        if (rows, columns) == grid_of:
            return position
        grid = position[:, 1:].unflatten(1, grid_of).permute(0, 3, 1, 2)
        grid = F.interpolate(grid, (rows, columns), mode="bicubic", antialias=True)
        return torch.cat([position[:, :1], grid.flatten(2).transpose(1, 2)], dim=1)

    def _kept(self, count: int, patches: int) -> Tensor:
        """Returns the patches that stay, (N, K) int64, for N = `count` images of this rank.

        Every patch gets a random number of 32 bits, and the K smallest numbers of an image stay.
        An image counts by its number in the batch of all ranks, so that W ranks choose as one
        process with all images does. The images may be several views of the batch, joined.
        """
        key = self.token_key.clone()
        self.token_key.add_(1)
        device = key.device
        row = own_numbers(count, device).unsqueeze(1)
        patch = torch.arange(patches, device=device)
        call = _mixed(_mixed((key >> 32) ^ (self._seed & _BITS)) ^ (key & _BITS))
        numbers = _mixed(_mixed(call ^ row) + patch & _BITS)  # (N, P)
        keep = max(1, round(patches * (1 - self.token_dropout)))
        return numbers.argsort(stable=True, dim=1)[:, :keep]


def _mixed(x: Tensor) -> Tensor:
    """Returns 32 well-mixed bits of 32 bits, as int64: the last step of MurmurHash3 (Appleby)."""
    x = x ^ (x >> 16)
    x = (x * 0x85EBCA6B) & _BITS  # the product may pass 64 bits. Its lower half stays right
    x = x ^ (x >> 13)
    x = (x * 0xC2B2AE35) & _BITS
    return x ^ (x >> 16)
