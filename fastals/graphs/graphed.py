"""``opt.graphed(loss_fn)``: steps as captured graphs, one program per signature of inputs."""

import gc
import math
import time
import warnings
import zlib
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from operator import attrgetter
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_is_leaf, tree_map_only, tree_unflatten

from fastals import rng
from fastals.engine import Engine
from fastals.errors import OutdatedError, non_finite
from fastals.graphs.program import Backend, Program, Tail
from fastals.interrupt import held_back, uninterrupted
from fastals.kernels.arena import FLAGS
from fastals.microbatches import Closure
from fastals.schedule import turn_of
from fastals.search import COUNT_FROM_1
from fastals.settings import require

WARMUP = 3  # eager steps of each signature: compilation, workspaces, verification of the cache
MOST_SEEN = 1024  # signatures whose steps are counted
MOST_NOTED = 64  # steps that the host may be ahead of the device
Inputs = Any  # a batch as the user has it: any nest of tensors and constants
Note = tuple[torch.cuda.Event | None, Tensor]  # flags, and when they have arrived


class Stepper(Protocol):
    """An optimizer whose steps an engine makes: :class:`fastals.ALS`."""

    @property
    def engine(self) -> Engine:
        """Makes the steps."""

    def step(self, closure: Closure) -> Tensor:
        """Make one step; hooks and schedulers of torch attach to this method."""


class GraphMode(NamedTuple):
    """How steps run, and why so.

    Attributes:
        name: ``while`` (loops on the device), ``host`` (pieces, a flag read per trial) or ``eager``.
        reason: why it is this one.
    """

    name: str
    reason: str


class Pieces(NamedTuple):
    """Pieces of captured steps.

    Attributes:
        captured: the pieces that there are.
        used: how many the steps are made of; a piece counts in each of its places.
    """

    captured: int
    used: int


class Captured(NamedTuple):
    """A program with the static inputs that its graphs read."""

    program: Program
    inputs: list[Any]


