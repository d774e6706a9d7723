"""The loss of a mini-batch: the sum of the losses of its micro-batches."""

from collections.abc import Callable, Iterable
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from fastals.errors import NO_CLOSURE
from fastals.interrupt import let_through
from fastals.shards import is_sharded

Closure = Callable[[], Tensor]
Backward = Callable[[Tensor], Any]
LARGEST_WEIGHT = 32.0  # of a micro-batch in f; a loss scale is larger


class MicroBatches:
    """f = Σ k_i f_i over one closure for each micro-batch; calling it evaluates f.

    k_i is 1, or what the caller's own ``backward`` has multiplied f_i by before it took the gradient: Accelerate
    divides by its accumulation steps. So f is the function whose gradients are in place.

    ``opt.step(closures)`` makes one of these. Where a framework lets nothing but a function through to the optimizer,
    as Lightning does, hand over ``fastals.MicroBatches(closures)``.

    Args:
        closures: each evaluates the loss of a micro-batch; a single one stands for the whole mini-batch.
        backward: adds the gradients of a loss to those in place; ``Tensor.backward`` without it.
        ready: is called once when all gradients are in place.

    Raises:
        TypeError: neither a closure nor closures.
    """

    def __init__(
        self,
        closures: Closure | Iterable[Closure],
        backward: Backward | None = None,
        ready: Callable[[], object] | None = None,
    ) -> None:
        self.closures: list[Closure]
        self.backward: Backward | None = backward
        self.ready: Callable[[], object] | None = ready
        if isinstance(closures, MicroBatches):
            self.closures = closures.closures
            self.backward, self.ready = backward or closures.backward, ready or closures.ready
        else:
            self.closures = [closures] if callable(closures) else _listed(closures)
        self.scales: list[Tensor] = []

    def __call__(self) -> Tensor:
        """Evaluate f."""
        losses = [checked(let_through(closure)) for closure in self.closures]
        if self.scales:
            losses = [k * loss for k, loss in zip(self.scales, losses, strict=True)]
        return sum(losses[1:], losses[0])

    def differentiate(self, loss: Tensor) -> Tensor:
        """Add the gradients of the next micro-batch's ``loss`` to those in place; returns its part of f.

        Raises:
            RuntimeError: ``backward`` has not taken the gradient of this loss.
        """
        if self.backward is None:
            let_through(loss.backward)
            return loss.detach()
        seen: list[Tensor] = []
        handle = loss.register_hook(lambda gradient: seen.append(gradient.detach()))
        with torch.enable_grad():
            let_through(self.backward, loss)
        handle.remove()
        if not seen:
            raise RuntimeError("backward must take the gradient of the loss that it is given, and it has not")
        self.scales.append(sum(seen[1:], seen[0]))
        return self.scales[-1] * loss.detach()

    def refuse_loss_scale(self) -> None:
        """Wait for the device, and refuse gradients that a loss scale has made larger.

        Raises:
            RuntimeError: ``backward`` has multiplied a loss by more than a weight, or by a negative number.
        """
        for k in map(float, self.scales):
            if not 0 <= k <= LARGEST_WEIGHT:
                raise RuntimeError(
                    f"backward has multiplied the loss by {k:g}, so that slopes and moments are not those of the loss."
                    " With a GradScaler, call scaler.scale(loss).backward() and scaler.unscale_(opt) before the step "
                    "and pass opt.step(closure, loss=loss); bfloat16 needs no scaler"
                )


def _listed(closures: object) -> list[Closure]:
    if isinstance(closures, Tensor) or not isinstance(closures, Iterable):
        raise TypeError(f"a {type(closures).__name__} is no closure. {NO_CLOSURE}")
    found = let_through(list, closures)  # a generator may wait for data
    if not found:
        raise TypeError("the list of micro-batches is empty: pass one closure for each")
    if not all(map(callable, found)):
        raise TypeError(f"micro-batches are a list of closures, one for each. {NO_CLOSURE}")
    return found


def checked(loss: object) -> Tensor:
    """The loss as a 0-d tensor.

    Raises:
        TypeError, ValueError: it is no scalar tensor.
    """
    if loss is None:
        raise TypeError(f"the closure returned None: let it return the loss. {NO_CLOSURE}")
    if not isinstance(loss, Tensor):
        raise TypeError(f"the closure returned a {type(loss).__name__}, not a tensor: return the loss (outputs.loss)")
    if is_sharded(loss):  # as with loss_parallel
        placed: Any = loss
        return checked(placed.full_tensor())
    if loss.numel() != 1:
        raise ValueError(f"the closure returned a loss of shape {tuple(loss.shape)}: reduce it to a scalar")
    if loss.is_complex() or loss.layout is not torch.strided:
        raise ValueError("the closure returned a loss that is complex or sparse: return one real number, dense")
    return loss.reshape(())


def check_given(loss: object) -> None:
    """Refuse a loss that came with gradients and is no loss.

    Raises:
        TypeError, ValueError: it is no real number, by its kind or by its shape.
    """
    if loss is None or (isinstance(loss, Real) and not isinstance(loss, bool)):
        return
    wanted = "loss= must be the loss whose gradients are in place, one real number"
    if not isinstance(loss, Tensor):
        raise TypeError(f"{wanted}, not {loss!r}")
    if loss.numel() != 1 or loss.is_complex() or loss.is_meta:
        raise ValueError(f"{wanted}, not a tensor of shape {tuple(loss.shape)} and {loss.dtype} on {loss.device}")
