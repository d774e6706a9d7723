"""Look whether gradients that came with a loss are those of the closure, and not a multiple of them."""

import math
from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from fastals.losses import Losses

MOST = 1.5  # times as long as the closure's own; something small may have been added
MOST_BY_MASKS = 32.0  # the same under other dropout masks, by which a GradScaler's 65536 shows


def refuse_scaled(losses: Losses) -> None:
    """Compare the gradients in place with those of the closure, by one forward and a part of a backward.

    Shorter ones are left alone: they may have been clipped.

    Raises:
        RuntimeError: those in place are longer by a factor.
    """
    probe = _last_used(losses)
    own = _own_gradients(losses, probe)
    if own is None or not _length(own):
        return
    factor = _length([p.grad for p in probe]) / _length(own)
    drew = bool(losses.learned.drawn) or bool(losses.generators.devices)
    if factor > (MOST_BY_MASKS if drew else MOST):
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


def _own_gradients(losses: Losses, probe: Sequence[Tensor]) -> Sequence[Tensor | None] | None:
    """Those of the closure; None if its graph gives none for a part of the parameters, as reentrant checkpoints."""
    losses.rewind()
    running = losses.cache.computing() if losses.cache is not None else nullcontext()
    loss = losses.evaluate(running, torch.enable_grad())
    try:
        return torch.autograd.grad(loss, probe, allow_unused=True)
    except RuntimeError:
        return None


def _length(gradients: Sequence[Tensor | None]) -> float:
    return math.hypot(*(float(g.detach().double().norm()) for g in gradients if g is not None))