class GraphedStep:
    """Takes one step on a batch; the step is captured once per signature (shapes, dtypes, training mode).

    The first steps of a signature are real steps that run eagerly; then forward, backward, trials and updates are
    captured as CUDA graphs and replayed. The step sizes are those of the eager path. Dropout masks differ
    from step to step and are the same in all trials of a step. ``p.grad`` is not kept: gradients live in the graphs'
    memory. Hooks of the optimizer run in eager steps only. If graphs cannot be used, or a capture fails, steps run
    eagerly and :attr:`mode` says why.

    Args:
        optimizer: the :class:`fastals.ALS`.
        loss_fn: loss of a batch, a scalar tensor. To be captured it must not wait for the device (``.item()``, prints
            of values, branches on them) and must not draw random numbers on the host. Numbers that it reads from
            outside the batch (the weight of a term, an epoch) keep their value at the capture, and tensors outside
            the batch must keep their address. The tensors of the batch are moved to the device of the parameters. A
            mapping of another class, such as a ``BatchEncoding``, becomes a plain ``dict``: ``batch["labels"]``
            works, ``batch.labels`` does not.
        pad_to_multiple_of: pad text batches (mappings with ``input_ids`` and ``attention_mask``) on the right to a
            multiple of this length, so that there are few signatures; labels are padded with -100.
        max_signatures: programs kept; the one used least recently goes first, with its memory.

    Attributes:
        mode: :class:`GraphMode`, how steps run and why.
        capture_seconds: time spent on captures so far, those of programs that have gone included.

    Raises:
        FloatingPointError: the loss is not finite at the current weights; nothing has moved. In mode ``while`` the
            host does not wait for the loss, and the error comes with a later step.
    """

    def __init__(
        self,
        optimizer: Stepper,
        loss_fn: Callable[[Inputs], Tensor],
        *,
        pad_to_multiple_of: int | None = None,
        max_signatures: int = 8,
        backend: Callable[..., Backend] | None = None,
    ) -> None:
        if not callable(loss_fn):
            raise TypeError(f"loss_fn must be a function of a batch that returns its loss, not {loss_fn!r}")
        require("max_signatures", max_signatures, COUNT_FROM_1)
        if pad_to_multiple_of is not None:
            require("pad_to_multiple_of", pad_to_multiple_of, COUNT_FROM_1)
        self.optimizer, self.loss_fn, self.max_signatures = optimizer, loss_fn, max_signatures
        self.pad_to_multiple_of, self._make_backend = pad_to_multiple_of, backend or _cuda_graphs
        self.mode = GraphMode("eager", "nothing has been captured yet")
        self.capture_seconds = 0.0
        self._seen: OrderedDict[Hashable, int] = OrderedDict()
        self._programs: OrderedDict[Hashable, Captured] = OrderedDict()
        self._identity: Hashable = None
        self._draws = self._captures = False
        self._give_up = why_not_graphed(self.engine) if backend is None else why_not_recorded(self.engine)
        if self._give_up:
            self.mode = GraphMode("eager", self._give_up)
        self._device = self.engine.params()[0].device
        captures = self._device.type == "cuda" and not self._give_up
        self._stream = torch.cuda.Stream(self._device) if captures else None
        self._notes = Notes()

    @property
    def engine(self) -> Engine:
        """The engine of the optimizer, which a loaded state renews."""
        return self.optimizer.engine

    def __call__(self, batch: Inputs) -> Tensor:
        """Make one step; returns f(w_t) before it, on the device."""
        with held_back(), self.engine.processes.failing_together():
            return self._step(batch)

    def _step(self, batch: Inputs) -> Tensor:
        self.engine.check_constants()
        if isinstance(batch, Mapping) and tree_is_leaf(batch):
            batch = dict(batch)
        if self.pad_to_multiple_of is not None:
            batch = pad(batch, self.pad_to_multiple_of)
        if self._notes.read():
            self._start_over("a trial that was replayed should have been computed; it counted as rejected")
        if self._give_up:
            return self._eagerly(batch)
        leaves, spec = tree_flatten(batch)
        modules = self.engine.find_modules()
        signature: Hashable = None
        try:
            signature = _signature(leaves, spec, modules)
        except TypeError as error:
            self._abandon_graphs(f"the batch holds more than tensors and constants: {error}")
        signature = self._joint(signature, modules)
        if self._give_up:
            return self._eagerly(batch)
        if self._forget_if_changed(modules) or self._seen.get(signature, 0) < WARMUP:
            return self._warm_up(signature, batch)
        failure: Exception | None = None
        try:
            captured = self._captured(signature, leaves, spec)
            search = self.engine.is_due(captured.program.units)
            tail = self._tail(captured.program, search)
        except Exception as error:
            failure = error
        try:
            self._agree(failure)
        except Exception as error:
            self._drop_captures()
            loss = self._eagerly(batch)  # an error of the loss itself is raised here as in any eager step
            self._abandon_graphs(f"the capture failed: {type(error).__name__}: {error}")
            warnings.warn(f"fastals: steps run eagerly, because {self._give_up}", stacklevel=2)
            return loss
        try:
            with uninterrupted():  # signals wait until the step is launched and counted
                return self._replay(captured, tail, leaves, searched=search)
        except OutdatedError:
            self._start_over("a trial that was replayed should have been computed")
            return self._warm_up(signature, batch)

    def _joint(self, signature: Hashable, modules: list[torch.nn.Module]) -> Hashable:
        """The signature with those of the other processes, so that all hold a program, or none does.

        If one has given graphs up, or has to start over, all do.
        """
        processes = self.engine.processes
        if not processes.several:
            return signature
        self.engine.meet()
        own = zlib.crc32(repr((torch.distributed.get_rank(), signature)).encode())
        anew = self._standing(modules) != self._identity
        total, given_up, changed = processes.total([own, bool(self._give_up), anew], "signatures")
        if given_up and not self._give_up:
            self._abandon_graphs("another process has given graphs up")
        if changed:
            self._identity = None
        return signature, total

    def _agree(self, failure: Exception | None) -> None:
        """Wait until all processes have captured this step, if they had to; ``failure`` is why this one could not.

        Raises:
            PeerError: the capture has failed in another process. ``failure`` is raised itself.
        """
        if self._captures:
            self._captures = False
            self.engine.processes.agree(failure)
        elif failure is not None:
            raise failure

    @property
    def pool_bytes(self) -> int:
        """Device memory in bytes that the captured programs hold."""
        return sum(captured.program.backend.held_bytes() for captured in self._programs.values())

    @property
    def pieces(self) -> Pieces:
        """Pieces of the captured programs; tails that go on in the same way use the same ones."""
        used = [piece for captured in self._programs.values() for piece in captured.program.pieces]
        return Pieces(len(set(used)), len(used))

    def _warm_up(self, signature: Hashable, batch: Inputs) -> Tensor:
        if not self._seen:
            gc.collect()  # frees the device memory of old programs and models that only cycles hold
        loss = self._eagerly(batch)
        if (
            standing := self._standing(self.engine.find_modules())
        ) != self._identity:  # the step may have built the partition
            self._programs.clear()
            self._identity = standing
        self._seen[signature] = self._seen.get(signature, 0) + 1
        if len(self._seen) > MOST_SEEN:
            self._seen.popitem(last=False)
        if not self._programs and not self._give_up:
            reason = f"{len(self._seen)} signatures of inputs seen, and one is captured after {WARMUP} steps"
            self.mode = GraphMode("eager", reason)
        return loss

    def _eagerly(self, batch: Inputs) -> Tensor:
        generators = rng.get_state(rng.cuda_devices(self.engine.params()))
        with self._on_stream():
            moved = tree_map_only(Tensor, lambda t: t.to(self._device, non_blocking=True), batch)
            loss = self.optimizer.step(lambda: self.loss_fn(moved))
        self._note_draws(*generators)
        return loss

    def _note_draws(self, host: Tensor, devices: dict[int, Tensor]) -> None:
        """Note whether the forward has drawn random numbers since these states, on the host or on the device."""
        drawn = not torch.equal(host, torch.get_rng_state())
        if self._device.type == "cpu":
            self._draws |= drawn
            return
        self._draws |= any(not torch.equal(s, torch.cuda.get_rng_state(i)) for i, s in devices.items())
        if drawn and not self._give_up:
            self._abandon_graphs("the loss draws random numbers on the host, which graphs would repeat in every step")

    def _on_stream(self) -> AbstractContextManager[None]:
        if self._stream is None:
            return nullcontext()
        from fastals.graphs.cuda import on_stream

        return on_stream(self._stream)

    @contextmanager
    def _timed(self) -> Iterator[None]:
        """Count the time of the ``with`` block as spent on captures."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.capture_seconds += time.perf_counter() - begin

    def _captured(self, signature: Hashable, leaves: list[Any], spec: TreeSpec) -> Captured:
        """The program of the signature; a new one may take the place of the one used least recently."""
        if signature not in self._programs:
            while len(self._programs) >= self.max_signatures:
                self._programs.popitem(last=False)
            self._programs[signature] = self._capture(leaves, spec)
        self._programs.move_to_end(signature)
        return self._programs[signature]

    def _capture(self, leaves: list[Any], spec: TreeSpec) -> Captured:
        inputs = [leaf.to(self._device, copy=True) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        batch = tree_unflatten(inputs, spec)
        self._captures = True
        backend = self._make_backend(self._device, self._stream, draws=self._draws)
        with self._timed(), self._on_stream():
            program = Program(self.engine, lambda: self.loss_fn(batch), backend)
        return Captured(program, inputs)

    def _tail(self, program: Program, search: bool) -> Tail:
        """The program's tail for this step, captured at its first use."""
        turn = turn_of([unit.rules for unit in program.units]) if self.engine.settings.takes_turns else 0
        key = turn if search else "keep"
        if key not in program.tails:
            self._captures = True
            with self._timed(), self._on_stream():
                program.capture_tail(key, partial(self.engine.move, search=search), self.engine.seed)
            self._identity = self._standing(
                self.engine.find_modules()
            )  # a captured forward may have given the model new buffers
        tail = program.tails[key]
        self.mode = GraphMode(
            "while" if tail.launch is not None else "host", tail.reason or "loops are nodes of the graph"
        )
        return tail

    def _replay(self, captured: Captured, tail: Tail, leaves: list[Any], *, searched: bool) -> Tensor:
        engine, program = self.engine, captured.program
        with self._on_stream():
            for static, leaf in zip(captured.inputs, leaves, strict=True):
                if isinstance(static, Tensor):
                    static.copy_(leaf, non_blocking=True)
            program.device.refresh_rules(engine.seed)
            flags = program.device.arena.flags[-1]
            loss, note = torch.empty_like(program.loss), self._notes.new(flags)  # before what cannot be undone
            program.run(tail)
            loss.copy_(program.loss)
            self._notes.add(note, flags)
        program.device.arena.steps += 1  # the report is that of the last of these
        engine.count(tail.batch.report(), math.nan, program.units if searched else [])
        engine.reports.look()
        return loss

    def _forget_if_changed(self, modules: list[torch.nn.Module]) -> bool:
        """Forget all programs if anything that they depend on has changed; returns whether it has."""
        standing = self._standing(modules)
        changed = standing != self._identity
        if changed:
            self._programs.clear()
            self._seen.clear()
        self._identity = standing
        return changed

    def _standing(self, modules: list[torch.nn.Module]) -> Hashable:
        """All that captured steps depend on: addresses, ``requires_grad``, the modules, and the engine's partition."""
        tensors = self.engine.params()
        for module in modules:
            tensors += [t for t in module._parameters.values() if t is not None]
            tensors += [t for t in module._buffers.values() if t is not None]
        trained = tuple(map(attrgetter("requires_grad"), tensors))
        return tuple(map(Tensor.data_ptr, tensors)), trained, tuple(map(id, modules)), self.engine.built

    def _start_over(self, reason: str) -> None:
        """Forget all programs: what was known of the activation cache no longer holds."""
        warnings.warn(f"fastals: steps are captured anew: {reason}", stacklevel=3)
        self._programs.clear()
        self._seen.clear()

    def _drop_captures(self) -> None:
        self._programs.clear()
        for p in self.engine.params():
            p.grad = None

    def _abandon_graphs(self, reason: str) -> None:
        self._give_up = reason
        self.mode = GraphMode("eager", reason)


