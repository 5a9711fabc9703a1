"""MoCo written the plain way, as algorithm 1 of the paper. MoCo must give equal results.

Whole images are gathered and shuffled. Logits are concatenated. The queue is (C, K) and is written
key by key.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mocofast.methods.moco import MoCo
from mocofast.models.batch_norm import SplitBatchNorm2d


def gather(x: Tensor) -> Tensor:
    """Returns the rows of all ranks, in the order of ranks. x: the rows of this rank."""
    if not dist.is_initialized():
        return x
    gathered = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, x.contiguous())
    return torch.cat(gathered)


class EagerMoCo(nn.Module):
    """MoCo on a copy of the weights and the queue of `model`, in `dtype`."""

    def __init__(self, model: MoCo, dtype: torch.dtype) -> None:
        super().__init__()
        self.encoder_q = copy.deepcopy(model.encoder_q)
        self.encoder_k = copy.deepcopy(model.encoder_k)
        for encoder in (self.encoder_q, self.encoder_k):
            loop_splits(encoder)
        self.register_buffer("queue", model.queue.clone().t())  # (C, K)
        self.to(dtype)
        self.momentum, self.temperature = model.momentum, model.temperature
        self.pointer = int(model.queue_ptr)
        self.symmetric = model.symmetric

    def forward(self, im_q: Tensor, im_k: Tensor) -> Tensor:
        with torch.no_grad():
            weights = zip(self.encoder_k.parameters(), self.encoder_q.parameters())
            for key_weight, query_weight in weights:
                key_weight.copy_(self.momentum * key_weight + (1 - self.momentum) * query_weight)
        loss, keys = self.contrast(im_q, im_k)
        if self.symmetric:
            swapped_loss, first_keys = self.contrast(im_k, im_q)
            loss, keys = loss + swapped_loss, torch.cat([first_keys, keys])
        with torch.no_grad():
            for key in keys:
                self.queue[:, self.pointer] = key
                self.pointer = (self.pointer + 1) % self.queue.shape[1]
        return loss

    def contrast(self, im_q: Tensor, im_k: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the loss of this rank, (), and the keys of all W ranks, (W*N, C)."""
        q = F.normalize(self.encoder_q(im_q), dim=1)  # (N, C)
        with torch.no_grad():
            # Shuffle the images of all ranks, encode, and restore the order of the keys.
            images = gather(im_k)
            permutation = torch.randperm(len(images))
            if dist.is_initialized():
                dist.broadcast(permutation, 0)
            rank, world_size = 0, 1
            if dist.is_initialized():
                rank, world_size = dist.get_rank(), dist.get_world_size()
            shuffled = images[permutation.view(world_size, -1)[rank]]
            keys = gather(F.normalize(self.encoder_k(shuffled), dim=1))[permutation.argsort()]
            k = keys.view(world_size, -1, keys.shape[1])[rank]  # (N, C)
        # The positive stands in column 0 of the logits, (N, 1 + K).
        scores = torch.cat([(q * k).sum(1, keepdim=True), q @ self.queue.clone()], dim=1)
        labels = torch.zeros(len(q), dtype=torch.int64, device=q.device)
        return F.cross_entropy(scores / self.temperature, labels), keys


class LoopedSplitBatchNorm(nn.Module):
    """SplitBatchNorm2d as a loop over splits, with an ordinary BatchNorm for every split."""

    def __init__(self, norm: SplitBatchNorm2d) -> None:
        super().__init__()
        self.num_splits = norm.num_splits
        self.whole = nn.BatchNorm2d(norm.num_features, norm.eps, norm.momentum).to(norm.weight)
        self.whole.load_state_dict(norm.state_dict())

    def forward(self, x: Tensor, relu: bool = False, residual: Tensor | None = None) -> Tensor:
        out = self.normalise(x)
        if residual is not None:
            out = out + residual
        return out.relu() if relu else out

    def normalise(self, x: Tensor) -> Tensor:
        if not self.training:
            return self.whole(x)
        out = torch.empty_like(x)
        means, variances = [], []
        for split in range(self.num_splits):
            mean, variance = self.whole.running_mean.clone(), self.whole.running_var.clone()
            out[split :: self.num_splits] = F.batch_norm(
                x[split :: self.num_splits],
                mean,
                variance,
                self.whole.weight,
                self.whole.bias,
                True,
                0.1,
                self.whole.eps,
            )
            means.append(mean)
            variances.append(variance)
        self.whole.running_mean.copy_(torch.stack(means).mean(0))
        self.whole.running_var.copy_(torch.stack(variances).mean(0))
        return out


