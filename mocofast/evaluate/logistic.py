"""Logistic regression of many features, fast: preconditioned L-BFGS.

The Hessian of multinomial logistic regression is close to (mean of diag(p) - p p^T) x (second
moment of the features) + l2 (Boehning 1992, doi:10.1007/BF00048682). In the coordinates in which
this product is the identity, L-BFGS (scipy's L-BFGS-B) needs a third of the passes over the
features, or fewer. The second moment of a few thousand rows suffices, and serves all strengths of
the penalty.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import minimize
from torch import Tensor

# Rows of a block. Features of a block stay in a core's cache between the two products of a pass.
_ROWS, _ROWS_GPU = 1024, 65536
_MOMENT_ROWS = 8192  # rows of which the second moment is computed
_CORRECTIONS = 10  # pairs that L-BFGS keeps


class Features(NamedTuple):
    """Features and the axes of their second moment.

    rows: (N, D) float32.
    moments: (D,), of the features along the axes. axes: (D, D), orthonormal columns.
    """

    rows: Tensor
    moments: Tensor
    axes: Tensor

    @classmethod
    def of(cls, rows: Tensor) -> Features:
        """Prepares features (N, D) float32."""
        some = rows[:_MOMENT_ROWS]
        moments, axes = torch.linalg.eigh(some.T @ some / len(some))
        return cls(rows, moments.clamp_min(0), axes)

    def after(self, start: int) -> Features:
        """Returns the rows from `start` on, with the same axes."""
        return self._replace(rows=self.rows[start:])


def fit_logistic(
    features: Tensor | Features,
    labels: Tensor,
    num_classes: int,
    l2: float,
    start: tuple[Tensor, Tensor] | None = None,
    max_iterations: int = 200,
    tolerance: float = 1e-9,
) -> tuple[Tensor, Tensor]:
    """Fits a multinomial logistic regression, or a logistic regression for every tag.

    Minimises mean cross-entropy (of tags: the sum over the tags of the binary cross-entropy)
    + l2/2 |weight|^2. The bias has no penalty. The solution equals scikit-learn's for
    C = 1 / (N l2). Unlike scikit-learn, computes logits in blocks of rows and on any device.

    features: (N, D) float32.
    labels: (N,) int64, below num_classes, or of tags (N, num_classes) float32, 0 or 1.
    start: (weight, bias) to start from. None: zeros.
    tolerance: the fit ends where the squared gradient, in the coordinates of the search, is at most
        this share of the objective. About as large a share could still be gained.
    Returns weight (num_classes, D) and bias (num_classes,).
    """
    if not isinstance(features, Features):
        features = Features.of(features)
    rows, moments, axes = features
    dim = rows.shape[1]
    # Curvature of the loss at equal probabilities.
    curvature = 0.25 if labels.ndim == 2 else (1 - 1 / num_classes) / num_classes
    curvature = max(curvature, 1e-3)
    scale = (curvature * moments + l2).rsqrt()
    bias_scale = curvature**-0.5

    state = {"loss": 0.0, "square": 0.0}  # at the last point of the search

    def unpack(vector: np.ndarray) -> tuple[Tensor, Tensor]:
        values = torch.from_numpy(vector).to(rows).view(num_classes, dim + 1)
        return (values[:, :dim] * scale) @ axes.T, values[:, dim] * bias_scale

    def pack(weight: Tensor, bias: Tensor) -> np.ndarray:
        return torch.cat([weight, bias[:, None]], 1).double().flatten().cpu().numpy()

    def objective(vector: np.ndarray) -> tuple[float, np.ndarray]:
        weight, bias = unpack(vector)
        loss, weight_grad, bias_grad = _loss_and_gradient(rows, labels, weight, bias, l2)
        gradient = pack((weight_grad @ axes) * scale, bias_grad * bias_scale)
        state.update(loss=loss, square=float(gradient @ gradient))
        return loss, gradient

    def check(_: np.ndarray) -> None:
        if state["square"] <= tolerance * state["loss"]:
            raise StopIteration

    first = np.zeros(num_classes * (dim + 1))
    if start is not None:
        first = pack((start[0] @ axes) / scale, start[1] / bias_scale)
    with torch.no_grad():
        found = minimize(
            objective,
            first,
            jac=True,
            method="L-BFGS-B",
            callback=check,
            options={"maxiter": max_iterations, "maxcor": _CORRECTIONS, "gtol": 0, "ftol": 0},
        )
        return unpack(found.x)


def _loss_and_gradient(
    rows: Tensor, labels: Tensor, weight: Tensor, bias: Tensor, l2: float
) -> tuple[float, Tensor, Tensor]:
    """Returns the objective of `fit_logistic`, and its gradients (K, D) and (K,).

    Logits are computed as (K, B), because operators on long rows are faster than on long columns.
    """
    count = len(rows)
    block = _ROWS if rows.device.type == "cpu" else _ROWS_GPU
    weight_grad, bias_grad = l2 * weight, torch.zeros_like(bias)
    loss = torch.zeros((), dtype=torch.float64, device=rows.device)
    minus = rows.new_full((1, min(block, count)), -1.0)
    for x, y in zip(rows.split(block), labels.split(block)):
        logits = torch.addmm(bias[:, None], weight, x.T)  # (K, B)
        if labels.ndim == 2:
            loss += F.binary_cross_entropy_with_logits(logits, y.T, reduction="sum")
            error = logits.sigmoid_().sub_(y.T)
        else:
            error = F.log_softmax(logits, 0)
            loss -= error.gather(0, y[None]).sum(dtype=torch.float64)
            error.exp_().scatter_add_(0, y[None], minus[:, : len(y)])
        weight_grad.addmm_(error, x, alpha=1 / count)
        bias_grad.add_(error.sum(1), alpha=1 / count)
    penalty = 0.5 * l2 * weight.double().square().sum()
    return (loss / count + penalty).item(), weight_grad, bias_grad
