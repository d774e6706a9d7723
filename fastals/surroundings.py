"""What the loss reads and writes besides the trained weights: module buffers and untrained parameters.

All evaluations of a step start from the same surroundings, so that they are evaluations of one function. Large tensors
are copied only if the forward writes them.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils._python_dispatch import TorchDispatchMode

Holder = dict[str, Any]  # ``_buffers`` or ``_parameters`` of a module: tensors or None
Key = tuple[int, str]  # a holder's id and a name in it
SMALL = 1 << 16  # elements of a tensor of which a copy is kept in any case


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

    @property
    def key(self) -> Key:
        """The place, for as long as its module lives."""
        return id(self.holder), self.name

    @property
    def stands(self) -> bool:
        """Whether torch has seen no write, and the storage is the same."""
        return self.version == _version(self.tensor) and self.address == _address(self.tensor)


@dataclass(slots=True)
class Kept:
    """A tensor with its storage and its values at some time."""

    tensor: Tensor
    storage: Tensor  # an alias, since ``tensor.data`` may be assigned
    values: Tensor
    version: int

    @classmethod
    def of(cls, tensor: Tensor) -> "Kept":
        """The tensor as it is now."""
        return cls(tensor, tensor.detach(), tensor.detach().clone(), _version(tensor))

    @property
    def stands(self) -> bool:
        """Whether torch has seen no write, and the storage is the same."""
        return self.version == _version(self.tensor) and _address(self.storage) == _address(self.tensor)

    def put_back(self) -> None:
        """Give the tensor its storage and its values again."""
        if _address(self.tensor) != _address(self.storage) or self.tensor.shape != self.storage.shape:
            self.tensor.data = self.storage
        self.tensor.detach().copy_(self.values)


class Memory:
    """What steps have found out about writes, and copies of small tensors that no forward has written so far.

    Attributes:
        written: places of tensors that a forward writes.
        spare: copies by the ids of the tensors; they last until the tensor is written.
    """

    def __init__(self) -> None:
        self.written: set[Key] = set()
        self.spare: dict[int, Kept] = {}

    def copy_of(self, tensor: Tensor) -> Kept:
        """A copy of the tensor, the one of an earlier step if it still holds."""
        kept = self.spare.get(id(tensor))
        if kept is None or kept.tensor is not tensor or not kept.stands:
            kept = self.spare[id(tensor)] = Kept.of(tensor)
        return kept


class Surroundings:
    """Buffers and untrained parameters of modules, as they stood at the start of the step.

    Small tensors have a copy in any case. A large one has one if an earlier step has seen it written, or if this step
    watches: then it is copied before its first write.

    Args:
        modules: the modules, each once.
        trained: ids of the parameters that the optimizer moves.
        memory: lasts from step to step.
        watch: look at every operation.

    Attributes:
        places: every tensor that is not trained.
        kept: by their ids, the tensors that an evaluation has written in this step, or writes as a rule.
    """

    def __init__(self, modules: Iterable[nn.Module], trained: Collection[int], memory: Memory, *, watch: bool) -> None:
        self.memory, self.watch = memory, watch
        holders: list[Holder] = []
        unseen: set[Key] = set()  # statistics that batch norms write without torch's knowledge
        for module in modules:
            if isinstance(module, torch.jit.ScriptModule):  # its holders are views of another kind
                continue
            holders.append(module._buffers)
            if any(id(p) not in trained for p in module._parameters.values()):
                holders.append(module._parameters)
            if isinstance(module, _NormBase) and module.training:
                unseen |= {(id(module._buffers), name) for name in module._buffers}
        self.start: list[tuple[Holder, Holder]] = [(h, dict(h)) for h in holders]
        self.places = [
            Place(holder, name, t, _version(t), _address(t))
            for holder, start in self.start
            for name, t in start.items()
            if t is not None and id(t) not in trained
        ]
        self.kept: dict[int, Kept] = {}
        self.after: dict[int, Kept] = {}
        self.after_start = self.start  # the holders as one forward leaves them
        self._spare: dict[int, Kept] = {}
        for place in self.places:
            if place.key in memory.written or place.key in unseen:
                self.kept[id(place.tensor)] = Kept.of(place.tensor)
            elif place.tensor.numel() <= SMALL:
                self._spare[id(place.tensor)] = memory.copy_of(place.tensor)
        memory.spare = self._spare  # others have gone
        self._storages = {id(p.tensor): p.tensor.detach() for p in self.places} if watch else {}

    def _keep(self, place: Place) -> None:
        if id(place.tensor) not in self.kept:
            self.kept[id(place.tensor)] = self._spare.get(id(place.tensor)) or Kept.of(place.tensor)
            self.memory.written.add(place.key)

    @property
    def changing(self) -> list[Tensor]:
        """The tensors that evaluations may write and that can be put back."""
        return (
            [p.tensor for p in self.places]
            if self.watch
            else [k.tensor for k in (*self.kept.values(), *self._spare.values())]
        )

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
        try:
            if self.watch:
                # under a dispatch mode dynamo would give compiled frames up for good
                with torch.compiler.set_stance("force_eager"), KeepBeforeWrite(self.places, self._keep):
                    yield
            else:
                yield
        except BaseException:
            self._find_writes()  # another evaluation may follow, from the same start
            raise
        if lost := self._find_writes():
            raise FirstWriteError([p.name for p in lost], {p.key for p in lost})

    def _find_writes(self) -> list[Place]:
        """Keep what has been written and can still be kept; returns the others."""
        lost: list[Place] = []
        for place in self.places:
            if place.stands or id(place.tensor) in self.kept:
                continue
            if id(place.tensor) in self._spare:
                self._keep(place)
            elif self.watch and place.version == _version(place.tensor):  # ``.data`` was assigned: the old one is here
                storage = self._storages[id(place.tensor)]
                self.kept[id(place.tensor)] = Kept(place.tensor, storage, storage.clone(), place.version)
                self.memory.written.add(place.key)
            else:
                lost.append(place)
        return lost

    def note_after(self) -> None:
        """Note what one forward has left."""
        self.after = {key: Kept.of(kept.tensor) for key, kept in self.kept.items()}
        self.after_start = [(holder, dict(holder)) for holder, _ in self.start]

    def put_back(self) -> None:
        """Put everything back to its state at the start of the step."""
        _refill(self.start)
        for kept in self.kept.values():
            kept.put_back()

    def undo(self) -> None:
        """The same after an evaluation that an error has ended."""
        self._find_writes()
        self.put_back()

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
                if tensor is not None and left is not None and left is not tensor and left.device == refused.device:
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