class Notes:
    """Flags of replayed steps on their way to the host, which reads those that have arrived."""

    def __init__(self) -> None:
        self._pending: deque[Note] = deque()

    def new(self, flags: Tensor) -> Note:
        """Room for a copy of such flags."""
        on_host = flags.device.type == "cpu"
        copied = torch.empty(flags.shape, dtype=flags.dtype, device="cpu", pin_memory=not on_host)
        return None if on_host else torch.cuda.Event(), copied

    def add(self, note: Note, flags: Tensor) -> None:
        """Queue a copy on the current stream; wait for the oldest if more than :data:`MOST_NOTED` are under way."""
        event, copied = note
        copied.copy_(flags, non_blocking=True)
        if event is not None:
            event.record()
        self._pending.append(note)
        oldest = self._pending[0][0]
        if len(self._pending) > MOST_NOTED and oldest is not None:
            oldest.synchronize()

    def read(self) -> bool:
        """Read the flags that have arrived; whether a step has found that the cache was misjudged.

        Raises:
            FloatingPointError: f(w_t) was not finite in one of the steps.
        """
        refused = outdated = False
        while self._pending and (self._pending[0][0] is None or self._pending[0][0].query()):
            flags = self._pending.popleft()[1]
            refused |= bool(flags[FLAGS.index("refused")])
            outdated |= bool(flags[FLAGS.index("outdated")])
        if refused:
            raise non_finite(math.nan)
        return outdated


