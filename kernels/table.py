"""Where the kernels find the tensors of all units: one row per parameter, one row per chunk of :data:`BLOCK`.

Parameters and gradients stay where they are. Parameters of one dtype with gradients of one dtype are a *kind*; a kernel
is launched once per kind with one anchor of each dtype, and finds every tensor by its distance from the anchor
in elements (64 bits), so that loads and stores keep their pointer type and their alignment.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter

import torch
from torch import Tensor

BLOCK = 2048  # elements of one chunk, which one program handles in registers
WARPS = 8  # of such a program: 8 elements a thread, two 16-byte accesses to each float32 buffer
ALIGNMENT = 64  # bytes; what the allocators give, and a multiple of 16 elements of any dtype here
_gradient = attrgetter("grad")

Dtypes = tuple[torch.dtype, torch.dtype]


@dataclass(frozen=True, slots=True)
class Entry:
    """A parameter with its first element in the flat buffers, and the rows of its unit and of its rules."""

    param: Tensor
    flat: int
    unit: int
    rules: int


@dataclass(frozen=True, slots=True)
class Kind:
    """Chunks of the parameters of one pair of dtypes, sorted by unit."""

    param: Tensor  # the anchors: one element of each dtype
    gradient: Tensor
    chunks: Tensor  # int32 [chunks, 3]: parameter, number of the block within it, row of partial sums
    units: dict[int, slice]  # rows of ``chunks`` that belong to each unit


class Table:
    """Rows of parameters and chunks; where anything has :meth:`moved`, :meth:`rebuild` before the next launch.

    Attributes:
        layout: int64 [parameters, 4]: first element in the flat buffers, number of elements, unit, rules.
        places: int64 [parameters, 3]: distances of p and p.grad from their anchors, 1 if there is a gradient.
        spans: int32 [units, 2]: first and last + 1 row of the unit's partial sums.
        chunks: number of chunks, the rows of partial sums.
        aligned: whether every tensor starts at a multiple of :data:`ALIGNMENT`.
    """

    def __init__(self, entries: Sequence[Entry]) -> None:
        self.entries = list(entries)
        self.params = [e.param for e in entries]
        self.device = self.params[0].device
        self.layout = self._upload([[e.flat, e.param.numel(), e.unit, e.rules] for e in entries], torch.int64)
        self.kinds: dict[Dtypes, Kind] = {}
        self._addresses: list[int] = []
        self._dtypes: list[Dtypes] = []
        self.rebuild()

    def moved(self) -> bool:
        """Whether a parameter or gradient lies elsewhere than at the last rebuild, has come or has gone.

        A dtype cannot change without its address, so equal addresses need no other look.
        """
        return self._addresses != _addresses(self.params)

    def rebuild(self) -> None:
        """Look at every tensor anew.

        Raises:
            RuntimeError: a tensor that is not contiguous or lies on another device.
        """
        gradients = list(map(_gradient, self.params))
        self._check(gradients)
        dtypes = [(p.dtype, p.dtype if g is None else g.dtype) for p, g in zip(self.params, gradients, strict=True)]
        if dtypes != self._dtypes:
            self._cut(dtypes)
        self._place(gradients)
        self._addresses, self._dtypes = _addresses(self.params), dtypes

    def _check(self, gradients: Sequence[Tensor | None]) -> None:
        for p, g in zip(self.params, gradients, strict=True):
            if p.device != self.device or (g is not None and not g.is_contiguous()) or not p.is_contiguous():
                raise RuntimeError(
                    f"a parameter or gradient of shape {tuple(p.shape)} is not contiguous or not on {self.device}: "
                    "make it contiguous, or use fused=False"
                )

    def _cut(self, dtypes: Sequence[Dtypes]) -> None:
        """Cut the parameters into chunks; the partial sums of a unit are neighbours, whatever its dtypes."""
        order = sorted(range(len(dtypes)), key=lambda i: (self.entries[i].unit, str(dtypes[i])))
        cut = [(i, block) for i in order for block in range(-(-self.params[i].numel() // BLOCK))]
        rows: dict[Dtypes, list[list[int]]] = {}
        spans = [[len(cut), 0] for _ in range(max(e.unit for e in self.entries) + 1)]
        for row, (i, block) in enumerate(cut):
            rows.setdefault(dtypes[i], []).append([i, block, row])
            span = spans[self.entries[i].unit]
            span[:] = [min(span[0], row), row + 1]
        self.chunks, self.spans = len(cut), self._upload(spans, torch.int32)
        self.kinds = {kind: self._kind(kind, cut_rows) for kind, cut_rows in rows.items()}

    def _kind(self, dtypes: Dtypes, rows: list[list[int]]) -> Kind:
        units: dict[int, slice] = {}
        for at, (i, _, _) in enumerate(rows):
            unit = self.entries[i].unit
            units[unit] = slice(units[unit].start if unit in units else at, at + 1)
        param, gradient = (torch.zeros(1, dtype=dtype, device=self.device) for dtype in dtypes)
        return Kind(param, gradient, self._upload(rows, torch.int32), units)

    def _place(self, gradients: Sequence[Tensor | None]) -> None:
        places, self.aligned = [[0, 0, 0] for _ in gradients], True
        for i, (p, g) in enumerate(zip(self.params, gradients, strict=True)):
            if g is None:
                continue
            kind = self.kinds[p.dtype, g.dtype]
            places[i] = [_distance(p, kind.param), _distance(g, kind.gradient), 1]
            self.aligned &= p.data_ptr() % ALIGNMENT == 0 and g.data_ptr() % ALIGNMENT == 0
        self.places = self._upload(places, torch.int64)

    def _upload(self, rows: list[list[int]], dtype: torch.dtype) -> Tensor:
        return upload(torch.tensor(rows, dtype=dtype), self.device)


def upload(host: Tensor, device: torch.device) -> Tensor:
    """Copy to the device without waiting for it, through pinned memory that the allocator keeps until it is read."""
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host


def _addresses(params: Sequence[Tensor]) -> list[int]:
    gradients = list(map(_gradient, params))
    if any(g is None for g in gradients):  # "None in" would compare tensors
        found = [0 if g is None else g.data_ptr() for g in gradients]
    else:
        found = list(map(Tensor.data_ptr, gradients))
    found += map(Tensor.data_ptr, params)
    return found


def _distance(tensor: Tensor, anchor: Tensor) -> int:
    return (tensor.data_ptr() - anchor.data_ptr()) // anchor.itemsize
