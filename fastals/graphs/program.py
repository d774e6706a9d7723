"""A step as captured pieces: the head (forward and backward) and, for each kind of step, a tail of runs and loops.

Recording walks through the very schedules that the eager path runs. Between two loops everything is a straight line of
device work and becomes one piece; the body of a loop is a piece of its own, repeated while its flag says so. A back end
captures and replays pieces (:class:`fastals.graphs.cuda.CudaGraphs`).
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from fastals import rng
from fastals.cache import ActivationCache
from fastals.device import Device, DeviceBatch, Immediately
from fastals.kernels import armijo
from fastals.kernels.arena import FLAGS, Arena
from fastals.kernels.table import Table
from fastals.kernels.trial import trial
from fastals.losses import Learned, Losses

Action = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Run:
    """A piece that is replayed once."""

    piece: Any


@dataclass(frozen=True, slots=True)
class Loop:
    """A piece that is replayed while the flag of its row is set, at least once by a host."""

    piece: Any
    row: int


@dataclass(frozen=True, slots=True)
class SkipIfAccepted:
    """Up to the next :class:`Always` nothing is left to do where the loop before has accepted."""


@dataclass(frozen=True, slots=True)
class Always:
    """End of what may be skipped."""


Operation = Run | Loop | SkipIfAccepted | Always


class Backend(Protocol):
    """Captures device work once and replays it.

    ``draws`` says whether the forward draws random numbers: then the head is replayed by itself, since only a replay
    of its own gives a graph its random state.
    """

    draws: bool

    def session(self) -> AbstractContextManager[None]:
        """Surrounds the captures that belong together."""

    def capture_head(self, action: Callable[[], Tensor]) -> tuple[Any, Tensor]:
        """Capture an action; its piece, and its result at an address that every replay writes to again."""

    def capture(self, action: Action) -> Any:
        """Capture an action as a piece."""

    def replay(self, piece: Any) -> None:
        """Do the piece's work again."""

    def look(self, flags: Tensor) -> list[int]:
        """Wait for the work so far and read the flags."""

    def held_bytes(self) -> int:
        """Device memory that the captured pieces hold."""

    def rng_state(self) -> Any:
        """State of the generator that replays draw from."""

    def set_rng_state(self, state: Any) -> None:
        """Set that state."""

    def link(self, operations: Sequence[Operation], flags: Tensor) -> Action:
        """One launch that runs all operations, loops included, without the host.

        Raises:
            RuntimeError: this is not possible here; the message says why.
        """


class Recorder(Immediately):
    """Takes the actions of a mini-batch down as operations instead of running them."""

    def __init__(self, backend: Backend) -> None:
        self.backend, self.operations, self._line = backend, list[Operation](), list[Action]()
        self._skipping = False

    def do(self, action: Action) -> None:
        """Append to the straight line under way."""
        self._line.append(action)

    def repeat(self, arena: Arena, row: int, attempt: Action) -> bool | None:
        """Record a loop; what it will say is not known."""
        del arena
        self._end_line()
        self.operations.append(Loop(self.backend.capture(attempt), row))
        return None

    def skip_rest_if_accepted(self) -> None:
        """Mark the start of what may be skipped."""
        self._end_line()
        self.operations.append(SkipIfAccepted())
        self._skipping = True

    def always(self) -> None:
        """Mark its end, if it was marked."""
        if self._skipping:
            self._end_line()
            self.operations.append(Always())
            self._skipping = False

    def finish(self) -> list[Operation]:
        """All operations."""
        self._end_line()
        return self.operations

    def _end_line(self) -> None:
        line, self._line = self._line, []
        if line:
            self.operations.append(Run(self.backend.capture(partial(_run_all, line))))


def _run_all(actions: Sequence[Action]) -> None:
    for action in actions:
        action()


class Watching(Immediately):
    """Repeats a piece and looks at its flag through the back end."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend

    def look(self, arena: Arena, row: int) -> list[int]:
        """Wait for the device and read the row's flags."""
        return self.backend.look(arena.flags[row])


@dataclass(frozen=True, slots=True)
class Tail:
    """What follows the head in one kind of step, and its one launch where that is possible.

    ``whole`` says that the launch does the head as well.
    """

    operations: list[Operation]
    batch: DeviceBatch
    launch: Action | None
    whole: bool
    reason: str