def why_not_recorded(engine: Engine) -> str:
    """Why steps cannot be recorded as a fixed sequence of pieces; empty if they can."""
    settings = engine.settings
    if settings.cache == "check":
        return "cache='check' compares every trial on the host"
    if settings.order == "random":
        return "order='random' draws another sequence of searches in every step"
    if settings.merge_below is not None:
        return "merge_below looks at the step sizes after every step"
    if engine.is_sharded:
        return "the collectives of FSDP2 and DTensors run between the kernels of a step, under the host's control"
    return "" if engine.fused else "the optimizer does not run its fused kernels (fused=True says why)"


def why_not_graphed(engine: Engine) -> str:
    """Why steps cannot be CUDA graphs; empty if they can."""
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    return why_not_recorded(engine)


def pad(batch: Inputs, multiple: int) -> Inputs:
    """Pad every tensor of the length of ``input_ids``, on the right; the mask excludes the padding.

    Raises:
        TypeError: the batch is no mapping with ``input_ids`` and ``attention_mask``.
    """
    if not isinstance(batch, Mapping) or not {"input_ids", "attention_mask"} <= set(batch):
        raise TypeError("pad_to_multiple_of needs batches that are mappings with input_ids and attention_mask")
    length = batch["input_ids"].shape[1]
    missing = -length % multiple

    def padded(name: str, value: Any) -> Any:
        if not missing or not isinstance(value, Tensor) or value.dim() < 2 or value.shape[1] != length:
            return value
        filling = -100 if name == "labels" else 0
        widths = [0, 0] * (value.dim() - 2) + [0, missing]
        return torch.nn.functional.pad(value, widths, value=filling)

    return {name: padded(name, value) for name, value in batch.items()}


def _signature(leaves: list[Any], spec: TreeSpec, modules: list[torch.nn.Module]) -> Hashable:
    kinds = tuple((leaf.shape, leaf.dtype) if isinstance(leaf, Tensor) else leaf for leaf in leaves)
    training = tuple(map(attrgetter("training"), modules))
    autocast = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    signature = str(spec), kinds, training, autocast
    hash(signature)
    return signature


def _cuda_graphs(device: torch.device, stream: torch.cuda.Stream | None, *, draws: bool) -> Backend:
    from fastals.graphs.cuda import CudaGraphs

    assert stream is not None
    return CudaGraphs(device, stream, draws=draws)
