"""What a step computes over the buffers of a unit, in plain torch, a block at a time: one pass over memory per verb."""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastals.blocks import Block, Scratch, cut
from fastals.buffers import Segment, Unit
from fastals.kernels import plain
from fastals.shards import local


class Sums(NamedTuple):
    """Sums over the active entries of a unit, or over the share of them that this process stands for.

    What several processes hold counts in each of them as one over their number.
    """

    slope: float  # ⟨g, d⟩
    direction: float  # ‖d‖
    moving: float  # entries with g ≠ 0
    weights: float  # ‖w‖ at w_t
    elements: float

    @property
    def length(self) -> float:
        """RMS of d over the entries with g ≠ 0."""
        return self.direction / math.sqrt(max(self.moving, 1))

    @property
    def weight_rms(self) -> float:
        """RMS of w_t."""
        return self.weights / math.sqrt(max(self.elements, 1))

    def squared(self) -> list[float]:
        """The numbers that add up over the processes."""
        return [self.slope, self.direction**2, self.moving, self.weights**2, self.elements]

    @classmethod
    def of_squared(cls, numbers: Sequence[float]) -> "Sums":
        """The sums over all processes."""
        slope, direction, moving, weights, elements = numbers
        return cls(slope, math.sqrt(direction), moving, math.sqrt(weights), elements)


class Tensors(NamedTuple):
    """Parameters and gradients by index, flat where blocks take parts of them; they live as long as one pass."""

    params: dict[int, Tensor]
    grads: dict[int, Tensor]


