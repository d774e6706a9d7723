"""Activation cache: a trial of one unit recomputes only the part of the forward pass that the unit can change.

A forward pass calls *boundary* modules (the blocks and the modules beside them) one after the other; the code of
their parents connects the calls. Recording keeps the output of every boundary call and the random state after it.
A trial of unit u *starts* at the first call of a boundary that holds one of u's parameters: it replays the calls
before its start and computes the others. The code of the parents always runs. Tied and shared weights need no
special case: their unit starts at their first user.
"""

import functools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from fastals import rng
from fastals.partition import blocks, boundaries

Start = list[int]  # of each pass of the model, the index of the first call to compute


class StaleRecordError(RuntimeError):
    """The forward pass made other calls than the recorded one, or wrote into a recorded output."""


@dataclass(slots=True)
class Call:
    """One recorded boundary call: its output, the versions of the output's tensors, and the random state after it."""

    module: nn.Module
    output: Any
    versions: list[int]
    state: rng.State


class ActivationCache:
    """Records and replays the boundary calls of ``model``.

    Each call of the model is a pass, and each pass has a list of its boundary calls; a closure with several
    micro-batches makes several passes.

    Attributes:
        forwards: computed (not replayed) calls of each block, by its name.
        share: fraction of the block calls that were computed, in the last run of the closure.
        passes: the recorded calls, pass by pass.
    """

    def __init__(self, model: nn.Module, devices: tuple[int, ...]) -> None:
        self.model = model
        self.devices = devices
        self.fingerprint = self._fingerprint()
        unseen = _below_compiled(model)
        self.boundaries = [b for b in boundaries(model) if id(b) not in unseen]
        self.owners = _owners(model, self.boundaries)
        self.names = {id(m): n for n, m in blocks(model).items()}
        self.forwards: Counter[str] = Counter()
        self.share = 1.0
        self.passes: list[list[Call]] = []
        self._fresh: list[list[Call]] | None = None
        self._start: Start = []
        self._inside = False

    def _fingerprint(self) -> tuple[int, ...]:
        return tuple(map(id, self.model.modules()))

    def outdated(self) -> bool:
        """Whether the module tree has changed since the cache was built."""
        return self._fingerprint() != self.fingerprint

    def clear(self) -> None:
        """Drop every recorded output."""
        self.passes, self._fresh = [], None

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Compute every boundary call of the closure that runs inside, and keep the outputs."""
        self.clear()
        with self._running(start=[], fresh=[]):
            yield
        self.adopt()

    @contextmanager
    def replaying(self, start: Start, *, record: bool = False) -> Iterator[None]:
        """Replay the calls before ``start`` in the closure inside; with ``record`` keep its calls for :meth:`adopt`."""
        with self._running(start, [] if record else None):
            yield

    def adopt(self) -> None:
        """From now on replay the calls recorded last."""
        if self._fresh is not None:
            self.passes, self._fresh = self._fresh, None

    def start(self, params: Iterable[Tensor]) -> Start:
        """Index of the first call in each pass that the parameters can change; 0 if it is unknown."""
        users = [self.owners.get(id(p)) for p in params]
        return [min((_first(calls, owners) for owners in users), default=0) for calls in self.passes]

    def position(self, param: Tensor) -> str:
        """Name of the unit in which the forward first uses ``param``, by the order of the calls.

        A call before the first block belongs to ``embeddings``, one between two blocks to the later block, and one
        after the last block to ``head``. Empty if Python called no block, as in a model that is compiled as a whole.
        """
        calls, owners = self.passes[0] if self.passes else [], self.owners.get(id(param))
        first = next((i for i, call in enumerate(calls) if owners and call.module in owners), 0)
        block_calls = [i for i, call in enumerate(calls) if id(call.module) in self.names]
        if not block_calls:
            return ""
        following = next((i for i in block_calls if i >= first), None)
        if following is None:
            return "head"
        before_blocks = following == block_calls[0] and first < block_calls[0]
        return "embeddings" if before_blocks or not owners else self.names[id(calls[following].module)]

    @contextmanager
    def _running(self, start: Start, fresh: list[list[Call]] | None) -> Iterator[None]:
        """Intercept the calls inside: replay those before ``start``, and append all to ``fresh`` if given."""
        self._start, self._fresh, self._pass, self._next_call, self._inside = start, fresh, -1, 0, False
        self._computed_blocks = self._replayed_blocks = 0
        with _patched([self.model], self._new_pass), _patched(self.boundaries, self._call):
            yield
        called = self._computed_blocks + self._replayed_blocks
        self.share = self._computed_blocks / called if called else 1.0

    def _new_pass(self, module: nn.Module, forward: Callable, args: tuple, kwargs: dict) -> Any:
        del module
        self._open_pass()
        return forward(*args, **kwargs)

    def _open_pass(self) -> None:
        self._pass, self._next_call = self._pass + 1, 0
        if self._fresh is not None:
            self._fresh.append([])

    def _call(self, module: nn.Module, forward: Callable, args: tuple, kwargs: dict) -> Any:
        if self._inside:  # a boundary inside another one belongs to the outer call
            return forward(*args, **kwargs)
        if self._pass < 0:  # the closure calls parts of the model and never the model itself
            self._open_pass()
        index, self._next_call = self._next_call, self._next_call + 1
        if self._pass < len(self._start) and index < self._start[self._pass]:
            call = self._recorded(module, index)
            rng.set_state(call.state)
            output = call.output
            self._replayed_blocks += id(module) in self.names
        else:
            output = self._computed(module, forward, args, kwargs)
            call = None
        if self._fresh is not None:
            self._fresh[self._pass].append(call or _record(module, output, rng.get_state(self.devices)))
        return output

    def _recorded(self, module: nn.Module, index: int) -> Call:
        """The recorded call at this index, if it is one of the same module and its output is unchanged."""
        calls = self.passes[self._pass]
        if index >= len(calls) or calls[index].module is not module:
            raise StaleRecordError("the forward called its modules in another order than the recorded one")
        call = calls[index]
        if _versions(call.output) != call.versions:
            raise StaleRecordError(f"the output of a {type(module).__name__} was changed in place after its call")
        return call

    def _computed(self, module: nn.Module, forward: Callable, args: tuple, kwargs: dict) -> Any:
        self._inside = True
        try:
            output = forward(*args, **kwargs)
        finally:
            self._inside = False
        if id(module) in self.names:
            self.forwards[self.names[id(module)]] += 1
            self._computed_blocks += 1
        return output


def _record(module: nn.Module, output: Any, state: rng.State) -> Call:
    detached = tree_map_only(Tensor, Tensor.detach, output)
    return Call(module, detached, _versions(detached), state)


def _versions(output: Any) -> list[int]:
    return [t._version for t in tree_leaves(output) if isinstance(t, Tensor) and not t.is_inference()]


def _first(calls: Sequence[Call], owners: list[nn.Module] | None) -> int:
    """Index of the first call of any owner; 0 unless every use of the parameter lies in a boundary call."""
    return next((i for i, call in enumerate(calls) if owners and call.module in owners), 0)


def _owners(model: nn.Module, boundary_list: Sequence[nn.Module]) -> dict[int, list[nn.Module]]:
    """The boundaries that hold each parameter, by its id; none if a module outside all boundaries holds it too."""
    inside = {id(m): b for b in boundary_list for m in b.modules()}
    holders: dict[int, list[nn.Module | None]] = {}
    for module in model.modules():
        for p in module.parameters(recurse=False):
            holders.setdefault(id(p), []).append(inside.get(id(module)))
    return {p: [] if None in held_by else [b for b in held_by if b is not None] for p, held_by in holders.items()}


def _below_compiled(model: nn.Module) -> set[int]:
    """Ids of the modules inside a compiled one, whose calls Python does not see."""
    compiled = [m for m in model.modules() if hasattr(m, "_orig_mod") or m._compiled_call_impl is not None]
    return {id(inner) for m in compiled for inner in m.modules() if inner is not m}


@contextmanager
def _patched(modules: Iterable[nn.Module], intercept: Callable) -> Iterator[None]:
    """Route the calls of the modules through ``intercept`` inside the ``with`` block, and restore them after it."""
    saved: list[tuple[nn.Module, str, Any]] = []
    try:
        for module in modules:
            name = "forward" if module._compiled_call_impl is None else "_compiled_call_impl"
            saved.append((module, name, module.__dict__.get(name)))
            object.__setattr__(module, name, _bind(intercept, module, getattr(module, name)))
        yield
    finally:
        for module, name, previous in saved:
            if previous is None:
                object.__delattr__(module, name)
            else:
                object.__setattr__(module, name, previous)


def _bind(intercept: Callable, module: nn.Module, forward: Callable) -> Callable:
    @functools.wraps(forward)
    def call(*args: Any, **kwargs: Any) -> Any:
        return intercept(module, forward, args, kwargs)

    return call
