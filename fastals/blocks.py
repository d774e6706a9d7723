"""The active part of a unit's flat buffers, cut into blocks that stay in the cache while a pass works on them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fastals.buffers import Segment, Unit

BLOCK = 65_536  # elements for each thread of the CPU: six float32 buffers of this size fit into 2 MiB of cache
ELSEWHERE = 2**22  # elements on other devices, where launches cost more than what a cache saves


class Scratch:
    """Gradient, direction and work space of one block, shared by the units of one dtype and device."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.g, self.d, self.work = (torch.zeros(0, dtype=dtype, device=device) for _ in range(3))

    def take(self, size: int) -> tuple[Tensor, Tensor, Tensor]:
        """The three buffers in this size; blocks that were cut before keep theirs if they have to grow."""
        if len(self.g) < size:
            self.g, self.d, self.work = (x.new_zeros(size) for x in (self.g, self.d, self.work))
        return self.g[:size], self.d[:size], self.work[:size]


class Piece(NamedTuple):
    """What a block holds of one parameter; ``part`` is its part of the flat parameter, None if it is whole."""

    param: int
    part: slice | None
    where: slice  # in the block


@dataclass(frozen=True, slots=True)
class Block:
    """A stretch of one segment with its views, which never change.

    ``ws``, ``gs`` and ``ds`` are one view per piece, in the shape of the parameter if it is whole.
    """

    segment: int
    pieces: list[Piece]
    gaps: bool
    m: Tensor
    v: Tensor
    w: Tensor
    g: Tensor
    d: Tensor
    work: Tensor
    ws: list[Tensor]
    gs: list[Tensor]
    ds: list[Tensor]

    def pick(self, tensors: Mapping[int, Tensor]) -> list[Tensor]:
        """From the tensors of parameters, flat where parts are taken, one view per piece."""
        return [tensors[i] if part is None else tensors[i][part] for i, part, _ in self.pieces]


def largest(device: torch.device) -> int:
    """The most elements of a block on this device."""
    return BLOCK * torch.get_num_threads() if device.type == "cpu" else ELSEWHERE


def cut(unit: Unit, segments: Sequence[Segment], rigid: set[int], scratch: Scratch) -> list[Block]:
    """The segments as blocks; ``rigid`` are the parameters that cannot be cut."""
    size, blocks = largest(unit.device), []
    for number, segment in enumerate(segments):
        for where in _stretches(unit, segment.members, rigid, size):
            if where.start < where.stop:
                blocks.append(_block(unit, number, segment.members, where, scratch))
    return blocks


def _extent(unit: Unit, i: int) -> tuple[int, int]:
    """Where parameter i starts and ends."""
    return unit.offsets[i], unit.offsets[i] + unit.sizes[i]


def _stretches(unit: Unit, members: Sequence[int], rigid: set[int], size: int) -> Iterator[slice]:
    """The parameters of a segment as stretches of at most ``size`` elements; a rigid one may need a longer one."""
    start = end = unit.offsets[members[0]]
    for i in members:
        first, last = _extent(unit, i)
        if i in rigid and last - start > size:
            yield from (slice(start, end), slice(first, last))
            start = last
        while last - start > size:
            yield slice(start, start + size)
            start += size
        end = last
    yield slice(start, end)


def _block(unit: Unit, segment: int, members: Sequence[int], where: slice, scratch: Scratch) -> Block:
    pieces = [piece for i in members if (piece := _piece(unit, i, where)) is not None]
    m, v, w = (flat[where] for flat in (unit.m, unit.v, unit.w))
    g, d, work = scratch.take(where.stop - where.start)
    ws, gs, ds = ([_view(unit, piece, flat) for piece in pieces] for flat in (w, g, d))
    gaps = sum(piece.where.stop - piece.where.start for piece in pieces) < len(w)
    return Block(segment, pieces, gaps, m, v, w, g, d, work, ws, gs, ds)


def _piece(unit: Unit, i: int, where: slice) -> Piece | None:
    """What lies of parameter i in a stretch of the unit's buffers."""
    first, last = _extent(unit, i)
    start, stop = max(first, where.start), min(last, where.stop)
    if start >= stop:
        return None
    part = None if (start, stop) == (first, last) else slice(start - first, stop - first)
    return Piece(i, part, slice(start - where.start, stop - where.start))


def _view(unit: Unit, piece: Piece, flat: Tensor) -> Tensor:
    view = flat[piece.where]
    return view if piece.part is not None else view.view(unit.shapes[piece.param])
