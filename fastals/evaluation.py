"""Evaluations of a closure: every one of a step is of the same function of the trained weights."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastals import rng
from fastals.cache import ActivationCache, Key
from fastals.compare import Comparison, same_loss, same_outputs
from fastals.compiler import compilations
from fastals.distributed import Processes
from fastals.errors import BackwardError, ChangedError, StaleRecordError, is_about_gradients
from fastals.interrupt import hand_on
from fastals.learned import Learned
from fastals.microbatches import MicroBatches, checked
from fastals.shards import reshard, with_buffers
from fastals.surroundings import Surroundings


class Outcome(NamedTuple):
    """A loss, and the digests of the outputs of all boundary calls."""

    loss: Tensor
    outputs: dict[Key, list[Tensor]]

    def difference(self, cached: "Outcome | Exception", names: dict[int, str]) -> str:
        """How a cached trial differs from this full forward, with the first call that does; empty if it does not."""
        if isinstance(cached, Exception):
            return f"{type(cached).__name__}: {cached}"
        pairs = ((key, cached.outputs.get(key), output) for key, output in self.outputs.items())
        first = next((key for key, a, b in pairs if not same_outputs(a, b)), None)
        if first is None and bool(same_loss(cached.loss, self.loss)):
            return ""
        place = "" if first is None else f", first in call {first[1] + 1} of {names[first[0]]!r}"
        return f"a cached trial gave {float(cached.loss)}, a full forward {float(self.loss)}{place}"


class Evaluated(NamedTuple):
    """The closure's loss in this process, and its mean over all processes."""

    own: Tensor
    mean: Tensor


