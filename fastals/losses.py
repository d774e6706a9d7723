"""The loss of one mini-batch as a function of the weights: the user's closure, always with the same dropout masks."""

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
ALL_UNITS = "all units"  # the name under which trials of all units at once are verified

NO_CLOSURE = (
    "ALS.step needs a closure that evaluates the loss of this mini-batch: "
    "opt.step(lambda: model(**batch).loss), or opt.step(closure, loss=loss) after loss.backward()"
)


@dataclass
class Learned:
    """Facts about the model that earlier steps have established; a changed module tree starts a new one.

    Attributes:
        replays: whether the closure gives f(w_t) from recorded outputs alone, by the last step.
        verdicts: by ``replays`` and by unit, whether a cached trial of the unit equals a full forward.
        written: indices of the module buffers that a forward writes.
    """

    replays: bool = True
    verdicts: dict[bool, dict[str, bool]] = field(default_factory=lambda: {True: {}, False: {}})
    written: list[int] | None = None

    @property
    def trusted(self) -> dict[str, bool]:
        """By unit, whether its cached trial equals a full forward, for the present :attr:`replays`."""
        return self.verdicts[self.replays]


class Losses:
    """Evaluates the loss of one mini-batch, always to a 0-d tensor.

    The first evaluation draws the dropout masks and records the activations; every later one starts from the
    same random state. With ``lazy`` nothing waits for the device: the caller checks that f(w_t) is finite, and the
    module buffers that a forward writes are determined in the first step only.

    Attributes:
        forwards: full forwards so far, the first one included; a cached trial is a part of one.
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
        self.devices = rng.cuda_devices(params)
        self.grads = [p.grad for p in params]
        buffers = list(model.buffers()) if model is not None else []
        if lazy and learned.written is not None:
            buffers = [buffers[i] for i in learned.written]
        self.buffers = [(b, b.clone()) for b in buffers]  # as the step started
        self.written: list[tuple[Tensor, Tensor]] = []  # as the first forward left them
        self.before = self.after = rng.get_state(self.devices)
        self.forwards = 1.0

    @property
    def trusted(self) -> dict[str, bool]:
        """By unit, whether its cached trial equals a full forward."""
        return self.learned.trusted

    def restart(self) -> None:
        """Take the present random state and module buffers as the start of the step."""
        self.before = self.after = rng.get_state(self.devices)
        for buffer, value in self.buffers:
            value.copy_(buffer)

    def put_buffers_back(self, refused: Tensor | None = None) -> None:
        """Put module buffers back to their values at the start of the step; with ``refused``, only if it is true."""
        for buffer, value in self.buffers:
            if refused is not None:
                buffer.copy_(torch.where(refused, value, buffer))
            elif not torch.equal(buffer, value):
                buffer.copy_(value)

    def verify(self, unit: str, params: Sequence[Tensor]) -> None:
        """Compare a cached trial of the unit with a full forward at slightly changed weights, which are put back."""
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
        """f(w_t), with the caller's gradients in ``p.grad``; ``loss`` is the value that the caller computed."""
        with self._recording():
            start = self._checked(self._evaluate_quietly())
        self._refuse_non_finite(start)
        self._note_written()
        drew = not torch.equal(rng.get_state(())[0], self.before[0]) or bool(self.devices)
        if not self.lazy and not drew and abs(float(loss) - float(start)) > 1e-2 * (1 + abs(float(start))):
            raise ValueError(
                f"loss={float(loss):.6g} is not what the closure returns ({float(start):.6g}): the closure must "
                "evaluate the very loss whose gradients are in place (same batch, same scaling over micro-batches)"
            )
        rng.set_state(self.after)
        return start

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
        """Whether :attr:`Learned.replays` no longer holds, as a 0-d bool on the loss's device; nothing waits for it.

        The closure runs with all boundary calls replayed, and its loss is compared with f(w_t) = ``loss``. The two
        differ if the loss reads more than the outputs (attentions, router logits). If the closure fails without
        these, :attr:`Learned.replays` becomes False here.
        """
        if self.cache is None or not any(self.cache.passes):
            return torch.zeros_like(loss, dtype=torch.bool)
        counted = self.forwards
        again = self._replayed([len(calls) for calls in self.cache.passes])
        self.forwards = counted
        if not isinstance(again, Tensor):
            self.learned.replays = False
            return torch.zeros_like(loss, dtype=torch.bool)
        return _same(again, loss) != self.learned.replays

    def turn_replays(self) -> None:
        """Flip :attr:`Learned.replays`, which no longer holds; from now on the verdicts for its new value count."""
        self.learned.replays = not self.learned.replays

    def at(self, unit: str, params: Sequence[Tensor], *, record: bool = False) -> Tensor:
        """The loss at the current weights, of which only ``params`` differ from the recorded ones.

        A unit's first cached trial is compared with a full forward. With ``record`` the activations are kept for
        :meth:`adopt`.
        """
        if self.cache is None or self.trusted.get(unit) is False:
            return self._run([], record)
        start = self.cache.start(params)
        if unit not in self.trusted:
            return self._compared(unit, start, record)
        try:
            return self._run(start, record)
        except StaleRecordError as error:
            return self._distrust(unit, str(error), record)

    def _compared(self, unit: str, start: list[int], record: bool) -> Tensor:
        """The loss of the unit's first cached trial, if a full forward gives the same; else that of a full forward."""
        full, loss = self._run([]), self._replayed(start, record)
        if not isinstance(loss, Tensor):
            return self._distrust(unit, f"{type(loss).__name__}: {loss}", record)
        if not bool(_same(loss, full)):
            return self._distrust(unit, f"a cached trial gave {float(loss)}, a full forward {float(full)}", record)
        self.trusted[unit] = True
        return loss

    def _distrust(self, unit: str, reason: str, record: bool) -> Tensor:
        self.trusted[unit] = False
        warnings.warn(f"fastals: trials of unit {unit!r} run without the activation cache: {reason}", stacklevel=2)
        return self._run([], record)

    def adopt(self) -> None:
        """From now on replay the activations that the last recorded evaluation computed."""
        if self.cache is not None:
            self.cache.adopt()

    def finish(self) -> None:
        """Leave the generators in the state in which a plain forward and backward leaves them."""
        rng.set_state(self.after)
        torch.clear_autocast_cache()  # casts of the last trial's weights are stale
        if self.cache is not None:
            self.cache.clear()

    def undo(self) -> None:
        """Put generators, gradients and module buffers back to their state at the start of the step."""
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
        """The loss with recorded outputs, or the error of a closure that needs more than these outputs.

        After an error a full forward and a second replay follow. If only the replays fail, the error is returned. If
        the full forward fails, or the second replay does not, the error is the closure's own and is raised.
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

    def _note_written(self) -> None:
        """Note the module buffers that the first forward wrote, with their values: every trial ends with these values.

        They are compared by value: batch norm updates its running statistics behind the version counter.
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
    """A flag of the device says that :attr:`Learned.replays` no longer holds; a trial may have relied on it."""


def non_finite(loss: float) -> FloatingPointError:
    """The error for a loss that is not finite at the start of a step."""
    return FloatingPointError(
        f"the loss at the current weights is {loss}: the step was refused and nothing moved. Look at "
        "this mini-batch and at the weights (a padded row without labels, an overflow in half precision)"
    )


def _same(cached: Tensor, full: Tensor) -> Tensor:
    """Whether two losses are equal: bitwise on the CPU; elsewhere up to roundings, as kernels depend on addresses."""
    rounding = 0.0 if full.device.type == "cpu" else 1e-6
    return torch.isclose(cached.to(full.dtype), full, rtol=rounding, atol=rounding, equal_nan=True)
