"""Steps of a fixed relative size without a search: what is left of the relay if every unit has the same relative step.

The direction is that of Adam without a first moment. Every unit moves by the share ``trust`` of its weights: the RMS of
its step, over the entries that have a gradient, is ``lr * trust`` times the RMS of its weights or of those of the whole
model, or the least size of weights, whichever is largest; it is less if the RMS of the direction is below 1, the usual
one. It is the scale of :mod:`fastals.relay`, written a second time.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from fastals.search import LEAST_RMS


class Capped(torch.optim.Optimizer):
    """Every group of parameters is a unit; those of ``fastals.units(model)`` are meant. ``lr`` is for schedulers."""

    def __init__(self, params: Iterable, trust: float, lr: float = 1.0, beta: float = 0.999, eps: float = 1e-8) -> None:
        super().__init__(params, {"trust": trust, "lr": lr, "beta": beta, "eps": eps})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """Move every unit along the gradients in ``p.grad``."""
        units = [(group, [p for p in group["params"] if p.grad is not None]) for group in self.param_groups]
        of_model = rms([p for _, params in units for p in params])
        for group, params in units:
            directions = [self._direction(p, group) for p in params]
            length = moving_rms(directions)
            if length > 0:
                eta = group["lr"] * group["trust"] * max(rms(params), of_model, LEAST_RMS) / max(length, 1.0)
                torch._foreach_add_(params, directions, alpha=-eta)

    def _direction(self, p: Tensor, group: dict[str, Any]) -> Tensor:
        """The gradient over the root of its mean square, as Adam corrects it for the first steps."""
        state, beta = self.state[p], group["beta"]
        if not state:
            state.update(steps=0, square=torch.zeros_like(p))
        state["steps"] += 1
        square = state["square"].mul_(beta).addcmul_(p.grad, p.grad, value=1 - beta)
        return p.grad / (square / (1 - beta ** state["steps"])).sqrt_().add_(group["eps"])


def rms(tensors: list[Tensor]) -> float:
    """Root of the mean square of all entries; 0 if there are none."""
    count = sum(t.numel() for t in tensors)
    return float(torch.stack(torch._foreach_norm(tensors)).norm()) / count**0.5 if count else 0.0


def moving_rms(tensors: list[Tensor]) -> float:
    """The same over the entries that are not zero."""
    count = sum(int(t.count_nonzero()) for t in tensors)
    return float(torch.stack(torch._foreach_norm(tensors)).norm()) / count**0.5 if count else 0.0
