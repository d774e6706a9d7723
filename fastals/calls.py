"""Recorded calls of modules: what went in, what the call read, wrote and drew, and what came out."""

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
from fastals.stamps import Stamp, Stamps
from fastals.surroundings import Holder

Place = tuple[Holder, str]
PLAIN = (bool, int, float, complex, str, bytes, enum.Enum, torch.dtype, torch.device, torch.Size, type(None), slice)


DEEPEST = 4  # levels of attributes at which tensors are looked for in an object


class Arguments:
    """The arguments of a call, flat.

    Containers and dataclasses are taken apart, and so are objects that hold tensors as attributes. Any other object is
    ``opaque``, such as a cache of keys and values.
    """

    def __init__(self, args: tuple, kwargs: dict) -> None:
        self.leaves, self.shape = flatten((args, kwargs))
        self.opaque = [leaf for leaf in self.leaves if not isinstance(leaf, (Tensor, *PLAIN))]


def flatten(tree: Any) -> tuple[list[Any], list[Any]]:
    """The leaves of a nest of containers and objects, and its shape, which can be compared."""
    leaves, spec = tree_flatten(tree)
    shape: list[Any] = [spec]
    if all(isinstance(leaf, (Tensor, *PLAIN)) for leaf in leaves):
        return leaves, shape
    flat: list[Any] = []
    for leaf in leaves:
        inside = _attributes(leaf)
        if inside is None:
            flat.append(leaf)
        else:
            more, below = flatten(inside)
            flat += more
            shape += type(leaf), below
    return flat, shape


def contents(thing: Any, depth: int = DEEPEST) -> list[Any]:
    """Tensors and constants inside an object, through containers and attributes; of other objects inside the type."""
    if isinstance(thing, (Tensor, *PLAIN)):
        return [thing]
    found: list[Any] = [type(thing)]
    if isinstance(thing, dict):
        parts: Any = thing.values()
    else:
        parts = thing if isinstance(thing, (list, tuple)) else getattr(thing, "__dict__", {}).values()
    if depth and not callable(thing):
        for part in parts:
            found += contents(part, depth - 1)
    return found


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
    """What a call has left at a place of its module: a tensor, its values, and its stamp."""

    place: Place
    tensor: Tensor | None
    values: Tensor | None
    stamp: Stamp

    @classmethod
    def of(cls, place: Place, tensor: Tensor | None, stamps: Stamps) -> "Write":
        """The tensor as it is now, with a stamp of its own."""
        if tensor is None:
            return cls(place, None, None, 0)
        stamp = stamps.new()
        stamps.stand(tensor, stamp)
        return cls(place, tensor, tensor.detach().clone(), stamp)

    def repeat(self, stamps: Stamps) -> None:
        """Leave the same again."""
        holder, name = self.place
        holder[name] = self.tensor
        if self.tensor is not None and self.values is not None:
            self.tensor.detach().copy_(self.values)
            stamps.stand(self.tensor, self.stamp)


class Aliases:
    """What is kept of the tensors and objects that are recorded during one evaluation, once for each.

    The alias of a tensor shares storage and version and holds no graph. Of an opaque object the contents are kept that
    it had when it was first an argument: what calls do to it later belongs to these calls.
    """

    def __init__(self, stamps: Stamps) -> None:
        self._stamps = stamps
        self._known: dict[int, tuple[Any, Any]] = {}

    def of(self, leaf: Any) -> Any:
        """The alias of a tensor, the contents of an opaque object, or a constant or parameter itself."""
        if isinstance(leaf, (nn.Parameter, *PLAIN)):
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
        module: nn.Module,
        arguments: Arguments,
        places: Sequence[Place],
        stamps: Stamps,
        aliases: Aliases,
        before: States,
    ) -> None:
        """Note what the call is about to read."""
        self.module, self.shape = module, arguments.shape
        self.places, self.before, self.after = places, before, before
        self.inputs = [aliases.of(leaf) for leaf in arguments.leaves]
        self.input_stamps = [stamps.of(t) if isinstance(t, Tensor) else 0 for t in self.inputs]
        tensors = (holder.get(name) for holder, name in places)
        self.read = [(t, stamps.of(t)) for t in tensors]
        self.writes: list[Write] = []
        self.output: list[Any] = []
        self.output_spec: TreeSpec | None = None
        self.output_stamps: list[Stamp] = []
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
        leaves, self.output_spec = tree_flatten(output)
        self.obstacle = self._find_obstacle(leaves, before.leaves, flatten((args, kwargs))[0], stamps)
        self.tracked = not torch.is_grad_enabled() or any(isinstance(t, Tensor) and t.requires_grad for t in leaves)
        self.output = [aliases.of(leaf) for leaf in leaves]
        self.output_stamps = [stamps.of(t) if isinstance(t, Tensor) else 0 for t in self.output]
        for place, (tensor, stamp) in zip(self.places, self.read, strict=True):
            now = place[0].get(place[1])
            if now is not tensor or id(now) in changing or stamps.of(now) != stamp:
                self.writes.append(Write.of(place, now, stamps))
        self.after = after

    def _find_obstacle(self, output: Sequence[Any], before: Sequence[Any], now: Sequence[Any], stamps: Stamps) -> str:
        noted = zip(self.inputs, self.input_stamps, strict=True)
        written = any(isinstance(t, Tensor) and stamps.of(t) != stamp for t, stamp in noted)
        if written or len(now) != len(before) or any(map(is_not, now, before)):
            return "it changes its arguments in place"
        if any(not isinstance(leaf, (Tensor, *PLAIN)) for leaf in output):
            return "its output holds more than tensors and constants"
        return ""

    def reads_the_same(self, stamps: Stamps) -> bool:
        """Whether parameters and buffers are those that the call has read, and its output has not been written."""
        for (holder, name), (tensor, stamp) in zip(self.places, self.read, strict=True):
            now = holder.get(name)
            if now is not tensor or stamps.of(now) != stamp:
                return False
        return self.output_stands(stamps)

    def output_stands(self, stamps: Stamps) -> bool:
        """Whether nobody has written into the recorded output."""
        noted = zip(self.output, self.output_stamps, strict=True)
        return all(stamps.of(t) == stamp for t, stamp in noted if isinstance(t, Tensor))

    def replay(self, stamps: Stamps) -> Any:
        """Write what the call has written, and return its output, in containers of its own."""
        for write in self.writes:
            write.repeat(stamps)
        assert self.output_spec is not None
        return tree_unflatten(self.output, self.output_spec)

    def gave_another(self, output: Any, stamps: Stamps) -> bool:
        """Whether the recorded output, if it still stands, differs from this one on the CPU."""
        tensors = [(a, b) for a, b in zip(self.output, tree_flatten(output)[0], strict=False) if isinstance(a, Tensor)]
        if self.obstacle or not self.output_stands(stamps) or any(a.device.type != "cpu" for a, _ in tensors):
            return False
        return any(not isinstance(b, Tensor) or a.dtype != b.dtype or not torch.equal(a, b) for a, b in tensors)
