"""Save and restore the states of the random generators that a forward pass draws from."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

State = tuple[Tensor, dict[int, Tensor]]


def cuda_devices(tensors: Iterable[Tensor]) -> tuple[int, ...]:
    """Indices of the CUDA devices that hold any of the tensors."""
    return tuple(sorted({t.device.index for t in tensors if t.device.type == "cuda"}))


def get_state(devices: tuple[int, ...]) -> State:
    """The state of the CPU's generator, and of the default generator of each CUDA device, by its index."""
    return torch.get_rng_state(), {i: torch.cuda.get_rng_state(i) for i in devices}


def set_state(state: State) -> None:
    """Set the generators to a saved state."""
    cpu, cuda = state
    torch.set_rng_state(cpu)
    for index, device_state in cuda.items():
        torch.cuda.set_rng_state(device_state, index)


@contextmanager
def standing_at(state: State) -> Iterator[None]:
    """Set the generators to a saved state inside the ``with`` block, and restore them after it."""
    outside = get_state(tuple(state[1]))
    set_state(state)
    try:
        yield
    finally:
        set_state(outside)
