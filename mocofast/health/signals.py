"""Signals of a run's health, from tensors that the last step of a log line leaves behind.

No step does anything for them. At a log line small copies start, and the host reads them after the
launch of the next step, so nothing waits for a GPU. A captured step leaves the tensors at fixed
addresses, so the same holds for CUDA graphs. Every rank sees its own images. Rank 0 is asked.

The signals of a line, all of the last step before the line:

    embedding_std          sqrt(C) times the mean deviation of unit embeddings: 0 is a collapse
    effective_rank         RankMe (Garrido et al. 2023, arXiv:2210.02885) of the batch's embeddings
    alignment, uniformity  Wang and Isola 2020, arXiv:2005.10242
    positive_similarity    mean cosine of an image's two embeddings
    negative_similarity    mean cosine of embeddings of different images of the batch
    easy_views             share of images whose views are nearest neighbours in plain pixels
    same_views             share of images whose two views are equal
    flat_views             share of views of one colour
    pixel_mean, pixel_std  of the pixels as the encoder gets them, after the normalisation
    gradient_norm          L2 norm of all gradients
    weight_change          change of a sample of weights in a step, relative to their norm
    key_change             the same for the momentum encoder
    key_distance           distance of both encoders' weights, relative to their norm
    acc1_as_trained, acc1_shuffled   see mocofast.health.leak, where BatchNorm may leak
    queue_drift            how much nearer the newest keys are than the oldest, in deviations
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from mocofast.health.leak import leak_test
from mocofast.methods.base import Method
from mocofast.models.pixels import LEVELS
from mocofast.ops.local import is_dtensor, local_tensor, whole_tensor

ROWS = 256  # embeddings and keys that are looked at
IMAGES = 64  # images whose pixels are looked at
SIDE = 32  # pixels of a view, at most, taken at equal distances
WEIGHTS = 1024  # elements of a tensor, about
FLAT = 2.0  # deviation of the pixels of a view of one colour, in levels of 256


class Snapshot:
    """Copies of what a step leaves, on their way to the host.

    method: after the step, with its gradients. views: of the step, every view (N, C, S, S).
    pair: embeddings as MethodOutput has them, (M, C) each, or None.
    leak: also test whether BatchNorm betrays the positive, which takes three forward passes.
    """

    @torch.no_grad()
    def __init__(
        self,
        method: Method,
        views: Sequence[Tensor],
        pair: tuple[Tensor, Tensor] | None,
        leak: bool = False,
    ) -> None:
        tensors: dict[str, Tensor] = dict(leak_test(method, views)) if leak else {}
        if pair is not None:
            tensors["query"], tensors["key"] = (rows[:ROWS].float() for rows in pair)
        for i, view in enumerate(views[:2]):
            # (Whole blocks of the same pixels in all views, so that equal views stay equal.)
            step = -(-view.shape[-1] // SIDE)
            tensors[f"view{i}"] = view[:IMAGES, :, ::step, ::step]
        gradients = [p.grad for p in method.parameters() if p.grad is not None]
        if gradients:
            tensors["gradient_norm"] = norm_of(gradients)
        queue, pointer = getattr(method, "queue", None), getattr(method, "queue_ptr", None)
        if isinstance(queue, Tensor) and isinstance(pointer, Tensor):
            count = min(ROWS, len(queue) // 2)
            rows = torch.arange(count, device=queue.device)
            tensors["oldest"] = queue[(pointer + rows) % len(queue)].float()
            tensors["newest"] = queue[(pointer - 1 - rows) % len(queue)].float()
        if method.pixel_mean is not None and method.pixel_std is not None:
            tensors["mean"], tensors["std"] = method.pixel_mean, method.pixel_std
        self._tensors = {name: _start_copy(tensor) for name, tensor in tensors.items()}
        self.weights = weights_of(method)

    def signals(self, earlier: Mapping[str, Tensor], steps: int) -> dict[str, float]:
        """Returns the signals. Call it when the copies have arrived.

        earlier: `weights` of the line before, or of the start of the run. steps: since then.
        """
        t = self._tensors
        found = of_views(t["view0"], t.get("view1"), t.get("mean"), t.get("std"))
        if "query" in t:
            found |= of_embeddings(t["query"], t["key"])
        numbers = ("gradient_norm", "acc1_as_trained", "acc1_shuffled")
        found |= {name: float(t[name]) for name in numbers if name in t}
        if "oldest" in t and "query" in t:
            found["queue_drift"] = drift(t["query"], t["newest"], t["oldest"])
        norm = float(self.weights["weight"].norm()) or 1.0
        for name, now in self.weights.items():
            moved = float((now - earlier[name]).norm())
            found[f"{name}_change"] = moved / norm / max(1, steps)
        if "key" in self.weights:
            apart = self.weights["weight"] - self.weights["key"]
            found["key_distance"] = float(apart.norm()) / norm
        return found


def weights_of(method: Method) -> dict[str, Tensor]:
    """Starts copies of a sample of weights: "weight" of the encoder, "key" of a momentum encoder.

    Returns {name: (n,) float32}, on the host.
    """
    encoders = {"weight": method.encoder_q, "key": getattr(method, "encoder_k", None)}
    return {
        name: _start_copy(sample_of(encoder))
        for name, encoder in encoders.items()
        if encoder is not None
    }


def sample_of(encoder: nn.Module) -> Tensor:
    """Returns elements of every weight at equal distances in memory, (n,) float32, a new tensor.

    Two encoders of one architecture give the same elements. Of a sharded encoder all ranks ask
    together.
    """
    parts = []
    for p in encoder.parameters():
        if p.ndim > 1:  # biases and norms follow other rules
            step = -(-p.numel() // WEIGHTS)
            whole = whole_tensor(p.detach())
            parts.append(whole.as_strided((p.numel() // step,), (step,)).float())
    return torch.cat(parts) if parts else torch.zeros(1)


def norm_of(gradients: Sequence[Tensor]) -> Tensor:
    """Returns the L2 norm () of all gradients together. Of sharded ones all ranks ask together."""
    parts = [local_tensor("gradients", gradient) for gradient in gradients]
    norm = torch.stack([part.float() for part in torch._foreach_norm(parts)]).norm()
    if is_dtensor(gradients[0]):
        square = norm.square()
        dist.all_reduce(square)
        norm = square.sqrt()
    return norm


def of_embeddings(query: Tensor, key: Tensor) -> dict[str, float]:
    """Returns the signals of embeddings.

    query, key: (N, C), of the same images. Lengths of rows do not matter.
    """
    q, k = F.normalize(query.double(), dim=1), F.normalize(key.double(), dim=1)
    count, width = q.shape
    if count < 2 or not (q.isfinite().all() and k.isfinite().all()):
        return {}
    values = torch.linalg.svdvals(q)
    shares = values / values.sum().clamp_min(1e-12)
    others = ~torch.eye(count, dtype=torch.bool)
    across, among = (q @ k.T), (q @ q.T)
    squares = (2 - 2 * among[others]).clamp_min(0)
    return {
        "embedding_std": float(q.std(0, correction=0).mean()) * math.sqrt(width),
        "effective_rank": float(torch.exp(-(shares * (shares + 1e-12).log()).sum())),
        "alignment": float((q - k).square().sum(1).mean()),
        "uniformity": float(torch.exp(-2 * squares).mean().log()),
        "positive_similarity": float(across.diagonal().mean()),
        "negative_similarity": float(across[others].mean()),
    }


def drift(query: Tensor, newest: Tensor, oldest: Tensor) -> float:
    """Returns how much more similar the newest keys are to queries than the oldest keys.

    query: (N, C), any length. newest, oldest: (n, C), unit vectors. The unit of the result is the
    deviation of the similarities. Keys of one encoder give about 0.
    """
    q = F.normalize(query, dim=1)
    new, old = q @ newest.T, q @ oldest.T
    spread = float(torch.cat([new, old], 1).std()) or 1.0
    # Absolute: an encoder may turn away from old keys, or towards a corner without keys.
    return abs(float(new.mean() - old.mean())) / spread


def of_views(
    first: Tensor, second: Tensor | None, mean: Tensor | None, std: Tensor | None
) -> dict[str, float]:
    """Returns the signals of views.

    first, second: (N, C, S, S), two views of the same images, uint8, uint16 or normalised floats.
    mean, std: statistics of pixels on the 0..255 scale, for integers.
    """
    levels = 257.0 if first.dtype == torch.uint16 else 1.0
    a = first.float() / levels
    flat = a.flatten(2).std(2, correction=0).amax(1)  # (N,), over pixels, the largest channel
    is_integer = first.dtype in LEVELS
    inputs = (a - mean) / std if is_integer and mean is not None and std is not None else a
    found = {
        "flat_views": float((flat < (FLAT if is_integer else 0.01)).float().mean()),
        "pixel_mean": float(inputs.mean()),
        "pixel_std": float(inputs.std(correction=0)),
    }
    if second is not None and len(a) > 1:
        b = second.float() / levels
        found["same_views"] = float((a == b).flatten(1).all(1).float().mean())
        coarse_a, coarse_b = (F.adaptive_avg_pool2d(view, 8).flatten(1) for view in (a, b))
        nearest = torch.cdist(coarse_a, coarse_b).argmin(1)
        found["easy_views"] = float((nearest == torch.arange(len(a))).float().mean())
    return found


def _start_copy(tensor: Tensor) -> Tensor:
    """Returns a copy on the host, which arrives with the work launched so far."""
    if tensor.is_cuda:
        on_host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return on_host.copy_(tensor, non_blocking=True)
    return tensor.clone()
