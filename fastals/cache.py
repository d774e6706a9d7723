"""Activation cache: a trial of one unit recomputes only the part of the forward that the unit can change.

A forward pass is a run of calls of *boundary* modules (the blocks and the modules beside them), glued
together by the code of their parents. While a forward is recorded, the output of every boundary call and the
random state behind it are kept. A trial of unit u replays the calls before u's *start*, the first call of
a boundary that owns one of its parameters, and runs the rest; the glue always runs. Tied and shared
weights need no special case: a unit that owns them starts at the first of their users.
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

Start = list[int]


class StaleRecordError(RuntimeError):
    """The forward took another path than the recorded one, or wrote into a recorded output."""


@dataclass(slots=True)
class Call:
    """One recorded boundary call."""

    module: nn.Module
    output: Any
    versions: list[int]
    state: rng.State


class ActivationCache:
    """Records and replays the boundary calls of ``model``.

    Calls are counted within each call of the model, so a closure that runs several micro-batches is
    cached in each of them. ``forwards`` counts the block calls that were computed, by block name; ``share`` is
    the part of the last forward's block calls that was.
    """

    def __init__(self, model: nn.Module, devices: tuple[int, ...]) -> None:
        self.model = model
        self.devices = devices
        self.fingerprint = self._fingerprint()
        hidden = _below_compiled(model)
        self.boundaries = [b for b in boundaries(model) if id(b) not in hidden]
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
        """Run a whole forward and keep its boundary calls."""
        self.clear()
        with self._running(start=[], fresh=[]):
            yield
        self.adopt()

    @contextmanager
    def replaying(self, start: Start, *, record: bool = False) -> Iterator[None]:
        """Run a forward that replays the calls before ``start``; with ``record``, :meth:`adopt` can keep it."""
        with self._running(start, [] if record else None):
            yield

    def adopt(self) -> None:
        """Make the forward that was recorded last the one that is replayed."""
        if self._fresh is not None:
            self.passes, self._fresh = self._fresh, None

    def start(self, params: Iterable[Tensor]) -> Start:
        """First call, in each pass, that the parameters can change; 0 where it is not known."""
        needed = [self.owners.get(id(p)) for p in params]
        return [min((_first(calls, owners) for owners in needed), default=0) for calls in self.passes]

    def position(self, param: Tensor) -> str:
        """Which part of the model uses ``param`` first: ``embeddings``, ``head``, or the block called there or next.

        Empty where no call of a block was seen, as in a model that is compiled as a whole.
        """
        calls, owners = self.passes[0] if self.passes else [], self.owners.get(id(param))
        first = next((i for i, call in enumerate(calls) if owners and call.module in owners), 0)
        at = [i for i, call in enumerate(calls) if id(call.module) in self.names]
        if not at:
            return ""
        following = next((i for i in at if i >= first), None)
        if following is None:
            return "head"
        before_all = following == at[0] and first < at[0]
        return "embeddings" if before_all or not owners else self.names[id(calls[following].module)]

    @contextmanager
    def _running(self, start: Start, fresh: list[list[Call]] | None) -> Iterator[None]:
        self._start, self._fresh, self._pass, self._clock, self._inside = start, fresh, -1, 0, False
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
        self._pass, self._clock = self._pass + 1, 0
        if self._fresh is not None:
            self._fresh.append([])

    def _call(self, module: nn.Module, forward: Callable, args: tuple, kwargs: dict) -> Any:
        if self._inside:  # a boundary within another one's call
            return forward(*args, **kwargs)
        if self._pass < 0:  # the closure calls parts of the model, not the model
            self._open_pass()
        index, self._clock = self._clock, self._clock + 1
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
    kept = tree_map_only(Tensor, Tensor.detach, output)
    return Call(module, kept, _versions(kept), state)


def _versions(output: Any) -> list[int]:
    return [t._version for t in tree_leaves(output) if isinstance(t, Tensor) and not t.is_inference()]


def _first(calls: Sequence[Call], owners: list[nn.Module] | None) -> int:
    """Index of the first call of any owner; 0 unless every use of the parameter lies in a boundary call."""
    return next((i for i, call in enumerate(calls) if owners and call.module in owners), 0)


def _owners(model: nn.Module, boundary_list: Sequence[nn.Module]) -> dict[int, list[nn.Module]]:
    """By parameter id, the boundaries that hold it; empty if a module outside of all boundaries holds it too."""
    inside = {id(m): b for b in boundary_list for m in b.modules()}
    holders: dict[int, list[nn.Module | None]] = {}
    for module in model.modules():
        for p in module.parameters(recurse=False):
            holders.setdefault(id(p), []).append(inside.get(id(module)))
    return {p: [] if None in found else [b for b in found if b is not None] for p, found in holders.items()}


def _below_compiled(model: nn.Module) -> set[int]:
    """Ids of the modules inside a compiled one: their calls are not seen from Python."""
    compiled = [m for m in model.modules() if hasattr(m, "_orig_mod") or m._compiled_call_impl is not None]
    return {id(inner) for m in compiled for inner in m.modules() if inner is not m}


@contextmanager
def _patched(modules: Iterable[nn.Module], intercept: Callable) -> Iterator[None]:
    """Route the calls of the modules through ``intercept`` and leave no trace behind."""
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
