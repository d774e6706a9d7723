"""Optimizer-owned flat buffers of one unit; parameters and gradients stay where they are."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter, is_
from typing import NamedTuple

import torch
from torch import Tensor

from fastals.kernels import plain

ALIGNMENT = 64  # elements: every parameter starts on a 256-byte boundary of a float32 buffer


class Flat(NamedTuple):
    """Buffers of a unit that lie in somebody else's memory."""

    m: Tensor
    v: Tensor
    w: Tensor
    steps: Tensor  # updates so far, one element per parameter


@dataclass(frozen=True, slots=True)
class Segment:
    """Consecutive parameters that share their group and their number of updates."""

    where: slice
    group: dict
    count: int


class Scratch:
    """Gradient, direction and work space of whichever unit is searched now: the largest unit's size."""

    def __init__(self, size: int, dtype: torch.dtype, device: torch.device) -> None:
        self.g, self.d, self.work = (torch.zeros(size, dtype=dtype, device=device) for _ in range(3))


class Gradients:
    """The gradients of one step, held for as long as kernels may read them."""

    def __init__(self, units: "Iterable[Unit]") -> None:
        self.params = [p for unit in units for p in unit.active_params()]
        self.held = self._now()
        self.versions = list(map(attrgetter("_version"), self.held))

    def check(self) -> None:
        """Refuse to go on where a trial has dropped, replaced or changed them.

        Raises:
            RuntimeError: it has.
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
    """Parameters whose step size is searched together, with their moments, snapshot and direction.

    ``m`` and ``v`` hold the moments, ``w`` the weights before the step (for parameters below float32 the
    float32 master weights), ``d`` the direction. The state of parameter p holds views of them.
    """

    def __init__(
        self, groups: Sequence[dict], kind: str, state: dict, *, averages: bool = True, flat: Flat | None = None
    ) -> None:
        """``averages``: whether there is a first moment; ``flat``: buffers to use instead of own ones."""
        self.groups, self.kind = list(groups), kind
        self.name = "+".join(g["name"] for g in groups)
        self.members = [(p, g) for g in groups for p in g["params"]]
        params = [p for p, _ in self.members]
        self.identity = list(map(_identity, params))
        self.dtype = max((torch.promote_types(p.dtype, torch.float32) for p in params), key=lambda t: t.itemsize)
        self.device, self.rounding = params[0].device, plain.rounding(params)
        self.offsets, self.gaps, self.size = layout(params)
        self.counts = [int(state[p]["step"]) if p in state else 0 for p in params]
        own = (averages, kind == "adam", True)
        self.m, self.v, self.w = flat[:3] if flat else map(self._buffer, own)
        self.steps = flat.steps if flat else None
        self.m_views, self.v_views, self.w_views = map(self.views, (self.m, self.v, self.w))
        self._unpack(state)
        self.row = 0  # of the unit in the tables of the fused kernels
        self.active: list[int] = []
        self.weight_norm = 0.0  # of the snapshot, over the active parameters
        self.d = self.w[:0]  # where direct() wrote last: shared scratch or a buffer of the unit's own
        self.own_d: Tensor | None = None

    @property
    def rules(self) -> dict:
        """The group that holds the unit's constants and memory; merged units write to each of their groups."""
        return self.groups[0]

    def views(self, flat: Tensor) -> list[Tensor]:
        """The flat buffer as one view per parameter, in its shape; no views of a buffer that the unit goes without."""
        if len(flat) < self.size:
            return []
        shapes = [p.shape for p, _ in self.members]
        return [flat[o : o + s.numel()].view(s) for o, s in zip(self.offsets, shapes, strict=True)]

    def find_active(self) -> bool:
        """Note which parameters have gradients; whether any has."""
        self.active = [i for i, (p, _) in enumerate(self.members) if p.grad is not None]
        return bool(self.active)

    def begin(self) -> None:
        """Snapshot the weights of the parameters with gradients."""
        self.check()
        plain.snapshot(self._pick(self.params, self.active), self._pick(self.w_views, self.active))
        self.weight_norm = self._norm(self.w)

    @property
    def params(self) -> list[Tensor]:
        """The unit's parameters as plain tensors that share their storage."""
        return [p.detach() for p, _ in self.members]

    @property
    def low_precision(self) -> bool:
        """Whether any parameter is kept as a float32 master besides."""
        return any(self._low_precision(i) for i in range(len(self.members)))

    def active_params(self) -> list[Tensor]:
        """Parameters with a gradient in this step."""
        return [self.members[i][0] for i in self.active]

    def direct(self, scratch: Scratch, averaged: bool, grad_scale: float, own: bool = False) -> tuple[float, float]:
        """Write the direction; returns the slope ⟨g, d⟩ and the RMS of d over the entries that have a gradient."""
        if own and self.own_d is None:
            self.own_d = self._buffer()
        g, d = self._gradient(scratch), scratch.d if self.own_d is None else self.own_d
        self.d, segments = d, list(self._segments())
        for s in segments:
            plain.direction(
                g[s.where], self.m[s.where], self.v[s.where], self.w[s.where], d[s.where],
                scratch.work[s.where], adam=self.kind == "adam", averaged=averaged,
                betas=s.group["betas"], eps=s.group["eps"],
                weight_decay=s.group["weight_decay"], count=s.count + 1, grad_scale=grad_scale,
            )  # fmt: skip
        moving = sum(int(torch.count_nonzero(g[s.where])) for s in segments)
        slope = sum(float(torch.dot(g[s.where], d[s.where])) for s in segments)
        return slope, self._norm(d) / math.sqrt(max(moving, 1))

    @property
    def numel(self) -> int:
        """Number of weights that have a gradient in this step."""
        return sum(self.members[i][0].numel() for i in self.active)

    def trial(self, eta: float) -> None:
        """Put w − η d into the parameters; η = 0 restores them bitwise."""
        plain.trial(
            self._pick(self.params, self.active),
            self._pick(self.w_views, self.active),
            self._pick(self.views(self.d), self.active) if eta else self._pick(self.w_views, self.active),
            eta,
        )

    def commit(self, scratch: Scratch, state: dict, grad_scale: float, eta: float) -> None:
        """Advance moments, update counts and master weights; the parameters have moved already."""
        for i in self.active:
            if eta and self._low_precision(i):
                self.w_views[i].sub_(self.views(self.d)[i], alpha=eta)
        g = self._gradient(scratch)
        for s in self._segments():
            plain.advance(
                g[s.where], self.m[s.where], self.v[s.where],
                adam=self.kind == "adam", betas=s.group["betas"], grad_scale=grad_scale,
            )  # fmt: skip
        for i in self.active:
            self.counts[i] += 1
            self._pack(i, state)

    def show(self, state: dict, *, active: bool = False) -> None:
        """Enter the parameters in the optimizer's state: those with a gradient, or all."""
        for i in self.active if active else range(len(self.members)):
            self._pack(i, state)

    def gradient_norm(self) -> float:
        """‖g‖ of the unit."""
        grads = [p.grad for p in self.active_params() if p.grad is not None]
        return math.hypot(*(float(torch.linalg.vector_norm(g, dtype=self.dtype)) for g in grads))

    def _gradient(self, scratch: Scratch) -> Tensor:
        g = scratch.g
        plain.snapshot([self.members[i][0].grad for i in self.active], self._pick(self.views(g), self.active))
        for gap in self.gaps:  # what another unit left there would count as a gradient
            g[gap].zero_()
        return g

    def _norm(self, flat: Tensor) -> float:
        return math.hypot(*(float(torch.linalg.vector_norm(flat[s.where])) for s in self._segments()))

    def _segments(self) -> Iterator[Segment]:
        """Runs of active parameters with one group and one count, alignment gaps included."""
        run: list[int] = []
        for i in [*self.active, None]:
            if run and (i is None or i != run[-1] + 1 or self._key(i) != self._key(run[-1])):
                first, last = run[0], run[-1]
                end = self.offsets[last] + self.members[last][0].numel()
                yield Segment(slice(self.offsets[first], end), self.members[first][1], self.counts[first])
                run = []
            if i is not None:
                run.append(i)

    def _pick(self, items: Sequence[Tensor], indices: Sequence[int]) -> list[Tensor]:
        return [items[i] for i in indices]

    def _key(self, i: int) -> tuple[int, int]:
        return id(self.members[i][1]), self.counts[i]

    def _low_precision(self, i: int) -> bool:
        return self.members[i][0].dtype.itemsize < self.dtype.itemsize

    def _buffer(self, needed: bool = True) -> Tensor:
        return torch.zeros(self.size if needed else 0, dtype=self.dtype, device=self.device)

    def check(self) -> None:
        """Refuse parameters that are not what they were, and gradients that cannot be used.

        Raises:
            RuntimeError: a parameter was moved, converted or resized, or a gradient is sparse.
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

    def _stored(self, i: int) -> dict[str, list[Tensor]]:
        """The buffers that hold state of parameter i, by AdamW's names, as views of all parameters."""
        views = {"exp_avg": self.m_views, "exp_avg_sq": self.v_views}
        if self._low_precision(i):
            views["master"] = self.w_views
        return {name: flat for name, flat in views.items() if flat}

    def _pack(self, i: int, state: dict) -> None:
        """Show the buffers of parameter i in the optimizer's state, under AdamW's names."""
        entry = state[self.members[i][0]]
        count = float(self.counts[i])
        entry["step"] = torch.tensor(count, device="cpu") if self.steps is None else self.steps[i]
        entry.update({name: flat[i] for name, flat in self._stored(i).items()})

    def _unpack(self, state: dict) -> None:
        """Take over the state of parameters that have one (a loaded checkpoint, a merged unit)."""
        for i, (p, _) in enumerate(self.members):
            if p in state:
                for name, flat in self._stored(i).items():
                    if name not in state[p]:
                        raise ValueError(f"the state has no {name!r}: it was saved with another momentum or direction")
                    flat[i].copy_(state[p][name])
                self._pack(i, state)


def _identity(p: Tensor) -> tuple[torch.dtype, torch.device, tuple[int, ...]]:
    return p.dtype, p.device, tuple(p.shape)


def layout(params: Sequence[Tensor]) -> tuple[list[int], list[slice], int]:
    """Aligned offset of every parameter, the gaps between them, and the size of the buffer."""
    offsets, gaps, size = [], [], 0
    for p in params:
        end, offset = size + p.numel(), size
        size = offset + -(-p.numel() // ALIGNMENT) * ALIGNMENT
        offsets.append(offset)
        if end < size:
            gaps.append(slice(end, size))
    return offsets, gaps, size
