"""What modules are made of, to notice that it has changed."""

from collections.abc import Iterable
from typing import Any

from torch import nn

Anatomy = tuple[object, ...]


def anatomy(modules: Iterable[nn.Module]) -> Anatomy:
    """All that a step takes for granted of the modules: their parts, parameters, hooks and training flags.

    It holds ids: compare it only while the modules live.
    """
    parts: list[object] = []
    for m in modules:
        parts += id(m), m.training, len(m._buffers)
        parts += map(id, m._parameters.values())
        for hooks in (m._forward_hooks, m._forward_pre_hooks):
            parts += map(_code, hooks.values())
    return tuple(parts)


def _code(hook: Any) -> int:
    """What a hook runs: a function that is made anew for every step, or a partial of one, stays the same hook."""
    code = getattr(hook, "__code__", None) or getattr(getattr(hook, "func", None), "__code__", None)
    return id(code or type(hook))


def distinct_modules(roots: Iterable[nn.Module | None]) -> list[nn.Module]:
    """All modules below the roots, each once, without the names that ``modules()`` makes."""
    found: dict[int, nn.Module] = {}
    waiting = [root for root in roots if root is not None]
    while waiting:
        module = waiting.pop()
        if id(module) not in found:
            found[id(module)] = module
            waiting += (child for child in module._modules.values() if child is not None)
    return list(found.values())