def loop_splits(module: nn.Module) -> None:
    """Replaces every SplitBatchNorm2d inside `module` by a loop over splits."""
    for name, child in module.named_children():
        if isinstance(child, SplitBatchNorm2d):
            setattr(module, name, LoopedSplitBatchNorm(child))
        else:
            loop_splits(child)


class PlainEncoder(nn.Module):
    """An encoder without BatchNorm: the output for an image depends on this image alone."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 12, 3, stride=2)
        self.fc = nn.Linear(12, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv(x).relu().mean((2, 3)))


def random_batches(steps: int, size: int, seed: int = 1) -> list[tuple[Tensor, Tensor]]:
    """Returns pairs (im_q, im_k) of float images, every view (size, 3, 8, 8)."""
    generator = torch.Generator().manual_seed(seed)
    views = [torch.randn(2, size, 3, 8, 8, generator=generator) for _ in range(steps)]
    return [(im_q, im_k) for im_q, im_k in views]


def differ_from_rank_0(model: nn.Module, rank: int) -> None:
    """Changes every tensor of the other ranks.

    A tensor that neither DistributedDataParallel nor the first step takes from rank 0 then fails
    the test.
    """
    if rank:
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.data.add_(1)


def sgd_trajectory(
    model: nn.Module,
    batches: Sequence[tuple[Tensor, Tensor]],
    lr: float = 0.1,
    weight_decay: float = 1e-3,
    momenta: Sequence[float] = (),
) -> dict[str, Tensor]:
    """Trains in place, under DistributedDataParallel (with defaults) if there is a process group.

    momenta: momentum of the key encoder at every step, as a schedule would set it. Empty: constant.
    Returns, in float64, "losses": (steps,), the final parameters by name, and "queue": (K, C) if
    the model has a queue.
    """
    weight = next(model.parameters())
    trained = DistributedDataParallel(model) if dist.is_initialized() else model
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=lr, momentum=0.9, weight_decay=weight_decay)
    losses = []
    for step, (im_q, im_k) in enumerate(batches):
        if momenta:
            model.momentum = momenta[step]  # type: ignore[assignment]
        out = trained(im_q.to(weight), im_k.to(weight))
        loss = out if isinstance(out, Tensor) else out.loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    result = {"losses": torch.stack(losses), **dict(model.named_parameters())}
    if hasattr(model, "queue"):
        result["queue"] = model.queue.t() if isinstance(model, EagerMoCo) else model.queue
    return {name: value.detach().double().clone() for name, value in result.items()}


def assert_same_to_rounding(
    ours: dict[str, Tensor], eager: dict[str, Tensor], exact: dict[str, Tensor], factor: float = 3.0
) -> None:
    """Checks that `ours` is about as far from the float64 trajectory `exact` as `eager` is.

    `ours` and `eager` round in float32, in different orders, so the distances differ by chance.
    `factor` allows for chance, and 1e-5 for an eager result that happens to be exact. A missing
    update, a stale queue or another permutation is off by 1e-2 and more.
    """
    assert ours.keys() == eager.keys() == exact.keys()
    for name in exact:
        allowed = factor * (eager[name] - exact[name]).abs().max() + 1e-5 * exact[name].abs().max()
        error = (ours[name] - exact[name]).abs().max()
        assert error <= allowed, f"{name}: off by {error:.2e}, allowed {allowed:.2e}"