class Passes:
    """The computations of a step over the buffers of one unit, a block of the flat buffers at a time.

    The direction is not kept: every pass that needs it writes it into the scratch again, block by block.

    Attributes:
        averaged: whether trials and commit go along the first moment.
        grad_scale: multiplies the gradients.
        weight_norm: ‖w_t‖ over the parameters that have a gradient; 0 until held.
    """

    def __init__(self, unit: Unit, scratch: Scratch) -> None:
        self.unit, self.scratch = unit, scratch
        self.averaged, self.grad_scale = False, 1.0
        self.weight_norm = 0.0
        self.blocks: list[Block] = []
        self._held = 0  # blocks with the weights of this step, the first ones
        self._norms: list[Tensor] = []  # of the weights of those
        self._segments: list[Segment] = []
        self._entries: dict[int, dict[str, Tensor]] = {}  # of the optimizer's state, after this step
        self._parted: set[int] = set()  # parameters that lie in several blocks
        self._cut_for: object = None

    def begin(self) -> None:
        """Start a mini-batch."""
        self.unit.check()
        self._held, self._norms, self.weight_norm = 0, [], 0.0
        self.averaged, self.grad_scale = False, 1.0
        self._segments, self._entries = list(self.unit.segments()), self.unit.after_update()
        self._cut()

    @property
    def held(self) -> bool:
        """Whether w holds the weights of this step."""
        return self._held == len(self.blocks)

    def gradient_norm(self) -> float:
        """‖g‖, of this process' share."""
        unit = self.unit
        grads = [(unit.shares[i], local(g)) for i in unit.active if (g := unit.members[i][0].grad) is not None]
        return math.hypot(*_read(math.sqrt(s) * torch.linalg.vector_norm(g, dtype=unit.dtype) for s, g in grads))

    def hold(self) -> None:
        """Copy the weights of the parameters that have a gradient, if that is not done."""
        tensors = self._tensors()
        for number, block in enumerate(self.blocks):
            self._hold(number, block, tensors)
        self._weigh()

    def survey(self, averaged: bool, move: float = 0.0) -> Sums:
        """Slope and length of the direction; with ``move`` the parameters are set to w − move d in the same pass."""
        self.averaged = averaged
        tensors = self._tensors()
        sums: list[Tensor] = []
        for number, block in enumerate(self.blocks):
            self._hold(number, block, tensors)
            g = self._direct(block, tensors)
            moving, share = torch.ne(g, 0, out=block.work).sum(dtype=g.dtype), self._segments[block.segment].share
            norm = torch.linalg.vector_norm(block.d)
            sums += share * torch.dot(g, block.d), math.sqrt(share) * norm, share * moving
            if move:
                self._put(block, tensors, move)
        self._weigh()
        found = _read(sums)
        slope, length, entries = sum(found[::3]), math.hypot(*found[1::3]), sum(found[2::3])
        return Sums(slope, length, entries, self.weight_norm, self.unit.elements)

    def trial(self, eta: float) -> None:
        """Put w − η d into the parameters; η = 0 restores them bitwise, as far as they are held."""
        if not eta:
            self._restore()
            return
        tensors = self._tensors()
        for number, block in enumerate(self.blocks):
            self._hold(number, block, tensors)
            self._direct(block, tensors)
            self._put(block, tensors, eta)
        self._weigh()

    def commit(self, state: dict, eta: float) -> None:
        """Advance moments, update counts and master weights; the parameters have moved already.

        All is written in place and nothing is allocated, since what fails halfway could not be undone.
        """
        unit, tensors = self.unit, self._tensors()
        for block in self.blocks:
            masters = [k for k, piece in enumerate(block.pieces) if eta and unit.has_master(piece.param)]
            g = self._direct(block, tensors) if masters else self._gradient(block, tensors)
            for k in masters:
                block.ws[k].sub_(block.ds[k], alpha=eta)
            plain.advance(
                g,
                block.m,
                block.v,
                scratch=block.work,
                adam=unit.adam,
                betas=self._segments[block.segment].group["betas"],
                grad_scale=self.grad_scale,
            )
        unit.count(self._entries, state)

    def _cut(self) -> None:
        """Cut the blocks anew if what they depend on has changed; while only some are held, they stay."""
        unit = self.unit
        rigid = {i for i in unit.active if not _can_be_cut(unit.members[i][0])}
        now = [segment.where for segment in self._segments], rigid
        if now == self._cut_for or 0 < self._held < len(self.blocks):
            return
        blocks = cut(unit, self._segments, rigid, self.scratch)
        self._parted = {piece.param for block in blocks for piece in block.pieces if piece.part is not None}
        self.blocks, self._held, self._cut_for = blocks, len(blocks) if self._held else 0, now

    def _tensors(self) -> Tensors:
        self._cut()
        members = [(i, self.unit.members[i][0]) for i in self.unit.active]
        params = {i: self._flat(i, local(p.detach())) for i, p in members}
        return Tensors(params, {i: self._flat(i, local(p.grad.detach())) for i, p in members if p.grad is not None})

    def _flat(self, i: int, tensor: Tensor) -> Tensor:
        return tensor.view(-1) if i in self._parted else tensor

    def _hold(self, number: int, block: Block, tensors: Tensors) -> None:
        """Copy the weights of a block, if that is not done; it must not be written before."""
        if number >= self._held:
            plain.snapshot(block.pick(tensors.params), block.ws)
            share = self._segments[block.segment].share
            self._norms[number:] = [math.sqrt(share) * torch.linalg.vector_norm(block.w)]
            self._held = number + 1

    def _weigh(self) -> None:
        """Set the norm of the weights once all are held."""
        if self._norms:
            self.weight_norm, self._norms = math.hypot(*_read(self._norms)), []

    def _gradient(self, block: Block, tensors: Tensors) -> Tensor:
        """The gradient of a block, zeros in gaps: itself if it is in one piece, else copied into the scratch."""
        parts = block.pick(tensors.grads)
        if len(parts) == 1 and not block.gaps and parts[0].dtype == self.unit.dtype and parts[0].is_contiguous():
            return parts[0].view(-1)
        if block.gaps:
            block.g.zero_()
        plain.copy(parts, block.gs)
        return block.g

    def _direct(self, block: Block, tensors: Tensors) -> Tensor:
        """Write the direction of a block into the scratch; returns its gradient."""
        segment, g = self._segments[block.segment], self._gradient(block, tensors)
        plain.direction(
            g,
            block.m,
            block.v,
            block.w,
            out=block.d,
            scratch=block.work,
            adam=self.unit.adam,
            averaged=self.averaged,
            betas=segment.group["betas"],
            eps=segment.group["eps"],
            weight_decay=segment.group["weight_decay"],
            count=segment.count + 1,
            grad_scale=self.grad_scale,
        )
        return g

    def _put(self, block: Block, tensors: Tensors, eta: float) -> None:
        """Put w − η d of a block into the parameters."""
        plain.trial(block.pick(tensors.params), block.ws, block.ds, eta)

    def _restore(self) -> None:
        """Put w into the parameters, all in their shape, or after an interrupted pass the blocks that it has held."""
        unit = self.unit
        if self.held:
            plain.trial(unit.pick_active(unit.params), unit.pick_active(unit.w_views), [], 0.0)
        elif self._held:
            params = self._tensors().params
            for block in self.blocks[: self._held]:
                plain.trial(block.pick(params), block.ws, [], 0.0)


def _can_be_cut(p: Tensor) -> bool:
    """Whether flat parts of a parameter and of its gradient are views of them."""
    return local(p.detach()).is_contiguous() and (p.grad is None or local(p.grad).is_contiguous())


def _read(numbers: Iterable[Tensor]) -> list[float]:
    """The values of many numbers, after one wait for the device."""
    numbers = list(numbers)
    return torch.stack(numbers).tolist() if numbers else []
