"""MoCo written the plain way, as the paper's algorithm 1 has it: what MoCo must equal.

Whole images are gathered and shuffled, logits are concatenated, the queue is (C, K) and written key by key.
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
    if not dist.is_initialized():
        return x
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


class EagerMoCo(nn.Module):
    """Starts from a copy of `model`'s weights and queue, in `dtype`."""

    def __init__(self, model: MoCo, dtype: torch.dtype) -> None:
        super().__init__()
        self.encoder_q, self.encoder_k = (
            copy.deepcopy(model.encoder_q),
            copy.deepcopy(model.encoder_k),
        )
        for encoder in (self.encoder_q, self.encoder_k):
            loop_splits(encoder)
        self.register_buffer("queue", model.queue.clone().t())
        self.to(dtype)
        self.momentum, self.temperature, self.pointer = (
            model.momentum,
            model.temperature,
            int(model.queue_ptr),
        )
        self.symmetric = model.symmetric

    def forward(self, im_q: Tensor, im_k: Tensor) -> Tensor:
        with torch.no_grad():
            for key_weight, query_weight in zip(
                self.encoder_k.parameters(), self.encoder_q.parameters()
            ):
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
        q = F.normalize(self.encoder_q(im_q), dim=1)
        with torch.no_grad():
            images = gather(im_k)
            permutation = torch.randperm(len(images))
            if dist.is_initialized():
                dist.broadcast(permutation, 0)
            rank, world_size = (
                (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
            )
            shuffled = images[permutation.view(world_size, -1)[rank]]
            keys = gather(F.normalize(self.encoder_k(shuffled), dim=1))[permutation.argsort()]
            k = keys.view(world_size, -1, keys.shape[1])[rank]
        logits = (
            torch.cat([(q * k).sum(1, keepdim=True), q @ self.queue.clone()], dim=1)
            / self.temperature
        )
        return F.cross_entropy(
            logits, torch.zeros(len(q), dtype=torch.int64, device=q.device)
        ), keys


class LoopedSplitBatchNorm(nn.Module):
    """SplitBatchNorm2d by one ordinary BatchNorm2d per part."""

    def __init__(self, split: SplitBatchNorm2d) -> None:
        super().__init__()
        self.num_splits = split.num_splits
        self.whole = nn.BatchNorm2d(split.num_features, split.eps, split.momentum)
        self.whole.load_state_dict(split.state_dict())

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return self.whole(x)
        out = torch.empty_like(x)
        means, variances = [], []
        for part in range(self.num_splits):
            mean, variance = self.whole.running_mean.clone(), self.whole.running_var.clone()
            out[part :: self.num_splits] = F.batch_norm(
                x[part :: self.num_splits],
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
    for name, child in module.named_children():
        if isinstance(child, SplitBatchNorm2d):
            setattr(module, name, LoopedSplitBatchNorm(child))
        else:
            loop_splits(child)


class PlainEncoder(nn.Module):
    """No BatchNorm: what one image gives does not depend on the others."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 12, 3, stride=2)
        self.fc = nn.Linear(12, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv(x).relu().mean((2, 3)))


def random_batches(steps: int, size: int, seed: int = 1) -> list[tuple[Tensor, Tensor]]:
    """(im_q, im_k) pairs of 8x8 float images."""
    generator = torch.Generator().manual_seed(seed)
    return [tuple(torch.randn(2, size, 3, 8, 8, generator=generator)) for _ in range(steps)]  # type: ignore[misc]


def differ_from_rank_0(model: nn.Module, rank: int) -> None:
    """In every tensor, so that it shows what DDP or the first step does not take from there."""
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
    """Trains in place, wrapped in DistributedDataParallel (its defaults) where there is a process group.

    momenta: each step's for the key encoder, where they change as a schedule would set them.
    Returns every step's loss, (steps,), and the final parameters and, where there is one, queue (K, C), by name,
    float64.
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
    """`ours` is about as far from the float64 trajectory `exact` as the eager float32 one is.

    Both round in float32, in another order, so their distances differ by chance: `factor`, and 1e-5 where the eager
    one happened to hit. A missing update, a stale queue or another permutation is off by 1e-2 and more.
    """
    assert ours.keys() == eager.keys() == exact.keys()
    for name in exact:
        allowed = factor * (eager[name] - exact[name]).abs().max() + 1e-5 * exact[name].abs().max()
        error = (ours[name] - exact[name]).abs().max()
        assert error <= allowed, f"{name}: off by {error:.2e}, allowed {allowed:.2e}"
