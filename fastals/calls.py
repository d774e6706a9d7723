"""Recorded calls of modules: what went in, what the call read, wrote and drew, and what came out."""

import copy
import dataclasses
import enum
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from operator import is_not
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from fastals.rng import States
from fastals.shards import is_sharded, local
from fastals.stamps import Stamp, Stamps
from fastals.surroundings import Holder, Kept

Slot = tuple[Holder, str]  # where a module holds a parameter or a buffer
PLAIN = (bool, int, float, complex, str, bytes, enum.Enum, torch.dtype, torch.device, torch.Size, type(None), slice)
KNOWN = (Tensor, *PLAIN)
CONSTANTS = frozenset((bool, int, float, complex, str, bytes, type(None)))  # the most frequent types of leaves
PLAINEST = CONSTANTS | {Tensor, nn.Parameter}
DEEPEST = 4  # levels of attributes at which tensors are looked for in an object
MOST = 1000  # parts of an object that are looked at


class Arguments:
    """The arguments of a call, flat.

    Containers and dataclasses are taken apart, and so are objects that hold tensors as attributes. Any other object is
    ``opaque``, such as a cache of keys and values.
    """

    def __init__(self, args: tuple, kwargs: dict) -> None:
        leaves = [*args, *kwargs.values()]
        if all(type(leaf) in PLAINEST for leaf in leaves):  # nothing to take apart
            self.leaves, self.shape, self.opaque = leaves, [len(args), *kwargs], []
            return
        self.leaves, self.shape = flatten((args, kwargs))
        others = [leaf for leaf in self.leaves if type(leaf) not in CONSTANTS]
        self.opaque = [leaf for leaf in others if not isinstance(leaf, KNOWN)]


def flatten(tree: Any, depth: int = DEEPEST) -> tuple[list[Any], list[Any]]:
    """The leaves of a nest of containers and objects, and its shape, which can be compared."""
    leaves, spec = tree_flatten(tree)
    shape: list[Any] = [spec]
    if all(type(leaf) in CONSTANTS or isinstance(leaf, KNOWN) for leaf in leaves):
        return leaves, shape
    flat: list[Any] = []
    for leaf in leaves:
        inside = _attributes(leaf) if depth else None
        if inside is None:
            flat.append(leaf)
        else:
            more, below = flatten(inside, depth - 1)
            flat += more
            shape += type(leaf), below
    return flat, shape


def contents(thing: Any, depth: int = DEEPEST) -> list[Any]:
    """Tensors and constants inside an object, through containers and attributes.

    Of a function or a module only the type is taken, and of an object without attributes the object itself.
    """
    if isinstance(thing, KNOWN):
        return [thing]
    if hasattr(thing, "tobytes"):  # NumPy's arrays and scalars
        return [str(thing.dtype), torch.Size(thing.shape), thing.tobytes()]
    found: list[Any] = [type(thing)]
    if callable(thing) or not depth:
        return found
    parts = _parts(thing)
    if parts is None:
        return [thing]
    for part in parts:
        if len(found) < MOST:
            found += contents(part, depth - 1)
    return found


def _parts(thing: Any) -> list[Any] | None:
    """What a container holds, or the attributes of an object; None if it has none."""
    if isinstance(thing, dict):
        return [*thing.keys(), *thing.values()]
    if isinstance(thing, (list, tuple)):
        return list(thing)
    slots = [name for cls in type(thing).__mro__ for name in getattr(cls, "__slots__", ())]
    if not slots and not hasattr(thing, "__dict__"):
        return None
    return [*(getattr(thing, name, None) for name in slots), *getattr(thing, "__dict__", {}).values()]


def _attributes(leaf: Any) -> dict[str, Any] | None:
    """The attributes of an object that is known by them; None of any other."""
    if dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
        return {f.name: getattr(leaf, f.name, None) for f in dataclasses.fields(leaf)}
    attributes = getattr(leaf, "__dict__", None)
    if isinstance(leaf, (Tensor, nn.Module, type, *PLAIN)) or not attributes:
        return None
    return attributes if any(isinstance(v, Tensor) for v in attributes.values()) else None


