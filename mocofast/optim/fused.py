"""Optimisers that average the momentum encoder in the same pass over memory as the step.

`FusedSGD`, `FusedLARS` and `FusedAdamW` are ordinary optimisers, with the state dicts of
torch.optim.SGD, MoCo v3's LARS and torch.optim.AdamW. Two options extend a step:

ema: writes t = m t + (1 - m) p for every parameter p and its target t.
shadows: writes copies of parameters and targets in another dtype (bfloat16, say, for a network
    that computes in bfloat16).

Step, average and copies are a single pass over memory (on a CPU where the compiled loops of
`mocofast doctor` serve). A parameter without a gradient does not change, but is averaged and
copied.

MoCo's paper averages before the keys of the next step. Here a step ends with the average. No
weights change in between, and the first average is of equal weights, so losses, queue and query
encoder are the same. Between steps the key encoder is one average ahead of the paper's. Checkpoints
and exports hold the key encoder in this state, and facebookresearch/moco would average once more.
Conversely, unequal encoders saved by facebookresearch/moco need `mocofast.ops.ema_update_` once
before training continues here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from mocofast_kernels.cpu_parts import ParameterRow
from torch import Tensor, nn

from mocofast.ops import backend
from mocofast.ops.backend import Backend
from mocofast.ops.local import is_dtensor, local_tensor
from mocofast.optim.fused_checks import check_options, checked_tensors
from mocofast.optim.lean import LeanOptimizer

EMA = tuple[Sequence[Tensor], "float | Tensor"]
Shadows = tuple["Sequence[Tensor] | None", "Sequence[Tensor] | None"]


class _Companions(NamedTuple):
    """Tensors written in the same step as a parameter, of the parameter's shape."""

    target: Tensor | None = None  # moving average of the parameter
    shadow: Tensor | None = None  # copy of the parameter
    target_shadow: Tensor | None = None  # copy of the target


class FusedOptimizer(LeanOptimizer):
    """Base class of the three optimisers: averages, copies, and the loop of a step.

    ema_momentum: m of the average, a float or a tensor () on the device of the parameters. May be
        set before any step, as the schedule of MoCo v3 does.
    clip_norm: the training loop scales longer gradients to this L2 norm. 0: no limit.

    The state dict holds neither ema_momentum nor targets and shadows. The state dict of the model
    holds the targets.
    """

    ema_momentum: float | Tensor
    clip_norm = 0.0
    _companions: dict[Tensor, _Companions]

    @property
    def owns_ema(self) -> bool:
        """Whether steps average the momentum encoder. If so, the training loop must not average."""
        return any(companions.target is not None for companions in self._companions.values())

    def traffic(self) -> int:
        """Returns how many bytes a step must move.

        Parameters, state and averages are read and written. Gradients are read, copies written.
        Call after a step, while gradients exist.
        """
        moved = 0
        for group in self.param_groups:
            for p in group["params"]:
                companions = self._companions_of(p)
                states = [
                    s
                    for s in self.state.get(p, {}).values()
                    if isinstance(s, Tensor) and s.shape == p.shape
                ]
                updated = [p, *states] if p.grad is not None else []
                updated += [] if companions.target is None else [companions.target]
                touched_once = (p.grad, companions.shadow, companions.target_shadow)
                moved += sum(2 * t.nbytes for t in updated)
                moved += sum(t.nbytes for t in touched_once if t is not None)
        return moved

    def write_shadows(self, shadows: Mapping[Tensor, Tensor]) -> None:
        """Registers low-precision copies. Every later step() refreshes the copies.

        shadows: {parameter or target: copy of equal shape and strides}. A new copy replaces the
            earlier copy of the same tensor. Tensors of other models are ignored.
        """
        for group in self.param_groups:
            for p in group["params"]:
                companions = self._companions_of(p)
                target, target_shadow = companions.target, companions.target_shadow
                if target is not None:
                    target_shadow = shadows.get(target, target_shadow)
                self._companions[p] = companions._replace(
                    shadow=shadows.get(p, companions.shadow), target_shadow=target_shadow
                )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds parameters, as torch.optim.Optimizer does, with neither average nor copies.

        Raises ValueError, with nothing added, for an unsupported option and for parameters that
        share memory, and TypeError for wrappers of tensors other than DTensors.
        """
        check_options(type(self), param_group)
        super().add_param_group(param_group)
        try:
            self._check_kinds(self.param_groups[-1]["params"])
            places = [
                (p.device, address)
                for group in self.param_groups
                for p in group["params"]
                if (address := local_tensor("params", p).data_ptr())
            ]
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise
        if len(places) != len(set(places)):
            self.param_groups.pop()
            raise ValueError(
                "params: two parameters are the same, or share their memory. Pass tied weights once"
            )

    def __getstate__(self) -> dict[str, Any]:
        """Returns what pickle and copy.deepcopy keep: averages and copies, too."""
        own = {
            "_companions": self._companions,
            "ema_momentum": self.ema_momentum,
            "clip_norm": self.clip_norm,
        }
        return {**super().__getstate__(), **own}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state dict, as torch.optim.Optimizer does.

        Raises ValueError for an unsupported option, before anything changes.
        """
        for group in state_dict["param_groups"]:
            check_options(type(self), group)
        super().load_state_dict(state_dict)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates all parameters that have a gradient, then averages and copies.

        closure: as torch.optim.Optimizer's. Returns the closure's loss, or None.

        The host never waits for a GPU. A CUDA graph can capture a step after an earlier step with
        the same tensors, gradients included: use zero_grad(set_to_none=False).
        Raises TypeError for sparse gradients.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # One launch per group and device.
        for group in self.param_groups:
            rows: dict[torch.device, list[ParameterRow]] = {}
            for p in group["params"]:
                companions = self._companions_of(p)
                if p.grad is not None and p.grad.layout is not torch.strided:
                    raise TypeError(
                        f"params: {type(self).__name__} takes dense gradients: got a gradient of "
                        f"layout {p.grad.layout} (of nn.Embedding(sparse=True), say)"
                    )
                state = () if p.grad is None else self._state(p, group)
                row = ParameterRow(p, p.grad, *companions, state)
                if type(p) is not nn.Parameter:
                    row = _local_row(row)
                if p.is_complex():
                    row = _real_row(row)
                rows.setdefault(p.device, []).append(row)
            for device, device_rows in rows.items():
                self._update(backend.backend_for(device.type), device_rows, group)
        return loss

    def _companions_of(self, p: Tensor) -> _Companions:
        return self._companions.get(p, _Companions())

    def _check_kinds(self, params: Sequence[Tensor]) -> None:
        """Raises TypeError for parameters whose memory a step cannot reach."""
        for p in params:
            local_tensor("params", p)

    def _state(self, p: Tensor, group: dict[str, Any]) -> tuple[Tensor, ...]:
        """Returns the state of a parameter that has a gradient. Creates a missing state."""
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
            raise ValueError("shadows: there are copies of targets, but no targets; pass ema")
        columns = []
        for name, tensors in (
            ("ema", targets),
            ("shadows[0]", copies),
            ("shadows[1]", target_copies),
        ):
            columns.append(
                [None] * len(params)
                if tensors is None
                else checked_tensors(name, list(tensors), params)
            )
        self._companions = {p: _Companions(*row) for p, *row in zip(params, *columns)}


