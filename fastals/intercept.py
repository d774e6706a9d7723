"""Intercept the calls of modules for a while."""

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import nn

from fastals.compiler import TracedError, mark_refusal, refuse_trace, runs_in_compiled
from fastals.shards import is_fsdp


class Intercepted:
    """Stands for the forward of a module; a copy of the module gets its plain forward."""

    def __init__(self, intercept: Callable, module: nn.Module, forward: Callable, own: Any) -> None:
        self.intercept, self.module, self.plain, self.own = intercept, module, forward, own
        self.active = True
        self.__wrapped__ = forward  # for those who ask for its signature

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Have the call intercepted.

        Raises:
            TracedError: it is a part of something compiled.
        """
        if not self.active:  # somebody has kept it
            return self.plain(*args, **kwargs)
        if torch.compiler.is_compiling():
            refuse_trace()
        if runs_in_compiled():
            raise TracedError
        return self.intercept(self.module, self.plain, args, kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """The forward that the copied module had before, its own or that of its class."""
        if self.own is not None:
            return copy.deepcopy(self.own, memo)
        return MethodType(type(self.module).forward, memo[id(self.module)])


def _entry(module: nn.Module) -> tuple[str, Callable]:
    """The attribute by which calls of the module are intercepted, and the function that it stands for."""
    if module._compiled_call_impl is not None:
        return "_compiled_call_impl", module._compiled_call_impl
    if is_fsdp(module):  # around the hooks, which gather the weights
        return "_compiled_call_impl", module._call_impl
    return "forward", module.forward


@contextmanager
def intercepted(modules: Iterable[nn.Module], intercept: Callable) -> Iterator[None]:
    """Route the calls of the modules through ``intercept`` inside the ``with`` block, and restore them after it."""
    mark_refusal()
    placed: list[tuple[nn.Module, str, Intercepted]] = []
    try:
        for module in modules:
            name, plain = _entry(module)
            stand_in = Intercepted(intercept, module, plain, module.__dict__.get(name))
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
