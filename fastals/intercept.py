"""Intercept the calls of modules for a while."""

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import nn


def below_compiled(model: nn.Module) -> set[int]:
    """Ids of the modules inside a compiled one, whose calls Python does not see, and of scripted ones."""
    compiled = [m for m in model.modules() if hasattr(m, "_orig_mod") or m._compiled_call_impl is not None]
    scripted = {id(m) for m in model.modules() if isinstance(m, torch.jit.ScriptModule)}
    return scripted | {id(inner) for m in compiled for inner in m.modules() if inner is not m}


class Intercepted:
    """Stands for the forward of a module; a copy of the module gets its plain forward."""

    def __init__(self, intercept: Callable, module: nn.Module, forward: Callable, own: Any) -> None:
        self.intercept, self.module, self.plain, self.own = intercept, module, forward, own
        self.active = True
        self.__wrapped__ = forward  # for those who ask for its signature

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Have the call intercepted."""
        if not self.active:  # somebody has kept it
            return self.plain(*args, **kwargs)
        return self.intercept(self.module, self.plain, args, kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """The forward that the copied module had before, its own or that of its class."""
        if self.own is not None:
            return copy.deepcopy(self.own, memo)
        return MethodType(type(self.module).forward, memo[id(self.module)])


@contextmanager
def intercepted(modules: Iterable[nn.Module], intercept: Callable) -> Iterator[None]:
    """Route the calls of the modules through ``intercept`` inside the ``with`` block, and restore them after it."""
    placed: list[tuple[nn.Module, str, Intercepted]] = []
    try:
        for module in modules:
            name = "forward" if module._compiled_call_impl is None else "_compiled_call_impl"
            stand_in = Intercepted(intercept, module, getattr(module, name), module.__dict__.get(name))
            placed.append((module, name, stand_in))
            object.__setattr__(module, name, stand_in)
        yield
    finally:
        for module, name, stand_in in placed:
            stand_in.active = False
            if module.__dict__.get(name) is not stand_in:
                continue  # an interrupt came before it was set, or the forward has put something else there
            if stand_in.own is not None:
                object.__setattr__(module, name, stand_in.own)
            else:
                object.__delattr__(module, name)
