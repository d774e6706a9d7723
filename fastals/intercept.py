"""Intercept the calls of modules for a while."""

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


def below_compiled(model: nn.Module) -> set[int]:
    """Ids of the modules inside a compiled one, whose calls Python does not see."""
    compiled = [m for m in model.modules() if hasattr(m, "_orig_mod") or m._compiled_call_impl is not None]
    return {id(inner) for m in compiled for inner in m.modules() if inner is not m}


@contextmanager
def intercepted(modules: Iterable[nn.Module], intercept: Callable) -> Iterator[None]:
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
            if previous is not None:
                object.__setattr__(module, name, previous)
            elif name in module.__dict__:  # an interrupt may have come before it was set
                object.__delattr__(module, name)


def _bind(intercept: Callable, module: nn.Module, forward: Callable) -> Callable:
    @functools.wraps(forward)
    def call(*args: Any, **kwargs: Any) -> Any:
        return intercept(module, forward, args, kwargs)

    return call
