"""A step as captured pieces: the head (forward and backward) and, for each sequence of searches, a tail.

The engine makes its moves on a mini-batch that records them. The actions between two loops become one piece; the body
of a loop is a piece of its own, repeated while its flag is set. Where tails join (:meth:`Recorder.join`) the pieces of
the first are those of all. A back end captures and replays pieces (:class:`fastals.graphs.cuda.CudaGraphs`).
"""

import copy
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from fastals import rng
from fastals.device import Action, DeviceBatch, DeviceUnits, DirectExecutor, put_back
from fastals.engine import Engine, in_forward_order
from fastals.kernels.arena import FLAGS, Arena
from fastals.kernels.table import Table
from fastals.learned import Learned
from fastals.losses import Losses
from fastals.microbatches import Closure, MicroBatches


@dataclass(frozen=True, slots=True)
class Run:
    """A piece that is replayed once."""

    piece: Any


@dataclass(frozen=True, slots=True)
class Loop:
    """A piece that is replayed while the flag ``go`` of its row is set; the host replays it at least once."""

    piece: Any
    row: int


@dataclass(frozen=True, slots=True)
class SkipIfAccepted:
    """Skip the operations up to the next :class:`EndSkip` if the loop before has accepted."""


@dataclass(frozen=True, slots=True)
class EndSkip:
    """End of the operations that may be skipped."""


Operation = Run | Loop | SkipIfAccepted | EndSkip


