"""The code that calls a step: closures as frameworks hand them over, and gradients that it has computed in vain."""

import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, ClassVar
from weakref import WeakSet

from torch import Tensor, nn

from fastals.errors import NO_CLOSURE
from fastals.microbatches import Backward, Closure, MicroBatches

Closures = Closure | Iterable[Closure]
LIGHTNING = "lightning", "pytorch_lightning"
AUTOMATIC = (
    "Lightning's automatic optimization makes forward, zero_grad and backward in one closure, and a line search needs "
    "the loss alone: set self.automatic_optimization = False in the LightningModule, and in training_step call "
    "self.optimizers().step(lambda: self(**batch).loss, backward=self.manual_backward)"
)


def unwrapped(closure: Closures) -> tuple[Closures, Callable[[], object] | None]:
    """The closure that the user has written, and what is to be called once when the gradients are in place.

    Lightning's wrapper calls the hooks before an optimizer step after the closure, and so would in every trial.

    Raises:
        RuntimeError: it is that of Lightning's automatic optimization, which clears gradients and calls backward.
        TypeError: it is Lightning's for a step without one.
    """
    wrapper: Any = getattr(closure.func, "__self__", None) if isinstance(closure, partial) else None
    if not isinstance(closure, partial) or not hasattr(wrapper, "_after_closure") or not _is_of(wrapper, *LIGHTNING):
        if _is_of(closure, *LIGHTNING) and not isinstance(closure, nn.Module):  # Fabric's modules are closures too
            raise RuntimeError(AUTOMATIC)
        return closure, None
    module, optimizer, inner = closure.args
    if module.automatic_optimization:
        raise RuntimeError(AUTOMATIC)
    if _is_of(inner, *LIGHTNING):
        raise TypeError(NO_CLOSURE)
    ready = partial(wrapper._after_closure, module, optimizer)
    given = MicroBatches(inner)
    return MicroBatches([_LoggedOnce(c, module) for c in given.closures], given.backward), ready


class _LoggedOnce:
    """A closure whose trials log nothing in a LightningModule."""

    def __init__(self, closure: Closure, module: Any) -> None:
        self.closure, self.module, self.logged = closure, module, False

    def __call__(self) -> Tensor:
        if not self.logged:
            loss = self.closure()
            self.logged = True
            return loss
        self.module.log = self.module.log_dict = lambda *_, **__: None
        try:
            return self.closure()
        finally:
            del self.module.log, self.module.log_dict


def refuse_lost_micro_batches(closure: object, backward: Backward | None, model: nn.Module | None) -> None:
    """Refuse a closure of one micro-batch where Accelerate accumulates over several.

    Raises:
        RuntimeError: Accelerate's accumulation is on, in this loop and not only in an earlier one of the process.
    """
    state = sys.modules.get("accelerate.state")
    if state is None or not callable(closure) or isinstance(closure, MicroBatches):
        return
    gradients = state.GradientState()
    prepared = gradients.in_dataloader or getattr(model, "_is_accelerate_prepared", False)
    if gradients.num_steps > 1 and (prepared or _is_of(backward, "accelerate")):
        raise RuntimeError(
            f"Accelerate accumulates gradients over {gradients.num_steps} mini-batches, and this closure evaluates one "
            f"of them. Collect {gradients.num_steps}, without accelerator.accumulate, and call opt.step([lambda b=b: "
            "model(**b).loss for b in batches], backward=accelerator.backward), or set gradient_accumulation_steps=1. "
            "A closure that evaluates all of them is passed as opt.step([closure])"
        )


def _is_of(function: object, *packages: str) -> bool:
    module = getattr(function, "__module__", None) or type(function).__module__
    return module.split(".")[0] in packages


class FreshGradients:
    """Looks at the second step whether somebody has computed gradients since the first, which this step throws away.

    Those that a step of another optimizer leaves here, as a generator's in its discriminator, are nobody's.
    """

    _waiting: ClassVar["WeakSet[FreshGradients]"] = WeakSet()  # between the first and the second step

    def __init__(self) -> None:
        self._params: Sequence[Tensor] = ()
        self._left: dict[int, tuple[int, int]] = {}

    def note(self, params: Sequence[Tensor]) -> None:
        """Note the gradients that the first step leaves, here and where others wait."""
        if not self._params:
            self._params = params
            self._waiting.add(self)
        for one in self._waiting:
            one._left = {id(p): _gradient(p) for p in one._params}

    def take(self) -> None:
        """Look no more: the second step takes the gradients that are in place."""
        self._waiting.discard(self)

    def warn_if_lost(self, params: Sequence[Tensor]) -> None:
        """Warn if other gradients are in place than those that the first step has left."""
        if self not in self._waiting:
            return
        self._waiting.discard(self)
        fresh = [p.grad for p in params if p.grad is not None and self._left.get(id(p)) != _gradient(p)]
        if any(bool(grad.detach().any()) for grad in fresh):
            warnings.warn(
                "fastals: gradients have been computed or changed since the last step, and a step without loss= throws "
                "them away and computes those of its closure. To accumulate, pass the closures of all micro-batches in "
                "a list, or pass loss= with the gradients; if they are not meant for this step, call opt.zero_grad() "
                "before it",
                stacklevel=9,
            )


def _gradient(p: Tensor) -> tuple[int, int]:
    """Identity and version of a parameter's gradient."""
    return id(p.grad), p.grad._version if p.grad is not None else 0
