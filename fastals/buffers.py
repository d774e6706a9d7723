"""The flat buffers of one unit and the optimizer's state as views of them; parameters and gradients stay in place."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter, is_
from typing import NamedTuple

import torch
from torch import Tensor

from fastals.kernels import plain
from fastals.shards import local, part_for, placed_like

ALIGNED_ELEMENTS = 64  # every parameter starts on a 256-byte boundary of a float32 buffer


class Flat(NamedTuple):
    """The parts of the arena's buffers that belong to one unit."""

    m: Tensor
    v: Tensor
    w: Tensor
    steps: Tensor  # updates so far, one element per parameter


@dataclass(frozen=True, slots=True)
class Segment:
    """Consecutive parameters of one group, number of updates and share, see :class:`Unit`."""

    where: slice
    members: range
    group: dict
    count: int
    share: float


class Gradients:
    """The gradients of one step, held for as long as kernels may read them."""

    def __init__(self, units: "Iterable[Unit]") -> None:
        self.params = [p for unit in units for p in unit.active_params()]
        self.held = self._now()
        self.versions = list(map(attrgetter("_version"), self.held))

    def check(self) -> None:
        """Refuse to go on if a trial has dropped, replaced or changed a gradient.

        Raises:
            RuntimeError: a trial has done so.
        """
        same = all(map(is_, self._now(), self.held))
        if not same or list(map(attrgetter("_version"), self.held)) != self.versions:
            raise RuntimeError(
                "the closure changed the gradients in a trial: let it return the loss only, without zero_grad or "
                "backward"
            )

    def _now(self) -> list[Tensor]:
        return list(map(attrgetter("grad"), self.params))


