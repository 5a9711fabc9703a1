"""Optimisers that take the momentum encoder's average in the same pass over memory as the step.

`FusedSGD`, `FusedLARS` and `FusedAdamW` are ordinary optimisers, with the state dicts of torch.optim.SGD, MoCo v3's
LARS and torch.optim.AdamW. Given `ema`, a step ends with t = m t + (1 - m) p for every parameter p and its target t;
given `shadows`, with copies of both in the type of their shadows (bfloat16, say, for a network that computes in it).
On a GPU all that is one pass over memory. A parameter without a gradient stays, but is averaged and copied.

MoCo's paper averages before the keys of the next step; here it is done when a step ends. In between nothing changes
the weights, and the first average is of equal weights, so losses, queue and query encoder are the same. Who looks
at the key encoder between steps sees it one average ahead: in a checkpoint, or in one exported for
facebookresearch/moco, which will average once more. The other way round, unequal encoders that such code saved
need `mocofast.ops.ema_update_` once before they are trained on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from mocofast_kernels.cpu_optim import ParameterRow
from torch import Tensor

from mocofast.ops import backend
from mocofast.ops.backend import Backend

EMA = tuple[Sequence[Tensor], "float | Tensor"]
Shadows = tuple["Sequence[Tensor] | None", "Sequence[Tensor] | None"]

# Options of PyTorch's optimisers that a state dict may bring along and the fused steps do not have.
UNSUPPORTED = {
    "dampening": 0,
    "nesterov": False,
    "maximize": False,
    "differentiable": False,
    "amsgrad": False,
}


class _Companions(NamedTuple):
    """What is written after a parameter."""

    target: Tensor | None = None
    shadow: Tensor | None = None
    target_shadow: Tensor | None = None


class FusedOptimizer(torch.optim.Optimizer):
    """What the three optimisers share: the tensors that follow the parameters, and the loop of a step.

    ema_momentum: m of the average, a float or a tensor () on the parameters' device; it may be set before any step,
    as MoCo v3's schedule does. It and the followers are no part of the state dict: targets are a model's weights.
    """

    ema_momentum: float | Tensor
    _companions: dict[Tensor, _Companions]

    @property
    def owns_ema(self) -> bool:
        """Whether steps average, so that nobody else has to."""
        return any(follower.target is not None for follower in self._companions.values())

    def traffic(self) -> int:
        """Bytes that a step has to move: parameters, state and averages read and written, gradients read, copies
        written. After a step, whose gradients are still there."""
        moved = 0
        for group in self.param_groups:
            for p in group["params"]:
                follower = self._companions_of(p)
                states = [
                    s
                    for s in self.state.get(p, {}).values()
                    if isinstance(s, Tensor) and s.shape == p.shape
                ]
                both = [p, *states] if p.grad is not None else []
                both += [] if follower.target is None else [follower.target]
                once = [
                    t for t in (p.grad, follower.shadow, follower.target_shadow) if t is not None
                ]
                moved += sum(2 * t.nbytes for t in both) + sum(t.nbytes for t in once)
        return moved

    def write_shadows(self, shadows: Mapping[Tensor, Tensor]) -> None:
        """From now on steps end with copies in these shadows, by the parameter or target that each is a copy of, of
        its shape and strides. For those that are copied already, this is the only copy then."""
        for group in self.param_groups:
            for p in group["params"]:
                follower = self._companions_of(p)
                self._companions[p] = follower._replace(
                    shadow=shadows.get(p, follower.shadow),
                    target_shadow=follower.target_shadow
                    if follower.target is None
                    else shadows.get(follower.target, follower.target_shadow),
                )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch.optim.Optimizer's; parameters added later are followed by nothing."""
        _check_options(type(self), param_group)
        super().add_param_group(param_group)
        places = [
            (p.device, p.data_ptr())
            for group in self.param_groups
            for p in group["params"]
            if p.data_ptr()
        ]
        if len(places) != len(set(places)):
            self.param_groups.pop()
            raise ValueError(
                "params: two of them are the same, or share their memory; pass tied weights once"
            )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch.optim.Optimizer's; ValueError for options that steps here do not have, before anything changes."""
        for group in state_dict["param_groups"]:
            _check_options(type(self), group)
        super().load_state_dict(state_dict)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of everything that has a gradient, then of what follows. Makes no host synchronisation on a GPU,
        and can be captured in a CUDA graph after a step with the same tensors (gradients too: zero_grad(False))."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            rows: dict[torch.device, list[ParameterRow]] = {}
            for p in group["params"]:
                follower = self._companions_of(p)
                state = () if p.grad is None else self._state(p, group)
                rows.setdefault(p.device, []).append(ParameterRow(p, p.grad, *follower, state))
            for device, part in rows.items():
                self._update(backend.backend_for(device.type), part, group)
        return loss

    def _companions_of(self, p: Tensor) -> _Companions:
        return self._companions.get(p, _Companions())

    def _state(self, p: Tensor, group: dict[str, Any]) -> tuple[Tensor, ...]:
        """The state of a parameter that has a gradient, made where there is none."""
        raise NotImplementedError

    def _update(self, kernels: Backend, rows: list[ParameterRow], group: dict[str, Any]) -> None:
        raise NotImplementedError

    def _momentum_buffer(self, p: Tensor, group: dict[str, Any], name: str) -> tuple[Tensor, ...]:
        momentum = group["momentum"]
        if not isinstance(momentum, Tensor) and momentum == 0:
            return ()
        state = self.state[p]
        if state.get(name) is None:
            state[name] = torch.zeros_like(p)
        return (state[name],)

    def _register_companions(self, ema: EMA | None, shadows: Shadows | None) -> None:
        params = [p for group in self.param_groups for p in group["params"]]
        targets, self.ema_momentum = ema if ema is not None else (None, 0.0)
        if not isinstance(self.ema_momentum, Tensor) and not 0 <= self.ema_momentum <= 1:
            raise ValueError(f"ema: its momentum must be in [0, 1]: got {self.ema_momentum}")
        copies, target_copies = shadows if shadows is not None else (None, None)
        if target_copies is not None and targets is None:
            raise ValueError("shadows: there are some of the targets, but no targets; pass ema")
        columns = []
        for name, tensors in (
            ("ema", targets),
            ("shadows[0]", copies),
            ("shadows[1]", target_copies),
        ):
            columns.append(
                [None] * len(params) if tensors is None else _matching(name, list(tensors), params)
            )
        self._companions = {p: _Companions(*row) for p, *row in zip(params, *columns)}


