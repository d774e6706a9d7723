"""Stamps: two equal stamps of a tensor say that it held the same values both times."""

from collections.abc import Iterable
from itertools import count

import torch
from torch import Tensor

Stamp = int | tuple[int, int]


class Stamps:
    """Gives stamps to tensors while a step is under way.

    A write that torch sees advances the tensor's version. The optimizer says by itself when it moves weights and when
    it puts them back bitwise, so weights at w_t have the stamp of w_t again. The kernels write without torch's
    knowledge: :meth:`moved` and :meth:`put_back` advance the version for them.
    """

    def __init__(self) -> None:
        self._told: dict[int, tuple[Tensor, Stamp, Stamp, Stamp]] = {}  # tensor, plain stamp, its meaning, w_t's
        self._new = count(-1, -1)

    def of(self, tensor: Tensor | None) -> Stamp:
        """The stamp of a tensor as it is now."""
        if tensor is None:
            return 0
        plain = _plain(tensor)
        told = self._told.get(id(tensor))
        if told is None or told[0] is not tensor or told[1] != plain:
            return plain
        return told[2]

    def at_start(self, tensors: Iterable[Tensor]) -> None:
        """Note that the tensors stand at their values at the start of the step."""
        for t in tensors:
            plain = _plain(t)
            self._told[id(t)] = (t, plain, plain, plain)

    def moved(self, tensors: Iterable[Tensor]) -> None:
        """Note that the tensors have been given new values."""
        stamp = next(self._new)
        for t in tensors:
            torch.autograd.graph.increment_version(t)
            self.stand(t, stamp)

    def put_back(self, tensors: Iterable[Tensor]) -> None:
        """Note that the tensors have been given the values again that they had at the start."""
        for t in tensors:
            told = self._told.get(id(t))
            if told is not None and told[0] is t:
                torch.autograd.graph.increment_version(t)
                self.stand(t, told[3])

    def stand(self, tensor: Tensor, stamp: Stamp) -> None:
        """Note that the tensor now holds the values that it had with this stamp."""
        told = self._told.get(id(tensor))
        start = told[3] if told is not None and told[0] is tensor else next(self._new)
        self._told[id(tensor)] = (tensor, _plain(tensor), stamp, start)

    def new(self) -> Stamp:
        """A stamp that no tensor has had."""
        return next(self._new)

    def clear(self) -> None:
        """Forget all tensors."""
        self._told.clear()


def _plain(tensor: Tensor) -> Stamp:
    """Version and address: torch advances the first at a write and changes the second if ``.data`` is assigned."""
    if tensor.is_inference():
        return 0
    try:
        return tensor._version, tensor.data_ptr()
    except RuntimeError:  # a subclass without a storage of its own
        return tensor._version