class Unit:
    """Parameters whose step size is searched together, with their moments and their snapshot.

    The optimizer's state of a parameter holds views of the buffers, under AdamW's names.

    Attributes:
        m, v: [size] first and second moment, in float32 or wider; empty if not needed.
        w: [size] weights before the step; for parameters below float32, their float32 master weights.
        active: indices of the parameters that have a gradient in this step.
        row: the unit's row in the tables of the fused kernels.
        shares: for each parameter, one over the number of processes that hold the same numbers of it.
        sizes: for each parameter, the number of its elements in this process.
    """

    def __init__(
        self,
        groups: Sequence[dict],
        state: dict,
        *,
        adam: bool,
        averages: bool = True,
        flat: Flat | None = None,
        share: Callable[[Tensor], float] = lambda _: 1.0,
    ) -> None:
        """Take over the state of the parameters, if they have one, and leave it as it is.

        Args:
            groups: the parameter groups of the unit; several if units were merged.
            state: the optimizer's state.
            adam: whether there is a second moment.
            averages: whether there is a first moment.
            flat: buffers to use; without them the unit allocates its own.
            share: gives the share of a parameter.
        """
        self.groups, self.adam = list(groups), adam
        self.name = "+".join(dict.fromkeys(g["name"] for g in groups))
        self.members = [(p, g) for g in groups for p in g["params"]]
        params = [p for p, _ in self.members]
        self.identity = list(map(_identity, params))
        reals = [p.dtype.to_real() for p in params]  # complex ones are frozen, and their place stays unused
        self.dtype = max((torch.promote_types(t, torch.float32) for t in reals), key=lambda t: t.itemsize)
        self.device, self.rounding = params[0].device, plain.rounding(params)
        self.shapes = [local(p.detach()).shape for p in params]
        self.sizes, self.shares = [shape.numel() for shape in self.shapes], list(map(share, params))
        self.offsets, self.gaps, self.size = layout(self.sizes)
        self.counts = [int(state[p]["step"]) if p in state else 0 for p in params]
        self.m, self.v, self.w = flat[:3] if flat else map(self.buffer, (averages, adam, True))
        self.steps = flat.steps if flat else None
        self.m_views, self.v_views, self.w_views = map(self.views, (self.m, self.v, self.w))
        self._unpack(state)
        self.active: list[int] = []
        self.row = 0

    @property
    def rules(self) -> dict:
        """The group that holds the unit's constants and memory; merged units write to each of their groups."""
        return self.groups[0]

    @property
    def params(self) -> list[Tensor]:
        """What lies here of the unit's parameters, as plain tensors that share their storage."""
        return [local(p.detach()) for p, _ in self.members]

    @property
    def elements(self) -> float:
        """Number of weights that have a gradient in this step, of which this process stands for its share."""
        return sum(self.shares[i] * self.sizes[i] for i in self.active)

    def find_active(self) -> bool:
        """Note which parameters have gradients; whether any has."""
        self.active = [i for i, (p, _) in enumerate(self.members) if p.grad is not None]
        return bool(self.active)

    def active_params(self) -> list[Tensor]:
        """Parameters that have a gradient in this step."""
        return [self.members[i][0] for i in self.active]

    def pick_active(self, items: Sequence[Tensor]) -> list[Tensor]:
        """From a list of one item per parameter, the items of the active parameters."""
        return [items[i] for i in self.active]

    def segments(self) -> Iterator[Segment]:
        """Runs of active parameters with one group and one count, alignment gaps included."""
        run: list[int] = []
        for i in [*self.active, None]:
            if run and (i is None or i != run[-1] + 1 or self._key(i) != self._key(run[-1])):
                first, last = run[0], run[-1]
                where = slice(self.offsets[first], self.offsets[last] + self.sizes[last])
                group, members = self.members[first][1], range(first, last + 1)
                yield Segment(where, members, group, self.counts[first], self.shares[first])
                run = []
            if i is not None:
                run.append(i)

    def _key(self, i: int) -> tuple[int, int, float]:
        return id(self.members[i][1]), self.counts[i], self.shares[i]

    def buffer(self, needed: bool = True) -> Tensor:
        """A new buffer of zeros of the unit's size; an empty one if it is not needed."""
        return torch.zeros(self.size if needed else 0, dtype=self.dtype, device=self.device)

    def views(self, flat: Tensor) -> list[Tensor]:
        """The flat buffer as one view per parameter, in its shape; none if the buffer is empty."""
        if len(flat) < self.size:
            return []
        return [flat[o : o + s.numel()].view(s) for o, s in zip(self.offsets, self.shapes, strict=True)]

    def has_master(self, i: int) -> bool:
        """Whether parameter i has a precision below float32, and so a master weight."""
        return self.members[i][0].dtype.itemsize < self.dtype.itemsize

    @property
    def has_masters(self) -> bool:
        """Whether any parameter has a master weight."""
        return any(map(self.has_master, range(len(self.members))))

    def check(self) -> None:
        """Refuse parameters that were replaced or converted, and gradients that cannot be used.

        Raises:
            RuntimeError: a parameter was moved, converted or resized, or a gradient is sparse or complex.
        """
        for i in self.active:
            p, grad = self.members[i][0], self.members[i][0].grad
            if _identity(p) != self.identity[i]:
                raise RuntimeError(
                    f"a parameter of unit {self.name!r} was {self.identity[i]} when the optimizer first saw it and is "
                    f"{_identity(p)} now: move, convert or resize the model before making the optimizer"
                )
            if grad is not None and grad.is_sparse:
                raise RuntimeError(f"unit {self.name!r} has a sparse gradient: use dense ones (sparse=False)")
            if p.is_complex():
                raise RuntimeError(
                    f"unit {self.name!r} has a complex parameter of shape {tuple(p.shape)} that was frozen when the "
                    "optimizer was made: freeze it, or hold it as real numbers with torch.view_as_real"
                )

    def show(self, state: dict, *, active: bool = False) -> None:
        """Enter the parameters in the optimizer's state: those with a gradient, or all."""
        for i in self.active if active else range(len(self.members)):
            self._pack(i, state)

    def after_update(self) -> dict[int, dict[str, Tensor]]:
        """What the optimizer's state will show of the active parameters once they are updated, for :meth:`count`."""
        return {i: self._entry(i, self.counts[i] + 1) for i in self.active}

    def count(self, entries: Mapping[int, dict[str, Tensor]], state: dict) -> None:
        """Count the update of the active parameters, and enter them in the optimizer's state."""
        for i, entry in entries.items():
            self.counts[i] += 1
            state[self.members[i][0]].update(entry)

    def _stored(self, i: int) -> dict[str, list[Tensor]]:
        """The buffers that hold the state of parameter i, by its names in the state, as one view per parameter."""
        views = {"exp_avg": self.m_views, "exp_avg_sq": self.v_views}
        if self.has_master(i):
            views["master"] = self.w_views
        return {name: flat for name, flat in views.items() if flat}

    def _pack(self, i: int, state: dict) -> None:
        """Show the buffers of parameter i in the optimizer's state."""
        state[self.members[i][0]].update(self._entry(i, self.counts[i]))

    def _entry(self, i: int, count: int) -> dict[str, Tensor]:
        """The buffers of parameter i after ``count`` updates, by their names in the optimizer's state."""
        step = torch.tensor(float(count), dtype=torch.float32, device="cpu") if self.steps is None else self.steps[i]
        stored = {name: placed_like(flat[i], self.members[i][0]) for name, flat in self._stored(i).items()}
        return {"step": step} | stored

    def show_known(self, state: dict) -> None:
        """Enter the parameters that the optimizer's state has been taken over of."""
        for i, (p, _) in enumerate(self.members):
            if p in state:
                self._pack(i, state)

    def _unpack(self, state: dict) -> None:
        """Take over the state of parameters that have one (a loaded checkpoint, a merged unit)."""
        for i, (p, _) in enumerate(self.members):
            if p in state:
                for name, flat in self._stored(i).items():
                    if name not in state[p]:
                        raise ValueError(f"the state has no {name!r}: it was saved with another momentum or direction")
                    flat[i].copy_(part_for(state[p][name], p))


def unit_groups(groups: Sequence[dict]) -> list[list[dict]]:
    """The groups of every unit; a group that was left without parameters belongs to none."""
    members: dict[int, list[dict]] = {}
    for group in groups:
        if group["params"]:
            members.setdefault(group["unit"], []).append(group)
    return list(members.values())


def layout(sizes: Sequence[int]) -> tuple[list[int], list[slice], int]:
    """Aligned offset of every parameter, the gaps between them, and the size of the buffer."""
    offsets, gaps, size = [], [], 0
    for elements in sizes:
        end, offset = size + elements, size
        size = offset + -(-elements // ALIGNED_ELEMENTS) * ALIGNED_ELEMENTS
        offsets.append(offset)
        if end < size:
            gaps.append(slice(end, size))
    return offsets, gaps, size


def _identity(p: Tensor) -> tuple[torch.dtype, torch.device, tuple[int, ...]]:
    return p.dtype, p.device, tuple(p.shape)
