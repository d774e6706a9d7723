"""The loss of one mini-batch as a function of the weights."""

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor, nn

from fastals.cache import ActivationCache
from fastals.compare import Comparison
from fastals.distributed import Processes
from fastals.errors import NO_GRADIENT, CheckError, StaleRecordError, non_finite
from fastals.evaluation import Evaluated, Evaluations, Outcome
from fastals.interrupt import let_through
from fastals.learned import Learned
from fastals.microbatches import Closure, MicroBatches, checked
from fastals.shards import recover, reshard, settle_gradients, without_sync
from fastals.surroundings import Kept


class Losses(Evaluations):
    """The loss f(w_t) with its gradients, then those of trials, always as a 0-d tensor.

    The first evaluation draws the dropout masks and records the calls of modules. With ``lazy`` nothing waits for the
    device: the caller checks that f(w_t) is finite. With ``check`` every cached trial is compared with a full forward.

    Attributes:
        unlike: the call that gave another output when the closure ran again at w_t; empty if none did.
        unseen: whether some process has a sequence of calls for which no verdict was found.
    """

    def __init__(
        self,
        closure: MicroBatches,
        params: Sequence[Tensor],
        modules: Sequence[nn.Module],
        cache: ActivationCache | None,
        learned: Learned,
        processes: Processes,
        *,
        lazy: bool = False,
        check: bool = False,
    ) -> None:
        super().__init__(closure, params, modules, cache, learned, processes, lazy=lazy)
        self.lazy, self.check, self.unlike, self.unseen = lazy, check, "", False
        self.grads = [(p, p.grad) for p in params]
        self.other_grads: list[tuple[Tensor, Tensor | None]] = []  # hidden while those of this loss are computed
        self._doubt: Tensor | None = None
        writes = learned.own_writes
        self._own = [Kept.of(p) for p in params if id(p) in writes]  # as the step starts, for an undo
        self._versions = [p._version for p in params]

    def differentiate(self) -> Tensor:
        """f(w_t) with its gradients, by one forward and one backward of each micro-batch."""
        self.other_grads = [(p.tensor, p.tensor.grad) for p in self.around.places if p.tensor.requires_grad]
        for p, _ in self.grads + self.other_grads:
            p.grad = None
        self.closure.scales.clear()  # of an attempt that has failed
        parts: list[Tensor] = []
        last = self.evaluate(self.recording(), torch.enable_grad(), partial(self._all_but_last, parts))
        self._note_drawn()
        self.unseen = self.processes.heard.unseen
        parts.append(self._differentiated(last))
        settle_gradients(self.params)
        if self.wait or not self.lazy:
            self.closure.refuse_loss_scale()
        reshard(self.modules)
        self.after = self.generators.save()
        self.around.note_after()
        if self.learned.rounds:
            self.record_again()
        if len(parts) == 1 and not self.closure.scales:
            return last.mean.detach()
        return self.processes.mean(sum(parts[1:], parts[0]))

    def _all_but_last(self, parts: list[Tensor]) -> Tensor:
        """Differentiate one micro-batch after the other, and evaluate the last one."""
        *others, last = self.closure.closures
        for closure in others:
            with without_sync(self.modules):
                loss = checked(self._without_backward(closure))
                with self.cache.paused() if self.cache is not None else nullcontext():  # checkpoints call modules again
                    mean = self.processes.mean(loss, kind=f"{len(parts) + 1} of {len(others) + 1}")
                    parts.append(self._differentiated(Evaluated(loss, mean)))
        return checked(self._without_backward(last))

    def _without_backward(self, closure: Closure) -> Tensor:
        """The closure's loss.

        Raises:
            RuntimeError: the closure has changed gradients, or its loss has none.
        """
        before = [(p.grad, _version(p.grad)) for p in self.params]
        loss = let_through(closure)
        if any(p.grad is not g or _version(g) != v for p, (g, v) in zip(self.params, before, strict=True)):
            raise RuntimeError(
                "the closure called backward itself: let it return the loss only, or call loss.backward() before "
                "opt.step(closure, loss=loss)"
            )
        if isinstance(loss, Tensor) and not loss.requires_grad:
            raise RuntimeError(NO_GRADIENT)
        return loss

    def _differentiated(self, loss: Evaluated) -> Tensor:
        """This process' part of f(w_t) in a micro-batch, with its gradients added to those in place.

        Raises:
            FloatingPointError: the loss is not finite in some process.
        """
        self._refuse_non_finite(loss.mean.detach())
        return self.closure.differentiate(loss.own)

    def given(self, loss: Tensor | float) -> Tensor:
        """f(w_t), with the caller's gradients in ``p.grad``; ``loss`` is the value that the caller computed.

        The caller's forward has drawn and has written buffers already, so the step leaves both as they are.
        """
        start = self.quietly(self.recording)
        settle_gradients(self.params)
        self._note_drawn()
        self.unseen = self.processes.heard.unseen
        self._refuse_non_finite(start)
        drew = bool(self.generators.moved(self.before)) or bool(self.generators.devices)
        if self.lazy:
            return start
        there, drew_somewhere = self.processes.total([float(loss), float(drew)], "loss=")
        there /= self.processes.size
        if not math.isfinite(there):
            raise non_finite(there, self.processes.size)
        if not drew_somewhere and abs(there - float(start)) > 1e-2 * (1 + abs(float(start))):
            raise ValueError(
                f"loss={there:.6g} is not what the closure returns ({float(start):.6g}): the closure must "
                "evaluate the very loss whose gradients are in place (same batch, same scaling over micro-batches)"
            )
        return start

    def _note_drawn(self) -> None:
        """Note which trained weights the first evaluation has written, and from which generators it drew."""
        moved = zip(self.params, self._versions, strict=True)
        self.learned.own_writes |= {id(p) for p, version in moved if p._version != version}
        if self.learned.drawn is None:
            self.learned.drawn = self.generators.moved(self.before)
            if self.cache is not None:
                self.cache.drawn = self.learned.drawn

    def records(self, unit: str) -> bool:
        """Whether trials of the unit are full forwards, which are recorded: they are all that later ones may replay."""
        return self.cache is not None and not self.learned.trusts(unit)

    def at(self, unit: str, params: Sequence[Tensor], *, record: bool = False) -> Tensor:
        """The loss at the current weights, of which only ``params`` have changed since the last evaluation.

        With ``record`` the calls are kept for :meth:`adopt`. A unit that is not trusted is evaluated in full.
        """
        if self.cache is None:
            return self.run()
        self.cache.stamps.moved(params)
        if self.records(unit):
            return self.run(record=True)
        if self.check:
            return self._checked_trial(unit, record)
        comparison = self.comparison(unit)
        loss = self._cached(comparison, record)
        looked = self.processes.several and self.processes.waits  # at the guesses of all processes
        if looked or comparison.differs is None:
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

    def mark(self) -> Callable[[], None]:
        """A function that goes back to the calls that are replayed now, and has their arguments and the weights as now.

        A captured step is here in every replay, though torch has seen writes into the batch and into the weights.
        """
        cache = self.cache
        if cache is None:
            return lambda: None
        records = cache.records
        tensors = [*self.params, *(t for call in records.values() for t in call.inputs if isinstance(t, Tensor))]
        stamps = [cache.stamps.of(t) for t in tensors]

        def go_back() -> None:
            cache.records = records
            for t, stamp in zip(tensors, stamps, strict=True):
                cache.stamps.stand(t, stamp)

        return go_back

    def cached(self, unit: str, params: Sequence[Tensor]) -> Outcome | Exception:
        """A cached trial of a unit of which ``params`` have changed, or the error of a loss that needs more."""
        assert self.cache is not None
        self.cache.stamps.moved(params)
        loss = self.replayed(self.comparison(unit), note_outputs=True)
        return Outcome(loss, self.cache.outputs or {}) if isinstance(loss, Tensor) else loss

    def note_effects(self, difference: str) -> None:
        """Note whether a replay at w_t is wrong, by its difference from a full forward, in any process."""
        assert self.cache is not None
        self.learned.effects |= self.processes.any(bool(difference))[0]
        self.cache.in_order = self.learned.effects

    def full(self) -> Outcome:
        """A full forward at the current weights."""
        assert self.cache is not None
        return Outcome(self.run(note_outputs=True), self.cache.outputs or {})

    def finish(self) -> None:
        """Leave generators, buffers and untrained parameters where a plain forward and backward leaves them."""
        reshard(self.modules)
        self.generators.restore(self.after)
        self.around.settle()
        torch.clear_autocast_cache()  # casts of the last trial's weights are stale
        self.learned.watched = not self.look_again
        if self.cache is not None:
            self.cache.clear()

    def add_other_grads(self) -> None:
        """Add the gradients of untrained parameters to those that were there."""
        for p, grad in self.other_grads:
            if grad is not None:
                p.grad = grad if p.grad is None else grad.add_(p.grad)

    def undoing(self) -> list[Callable[[], object]]:
        """Actions that put generators, gradients, buffers and untrained parameters back; each stands for itself."""
        grads = [partial(setattr, p, "grad", grad) for p, grad in self.grads]
        forget = [self.cache.clear] if self.cache is not None else []
        outside: list[Callable[[], object]] = [self._uncover, self.around.undo, torch.clear_autocast_cache]
        own = [kept.put_back for kept in self._own]
        shards = partial(recover, self.modules)
        return [*forget, *own, *grads, *outside, shards, partial(self.generators.restore, self.before)]

    def _uncover(self) -> None:
        """Put the gradients of untrained parameters back."""
        for p, grad in self.other_grads:
            p.grad = grad

    def _cached(self, comparison: Comparison, record: bool) -> Tensor:
        try:
            return self.run(comparison, record=record)
        except StaleRecordError:
            return self.run(record=record)

    def _checked_trial(self, unit: str, record: bool) -> Tensor:
        """A cached trial that is compared with a full forward.

        Raises:
            RuntimeError: they differ.
        """
        assert self.cache is not None
        try:
            loss = self.run(self.comparison(unit), record=record, note_outputs=True)
        except StaleRecordError:
            return self.run(record=record)
        cached, counted = Outcome(loss, self.cache.outputs or {}), self.forwards
        fresh, share = self.cache.fresh, self.cache.share
        full = self.full()
        self.forwards, self.cache.fresh, self.cache.share = counted, fresh, share
        if reason := full.difference(cached, self.cache.names):
            raise CheckError(unit, reason)
        return loss

    def _refuse_non_finite(self, loss: Tensor) -> None:
        if self.lazy:
            return
        if loss.is_meta:
            raise ValueError("the loss is on the device meta, which holds no numbers: load the weights before training")
        if not bool(torch.isfinite(loss)):
            raise non_finite(float(loss), self.processes.size)


def _version(grad: Tensor | None) -> int:
    return 0 if grad is None else grad._version
