"""Save and restore the random generators that a forward pass draws from."""

import random
import sys
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

State = tuple[Tensor, dict[int, Tensor]]
States = dict[str, Any]  # by the name of the generator


def cuda_devices(tensors: Iterable[Tensor]) -> tuple[int, ...]:
    """Indices of the CUDA devices that hold any of the tensors."""
    return tuple(sorted({t.device.index for t in tensors if t.device.type == "cuda"}))


def get_state(devices: tuple[int, ...]) -> State:
    """The state of torch's generator on the CPU, and of the default generator of each CUDA device, by its index."""
    return torch.get_rng_state(), {i: torch.cuda.get_rng_state(i) for i in devices}


def set_state(state: State) -> None:
    """Set torch's generators to a saved state."""
    cpu, cuda = state
    torch.set_rng_state(cpu)
    for index, device_state in cuda.items():
        torch.cuda.set_rng_state(device_state, index)


@contextmanager
def standing_at(state: State) -> Iterator[None]:
    """Set torch's generators to a saved state inside the ``with`` block, and restore them after it."""
    outside = get_state(tuple(state[1]))
    set_state(state)
    try:
        yield
    finally:
        set_state(outside)


class Generator(NamedTuple):
    """How to save, restore and compare one generator."""

    get: Callable[[], Any]
    set: Callable[[Any], object]
    same: Callable[[Any, Any], bool]


class Generators:
    """All global generators: torch's on the CPU and on these CUDA devices, Python's, and NumPy's if it is imported."""

    def __init__(self, devices: tuple[int, ...]) -> None:
        self.devices = devices
        self._each = {
            "torch": Generator(torch.get_rng_state, torch.set_rng_state, torch.equal),
            "python": Generator(random.getstate, random.setstate, tuple.__eq__),
        }
        for i in devices:
            self._each[f"cuda:{i}"] = Generator(partial(_get_cuda, i), partial(_set_cuda, i), torch.equal)
        if numpy := sys.modules.get("numpy"):
            self._each["numpy"] = Generator(numpy.random.get_state, numpy.random.set_state, _same_arrays)

    def save(self, names: Collection[str] | None = None) -> States:
        """The states of all generators, or of those with these names."""
        return {name: each.get() for name, each in self._each.items() if names is None or name in names}

    def restore(self, states: States) -> None:
        """Set the generators to saved states."""
        for name, state in states.items():
            self._each[name].set(state)

    def moved(self, states: States) -> set[str]:
        """Names of the generators that do not stand at these states."""
        return {name for name, state in states.items() if not self._each[name].same(self._each[name].get(), state)}


def _get_cuda(index: int) -> Tensor:
    return torch.cuda.get_rng_state(index)


def _set_cuda(index: int, state: Tensor) -> None:
    torch.cuda.set_rng_state(state, index)


def _same_arrays(a: tuple, b: tuple) -> bool:
    """Whether two states of NumPy's generator are equal: a name, an array, and numbers."""
    return a[2:] == b[2:] and bool((a[1] == b[1]).all())