class Evaluations:
    """Evaluates a closure, always from the same generators, buffers and untrained parameters.

    Args:
        closure: evaluates the loss, of each micro-batch.
        params: the trained parameters.
        modules: all modules that the closure may use.
        cache: replays calls of modules, or None.
        learned: what earlier steps have found out.
        processes: those that evaluate it together.
        lazy: whether comparisons of values must not wait for the device, but in a step that finds everything out.

    Attributes:
        forwards: full forwards so far, the first one included; a cached trial is a part of one.
        wait: whether comparisons of values may wait for the device.
        look_again: whether the next step has to find everything out once more.
        anew: whether the modules are others than the processes know, which the first evaluation tells them.
        learning: whether processes ask each other which calls they replay.
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
    ) -> None:
        self.closure, self.params, self.cache, self.learned = closure, params, cache, learned
        self.processes, self.modules = processes, modules
        self.learning = not learned.watched
        self.wait = not lazy or self.learning
        self.generators = rng.Generators(rng.cuda_devices(params)) if cache is None else cache.generators
        self.before = self.after = self.generators.save()
        self.around = Surroundings(modules, set(map(id, params)), learned.memory, watch=not learned.watched)
        self.forwards, self.look_again, self.anew = 1.0, False, False
        if cache is not None:
            cache.drawn, cache.changing, cache.in_order = learned.drawn, self.around.kept, learned.effects
            cache.stamps.at_start([*params, *self.around.changing])

    def restart(self) -> None:
        """Take the present generators and buffers as the start of the step."""
        self.before = self.after = self.generators.save()
        self.around.restart()

    def comparison(self, name: str, *, at_start: bool = False) -> Comparison:
        """Compares arguments in an evaluation of this name."""
        together = self.learned.collective and self.processes.waits
        return Comparison(
            name,
            self.learned.guesses,
            self.params[0].device,
            wait=self.wait or together,
            at_start=at_start,
            agree=self.processes.all_hold if together else None,
            learning=self.learning,
        )

    def run(self, comparison: Comparison | None = None, *, record: bool = False, note_outputs: bool = False) -> Tensor:
        """One evaluation from the start of the step: in full, or with calls replayed."""

        def running() -> AbstractContextManager:
            if self.cache is None:
                return nullcontext()
            if comparison is None:
                return self.cache.computing(record=record, note_outputs=note_outputs)
            return self.cache.replaying(comparison, record=record, note_outputs=note_outputs)

        self.rewind()
        try:
            return self.quietly(running)
        finally:
            self.forwards += self.cache.share if self.cache is not None else 1.0

    def rewind(self) -> None:
        """Go back to the start of the step with everything but the trained weights."""
        reshard(self.modules)
        self.generators.restore(self.before)
        self.around.put_back()
        if self.cache is not None:
            self.cache.stamps.put_back(self.around.written_tensors)

    def quietly(self, running: Callable[[], AbstractContextManager]) -> Tensor:
        """The loss by an evaluation without gradients, or with gradients if the closure takes some inside.

        Raises:
            BackwardError: the closure calls backward.
        """
        if self.learned.gradients:
            return self._evaluated(running(), torch.enable_grad())
        try:
            return self._evaluated(running(), torch.no_grad())
        except RuntimeError as error:
            if not is_about_gradients(error) or self.processes.leaves(error):
                raise
            failed = error
        self.rewind()
        loss = self._evaluated(running(), torch.enable_grad())
        try:
            self.rewind()
            self._evaluated(running(), torch.no_grad())
        except RuntimeError:
            self.learned.gradients = True
        else:
            raise failed  # it had nothing to do with gradients
        self.rewind()
        return self._evaluated(running(), torch.enable_grad()) if self.cache is not None else loss

    def _evaluated(self, running: AbstractContextManager, gradients: AbstractContextManager) -> Tensor:
        with self.without_backward():
            return self.evaluate(running, gradients).mean.detach()

    @contextmanager
    def without_backward(self) -> Iterator[None]:
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

    def evaluate(
        self,
        running: AbstractContextManager,
        gradients: AbstractContextManager,
        closure: Callable[[], Tensor] | None = None,
    ) -> Evaluated:
        """Call the closure, or another in its place.

        Raises:
            StaleRecordError: a call was replayed in some process that should have been computed.
            PeerError: it has failed in another process.
        """
        if not self.processes.waits:
            return self._recorded(self._call(running, gradients, closure or self.closure))
        own = torch.tensor(math.nan)
        failure: BaseException | None
        try:
            own = self._call(running, gradients, closure or self.closure)
            failure = ChangedError() if self.anew else None
        except BaseException as error:
            failure = error
        micro_batches = f"of {len(self.closure.closures)} micro-batches"
        try:
            return Evaluated(own, self.processes.mean(own, failure, self._notes(), micro_batches))
        except StaleRecordError:
            self.look_again |= self.processes.several
            raise

    def _recorded(self, own: Tensor) -> Evaluated:
        """The loss of an evaluation that is recorded, as all processes see it."""
        if not self.processes.several:
            return Evaluated(own, own)
        comparison = self.cache.comparison if self.cache is not None else None
        mean, doubt = self.processes.recorded_mean(own, comparison.differs if comparison is not None else None)
        if comparison is not None:
            comparison.agreed = doubt
        return Evaluated(own, mean)

    def _notes(self) -> tuple[bool, bool, bool]:
        """See :data:`fastals.signals.NOTES`."""
        cache = self.cache
        if cache is None:
            return False, False, compilations() != self.learned.compilations
        return cache.unlike, cache.sequence not in self.learned.sequences, compilations() != self.learned.compilations

    def _call(
        self, running: AbstractContextManager, gradients: AbstractContextManager, closure: Callable[[], Tensor]
    ) -> Tensor:
        torch.clear_autocast_cache()  # casts of the weights before this evaluation are stale
        with _no_fast_path(), self.around.evaluation(), with_buffers(self.modules), running, gradients:
            loss = checked(closure())
        hand_on()  # other processes hear of it as they hear of an error of the closure
        drawn = self.learned.drawn
        if self.cache is None:
            return loss
        if self.processes.several and self.processes.waits and self.cache.guessed_wrong:
            raise StaleRecordError
        if drawn is None:
            return loss
        if moved := self.generators.moved({n: s for n, s in self.before.items() if n not in drawn}):
            if self.processes.several:
                raise ChangedError
            drawn |= moved
            self.cache.forget()
            if self.cache.replays:
                raise StaleRecordError
        return loss

    def recording(self) -> AbstractContextManager:
        """Surrounds the evaluation whose calls trials replay."""
        return self.cache.recording() if self.cache is not None else nullcontext()

    def replayed(self, comparison: Comparison, *, note_outputs: bool = False) -> Tensor | Exception:
        """The loss with recorded outputs, or the error of a closure that needs more than these outputs.

        After an error a full forward and a second replay follow. If only the replays fail, the error is returned. If
        the full forward fails, or the second replay does not, the error is the closure's own and is raised.
        """
        try:
            return self.run(comparison, note_outputs=note_outputs)
        except StaleRecordError:
            return self.run(note_outputs=note_outputs)
        except Exception as error:
            if self.processes.leaves(error):
                raise
            self.run()
            try:
                self.run(comparison)
            except Exception:
                return error
            raise

    def record_again(self) -> None:
        """Record the calls of a forward without gradients, as trials make them."""
        self.run(record=True)
        self.adopt()

    def adopt(self) -> None:
        """From now on replay the calls of the last evaluation, if they were kept."""
        if self.cache is not None:
            self.cache.adopt()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Comparisons of values may wait for the device inside the ``with`` block."""
        waited, self.wait, self.learning = (self.wait, self.learning), True, True
        try:
            yield
        finally:
            self.wait, self.learning = waited


@contextmanager
def _no_fast_path() -> Iterator[None]:
    """Keep torch from the fast path of transformer layers, which it takes only where no gradient is needed."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)
