"""Intercept the calls of modules for a while."""

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

from torch import nn


def below_compiled(model: nn.Module) -> set[int]:
    """Ids of the modules inside a compiled one, whose calls Python does not see."""
    compiled = [m for m in model.modules() if hasattr(m, "_orig_mod") or m._compiled_call_impl is not None]
    return {id(inner) for m in compiled for inner in m.modules() if inner is not m}


class Intercepted:
    """Stands for the forward of a module; a copy of the module gets its plain forward."""

    def __init__(self, intercept: Callable, module: nn.Module, forward: Callable, own: Any) -> None:
        self.intercept, self.module, self.plain, self.own = intercept, module, forward, own
        self.__wrapped__ = forward  # for those who ask for its signature

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Have the call intercepted."""
        return self.intercept(self.module, self.plain, args, kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """The forward that the copied module had before, its own or that of its class."""
        if self.own is not None:
            return copy.deepcopy(self.own, memo)
        return MethodType(type(self.module).forward, memo[id(self.module)])


@contextmanager
def intercepted(modules: Iterable[nn.Module], intercept: Callable) -> Iterator[None]:
    """Route the calls of the modules through ``intercept`` inside the ``with`` block, and restore them after it."""
    saved: list[tuple[nn.Module, str, Any]] = []
    try:
        for module in modules:
            name = "forward" if module._compiled_call_impl is None else "_compiled_call_impl"
            own = module.__dict__.get(name)
            saved.append((module, name, own))
            object.__setattr__(module, name, Intercepted(intercept, module, getattr(module, name), own))
        yield
    finally:
        for module, name, previous in saved:
            if previous is not None:
                object.__setattr__(module, name, previous)
            elif name in module.__dict__:  # an interrupt may have come before it was set
                object.__delattr__(module, name)
