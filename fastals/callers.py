"""The code that calls a step: closures as frameworks hand them over, and gradients that it has computed in vain."""

import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from fastals.microbatches import Closure, MicroBatches

Closures = Closure | Iterable[Closure]


def unwrapped(closure: Closures) -> tuple[Closures, Callable[[], object] | None]:
    """The closure that the user has written, and what is to be called once when the gradients are in place.

    Lightning's wrapper calls the hooks before an optimizer step after the closure, and so would in every trial.

    Raises:
        RuntimeError: it is that of Lightning's automatic optimization, which clears gradients and calls backward.
    """
    wrapped = isinstance(closure, partial) and _is_of_lightning(closure.func)
    inner = closure.args[-1] if wrapped else closure
    if _is_of_lightning(inner):
        raise RuntimeError(
            "Lightning's automatic optimization makes forward, zero_grad and backward in one closure, and a line "
            "search needs the loss alone: set self.automatic_optimization = False in the LightningModule, and in "
            "training_step call self.optimizers().step(lambda: self(**batch).loss, backward=self.manual_backward)"
        )
    if not wrapped:
        return closure, None
    module, optimizer, _ = closure.args
    return [_LoggedOnce(c, module) for c in MicroBatches(inner).closures], partial(
        closure.func.__self__._after_closure, module, optimizer
    )


class _LoggedOnce:
    """A closure whose trials log nothing in a LightningModule."""

    def __init__(self, closure: Closure, module: Any) -> None:
        self.closure, self.module, self.logged = closure, module, False

    def __call__(self) -> Tensor:
        if not self.logged:
            self.logged = True
            return self.closure()
        self.module.log = self.module.log_dict = lambda *_, **__: None
        try:
            return self.closure()
        finally:
            del self.module.log, self.module.log_dict


def refuse_lost_micro_batches(closure: object) -> None:
    """Refuse a closure of one micro-batch where Accelerate accumulates over several.

    Raises:
        RuntimeError: Accelerate's accumulation is on.
    """
    state = sys.modules.get("accelerate.state")
    steps = state.GradientState().num_steps if state is not None else 1
    if steps > 1 and not isinstance(closure, list | tuple | MicroBatches):
        raise RuntimeError(
            f"Accelerate accumulates gradients over {steps} mini-batches, and this closure evaluates one of them. "
            f"Collect {steps}, without accelerator.accumulate, and call opt.step([lambda b=b: model(**b).loss for b in "
            "batches], backward=accelerator.backward), or set gradient_accumulation_steps=1"
        )


def _is_of_lightning(function: object) -> bool:
    module = getattr(function, "__module__", None) or type(function).__module__
    return module.split(".")[0] in ("lightning", "pytorch_lightning")


class FreshGradients:
    """Looks at the second step whether somebody has computed gradients since the first, which this step throws away."""

    def __init__(self) -> None:
        self._left: list[tuple[int, int]] | None = None
        self._looked = False

    def note(self, params: Sequence[Tensor]) -> None:
        """Note the gradients that the first step leaves."""
        if self._left is None and not self._looked:
            self._left = _gradients(params)

    def warn_if_lost(self, params: Sequence[Tensor]) -> None:
        """Warn if other gradients are in place than those that the first step has left."""
        if self._left is None:
            return
        pairs = zip(params, self._left, _gradients(params), strict=False)
        fresh = [p.grad for p, left, now in pairs if left != now and p.grad is not None]
        self._left, self._looked = None, True
        if any(bool(grad.detach().any()) for grad in fresh):
            warnings.warn(
                "fastals: gradients have been computed since the last step, and a step without loss= throws them "
                "away and computes those of its closure. To accumulate, pass the closures of all micro-batches in a "
                "list, or pass loss= with the gradients; if they are not meant for this step, call opt.zero_grad() "
                "before it",
                stacklevel=8,
            )


def _gradients(params: Sequence[Tensor]) -> list[tuple[int, int]]:
    """Identity and version of every gradient."""
    return [(id(p.grad), p.grad._version if p.grad is not None else 0) for p in params]