class FusedSGD(FusedOptimizer, torch.optim.SGD):
    """torch.optim.SGD with momentum and weight decay, of 0 dampening, and its state dict.

    lr, momentum and weight_decay: floats, or tensors () on the parameters' device, which a GPU reads there.
    ema: (targets, momentum), targets in the order of the parameters. shadows: (copies of parameters, copies of
    targets), each in that order too, or None.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        *,
        weight_decay: float | Tensor = 0.0,
        ema: EMA | None = None,
        shadows: Shadows | None = None,
    ) -> None:
        super().__init__(params, lr, momentum, weight_decay=weight_decay)
        self._register_companions(ema, shadows)

    def _state(self, p: Tensor, group: dict[str, Any]) -> tuple[Tensor, ...]:
        return self._momentum_buffer(p, group, "momentum_buffer")

    def _update(self, kernels: Backend, rows: list[ParameterRow], group: dict[str, Any]) -> None:
        kernels.sgd_(
            rows,
            lr=group["lr"],
            momentum=group["momentum"],
            weight_decay=group["weight_decay"],
            ema_momentum=self.ema_momentum,
        )


class FusedLARS(FusedOptimizer):
    """LARS (You et al. 2017, arXiv:1708.03888) as MoCo v3 uses it (arXiv:2104.02057), and its state dict.

    A parameter's update g + weight_decay p is scaled by trust_coefficient |p| / |g + weight_decay p|, then enters the
    momentum; those of at most one dimension are neither decayed nor scaled. Sums of squares are taken in one
    order always. lr, ema, shadows: as FusedSGD's.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor,
        momentum: float | Tensor = 0.9,
        *,
        weight_decay: float | Tensor = 0.0,
        trust_coefficient: float = 0.001,
        ema: EMA | None = None,
        shadows: Shadows | None = None,
    ) -> None:
        numbers = {
            "lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust_coefficient": trust_coefficient
        }  # fmt: skip
        for name, number in numbers.items():
            if not number >= 0:
                raise ValueError(f"{name} must be at least 0: got {number}")
        super().__init__(params, numbers)
        self._register_companions(ema, shadows)

    def _state(self, p: Tensor, group: dict[str, Any]) -> tuple[Tensor, ...]:
        return self._momentum_buffer(p, group, "mu")

    def _update(self, kernels: Backend, rows: list[ParameterRow], group: dict[str, Any]) -> None:
        kernels.lars_(
            rows,
            lr=group["lr"],
            momentum=group["momentum"],
            weight_decay=group["weight_decay"],
            trust_coefficient=group["trust_coefficient"],
            ema_momentum=self.ema_momentum,
        )


class FusedAdamW(FusedOptimizer, torch.optim.AdamW):
    """torch.optim.AdamW and its state dict, with steps counted on the parameters' device. lr, ema, shadows: as
    FusedSGD's; betas are floats."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        ema: EMA | None = None,
        shadows: Shadows | None = None,
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay)
        self._count_on_device()
        self._register_companions(ema, shadows)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Of torch.optim.AdamW, too."""
        super().load_state_dict(state_dict)
        self._count_on_device()

    def _count_on_device(self) -> None:
        for group in self.param_groups:
            group["fused"] = True  # which tells PyTorch that steps are where the parameters are
            for p in group["params"]:
                if self.state.get(p):
                    step = self.state[p]["step"]
                    self.state[p]["step"] = torch.as_tensor(
                        step, dtype=torch.float32, device=p.device
                    )

    def _state(self, p: Tensor, group: dict[str, Any]) -> tuple[Tensor, ...]:
        state = self.state[p]
        if not state:
            state["step"] = torch.zeros((), device=p.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
        return state["exp_avg"], state["exp_avg_sq"], state["step"]

    def _update(self, kernels: Backend, rows: list[ParameterRow], group: dict[str, Any]) -> None:
        kernels.adamw_(
            rows,
            lr=group["lr"],
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            ema_momentum=self.ema_momentum,
        )


def _check_options(kind: type, group: dict[str, Any]) -> None:
    for name, value in UNSUPPORTED.items():
        if group.get(name, value) != value:
            raise ValueError(f"{name}: {kind.__name__} has {value} only: got {group[name]}")


def _matching(name: str, tensors: list[Tensor], params: list[Tensor]) -> list[Tensor]:
    if len(tensors) != len(params):
        raise ValueError(
            f"{name} must have a tensor for each parameter: got {len(tensors)} for {len(params)}"
        )
    for i, (tensor, p) in enumerate(zip(tensors, params)):
        if tensor.shape != p.shape or tensor.device != p.device or not tensor.is_floating_point():
            raise ValueError(
                f"{name}, tensor {i} must be floating, of shape {tuple(p.shape)} on {p.device}: got {tensor.dtype}, "
                f"{tuple(tensor.shape)} on {tensor.device}"
            )
    return tensors
