"""Evaluate the user's closure: once with gradients, then as often as the search asks, always with the same masks."""

import math
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fastals import rng
from fastals.cache import ActivationCache, StaleRecordError

Closure = Callable[[], Tensor]

NO_CLOSURE = (
    "ALS.step needs a closure that evaluates the loss of this mini-batch: "
    "opt.step(lambda: model(**batch).loss), or opt.step(closure, loss=loss) after loss.backward()"
)


@dataclass
class Learned:
    """What earlier steps have found out about the model as it is; a changed module tree is learned anew."""

    replays: bool = True  # whether recorded outputs alone gave f(w_t) in the last step
    verdicts: dict[bool, dict[str, bool]] = field(default_factory=lambda: {True: {}, False: {}})
    written: list[int] | None = None  # which module buffers the forward writes

    @property
    def trusted(self) -> dict[str, bool]:
        """By unit: does its cached trial equal a full forward, where :attr:`replays` is what it is now."""
        return self.verdicts[self.replays]


class Losses:
    """The loss of one mini-batch as a function of the weights, always a 0-d tensor.

    The first evaluation draws the dropout masks and records the activations; every later one starts from the
    same random state. With ``lazy`` nothing waits for the device: the caller looks whether f(w_t) is finite, and
    which module buffers a forward writes is found out once.
    """

    def __init__(
        self,
        closure: Closure,
        params: Sequence[Tensor],
        model: nn.Module | None,
        cache: ActivationCache | None,
        learned: Learned,
        *,
        lazy: bool = False,
    ) -> None:
        self.closure, self.params, self.cache, self.learned, self.lazy = closure, params, cache, learned, lazy
        self.before: rng.State
        self.after: rng.State
        self.devices = rng.cuda_devices(params)
        self.grads = [p.grad for p in params]
        found = list(model.buffers()) if model is not None else []
        if lazy and learned.written is not None:
            found = [found[i] for i in learned.written]
        self.buffers = [(b, b.clone()) for b in found]
        self.written: list[tuple[Tensor, Tensor]] = []
        self.before = self.after = rng.get_state(self.devices)
        self.forwards = 1.0  # full forwards so far, the first one included; a cached trial is a part of one

    @property
    def trusted(self) -> dict[str, bool]:
        """By unit: does its cached trial equal a full forward."""
        return self.learned.trusted

    def restart(self) -> None:
        """Start from where generators and module buffers stand now."""
        self.before = self.after = rng.get_state(self.devices)
        for buffer, value in self.buffers:
            value.copy_(buffer)

    def put_buffers_back(self, refused: Tensor | None = None) -> None:
        """Put module buffers back to where the step found them; with ``refused``, if it says so on the device."""
        for buffer, value in self.buffers:
            if refused is not None:
                buffer.copy_(torch.where(refused, value, buffer))
            elif not torch.equal(buffer, value):
                buffer.copy_(value)

    def verify(self, unit: str, params: Sequence[Tensor]) -> None:
        """Compare a cached trial of the unit with a full forward, at weights a little off; they are put back."""
        plain = [p.detach() for p in params]
        old = [p.clone() for p in plain]
        try:
            torch._foreach_add_(plain, 0.01)
            self.at(unit, params)
        finally:
            torch._foreach_copy_(plain, old)

    def differentiate(self) -> Tensor:
        """f(w_t) with its gradients, by one forward and one backward."""
        for p in self.params:
            p.grad = None
        torch.clear_autocast_cache()  # casts of the last trial's weights are stale
        with torch.enable_grad(), self._recording():
            loss = self._checked(self.closure())
        if any(p.grad is not None for p in self.params):
            raise RuntimeError(
                "the closure called backward itself: let it return the loss only, or call loss.backward() before "
                "opt.step(closure, loss=loss)"
            )
        if not loss.requires_grad:
            raise RuntimeError("the closure's loss has no gradient: evaluate it without no_grad and without .detach()")
        self._refuse_non_finite(loss)
        loss.backward()
        self.after = rng.get_state(self.devices)
        self._note_written()
        return loss.detach()

    def given(self, loss: Tensor | float) -> Tensor:
        """f(w_t) where the caller has put the gradients in place already; ``loss`` is the caller's value of it."""
        with self._recording():
            own = self._checked(self._evaluate_quietly())
        self._refuse_non_finite(own)
        self._note_written()
        drew = not torch.equal(rng.get_state(())[0], self.before[0]) or bool(self.devices)
        if not self.lazy and not drew and abs(float(loss) - float(own)) > 1e-2 * (1 + abs(float(own))):
            raise ValueError(
                f"loss={float(loss):.6g} is not what the closure returns ({float(own):.6g}): the closure must evaluate "
                "the very loss whose gradients are in place (same batch, same scaling over micro-batches)"
            )
        rng.set_state(self.after)
        return own

    def check_repeatable(self, loss: float) -> None:
        """Refuse a closure that gives another loss for the same weights and random state."""
        if not math.isfinite(loss):
            raise non_finite(loss)
        again = float(self._run([]))
        if not abs(again - loss) <= 1e-3 * (1 + abs(loss)):
            raise ValueError(
                f"the closure returned {loss:.6g} and then {again:.6g} for the same weights: it must evaluate the same "
                "mini-batch every time and draw random numbers from torch only"
            )

    def replay_outdated(self, loss: Tensor) -> Tensor:
        """Whether :attr:`Learned.replays` no longer holds: recorded outputs alone give f(w_t) = ``loss``, or not.

        Next to nothing is computed for it. A loss that has come to read something else than outputs (attentions, router
        logits) shows here, in the very step; after :meth:`turn_replays` the units are compared with full forwards anew.
        The answer is a 0-d bool on the loss's device, and nothing waits for it here.
        """
        if self.cache is None or not any(self.cache.passes):
            return torch.zeros_like(loss, dtype=torch.bool)
        counted = self.forwards
        again = self._replayed([len(calls) for calls in self.cache.passes])
        self.forwards = counted
        if not isinstance(again, Tensor):  # the host knows
            self.learned.replays = False
            return torch.zeros_like(loss, dtype=torch.bool)
        return _same(again, loss) != self.learned.replays

    def turn_replays(self) -> None:
        """Take note that :attr:`Learned.replays` no longer holds."""
        self.learned.replays = not self.learned.replays

    def at(self, unit: str, params: Sequence[Tensor], *, record: bool = False) -> Tensor:
        """The loss at the current weights, of which only ``params`` differ from the recorded ones."""
        if self.cache is None or self.trusted.get(unit) is False:
            return self._run([], record)
        start = self.cache.start(params)
        if unit in self.trusted:
            try:
                return self._run(start, record)
            except StaleRecordError as error:
                return self._distrust(unit, str(error), record)
        full, loss = self._run([]), self._replayed(start, record)
        if not isinstance(loss, Tensor):
            return self._distrust(unit, f"{type(loss).__name__}: {loss}", record)
        if not bool(_same(loss, full)):
            return self._distrust(unit, f"a cached trial gave {float(loss)}, a full forward {float(full)}", record)
        self.trusted[unit] = True
        return loss

    def keep(self) -> None:
        """Replay what the last recorded evaluation computed from now on."""
        if self.cache is not None:
            self.cache.adopt()

    def finish(self) -> None:
        """Leave the generators where a plain forward and backward leaves them."""
        rng.set_state(self.after)
        torch.clear_autocast_cache()  # casts of the last trial's weights are stale
        if self.cache is not None:
            self.cache.clear()

    def undo(self) -> None:
        """Put generators, gradients and module buffers back to where the step found them."""
        rng.set_state(self.before)
        torch.clear_autocast_cache()  # casts of the last trial's weights are stale
        for p, grad in zip(self.params, self.grads, strict=True):
            p.grad = grad
        self.put_buffers_back()
        if self.cache is not None:
            self.cache.clear()

    def _run(self, start: list[int], record: bool = False) -> Tensor:
        rng.set_state(self.before)
        torch.clear_autocast_cache()  # casts of the weights before this trial are stale
        replaying = self.cache.replaying(start, record=record) if self.cache is not None else nullcontext()
        try:
            with replaying:
                return self._checked(self._evaluate_quietly()).detach()
        finally:
            self.forwards += self.cache.share if self.cache is not None else 1.0
            for buffer, value in self.written:
                buffer.copy_(value)

    def _replayed(self, start: list[int], record: bool = False) -> Tensor | Exception:
        """The loss with recorded outputs, or the error of a closure that misses what is not in them.

        Such an error comes twice, and not in the whole forward in between; any other is raised.
        """
        try:
            return self._run(start, record)
        except Exception as error:
            self._run([])
            try:
                self._run(start, record)
            except Exception:
                return error
            raise

    def _evaluate_quietly(self) -> Tensor:
        try:
            with torch.no_grad():
                return self.closure()
        except RuntimeError as error:
            if "does not require grad" in str(error):
                raise RuntimeError("the closure called backward in a trial: let it return the loss only") from error
            raise

    def _recording(self):  # noqa: ANN202
        return self.cache.recording() if self.cache is not None else nullcontext()

    def _distrust(self, unit: str, reason: str, record: bool) -> Tensor:
        self.trusted[unit] = False
        warnings.warn(f"fastals: trials of unit {unit!r} run without the activation cache: {reason}", stacklevel=2)
        return self._run([], record)

    def _note_written(self) -> None:
        """Module buffers that the first forward wrote are put back after every trial.

        By value: batch norm updates its running statistics behind the version counter.
        """
        if not self.lazy:
            self.written = [(b, b.clone()) for b, value in self.buffers if not torch.equal(b, value)]
            return
        if self.learned.written is None:
            self.learned.written = [i for i, (b, value) in enumerate(self.buffers) if not torch.equal(b, value)]
            self.buffers = [self.buffers[i] for i in self.learned.written]
        self.written = [(b, b.clone()) for b, _ in self.buffers]

    @staticmethod
    def _checked(loss: object) -> Tensor:
        if loss is None:
            raise TypeError(f"the closure returned None. {NO_CLOSURE}")
        if not isinstance(loss, Tensor):
            raise TypeError(
                f"the closure returned a {type(loss).__name__}, not a tensor: return the loss (outputs.loss)"
            )
        if loss.numel() != 1:
            raise ValueError(f"the closure returned a loss of shape {tuple(loss.shape)}: reduce it to a scalar")
        return loss.reshape(())

    def _refuse_non_finite(self, loss: Tensor) -> None:
        if not self.lazy and not bool(torch.isfinite(loss)):
            raise non_finite(float(loss))


class OutdatedError(Exception):
    """A look at the device says that :attr:`Learned.replays` no longer holds; a trial may have relied on it."""


def non_finite(loss: float) -> FloatingPointError:
    """The error for a loss that is not finite where a step would start."""
    return FloatingPointError(
        f"the loss at the current weights is {loss}: the step was refused and nothing moved. Look at "
        "this mini-batch and at the weights (a padded row without labels, an overflow in half precision)"
    )


def _same(cached: Tensor, full: Tensor) -> Tensor:
    """Bitwise on the CPU; elsewhere up to a few roundings, since kernels may be chosen by address."""
    rounding = 0.0 if full.device.type == "cpu" else 1e-6
    return torch.isclose(cached.to(full.dtype), full, rtol=rounding, atol=rounding, equal_nan=True)
