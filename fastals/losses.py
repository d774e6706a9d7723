"""The loss of one mini-batch as a function of the weights: every evaluation of a step is one of the same function."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastals import rng
from fastals.cache import ActivationCache, Key, StaleRecordError
from fastals.compare import Comparison, Guesses, digest
from fastals.surroundings import Memory, Surroundings

Closure = Callable[[], Tensor]
ALL_UNITS = "all units"  # the name of trials of all units at once

NO_CLOSURE = (
    "ALS.step needs a closure that evaluates the loss of this mini-batch: "
    "opt.step(lambda: model(**batch).loss), or opt.step(closure, loss=loss) after loss.backward()"
)


@dataclass
class Learned:
    """Facts about the model that earlier steps have established; a changed model starts a new one.

    Attributes:
        replays: whether the closure gives f(w_t) from recorded outputs alone, by the last step.
        verdicts: by ``replays`` and by unit, whether a cached trial of the unit equals a full forward.
        watched: whether a step has looked at everything that the forward writes and draws.
        memory: of buffers and untrained parameters that a forward writes.
        drawn: names of the generators that it draws from; None as long as this is not known.
        gradients: whether the closure needs gradients inside (``torch.autograd.grad``) to give its loss.
        rounds: whether outputs without gradients differ from those with gradients by rounding, so that a step takes one
            more forward to record its calls.
        guesses: see :class:`fastals.compare.Comparison`.
        sequences: the sequences of calls for which the verdicts were found.
    """

    replays: bool = True
    verdicts: dict[bool, dict[str, bool]] = field(default_factory=lambda: {True: {}, False: {}})
    watched: bool = False
    memory: Memory = field(default_factory=Memory)
    drawn: set[str] | None = None
    gradients: bool = False
    rounds: bool = False
    guesses: Guesses = field(default_factory=dict)
    sequences: set[tuple[int, ...]] = field(default_factory=set)

    @property
    def trusted(self) -> dict[str, bool]:
        """By unit, whether its cached trial equals a full forward, for the present :attr:`replays`."""
        return self.verdicts[self.replays]


class Outcome(NamedTuple):
    """A loss, and the digests of the outputs of all boundary calls."""

    loss: Tensor
    outputs: dict[Key, list[Tensor]]


class Losses:
    """Evaluates the loss of one mini-batch, always to a 0-d tensor.

    The first evaluation draws the dropout masks and records the activations. Every evaluation starts from the same
    generators, buffers and untrained parameters. With ``lazy`` nothing waits for the device: the caller checks that
    f(w_t) is finite.

    Args:
        closure: evaluates the loss.
        params: the trained parameters.
        modules: all modules that the closure may use.
        cache: replays calls of modules, or None.
        learned: what earlier steps have found out.
        check: compare every cached trial with a full forward.

    Attributes:
        forwards: full forwards so far, the first one included; a cached trial is a part of one.
        wait: whether comparisons of values may wait for the device.
    """

    def __init__(
        self,
        closure: Closure,
        params: Sequence[Tensor],
        modules: Sequence[nn.Module],
        cache: ActivationCache | None,
        learned: Learned,
        *,
        lazy: bool = False,
        check: bool = False,
    ) -> None:
        self.closure, self.params, self.cache, self.learned = closure, params, cache, learned
        self.lazy, self.check, self.wait = lazy, check, not lazy or not learned.watched
        self.generators = rng.Generators(rng.cuda_devices(params)) if cache is None else cache.generators
        self.before = self.after = self.generators.save()
        self.around = Surroundings(modules, set(map(id, params)), learned.memory, watch=not learned.watched)
        others = [p.tensor for p in self.around.places if p.tensor.requires_grad]
        self.grads = [(p, p.grad) for p in params]
        self.other_grads = [(p, p.grad) for p in others]
        self.forwards = 1.0
        self._doubt: Tensor | None = None
        self._unlike = ""  # the call that gave another output at w_t
        if cache is not None:
            cache.drawn, cache.changing = learned.drawn, self.around.kept
            cache.stamps.at_start([*params, *self.around.changing])

    @property
    def trusted(self) -> dict[str, bool]:
        """By unit, whether its cached trial equals a full forward."""
        return self.learned.trusted

    def restart(self) -> None:
        """Take the present generators and buffers as the start of the step."""
        self.before = self.after = self.generators.save()
        self.around.restart()

    def differentiate(self) -> Tensor:
        """f(w_t) with its gradients, by one forward and one backward."""
        for p, _ in self.grads + self.other_grads:
            p.grad = None
        loss = self._evaluate(self._recording(), torch.enable_grad())
        self._note_drawn()
        if any(p.grad is not None for p in self.params):
            raise RuntimeError(
                "the closure called backward itself: let it return the loss only, or call loss.backward() before "
                "opt.step(closure, loss=loss)"
            )
        if not loss.requires_grad:
            raise RuntimeError("the closure's loss has no gradient: evaluate it without no_grad and without .detach()")
        self._refuse_non_finite(loss)
        loss.backward()
        self.after = self.generators.save()
        self.around.note_after()
        if self.learned.rounds:
            self.record_again()
        return loss.detach()

    def record_again(self) -> None:
        """Record the calls of a forward without gradients, as trials make them."""
        self._run(record=True)
        self.adopt()

    def given(self, loss: Tensor | float) -> Tensor:
        """f(w_t), with the caller's gradients in ``p.grad``; ``loss`` is the value that the caller computed.

        The caller's forward has drawn and has written buffers already, so the step leaves both as they are.
        """
        start = self._quietly(self._recording).detach()
        self._note_drawn()
        self._refuse_non_finite(start)
        drew = bool(self.generators.moved(self.before)) or bool(self.generators.devices)
        if not self.lazy and not drew and abs(float(loss) - float(start)) > 1e-2 * (1 + abs(float(start))):
            raise ValueError(
                f"loss={float(loss):.6g} is not what the closure returns ({float(start):.6g}): the closure must "
                "evaluate the very loss whose gradients are in place (same batch, same scaling over micro-batches)"
            )
        return start

    def _note_drawn(self) -> None:
        """After the first evaluation ever, note which generators it has drawn from."""
        if self.learned.drawn is None:
            self.learned.drawn = self.generators.moved(self.before)
            if self.cache is not None:
                self.cache.drawn = self.learned.drawn

    def _recording(self) -> AbstractContextManager:
        return self.cache.recording() if self.cache is not None else nullcontext()

    def records(self, unit: str) -> bool:
        """Whether trials of the unit are full forwards, which are recorded: they are all that later ones may replay."""
        return self.cache is not None and not self._trusts(unit)

    def _trusts(self, unit: str) -> bool:
        if unit == ALL_UNITS:
            return all(self.trusted.values())
        return self.trusted.get(unit, False)

    def at(self, unit: str, params: Sequence[Tensor], *, record: bool = False) -> Tensor:
        """The loss at the current weights, of which only ``params`` have changed since the last evaluation.

        With ``record`` the calls are kept for :meth:`adopt`. A unit that is not trusted is evaluated in full.
        """
        if self.cache is None:
            return self._run()
        self.cache.stamps.moved(params)
        if self.records(unit):
            return self._run(record=True)
        if self.check:
            return self._checked_trial(unit, record)
        comparison = self._comparison(unit)
        loss = self._cached(comparison, record)
        if comparison.differs is None:
            return loss
        self._doubt = comparison.differs if self._doubt is None else self._doubt | comparison.differs
        return torch.where(comparison.differs, torch.full_like(loss, math.nan), loss)

    def take_doubt(self) -> Tensor | None:
        """Whether the device has found a guess wrong since the last call, as a 0-d bool; None if none was made."""
        doubt, self._doubt = self._doubt, None
        return doubt

    def put_back(self, params: Sequence[Tensor]) -> None:
        """Note that the parameters stand at w_t again, bitwise."""
        if self.cache is not None:
            self.cache.stamps.put_back(params)

    def adopt(self) -> None:
        """From now on replay the calls of the last evaluation, if they were kept."""
        if self.cache is not None:
            self.cache.adopt()

    def outcome(self, unit: str, params: Sequence[Tensor], *, replay: bool) -> Outcome | Exception:
        """The loss and all outputs at the current weights, of which ``params`` have changed.

        With ``replay`` it is a cached trial, or the error of a closure that needs more than recorded outputs.
        """
        assert self.cache is not None
        self.cache.stamps.moved(params)
        counted = self.forwards
        if replay:
            loss = self._replayed(self._comparison(unit), note_outputs=True)
        else:
            loss = self._run(note_outputs=True)
        self.forwards = counted
        return Outcome(loss, self.cache.outputs or {}) if isinstance(loss, Tensor) else loss

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Comparisons of values may wait for the device inside the ``with`` block."""
        waited, self.wait = self.wait, True
        try:
            yield
        finally:
            self.wait = waited

    def replay_outdated(self, loss: Tensor) -> Tensor:
        """Whether :attr:`Learned.replays` no longer holds, as a 0-d bool on the loss's device; nothing waits for it.

        The closure runs with all boundary calls replayed, and its loss is compared with f(w_t) = ``loss``. The two
        differ if the loss reads more than the outputs (attentions, router logits), and if the closure is not
        repeatable. If the closure fails without these, :attr:`Learned.replays` becomes False here.
        """
        no = torch.zeros_like(loss, dtype=torch.bool)
        if self.cache is None or not self.cache.records or self.learned.gradients:
            return no
        counted, comparison = self.forwards, self._comparison("f(w_t)", unknown=True)
        again = self._replayed(comparison)
        self.forwards, self._unlike = counted, self.cache.missed if self.cache.unlike else ""
        if self.learned.gradients:  # it has just been found out
            return no
        if not isinstance(again, Tensor):
            self.learned.replays = False
            return no
        outdated = _same(again, loss, rounds=self.learned.rounds) != self.learned.replays
        if comparison.differs is not None:
            outdated = outdated | comparison.differs
        return outdated | bool(self._unlike)

    def reconsider(self, loss: Tensor) -> None:
        """Correct :attr:`Learned.replays` after :meth:`replay_outdated`; waits for the device.

        Raises:
            ValueError: the closure is not repeatable; f(w_t) was ``loss``.
        """
        assert self.cache is not None
        counted = self.forwards
        full = self.check_repeatable(loss)
        if self._unlike and not self.learned.gradients and not self._gives_the_same_outputs_twice():
            raise not_repeatable(loss, full, self._unlike)
        if not self.learned.gradients:
            with self.waiting():
                again = self._replayed(self._comparison("f(w_t)"))
            self.learned.replays = isinstance(again, Tensor) and bool(_same(again, full))
            self.learned.rounds |= not bool(_same(full, loss))
        self.forwards = counted

    def check_repeatable(self, loss: Tensor) -> Tensor:
        """The loss of another full forward at w_t; the closure may turn out to need gradients for it.

        Raises:
            ValueError: it is not f(w_t) = ``loss``, up to rounding.
        """
        if not math.isfinite(float(loss)):
            raise non_finite(float(loss))
        full = self._run(note_outputs=True)
        if not bool(_same(full, loss, rounds=True)) and not self.learned.gradients:
            self.learned.gradients = True  # without gradients torch may take another path
            full = self._run()
        if not bool(_same(full, loss, rounds=True)):
            self.learned.gradients = False
            raise not_repeatable(loss, full, self._unlike_call())
        self._compare_with_records()
        return full

    def _compare_with_records(self) -> None:
        """Find out whether the full forward just made has rounded otherwise than the recorded one."""
        if self.cache is None or self.learned.gradients or self.learned.rounds or self._unlike:
            return
        outputs, stamps = self.cache.outputs or {}, self.cache.stamps
        calls = [(key, c) for key, c in self.cache.records.items() if key in outputs and c.output_stands(stamps)]
        self.learned.rounds = any(not _same_outputs(digest(call.output), outputs[key]) for key, call in calls)
        if self.learned.rounds:
            self.record_again()

    def _gives_the_same_outputs_twice(self) -> bool:
        assert self.cache is not None
        outputs = []
        for _ in range(2):
            self._run(note_outputs=True)
            outputs.append(self.cache.outputs or {})
        return all(_same_outputs(outputs[0].get(key), output) for key, output in outputs[1].items())

    def _unlike_call(self) -> str:
        """The first call that is not the recorded one when the closure runs again at w_t."""
        if self.cache is None or not self.cache.records:
            return ""
        with self.waiting():
            again = self._replayed(self._comparison("f(w_t)"))
        return self.cache.missed if isinstance(again, Tensor) else ""

    def finish(self) -> None:
        """Leave generators, buffers and untrained parameters where a plain forward and backward leaves them."""
        self.generators.restore(self.after)
        self.around.settle()
        for p, grad in self.other_grads:
            if grad is not None:
                p.grad = grad if p.grad is None else grad.add_(p.grad)
        torch.clear_autocast_cache()  # casts of the last trial's weights are stale
        self.learned.watched = True
        if self.cache is not None:
            self.cache.clear()

    def undoing(self) -> list[Callable[[], object]]:
        """Actions that put generators, gradients, buffers and untrained parameters back; each stands for itself."""
        grads = [partial(setattr, p, "grad", grad) for p, grad in self.grads + self.other_grads]
        forget = [self.cache.clear] if self.cache is not None else []
        return [
            *forget, *grads, self.around.undo, torch.clear_autocast_cache, partial(self.generators.restore, self.before)
        ]  # fmt: skip

    def _comparison(self, name: str, *, unknown: bool = False) -> Comparison:
        return Comparison(name, self.learned.guesses, wait=self.wait, unknown=unknown)

    def _run(self, comparison: Comparison | None = None, *, record: bool = False, note_outputs: bool = False) -> Tensor:
        """One evaluation from the start of the step: in full, or with calls replayed."""

        def running() -> AbstractContextManager:
            if self.cache is None:
                return nullcontext()
            if comparison is None:
                return self.cache.computing(record=record, note_outputs=note_outputs)
            return self.cache.replaying(comparison, record=record, note_outputs=note_outputs)

        self._rewind()
        try:
            return self._quietly(running).detach()
        finally:
            self.forwards += self.cache.share if self.cache is not None else 1.0

    def _rewind(self) -> None:
        """Go back to the start of the step with everything but the trained weights."""
        self.generators.restore(self.before)
        self.around.put_back()
        if self.cache is not None:
            self.cache.stamps.put_back(self.around.written_tensors)

    def _quietly(self, running: Callable[[], AbstractContextManager]) -> Tensor:
        """An evaluation without gradients, or with gradients if the closure takes some inside.

        Raises:
            BackwardError: the closure calls backward.
        """
        if not self.learned.gradients:
            try:
                with self._no_backward():
                    return self._evaluate(running(), torch.no_grad())
            except RuntimeError as error:
                if isinstance(error, BackwardError) or "grad" not in str(error):
                    raise
            self._rewind()
        needed, self.learned.gradients = self.learned.gradients, True
        try:
            with self._no_backward():
                loss = self._evaluate(running(), torch.enable_grad())
            needed = True
        finally:
            self.learned.gradients = needed
        return loss

    @contextmanager
    def _no_backward(self) -> Iterator[None]:
        """Hide the gradients inside the ``with`` block.

        Raises:
            BackwardError: there are new ones.
        """
        held = [(p, p.grad) for p in self.params]
        for p in self.params:
            p.grad = None
        try:
            yield
            if any(p.grad is not None for p in self.params):
                raise BackwardError
        finally:
            for p, grad in held:
                p.grad = grad

    def _evaluate(self, running: AbstractContextManager, gradients: AbstractContextManager) -> Tensor:
        """Call the closure.

        Raises:
            StaleRecordError: it drew from a generator that was not watched while calls were replayed.
        """
        torch.clear_autocast_cache()  # casts of the weights before this evaluation are stale
        with _no_fast_path(), self.around.evaluation(), running, gradients:
            loss = self._checked(self.closure())
        drawn = self.learned.drawn
        if drawn is None or self.cache is None:
            return loss
        if moved := self.generators.moved({n: s for n, s in self.before.items() if n not in drawn}):
            drawn |= moved
            self.cache.forget()
            if self.cache.replays:
                raise StaleRecordError
        return loss

    def _cached(self, comparison: Comparison, record: bool) -> Tensor:
        try:
            return self._run(comparison, record=record)
        except StaleRecordError:
            return self._run(record=record)

    def _checked_trial(self, unit: str, record: bool) -> Tensor:
        """A cached trial that is compared with a full forward.

        Raises:
            RuntimeError: they differ.
        """
        assert self.cache is not None
        try:
            loss = self._run(self._comparison(unit), record=record, note_outputs=True)
        except StaleRecordError:
            return self._run(record=record)
        cached, counted = Outcome(loss, self.cache.outputs or {}), self.forwards
        fresh, share = self.cache.fresh, self.cache.share
        full = Outcome(self._run(note_outputs=True), self.cache.outputs or {})
        self.forwards, self.cache.fresh, self.cache.share = counted, fresh, share
        if reason := self.difference(cached, full):
            raise wrong_trial(unit, reason)
        return loss

    def difference(self, cached: Outcome | Exception, full: Outcome) -> str:
        """How a cached trial differs from a full forward, with the first call that differs; empty if it does not."""
        assert self.cache is not None
        if isinstance(cached, Exception):
            return f"{type(cached).__name__}: {cached}"
        pairs = ((key, cached.outputs.get(key), output) for key, output in full.outputs.items())
        first = next((key for key, a, b in pairs if not _same_outputs(a, b)), None)
        if first is None and bool(_same(cached.loss, full.loss)):
            return ""
        place = "" if first is None else f", first in call {first[1] + 1} of {self.cache.names[first[0]]!r}"
        return f"a cached trial gave {float(cached.loss)}, a full forward {float(full.loss)}{place}"

    def _replayed(self, comparison: Comparison, *, note_outputs: bool = False) -> Tensor | Exception:
        """The loss with recorded outputs, or the error of a closure that needs more than these outputs.

        After an error a full forward and a second replay follow. If only the replays fail, the error is returned. If
        the full forward fails, or the second replay does not, the error is the closure's own and is raised.
        """
        try:
            return self._run(comparison, note_outputs=note_outputs)
        except StaleRecordError:
            return self._run(note_outputs=note_outputs)
        except Exception as error:
            self._run()
            try:
                self._run(comparison)
            except Exception:
                return error
            raise

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


