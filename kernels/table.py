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
ALIGNMENT = 64  # bytes; what the allocators give, and a multiple of 16 elements of up to 4 bytes
LAUNCH = {"enable_fp_fusion": True}  # said, since Triton 3.9 warns where it is not and 3.10 turns it off
BY_CHUNK, SCALAR = LAUNCH | {"num_warps": WARPS}, LAUNCH | {"num_warps": 1}
_dtype = attrgetter("dtype")

Dtypes = tuple[torch.dtype, torch.dtype]


@dataclass(frozen=True, slots=True)
class Entry:
    """A parameter with its first element in the flat buffers, and the rows of its unit and of its rules."""

    param: Tensor
    flat: int
    unit: int
    rules: int


@dataclass(slots=True)
class Kind:
    """Chunks of the parameters of one pair of dtypes, sorted by unit."""

    param: Tensor  # the anchors: one element of each dtype
    gradient: Tensor
    chunks: Tensor  # int32 [chunks, 3]: parameter, number of the block within it, row of partial sums
    units: dict[int, slice]  # rows of ``chunks`` that belong to each unit
    aligned: bool = True  # whether every tensor starts at a multiple of ALIGNMENT


class Table:
    """Rows of parameters and chunks; where anything has :meth:`moved`, :meth:`rebuild` before the next launch.

    A new table has to be rebuilt first. It is told the gradients, which the step has read already and holds.

    Attributes:
        layout: int64 [parameters, 4]: first element in the flat buffers, number of elements, unit, rules.
        places: int64 [parameters, 3]: distances of p and p.grad from their anchors, 1 if there is a gradient.
        spans: int32 [units, 2]: first and last + 1 row of the unit's partial sums.
        chunks: number of chunks, the rows of partial sums.
        kinds: the chunks by dtypes of parameter and gradient.
    """

    def __init__(self, entries: Sequence[Entry]) -> None:
        self.entries = list(entries)
        self.params = [e.param for e in entries]
        self.device = self.params[0].device
        self.sizes = [p.numel() for p in self.params]
        rows = [[e.flat, n, e.unit, e.rules] for e, n in zip(entries, self.sizes, strict=True)]
        self.layout = self._upload(_host(rows))
        self.chunks = sum(map(_blocks, self.sizes))
        self.kinds: dict[Dtypes, Kind] = {}
        self._dtypes: list[Dtypes] = [(p.dtype, p.dtype) for p in self.params]
        self._seen: list | None = None

    def moved(self, params: Sequence[Tensor], gradients: Sequence[Tensor]) -> bool:
        """Whether any is not what or where it was at the last rebuild, or others have gradients now."""
        return self._seen is None or self._seen != _look(params, gradients)

    def rebuild(self, params: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
        """Look at every tensor anew; parameters that are not among ``params`` have no gradient.

        Raises:
            RuntimeError: a tensor that is not contiguous, has another size or lies on another device.
        """
        given = dict(zip(map(id, params), gradients, strict=True))
        of_all = [given.get(id(p)) for p in self.params]
        self._check(of_all)
        known = zip(self.params, of_all, self._dtypes, strict=True)
        dtypes = [last if g is None else (p.dtype, g.dtype) for p, g, last in known]  # the rest may be anything
        if self._seen is None or dtypes != self._dtypes:
            self._cut(dtypes)
        self._place(of_all)
        self._seen, self._dtypes = _look(params, gradients), dtypes

    def _check(self, gradients: Sequence[Tensor | None]) -> None:
        for p, g, size in zip(self.params, gradients, self.sizes, strict=True):
            if g is None:
                continue
            if p.numel() != size or g.numel() != size:
                raise RuntimeError(
                    f"a parameter had {size} elements when the optimizer first saw it, and it or its gradient has "
                    f"another number now (shape {tuple(p.shape)}): resize the model before making the optimizer"
                )
            if not p.device == g.device == self.device or not (p.is_contiguous() and g.is_contiguous()):
                raise RuntimeError(
                    f"a parameter or gradient of shape {tuple(p.shape)} is not contiguous or not on {self.device}: "
                    "make it contiguous, or use fused=False"
                )

    def _cut(self, dtypes: Sequence[Dtypes]) -> None:
        """Cut the parameters into chunks; the partial sums of a unit are neighbours, whatever its dtypes."""
        units = [e.unit for e in self.entries]
        order = _host(sorted(range(len(units)), key=lambda i: (units[i], str(dtypes[i]))))
        blocks = _host(list(map(_blocks, self.sizes)))[order]
        param = torch.repeat_interleave(order, blocks)
        row = torch.arange(self.chunks, device="cpu")
        first = torch.repeat_interleave(blocks.cumsum(0) - blocks, blocks)
        chunks, unit = torch.stack([param, row - first, row], 1).int(), _host(units)[param]
        self.spans = self._upload(_spans(unit, max(units) + 1))
        known = list(dict.fromkeys(dtypes))
        kind = _host([known.index(pair) for pair in dtypes])[param]
        present = kind.unique().tolist()  # all but those of parameters without elements
        self.kinds = {known[k]: self._kind(known[k], chunks[kind == k], unit[kind == k]) for k in present}

    def _kind(self, dtypes: Dtypes, chunks: Tensor, unit: Tensor) -> Kind:
        spans = _spans(unit, int(unit.max()) + 1).tolist()
        units = {u: slice(first, last) for u, (first, last) in enumerate(spans) if first < last}
        param, gradient = (torch.zeros(1, dtype=dtype, device=self.device) for dtype in dtypes)
        return Kind(param, gradient, self._upload(chunks), units)

    def _place(self, gradients: Sequence[Tensor | None]) -> None:
        places = [[0, 0, 0] for _ in gradients]
        for kind in self.kinds.values():
            kind.aligned = True
        for i, (p, g) in enumerate(zip(self.params, gradients, strict=True)):
            if g is None or not self.sizes[i]:
                continue
            kind = self.kinds[p.dtype, g.dtype]
            places[i] = [_distance(p, kind.param), _distance(g, kind.gradient), 1]
            kind.aligned &= p.data_ptr() % ALIGNMENT == 0 and g.data_ptr() % ALIGNMENT == 0
        self.places = self._upload(_host(places))

    def _upload(self, host: Tensor) -> Tensor:
        return upload(host, self.device)


def upload(host: Tensor, device: torch.device) -> Tensor:
    """Copy to the device without waiting for it, through pinned memory that the allocator keeps until it is read."""
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host


def _host(rows: list) -> Tensor:
    return torch.tensor(rows, dtype=torch.int64, device="cpu")


def _blocks(size: int) -> int:
    return -(-size // BLOCK)


def _spans(unit: Tensor, units: int) -> Tensor:
    """First and last + 1 index at which each unit stands in a sorted list of them."""
    counts = torch.bincount(unit, minlength=units)
    last = counts.cumsum(0)
    return torch.stack([last - counts, last], 1).int()


def _look(params: Sequence[Tensor], gradients: Sequence[Tensor]) -> list:
    """What the rows of a table rest on, in as few calls as will do: it is looked at in every step.

    Gradients have the size of their parameters, and from autograd their layout and dtype as well, so those are looked
    at in the gradients alone.
    """
    found: list = list(map(Tensor.data_ptr, params))
    for what in (Tensor.data_ptr, Tensor.numel, Tensor.is_contiguous, _dtype):
        found += map(what, gradients)
    return found


def _distance(tensor: Tensor, anchor: Tensor) -> int:
    return (tensor.data_ptr() - anchor.data_ptr()) // anchor.itemsize