class Program:
    """A captured step for one signature of inputs.

    Args:
        device: tables and arena of the optimizer's units; the program has its own table, since its gradients lie in
            the graphs' memory.
        closure: evaluates the loss of the static inputs.
        params: all parameters of the optimizer.
        model: the module whose buffers a forward may write, or None.
        cache: of the model's activations, or None.
        learned: what eager steps have found out about the model.
    """

    def __init__(
        self,
        device: Device,
        closure: Callable[[], Tensor],
        params: Sequence[Tensor],
        model: torch.nn.Module | None,
        cache: ActivationCache | None,
        learned: Learned,
        backend: Backend,
        max_grad_norm: float | None,
    ) -> None:
        self.backend, self.params, self.max_grad_norm = backend, params, max_grad_norm
        _drop_gradients(params)
        trusted = {name: learned.trusted.get(name, False) for name in [*(u.name for u in device.units), "all units"]}
        known = Learned(learned.replays, {learned.replays: trusted}, learned.written)
        self.losses = Losses(closure, params, model, cache, known, lazy=True)
        self.generators = rng.get_state(self.losses.devices)
        with self._capturing():
            self.head, self.loss = backend.capture_head(self._differentiate)
        self.grads = [p.grad for p in params]
        self.units = [u for u in device.units if u.find_active()]
        if cache is not None:
            self.units.sort(key=lambda u: cache.start(u.active_params()))
        self.device = copy.copy(device)
        self.device.table = Table(device.table.entries)
        self.tails: dict[object, Tail] = {}
        _drop_gradients(params)

    def _differentiate(self) -> Tensor:
        self.losses.restart()
        return self.losses.differentiate()

    def tail(self, kind: object, record: Callable[[DeviceBatch], None], batch: Callable[..., DeviceBatch]) -> Tail:
        """The tail of this kind of step; ``record`` runs its schedule on a mini-batch from ``batch``."""
        if kind not in self.tails:
            with self._gradients_in_place(), self._capturing():
                for unit in self.units:
                    unit.find_active()
                self.tails[kind] = self._capture_tail(record, batch)
        return self.tails[kind]

    def _capture_tail(self, record: Callable[[DeviceBatch], None], make_batch: Callable[..., DeviceBatch]) -> Tail:
        recorder = Recorder(self.backend)
        batch = make_batch(self.losses, executor=recorder)
        batch.begin(self.device, self.units, self.loss, self.max_grad_norm)
        record(batch)
        if self.losses.buffers:
            batch.do(self._put_buffers_back_if_refused)
        batch.learn()
        operations, whole = recorder.finish(), not self.backend.draws
        linked = [Run(self.head), *operations] if whole else operations
        try:
            return Tail(operations, batch, self.backend.link(linked, self.device.arena.flags), whole, "")
        except Exception as error:  # the bindings raise what they like
            named = "" if type(error) is RuntimeError else f"{type(error).__name__}: "
            return Tail(operations, batch, None, False, f"{named}{error}")

    def _put_buffers_back_if_refused(self) -> None:
        self.losses.put_buffers_back(self.device.arena.flags[-1, FLAGS.index("refused")] != 0)

    @contextmanager
    def _capturing(self) -> Iterator[None]:
        """Hold the generators, whose seed may not change between captures, and keep no cast in the graphs' memory."""
        try:
            with rng.standing_at(self.generators), self.backend.session():
                yield
        finally:
            torch.clear_autocast_cache()

    @contextmanager
    def _gradients_in_place(self) -> Iterator[None]:
        """Show the captured gradients to the kernels' tables for as long as a tail is recorded."""
        others = [p.grad for p in self.params]
        for p, g in zip(self.params, self.grads, strict=True):
            p.grad = g
        try:
            yield
        finally:
            for p, g in zip(self.params, others, strict=True):
                p.grad = g

    def run(self, tail: Tail) -> None:
        """Replay the head and the tail; whatever is raised, weights, module buffers and generator are as before.

        Raises:
            FloatingPointError: f(w_t) is not finite, and the host has waited for it.
        """
        before = self.backend.rng_state()
        try:
            self._replay(tail, before)
        except BaseException:
            self.backend.set_rng_state(before)
            raise
        torch.clear_autocast_cache()  # casts of the weights before this step are stale

    def _replay(self, tail: Tail, before: Any) -> None:
        if tail.launch is not None and tail.whole:
            tail.launch()
            return
        self.backend.replay(self.head)
        after = self.backend.rng_state()
        try:
            if tail.launch is not None:
                tail.launch()
            else:
                self._run_on_host(tail.operations, before)
        except BaseException:
            self.losses.put_buffers_back()
            armijo.restore(self.device.arena)
            trial(self.device.table, self.device.arena)
            raise
        self.backend.set_rng_state(after)

    def _run_on_host(self, operations: Sequence[Operation], rng_state: Any) -> None:
        skipping = accepted = False
        for operation in operations:
            if isinstance(operation, Always):
                skipping = False
            elif skipping:
                continue
            elif isinstance(operation, SkipIfAccepted):
                skipping = accepted
            elif isinstance(operation, Loop):
                accepted = self._repeat(operation, rng_state)
            else:
                self.backend.set_rng_state(rng_state)
                self.backend.replay(operation.piece)

    def _repeat(self, loop: Loop, rng_state: Any) -> bool:
        def attempt() -> None:
            self.backend.set_rng_state(rng_state)  # the masks of the head, in every trial
            self.backend.replay(loop.piece)

        return bool(Watching(self.backend).repeat(self.device.arena, loop.row, attempt))


def _drop_gradients(params: Sequence[Tensor]) -> None:
    """Let go of the gradients and of the memory that they lie in."""
    for p in params:
        p.grad = None
