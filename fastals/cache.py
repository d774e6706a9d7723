"""Activation cache: a memo of the calls of modules, so that a trial computes only those calls that its unit changes.

A forward pass calls *boundary* modules (the blocks and the modules beside them) one after the other; the code of their
parents connects the calls and always runs. A recorded call is replayed if and only if its arguments are the recorded
ones, its parameters and buffers have not been written since, and the generators stand where they stood. So nothing
needs to be known of the order of the calls: one with a new argument is computed and hands a new output to the next.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastals.calls import Aliases, Arguments, Call, Slot
from fastals.compare import Comparison, digest
from fastals.compiler import below_compiled
from fastals.errors import StaleRecordError
from fastals.intercept import intercepted
from fastals.partition import blocks, boundaries
from fastals.rng import Generators
from fastals.shards import has_collectives, is_sharded, unwrapped
from fastals.stamps import Stamps

Key = tuple[int, int]  # a module's id, and the number of its call in the evaluation


class ActivationCache:
    """Records and replays the boundary calls of a model, and of further modules.

    Attributes:
        block_names: names of the blocks, by the ids of the modules.
        stamps: tell whether parameters and buffers have been written.
        changing: ids of buffers that the forward writes.
        in_order: whether every call after a computed one is computed too. Where calls leave something outside of their
            outputs, a trial so replays just what comes before its unit, whatever the loss makes of that unit's outputs.
        drawn: names of the generators to watch; None for all.
        forwards: computed (not replayed) calls of each block, by its name.
        share: fraction of the block calls that were computed, in the last evaluation.
        records: the recorded calls in their order.
        fresh: those of the last evaluation, if they were kept.
        replays: whether the last evaluation replayed calls.
        outputs: what :func:`digest` says of the output of every call in the last evaluation, if asked for.
        comparison: compares arguments in the last evaluation; None if it replayed nothing.
        missed: the first call that was computed although it was recorded, and why.
        unlike: whether such a call gave another output in an evaluation at w_t.
    """

    def __init__(self, model: nn.Module | None, further: Sequence[nn.Module], generators: Generators) -> None:
        self.generators, self.stamps = generators, Stamps()
        self.changing: Collection[int] = ()
        self.in_order = False
        self.drawn: Collection[str] | None = None
        self.names: dict[int, str] = {}
        self.block_names: dict[int, str] = {}
        self.boundaries: list[nn.Module] = []
        for i, root in enumerate([model, *further]):
            if root is not None:
                self._add(root, prefix=f"modules[{i - 1}]." if i else "")
        self._places = {id(b): _places(b) for b in self.boundaries}
        self._attributes = {id(b): [m.__dict__ for m in b.modules()] for b in self.boundaries}
        self.forwards: Counter[str] = Counter()
        self.share = 1.0
        self.records: dict[Key, Call] = {}
        self.fresh: dict[Key, Call] | None = None
        self.replays = False
        self._first: dict[int, int] = {}
        self._collective: dict[int, bool] = {}
        self.comparison: Comparison | None = None
        self.outputs: dict[Key, list[Tensor]] | None = None
        self.missed, self.unlike, self._inside = "", False, False

    def _add(self, root: nn.Module, prefix: str) -> None:
        root, unseen = unwrapped(root), below_compiled(root)
        self.boundaries += [b for b in boundaries(root) if id(b) not in unseen | set(self.names)]
        self.block_names |= {id(m): prefix + n for n, m in blocks(root).items()}
        self.names |= {id(m): prefix + n for n, m in root.named_modules()}

    def forget(self) -> None:
        """Drop every record, in whatever else holds the records too."""
        self.records.clear()
        self.fresh = None

    def clear(self) -> None:
        """Drop everything that belongs to the step."""
        self.forget()
        self.comparison = self.outputs = None
        self._first.clear()
        self.stamps.clear()

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Compute every boundary call of the closure that runs inside, and keep the calls."""
        self.records = {}
        with self.computing(record=True):
            yield
        self.adopt()
        for i, call in enumerate(self.records.values()):
            for tensor, _ in call.read:
                self._first.setdefault(id(tensor), i)

    @contextmanager
    def computing(self, *, record: bool = False, note_outputs: bool = False) -> Iterator[None]:
        """Compute every boundary call of the closure that runs inside; with ``record`` keep them for :meth:`adopt`."""
        with self._running(None, record, note_outputs):
            yield

    @contextmanager
    def replaying(self, comparison: Comparison, *, record: bool = False, note_outputs: bool = False) -> Iterator[None]:
        """Replay every boundary call that is recorded and compute the others."""
        with self._running(comparison, record, note_outputs):
            yield

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Neither record nor replay the calls that are made inside."""
        inside, self._inside = self._inside, True
        try:
            yield
        finally:
            self._inside = inside

    def adopt(self) -> None:
        """From now on replay the calls of the last evaluation, if they were kept."""
        if self.fresh is not None:
            self.records, self.fresh = self.fresh, None

    @property
    def guessed_wrong(self) -> bool:
        """Whether the last evaluation took values for equal that were not; waits for the device."""
        if self.comparison is None:
            return False
        return self.comparison.doubtful or (self.comparison.differs is not None and bool(self.comparison.differs))

    @property
    def sequence(self) -> tuple[int, ...]:
        """The modules of the recorded calls, by their ids."""
        return tuple(module for module, _ in self.records)

    def first_use(self, params: Iterable[Tensor]) -> int:
        """Index of the first recorded call that reads one of the parameters; 0 if none does."""
        return min((self._first.get(id(p), 0) for p in params), default=0)

    def position(self, param: Tensor) -> str:
        """Name of the unit in which the forward first uses ``param``, by the order of the calls.

        A call before the first block belongs to ``embeddings``, one between two blocks to the later block, and one
        after the last block to ``head``. Empty if Python called no block, as in a model that is compiled as a whole.
        """
        first = self._first.get(id(param))
        block_calls = [i for i, (module, n) in enumerate(self.records) if module in self.block_names and not n]
        if not block_calls:
            return ""
        following = next((i for i in block_calls if i >= (first or 0)), None)
        if following is None:
            return "head"
        if first is None or (following == block_calls[0] and first < following):
            return "embeddings"
        return self.block_names[list(self.records)[following][0]]

    @contextmanager
    def _running(self, comparison: Comparison | None, record: bool, note_outputs: bool) -> Iterator[None]:
        self.replays = comparison is not None
        self.comparison, self.fresh, self._aliases = comparison, {} if record else None, Aliases(self.stamps)
        self.outputs = {} if note_outputs else None
        self.missed, self.unlike, self._inside = "", False, False
        self._calls: Counter[int] = Counter()
        self._skipped: dict[int, list[Any]] = {}  # objects on which the effects of a module were not repeated
        self._computed_blocks = self._replayed_blocks = 0
        self._has_computed = False
        with intercepted(self.boundaries, self._call):
            yield
        del self._aliases
        called = self._computed_blocks + self._replayed_blocks
        self.share = self._computed_blocks / called if called else 1.0

    def _call(self, module: nn.Module, forward: Callable, args: tuple, kwargs: dict) -> Any:
        """Replay or compute a call; one inside another boundary or under vmap belongs to what is outside."""
        if self._inside or torch._C._functorch.peek_interpreter_stack() is not None:
            return forward(*args, **kwargs)
        key = id(module), self._calls[id(module)]
        self._calls[id(module)] += 1
        arguments = Arguments(args, kwargs)
        known = self.records.get(key) if self.comparison is not None else None
        call: Call | None = known
        if self.comparison is not None and self._is_recorded(key, module, known, arguments) and known is not None:
            output = self._replay(known)
            self._skipped.setdefault(id(module), []).extend(arguments.opaque)
        else:
            output, call = self._compute(key, module, forward, args, kwargs, arguments)
            if known is not None and self.comparison is not None and self.comparison.at_start:
                self.unlike |= known.gave_another(output, self.stamps)
        if self.fresh is not None and call is not None:
            self.fresh[key] = call
        if self.outputs is not None:
            self.outputs[key] = digest(output)
        return output

    def _is_recorded(self, key: Key, module: nn.Module, call: Call | None, arguments: Arguments) -> bool:
        assert self.comparison is not None
        why = self._difference(call, arguments) if call is not None else "it was not recorded"
        if self.comparison.agree is not None and self._is_collective(module):
            why = self.comparison.of_all(key, why)
        if why and call is not None and not self.missed:
            self.missed = f"{self.names[id(module)]!r}: {why}"
        return not why

    def _is_collective(self, module: nn.Module) -> bool:
        """Whether its calls have collectives inside; the weights of a gathered parent are whole by now."""
        if id(module) not in self._collective:
            self._collective[id(module)] = has_collectives(module.modules())
        return self._collective[id(module)]

    def _difference(self, call: Call, arguments: Arguments) -> str:
        """Why the call is not the recorded one; empty if it is."""
        assert self.comparison is not None
        if call.obstacle:
            return call.obstacle
        if self.in_order and self._has_computed:
            return "a call before it was computed"
        if torch.is_grad_enabled() and call.tracked:
            return "its gradient is needed"
        if not call.reads_the_same(self.stamps):
            return "its parameters, its buffers or its output have been written"
        if not self.comparison.same(call, arguments, self.stamps):
            return "its arguments are others"
        if self.generators.moved(call.before):
            return "random numbers were drawn before it that were not drawn the first time"
        return ""

    def _replay(self, call: Call) -> Any:
        self.generators.restore(call.after)
        self._replayed_blocks += id(call.module) in self.block_names
        return call.replay(self.stamps)

    def _compute(
        self, key: Key, module: nn.Module, forward: Callable, args: tuple, kwargs: dict, arguments: Arguments
    ) -> tuple[Any, Call | None]:
        if any(a is b for a in arguments.opaque for b in self._skipped.get(id(module), ())):
            raise StaleRecordError
        call, self._has_computed = None, True
        if self.fresh is not None:
            before = self.generators.save(self.drawn)
            inside = self._places[id(module)], self._attributes[id(module)]
            call = Call(key, module, arguments, *inside, self.stamps, self._aliases, before)
        self._inside = True
        try:
            output = forward(*args, **kwargs)
        finally:
            self._inside = False
        if call is not None:
            after = self.generators.save(self.drawn)
            call.note_end(output, arguments, args, kwargs, self.stamps, self._aliases, self.changing, after)
        if id(module) in self.block_names:
            self.forwards[self.block_names[id(module)]] += 1
            self._computed_blocks += 1
        return output, call


def _places(module: nn.Module) -> list[Slot]:
    """Where the module and those inside it hold parameters and buffers.

    A scripted module's holder is no dict, and FSDP2 puts gathered weights in the place of the shards: both are copied.
    """
    holders = [h for m in module.modules() for h in (m._parameters, m._buffers)]
    lasting = [h if isinstance(h, dict) and not any(map(is_sharded, h.values())) else dict(h.items()) for h in holders]
    return [(holder, name) for holder in lasting for name in holder]