class Backend(Protocol):
    """Captures device work once and replays it.

    Attributes:
        draws: whether the forward draws random numbers; if so, the head is not part of a launch, since a graph gets
            its random state from its own replay only.
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
        """Set the state of the generator that replays draw from."""

    def link(self, operations: Sequence[Operation], flags: Tensor) -> Action:
        """One launch that runs all operations, loops included, without the host.

        Raises:
            RuntimeError: this is not possible here; the message says why.
        """


class Recorder:
    """The executor that records the actions of a mini-batch as operations instead of carrying them out.

    Args:
        backend: captures pieces.
        rest: the operations that follow where tails join; empty until the first of them has been recorded.
    """

    def __init__(self, backend: Backend, rest: list[Operation]) -> None:
        self.backend, self.rest, self._before = backend, rest, list[Operation]()
        self.operations, self._line = list[Operation](), list[Action]()
        self._skipping = self._known = False

    def do(self, action: Action) -> None:
        """Append to the actions since the last loop."""
        self._line.append(action)

    def repeat(self, arena: Arena, row: int, attempt: Action) -> None:
        """Record a loop; whether it will accept is not known."""
        del arena
        self._end_line()
        self._append(lambda: Loop(self.backend.capture(attempt), row))

    def look(self, arena: Arena) -> None:
        """Nothing to do: a replay learns of its flags later."""

    def skip_rest_if_accepted(self) -> None:
        """Mark the start of the operations that may be skipped."""
        self._end_line()
        self._append(SkipIfAccepted)
        self._skipping = True

    def end_skip(self) -> None:
        """Mark their end, if their start was marked."""
        if self._skipping:
            self._end_line()
            self._append(EndSkip)
            self._skipping = False

    def join(self) -> None:
        """Go on with the operations that an earlier tail has recorded from here on, or record them for later tails."""
        self._end_line()
        self._before, self.operations, self._known = self.operations, self.rest, bool(self.rest)

    def finish(self) -> list[Operation]:
        """All operations."""
        self._end_line()
        return [*self._before, *self.operations]

    def _end_line(self) -> None:
        line, self._line = self._line, []
        if line:
            self._append(lambda: Run(self.backend.capture(partial(_run_all, line))))

    def _append(self, record: Callable[[], Operation]) -> None:
        if not self._known:
            self.operations.append(record())


def _run_all(actions: Sequence[Action]) -> None:
    for action in actions:
        action()


@dataclass(frozen=True, slots=True)
class Tail:
    """The operations that follow the head for one sequence of searches.

    Attributes:
        launch: runs all operations at once; None if that is not possible.
        whole: whether the launch runs the head as well.
        reason: why there is no launch.
    """

    operations: list[Operation]
    batch: DeviceBatch
    launch: Action | None
    whole: bool
    reason: str


class Program:
    """A captured step for one signature of inputs.

    Its gradients lie in the graphs' memory, so it has its own table; it shares the arena of the engine's partition.

    Args:
        engine: the optimizer's engine; its searches run on the device.
        closure: evaluates the loss of the static inputs.
        backend: captures and replays.

    Attributes:
        go_to_start: has the host take weights and calls as the head leaves them, for a piece that follows it.
    """

    def __init__(self, engine: Engine, closure: Closure, backend: Backend) -> None:
        self.backend, self.params = backend, engine.params()
        assert isinstance(engine.partition, DeviceUnits)
        units, cache = engine.partition.units, engine.new_cache()
        _drop_gradients(self.params)
        self.losses = Losses(
            MicroBatches(closure),
            self.params,
            engine.modules,
            cache,
            _settled(engine.learned, [u.name for u in units]),
            engine.processes.recording(),
            lazy=True,
        )
        self.generators = rng.get_state(self.losses.generators.devices)
        with self._capturing():
            self.head, self.loss = backend.capture_head(self._differentiate)
        self.go_to_start = self.losses.mark()
        self.grads = [p.grad for p in self.params]
        self.units = in_forward_order(units, cache)
        self.device = copy.copy(engine.partition)
        self.device.table = Table(engine.partition.table.entries)
        self.tails: dict[object, Tail] = {}
        self._rest: list[Operation] = []  # of all tails that join
        _drop_gradients(self.params)

    def _differentiate(self) -> Tensor:
        self.losses.restart()
        return self.losses.differentiate()

    def capture_tail(self, key: object, move: Callable[[DeviceBatch], None], seed: str) -> None:
        """Record ``move`` on a mini-batch, and capture it as ``tails[key]``; it starts where the head ends."""
        self.go_to_start()
        with self._gradients_in_place(), self._capturing():
            for unit in self.units:
                unit.find_active()
            self.tails[key] = self._recorded(move, seed)

    def _recorded(self, move: Callable[[DeviceBatch], None], seed: str) -> Tail:
        recorder = Recorder(self.backend, self._rest)
        batch = self.device.begin(self.losses, self.units, self.loss, seed, recorder)
        move(batch)
        recorder.end_skip()
        batch.do(self._settle)
        batch.learn()
        operations, whole = recorder.finish(), not self.backend.draws
        linked = [Run(self.head), *operations] if whole else operations
        if self.losses.processes.several:
            return Tail(operations, batch, None, False, "several processes: a loop on the device takes no collectives")
        try:
            return Tail(operations, batch, self.backend.link(linked, self.device.arena.flags), whole, "")
        except Exception as error:  # the bindings raise errors of any class
            named = "" if type(error) is RuntimeError else f"{type(error).__name__}: "
            return Tail(operations, batch, None, False, f"{named}{error}")

    @property
    def pieces(self) -> list[Any]:
        """The piece of every place in a tail; that of the head, first, has a place in each."""
        tails = self.tails.values()
        return [self.head for _ in tails] + [o.piece for t in tails for o in t.operations if isinstance(o, Run | Loop)]

    def _settle(self) -> None:
        self.losses.around.settle_in_place(self.device.arena.flags[-1, FLAGS.index("refused")] != 0)

    @contextmanager
    def _capturing(self) -> Iterator[None]:
        """Capture with the generators at one state, since their seed may not change; drop casts made in a capture."""
        try:
            with rng.standing_at(self.generators), self.backend.session():
                yield
        finally:
            torch.clear_autocast_cache()

    @contextmanager
    def _gradients_in_place(self) -> Iterator[None]:
        """Put the captured gradients into ``p.grad`` while a tail is recorded: the kernels' table reads them there."""
        others = [p.grad for p in self.params]
        for p, g in zip(self.params, self.grads, strict=True):
            p.grad = g
        try:
            yield
        finally:
            for p, g in zip(self.params, others, strict=True):
                p.grad = g

    def run(self, tail: Tail) -> None:
        """Replay the head and the tail; after an error weights, module buffers and generator are as before.

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
            self.losses.around.put_back()
            put_back(self.device.table, self.device.arena)
            raise
        self.backend.set_rng_state(after)

    def _run_on_host(self, operations: Sequence[Operation], rng_state: Any) -> None:
        skipping = accepted = False
        for operation in operations:
            if isinstance(operation, EndSkip):
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

        executor = DirectExecutor(self.backend.look)
        return executor.repeat(self.device.arena, loop.row, attempt)


def _settled(learned: Learned, units: Sequence[str]) -> Learned:
    """The same facts with a verdict on every unit, False if unverified."""
    trusted = {name: learned.trusted.get(name, False) for name in units}
    return dataclasses.replace(learned, verdicts={learned.replays: trusted})


def _drop_gradients(params: Sequence[Tensor]) -> None:
    """Drop the gradients and with them their memory."""
    for p in params:
        p.grad = None
