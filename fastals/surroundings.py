"""What the loss reads and writes besides the trained weights: module buffers and untrained parameters.

All evaluations of a step start from the same surroundings, so that they are evaluations of one function. Tensors are
copied only if the forward writes them: before the first write in a step that watches, at the start of every later step.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

Holder = dict[str, Tensor | None]  # ``_buffers`` or ``_parameters`` of a module
Key = tuple[int, str]  # a holder's id and a name in it


class FirstWriteError(Exception):
    """The forward wrote tensors whose values before were not kept."""

    def __init__(self, names: list[str], keys: set[Key]) -> None:
        super().__init__(", ".join(names))
        self.names, self.keys = names, keys


class Place(NamedTuple):
    """A tensor that is not trained, where it was found at the start of the step, and its version and address there."""

    holder: Holder
    name: str
    tensor: Tensor
    version: int
    address: int


@dataclass(slots=True)
class Kept:
    """A tensor that the forward writes, with its storage and its values."""

    tensor: Tensor
    storage: Tensor  # an alias, since ``tensor.data`` may be assigned
    values: Tensor

    @classmethod
    def of(cls, tensor: Tensor) -> "Kept":
        """The tensor as it is now."""
        return cls(tensor, tensor.detach(), tensor.detach().clone())

    def put_back(self) -> None:
        """Give the tensor its storage and its values again."""
        if _address(self.tensor) != _address(self.storage):
            self.tensor.data = self.storage
        self.tensor.detach().copy_(self.values)


class Surroundings:
    """Buffers and untrained parameters of modules, as they stood at the start of the step.

    Args:
        modules: the modules, each once.
        trained: ids of the parameters that the optimizer moves.
        written: where earlier steps have found tensors that the forward writes; new finds are added.
        watch: look at every operation, and keep a tensor before its first write.

    Attributes:
        places: every tensor that is not trained.
        kept: by their ids, the tensors that the forward writes.
    """

    def __init__(
        self, modules: Iterable[nn.Module], trained: Collection[int], written: set[Key], *, watch: bool
    ) -> None:
        self.written, self.watch = written, watch
        holders: list[Holder] = []
        for module in modules:
            holders.append(module._buffers)
            if any(id(p) not in trained for p in module._parameters.values()):
                holders.append(module._parameters)
        self.start: list[tuple[Holder, Holder]] = [(h, dict(h)) for h in holders]
        self.places = [
            Place(holder, name, t, _version(t), _address(t))
            for holder, start in self.start
            for name, t in start.items()
            if t is not None and id(t) not in trained
        ]
        self.storages = [p.tensor.detach() for p in self.places] if watch else []
        self.kept: dict[int, Kept] = {}
        self.after: dict[int, Kept] = {}
        self.after_start = self.start  # the holders as one forward leaves them
        for place in self.places:
            if (id(place.holder), place.name) in written:
                self._keep(place)

    def _keep(self, place: Place) -> None:
        if id(place.tensor) not in self.kept:
            self.kept[id(place.tensor)] = Kept.of(place.tensor)
            self.written.add((id(place.holder), place.name))

    @property
    def changing(self) -> list[Tensor]:
        """The tensors that an evaluation may write: all of them if this step watches."""
        return [p.tensor for p in self.places] if self.watch else self.written_tensors

    @property
    def written_tensors(self) -> list[Tensor]:
        """The tensors that evaluations have written."""
        return [k.tensor for k in self.kept.values()]

    def restart(self) -> None:
        """Take the present values as those at the start of the step."""
        for kept in self.kept.values():
            kept.values.copy_(kept.tensor.detach())

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """Surrounds an evaluation.

        Raises:
            FirstWriteError: it wrote a tensor whose values before were not kept.
        """
        if self.watch:
            with KeepBeforeWrite(self.places, self._keep):
                yield
        else:
            yield
        self._find_writes()

    def _find_writes(self) -> None:
        lost: list[Place] = []
        for i, place in enumerate(self.places):
            if place.version == _version(place.tensor) and place.address == _address(place.tensor):
                continue
            if id(place.tensor) in self.kept:
                continue
            if self.watch and place.version == _version(place.tensor):  # ``.data`` was assigned: the old one is here
                storage = self.storages[i]
                self.kept[id(place.tensor)] = Kept(place.tensor, storage, storage.clone())
                self.written.add((id(place.holder), place.name))
            else:
                lost.append(place)
        if lost:
            raise FirstWriteError([p.name for p in lost], {(id(p.holder), p.name) for p in lost})

    def note_after(self) -> None:
        """Note what one forward has left."""
        self.after = {key: Kept.of(kept.tensor) for key, kept in self.kept.items()}
        self.after_start = [(holder, dict(holder)) for holder, _ in self.start]

    def put_back(self) -> None:
        """Put everything back to its state at the start of the step."""
        _refill(self.start)
        for kept in self.kept.values():
            kept.put_back()

    def settle(self) -> None:
        """Put everything where one forward has left it."""
        _refill(self.after_start)
        for key, kept in self.kept.items():
            self.after.get(key, kept).put_back()

    def settle_in_place(self, refused: Tensor) -> None:
        """The same by writing into the tensors of the start, or put them back if ``refused`` is true.

        A captured step reads and writes the same addresses in every replay.
        """
        for (holder, start), (_, after) in zip(self.start, self.after_start, strict=True):
            for name, tensor in start.items():
                left = after.get(name)
                if tensor is not None and left is not None and left is not tensor:
                    tensor.detach().copy_(torch.where(refused, tensor, left))
            _refill([(holder, start)])
        for key, kept in self.kept.items():
            left = self.after.get(key, kept).values
            kept.tensor.detach().copy_(torch.where(refused, kept.values, left))


class KeepBeforeWrite(TorchDispatchMode):
    """Calls ``keep`` with every place whose tensor the next operation will write."""

    supports_higher_order_operators = True

    def __init__(self, places: Sequence[Place], keep: Callable[[Place], None]) -> None:
        super().__init__()
        self._keep = keep
        self._at: dict[int, list[Place]] = {}
        for place in places:
            self._at.setdefault(_storage(place.tensor), []).append(place)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Look at the arguments that the operation writes, then run it."""
        kwargs = kwargs or {}
        for index, name in _written_arguments(func):
            found = args[index] if index < len(args) else kwargs.get(name)
            for tensor in found if isinstance(found, list | tuple) else [found]:
                for place in self._at.get(_storage(tensor), ()) if isinstance(tensor, Tensor) else ():
                    self._keep(place)
        return func(*args, **kwargs)


@cache
def _written_arguments(func: Any) -> list[tuple[int, str]]:
    """Position and name of the arguments that an operation writes; batch norms do not declare their statistics."""
    arguments = getattr(getattr(func, "_schema", None), "arguments", ())
    return [
        (i, a.name)
        for i, a in enumerate(arguments)
        if (a.alias_info is not None and a.alias_info.is_write) or a.name.startswith("running_")
    ]


def _refill(holders: Sequence[tuple[Holder, Holder]]) -> None:
    """Give holders their former contents, the same objects in the same order."""
    for holder, contents in holders:
        if len(holder) != len(contents) or any(holder.get(name, holder) is not t for name, t in contents.items()):
            holder.clear()
            holder.update(contents)


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _address(tensor: Tensor) -> int:
    try:
        return tensor.data_ptr()
    except RuntimeError:  # a subclass without a storage of its own
        return 0


def _storage(tensor: Tensor) -> int:
    try:
        return tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):
        return 0