@dataclass(slots=True)
class Write:
    """What a call has left at a place of its module: a tensor with its values, and its stamp."""

    place: Slot
    kept: Kept | None
    stamp: Stamp

    @classmethod
    def of(cls, place: Slot, tensor: Tensor | None, stamps: Stamps) -> "Write":
        """The tensor as it is now, with a stamp of its own."""
        if tensor is None:
            return cls(place, None, 0)
        stamp = stamps.new()
        stamps.stand(tensor, stamp)
        return cls(place, Kept.of(tensor), stamp)

    def repeat(self, stamps: Stamps) -> None:
        """Leave the same again."""
        holder, name = self.place
        holder[name] = None if self.kept is None else self.kept.tensor
        if self.kept is not None:
            self.kept.put_back()
            stamps.stand(self.kept.tensor, self.stamp)


def tensor_attributes(modules: Sequence[dict[str, Any]]) -> dict[tuple[int, str], Tensor]:
    """The tensors among the attributes of modules, which are given by their ``__dict__``."""
    return {(i, n): v for i, attributes in enumerate(modules) for n, v in attributes.items() if type(v) is Tensor}


class Recorded(NamedTuple):
    """An object among the outputs that is known by its attributes, with what is kept of them."""

    thing: Any
    attributes: dict[str, Any]

    def again(self) -> Any:
        """A copy with the recorded attributes."""
        made = copy.copy(self.thing)
        for name, value in self.attributes.items():
            object.__setattr__(made, name, value)
        return made


class Aliases:
    """What is kept of the tensors and objects that are recorded during one evaluation, once for each.

    The alias of a tensor with a graph shares storage and version; a tensor without one is kept itself. Of an opaque
    object the contents are kept that it had when it was first an argument: what calls do to it later belongs to them.
    """

    def __init__(self, stamps: Stamps) -> None:
        self._stamps = stamps
        self._known: dict[int, tuple[Any, Any]] = {}

    def of(self, leaf: Any) -> Any:
        """The alias of a tensor with a graph, the contents of an opaque object, or anything else itself."""
        if isinstance(leaf, PLAIN) or (isinstance(leaf, Tensor) and (not leaf.requires_grad or leaf.is_leaf)):
            return leaf
        if id(leaf) not in self._known:
            self._known[id(leaf)] = leaf, leaf.detach() if isinstance(leaf, Tensor) else self._contents(leaf)
        return self._known[id(leaf)][1]

    def _contents(self, thing: Any) -> "Contents":
        leaves = [self.of(leaf) if isinstance(leaf, Tensor) else leaf for leaf in contents(thing)]
        return Contents(leaves, [self._stamps.of(t) if isinstance(t, Tensor) else 0 for t in leaves])


class Contents(NamedTuple):
    """What an opaque object held, with the stamps of the tensors."""

    leaves: list[Any]
    stamps: list[Stamp]