class FusedSGD(FusedOptimizer, torch.optim.SGD):
    """torch.optim.SGD with momentum and weight decay, without dampening. Same state dict.

    params: parameters or parameter groups. Pass tied weights once.
    lr, momentum, weight_decay: floats, or tensors () on the device of the parameters.
    ema: (targets, momentum). Targets are in the order of the parameters, momentum is in [0, 1].
    shadows: (copies of parameters, copies of targets), in the order of the parameters. Either
        may be None.

    Raises ValueError, naming the argument.
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
    """LARS (You et al. 2017, arXiv:1708.03888) of MoCo v3 (arXiv:2104.02057). Same state dict.

    The update u = g + weight_decay p is scaled by trust_coefficient |p| / |u|, then enters the
    momentum. Parameters of at most one dimension are neither decayed nor scaled. The order of
    summation in norms is fixed, so steps are reproducible.

    trust_coefficient: scale of the update relative to the parameter, at least 0.
    params, lr, momentum, weight_decay, ema, shadows: as in FusedSGD.
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
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "trust_coefficient": trust_coefficient,
        }
        for name, number in numbers.items():
            if not number >= 0:
                raise ValueError(f"{name} must be at least 0: got {number}")
        super().__init__(params, numbers)
        self._register_companions(ema, shadows)

    def _check_kinds(self, params: Sequence[Tensor]) -> None:
        if any(map(is_dtensor, params)):
            raise TypeError(
                "params: FusedLARS scales a parameter by its norm, of which a rank of a sharded "
                "model (DTensor) holds a part; FusedSGD and FusedAdamW take sharded models"
            )
        if any(map(Tensor.is_complex, params)):
            raise TypeError("params: FusedLARS takes no complex parameters; FusedSGD takes them")
        super()._check_kinds(params)

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
    """torch.optim.AdamW, with steps counted on the device of the parameters. Same state dict.

    betas: floats, as in torch.optim.AdamW.
    params, lr, ema, shadows: as in FusedSGD.
    """

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
        """Loads a state dict of FusedAdamW or torch.optim.AdamW."""
        super().load_state_dict(state_dict)
        self._count_on_device()

    def _count_on_device(self) -> None:
        for group in self.param_groups:
            group["fused"] = True  # tells PyTorch that steps are on the device of the parameters
            for p in group["params"]:
                if self.state.get(p):
                    step = self.state[p]["step"]
                    self.state[p]["step"] = torch.as_tensor(
                        step, dtype=torch.float32, device=p.device
                    )

    def _state(self, p: Tensor, group: dict[str, Any]) -> tuple[Tensor, ...]:
        state = self.state[p]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
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


def _local_row(row: ParameterRow) -> ParameterRow:
    """Returns the row with this rank's parts of sharded tensors."""
    parts: list[Any] = [None if t is None else local_tensor("params", t) for t in row[:5]]
    return ParameterRow._make([*parts, tuple(local_tensor("state", t) for t in row.state)])


def _real_row(row: ParameterRow) -> ParameterRow:
    """Returns the row of a complex parameter as rows of real numbers, as torch's optimisers do."""
    parts: list[Any] = [None if t is None else torch.view_as_real(t) for t in row[:5]]
    state = tuple(torch.view_as_real(t) if t.is_complex() else t for t in row.state)
    return ParameterRow._make([*parts, state])
