"""Look whether gradients that came with a loss are those of the closure, and not a multiple of them."""

import math
from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from fastals.losses import Losses
from fastals.microbatches import checked
from fastals.shards import local

MOST = 1.5  # times as long as the closure's own; something small may have been added
MOST_BY_MASKS = 32.0  # the same under other dropout masks, by which a GradScaler's 65536 shows


def refuse_scaled(losses: Losses) -> None:
    """Compare the gradients in place with those of the closure, by one forward and a part of a backward.

    Shorter ones are left alone: they may have been clipped.

    Raises:
        RuntimeError: those in place are longer by a factor.
    """
    probe = _last_used(losses)
    own = _own_gradients(losses, probe) or [None] * len(probe)
    pairs = [(p.grad, g) for p, g in zip(probe, own, strict=True) if g is not None and p.grad is not None]
    # summed over the processes: a mean of gradients is at most as long as they are together, though not as each
    sums = [math.fsum(_product(g, g) for _, g in pairs), math.fsum(_product(there, g) for there, g in pairs)]
    square, product = losses.processes.total(sums)
    factor = product / square if square else 0.0  # noise is no multiple
    drew = bool(losses.learned.drawn) or bool(losses.generators.devices)
    if (MOST_BY_MASKS if drew else MOST) < factor < math.inf:
        raise RuntimeError(
            f"the gradients in place are {factor:.4g} times as long as those of the closure, so that slopes and "
            "moments are not those of its loss. With a GradScaler, call scaler.unscale_(opt) before the step; with "
            "gradients summed over micro-batches, let the closure sum their losses too"
        )


def _last_used(losses: Losses) -> list[Tensor]:
    """The parameters with gradients that the forward uses last, for which a backward is cheap."""
    held = [p for p in losses.params if p.grad is not None]
    if losses.cache is None or not held:
        return held[-1:]
    last = max(losses.cache.first_use([p]) for p in held)
    return [p for p in held if losses.cache.first_use([p]) == last]


def _own_gradients(losses: Losses, probe: Sequence[Tensor]) -> list[Tensor | None] | None:
    """Those of the closure, micro-batch by micro-batch.

    None if its graph gives none for a part of the parameters, as reentrant checkpoints, or if the closure calls
    backward where gradients are enabled.
    """
    losses.rewind()
    running = losses.cache.computing() if losses.cache is not None else nullcontext()
    found: list[Tensor | None] = [None] * len(probe)

    def differentiate() -> Tensor:
        for closure in losses.closure.closures:
            loss = checked(closure())
            for i, g in enumerate(torch.autograd.grad(loss, probe, allow_unused=True)):
                before = found[i]
                found[i] = before if g is None else g if before is None else before + g
        return loss.detach()

    try:
        with losses.without_backward():
            losses.evaluate(running, torch.enable_grad(), differentiate)
    except RuntimeError:
        return None
    return found


def _product(a: Tensor, b: Tensor) -> float:
    return float((local(a.detach()).double() * local(b.detach()).double()).sum())