class Call:
    """One recorded call of a module.

    Attributes:
        obstacle: why the call cannot be replayed at all; empty if it can.
        tracked: whether gradients flow through its output.
        before, after: states of the generators at its start and at its end.
    """

    def __init__(
        self,
        key: tuple[int, int],
        module: nn.Module,
        arguments: Arguments,
        places: Sequence[Slot],
        attributes: Sequence[dict[str, Any]],
        stamps: Stamps,
        aliases: Aliases,
        before: States,
    ) -> None:
        """Note what the call is about to read.

        ``key`` has the module's id and the number of its call, ``attributes`` the ``__dict__`` of the modules inside.
        """
        self.key, self.module, self.shape = key, module, arguments.shape
        self.places, self.before, self.after = places, before, before
        self.inputs = [aliases.of(leaf) for leaf in arguments.leaves]
        self.input_stamps = [stamps.of(t) if isinstance(t, Tensor) else 0 for t in self.inputs]
        tensors = (holder.get(name) for holder, name in places)
        self.read = [(t, stamps.of(t)) for t in tensors]
        self.training = [a.get("training") for a in attributes]
        self.writes: list[Write] = []
        self.attributes, self.attributes_before = attributes, tensor_attributes(attributes)
        self.left: list[tuple[int, str, Tensor]] = []  # tensors that the call has left as attributes
        self.output: list[Any] = []
        self.output_spec: TreeSpec | None = None  # None of a tensor alone
        self.output_stamps: list[tuple[Tensor, Stamp]] = []
        self.obstacle, self.tracked = "", True

    def note_end(
        self,
        output: Any,
        before: Arguments,
        args: tuple,
        kwargs: dict,
        stamps: Stamps,
        aliases: Aliases,
        changing: Collection[int],
        after: States,
    ) -> None:
        """Keep the output and what the call has written; ``changing`` has the ids of buffers that are always kept."""
        leaves, self.output_spec = ([output], None) if isinstance(output, Tensor) else tree_flatten(output)
        self.obstacle = self._find_obstacle(leaves, before.leaves, Arguments(args, kwargs).leaves, stamps)
        self.tracked = not torch.is_grad_enabled() or any(isinstance(t, Tensor) and t.requires_grad for t in leaves)
        self.output = [_recorded(leaf, aliases) for leaf in leaves]
        kept = [v for leaf in self.output for v in (leaf.attributes.values() if isinstance(leaf, Recorded) else [leaf])]
        self.output_stamps = [(t, stamps.of(t)) for t in kept if isinstance(t, Tensor)]
        for place, (tensor, stamp) in zip(self.places, self.read, strict=True):
            now = place[0].get(place[1])
            if now is not tensor or id(now) in changing or stamps.of(now) != stamp:
                self.writes.append(Write.of(place, now, stamps))
        for (i, name), tensor in tensor_attributes(self.attributes).items():
            if self.attributes_before.get((i, name)) is not tensor:
                alias = aliases.of(tensor)
                self.left.append((i, name, alias))
                self.output_stamps.append((alias, stamps.of(alias)))
        self.attributes_before = {}
        self.after = after

    def _find_obstacle(self, output: Sequence[Any], before: Sequence[Any], now: Sequence[Any], stamps: Stamps) -> str:
        noted = zip(self.inputs, self.input_stamps, strict=True)
        written = any(isinstance(t, Tensor) and stamps.of(t) != stamp for t, stamp in noted)
        if written or len(now) != len(before) or any(map(is_not, now, before)):
            return "it changes its arguments in place"
        if any(not isinstance(leaf, KNOWN) and not _is_flat(leaf) for leaf in output):
            return "its output holds more than tensors and constants"
        return ""

    def reads_the_same(self, stamps: Stamps) -> bool:
        """Whether parameters, buffers and training flags are those of the call, and its output has not been written."""
        for (holder, name), (tensor, stamp) in zip(self.places, self.read, strict=True):
            now = holder.get(name)
            if now is not tensor or stamps.of(now) != stamp:
                return False
        return [a.get("training") for a in self.attributes] == self.training and self.output_stands(stamps)

    def output_stands(self, stamps: Stamps) -> bool:
        """Whether nobody has written into the recorded output and attributes."""
        return all(stamps.of(t) == stamp for t, stamp in self.output_stamps)

    def replay(self, stamps: Stamps) -> Any:
        """Write and leave what the call has written and left, and return its output."""
        for write in self.writes:
            write.repeat(stamps)
        for i, name, tensor in self.left:
            self.attributes[i][name] = tensor
        return self.replay_output()

    def replay_output(self) -> Any:
        """The output, in containers of its own."""
        if self.output_spec is None:
            return self.output[0]
        output = [leaf.again() if isinstance(leaf, Recorded) else leaf for leaf in self.output]
        return tree_unflatten(output, self.output_spec)

    def gave_another(self, output: Any, stamps: Stamps) -> bool:
        """Whether the recorded output, if it still stands, differs from this one on the CPU."""
        tensors = [(a, b) for a, b in zip(self.output, tree_flatten(output)[0], strict=False) if isinstance(a, Tensor)]
        comparable = all(a.device.type == "cpu" and a.layout == torch.strided for a, _ in tensors)
        if self.obstacle or not comparable or not self.output_stands(stamps):
            return False
        return any(not isinstance(b, Tensor) or a.dtype != b.dtype or not _equal(a, b) for a, b in tensors)


def _equal(a: Tensor, b: Tensor) -> bool:
    return is_sharded(a) == is_sharded(b) and torch.equal(local(a), local(b))


def _is_flat(thing: Any) -> bool:
    """Whether an object is known by its attributes, and these are tensors and constants."""
    inside = _attributes(thing)
    return inside is not None and all(isinstance(v, KNOWN) for v in inside.values())


def _recorded(leaf: Any, aliases: Aliases) -> Any:
    """What is kept of a leaf of an output."""
    inside = None if isinstance(leaf, KNOWN) else _attributes(leaf)
    if inside is None:
        return aliases.of(leaf)
    return Recorded(leaf, {name: aliases.of(v) for name, v in inside.items()})