class BackwardError(RuntimeError):
    """The closure called backward in a trial."""

    def __init__(self) -> None:
        super().__init__("the closure called backward in a trial: let it return the loss only")


class OutdatedError(Exception):
    """A flag of the device says that what is known of the activation cache no longer holds."""


def non_finite(loss: float) -> FloatingPointError:
    """The error for a loss that is not finite at the start of a step."""
    return FloatingPointError(
        f"the loss at the current weights is {loss}: the step was refused and nothing moved. Look at "
        "this mini-batch and at the weights (a padded row without labels, an overflow in half precision)"
    )


def wrong_trial(unit: str, difference: str) -> RuntimeError:
    """The error of ``cache="check"``."""
    return RuntimeError(f"cache='check' has found a wrong trial of unit {unit!r}: {difference}")


def not_repeatable(first: Tensor, again: Tensor, unlike: str) -> ValueError:
    """The error for a closure that is not a function of the weights; ``unlike`` is the first call that differs."""
    where = f" The first call that differs is that of {unlike}." if unlike else ""
    return ValueError(
        f"the closure returned {float(first):.9g} and then {float(again):.9g} for the same weights, but it must be the "
        f"same function at every call of a step.{where} Usual causes: it takes a new batch at each call (take it before "
        "opt.step), it draws random numbers from a generator of its own (torch's, NumPy's and Python's global ones "
        "are held), it carries a state over from call to call (a recurrent state, a counter, a cache), or a fast path "
        "of evaluation mode computes something else without gradients (model.train())"
    )


def _same(cached: Tensor, full: Tensor, *, rounds: bool = False) -> Tensor:
    """Whether two losses are equal: bitwise on the CPU; elsewhere up to roundings, as kernels depend on addresses.

    With ``rounds`` they may differ by the rounding of another kernel.
    """
    eps = torch.finfo(full.dtype).eps
    rounding = 0.0 if full.device.type == "cpu" else 1e-6
    if rounds:
        rounding = max(64 * eps if full.dtype.itemsize >= 4 else 2 * eps, 0.0 if full.device.type == "cpu" else 1e-3)
    return torch.isclose(cached.to(full.dtype), full, rtol=rounding, atol=rounding, equal_nan=True)


def _same_outputs(cached: list[Tensor] | None, full: list[Tensor]) -> bool:
    """Whether two lists of digests are equal."""
    if cached is None or len(cached) != len(full):
        return False
    return all(bool(_same(a, b).all()) for a, b in zip(cached, full, strict=True))


@contextmanager
def _no_fast_path() -> Iterator[None]:
    """Keep torch from the fast path of transformer layers, which it takes only where no gradient is needed."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)
