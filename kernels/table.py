"""Addresses of the tensors of all units: a row per parameter, per chunk of :data:`BLOCK` elements, and per program.

Parameters and gradients stay where they are. A kernel is launched once per pair of dtypes of parameter and gradient.
It gets an anchor of each dtype, a tensor of one element. The address of a parameter or gradient is its anchor's plus a
distance, a number of elements in 64 bits. So loads and stores keep their pointer type and their alignment.

A program takes up to two whole chunks of a unit, or several small ones. 144 LoRA factors of 8 x 768 in 12 units cost
216 programs, with a program per chunk 432; BERT-base with a unit per layer 26,726 (53,537); 256 biases of 64 elements
32 (256).
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

BLOCK = 2048  # elements of one chunk, which one program handles in registers
WARPS = 8  # of its program: 8 elements a thread, two 16-byte accesses to each float32 buffer
REGISTERS = 64  # of a thread, at most: four programs fit on a multiprocessor
MOST_ELEMENTS, MOST_CHUNKS = 2 * BLOCK, 8  # that begin in one program, which takes its chunks one after the other
ALIGNED_BYTES = 64  # torch's allocators give it; 16 elements of up to 4 bytes, as the kernels tell the compiler
LAUNCH = {"enable_fp_fusion": True}  # explicit: without it Triton 3.9 warns, and 3.10 turns it off
BY_CHUNK, SCALAR = LAUNCH | {"num_warps": WARPS}, LAUNCH | {"num_warps": 1}

#: Columns of :attr:`Chunks.rows`: parameter, number of the block within it.
CHUNK = ("param", "block")
#: Columns of :attr:`Chunks.programs`: first and last + 1 row of its chunks, row of partial sums, row of the unit.
PROGRAM = ("first", "last", "row", "unit")
#: Columns of ``layout``: first element in the flat buffers, number of elements, rows of the unit and of its rules.
LAYOUT = ("flat", "size", "unit", "rules")
#: Columns of ``places``: distances of p and p.grad from their anchors, 1 if there is a gradient.
PLACES = ("param", "gradient", "present")
#: Columns of ``spans``: first and last + 1 row of a unit's partial sums.
SPANS = ("first", "last")

Dtypes = tuple[torch.dtype, torch.dtype]
_dtype = attrgetter("dtype")


@dataclass(frozen=True, slots=True)
class Entry:
    """A parameter with its first element in the flat buffers, and the rows of its unit and of its rules."""

    param: Tensor
    flat: int
    unit: int
    rules: int


@dataclass(slots=True)
class Chunks:
    """The programs of one pair of dtypes, sorted by unit, and the chunks that they take."""

    param: Tensor  # the anchors: one element of each dtype
    gradient: Tensor
    rows: Tensor  # int32 [chunks, 2], see CHUNK; those of all dtypes
    programs: Tensor  # int32 [programs, 4], see PROGRAM
    units: dict[int, slice]  # programs of each unit
    aligned: bool = True  # whether every tensor starts at a multiple of ALIGNED_BYTES

    def of_unit(self, unit: int | None) -> range:
        """Programs of the unit, or of all units (None)."""
        everything = range(len(self.programs))
        return everything if unit is None else everything[self.units.get(unit, slice(0, 0))]


class Table:
    """Rows of parameters and chunks; before a launch, :meth:`moved` tells whether to call :meth:`rebuild`.

    The step reads the gradients once, holds them and passes them in.

    Attributes:
        layout: int64 [parameters, 4], see :data:`LAYOUT`.
        places: int64 [parameters, 3], see :data:`PLACES`.
        spans: int32 [units, 2], see :data:`SPANS`.
        n_chunks: number of chunks, as many rows of partial sums as there may be; most_chunks: of the largest unit.
        by_dtypes: the programs by dtypes of parameter and gradient.
    """

    def __init__(self, entries: Sequence[Entry]) -> None:
        self.entries = list(entries)
        self.params = [e.param for e in entries]
        self.device = self.params[0].device
        self.sizes = [p.numel() for p in self.params]
        rows = [[e.flat, n, e.unit, e.rules] for e, n in zip(entries, self.sizes, strict=True)]
        self.layout = self._upload(_host(rows))
        of_units: Counter[int] = Counter()
        for e, n in zip(entries, self.sizes, strict=True):
            of_units[e.unit] += _blocks(n)
        self.n_chunks, self.most_chunks = of_units.total(), max(of_units.values())
        self.by_dtypes: dict[Dtypes, Chunks] = {}
        self._dtypes: list[Dtypes] = [(p.dtype, p.dtype) for p in self.params]
        self._seen: list | None = None

    def moved(self, params: Sequence[Tensor], gradients: Sequence[Tensor]) -> bool:
        """Whether a tensor has another address or form than at the last rebuild, or others have gradients now."""
        return self._seen is None or self._seen != _fingerprint(params, gradients)

    def rebuild(self, params: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
        """Read every address anew; parameters that are not among ``params`` have no gradient.

        Raises:
            RuntimeError: a tensor that is not contiguous, has another size or lies on another device.
        """
        given = dict(zip(map(id, params), gradients, strict=True))
        of_all = [given.get(id(p)) for p in self.params]
        self._check(of_all)
        before = zip(self.params, of_all, self._dtypes, strict=True)
        dtypes = [last if g is None else (p.dtype, g.dtype) for p, g, last in before]  # without g, p may have changed
        if self._seen is None or dtypes != self._dtypes:
            self._cut(dtypes)
        self._place(of_all)
        self._seen, self._dtypes = _fingerprint(params, gradients), dtypes

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
        """Cut the parameters into chunks, hand these out to programs, and sort the programs by dtypes."""
        rows, pairs = self._rows(dtypes), list(dict.fromkeys(dtypes))
        param, block = rows.unbind(1)
        unit, pair = (_host(x)[param] for x in ([e.unit for e in self.entries], list(map(pairs.index, dtypes))))
        sizes = (_host(self.sizes)[param] - block * BLOCK).clamp(max=BLOCK)
        first, last = _hand_out(sizes, unit * len(pairs) + pair)
        programs = torch.stack([first, last, torch.arange(len(first), device="cpu"), unit[first]], 1)
        self.spans = self._upload(_spans(unit[first], max(e.unit for e in self.entries) + 1))
        uploaded = self._upload(rows.int())
        present = pair.unique().tolist()  # a parameter without elements has no chunk
        self.by_dtypes = {pairs[k]: self._chunks(pairs[k], uploaded, programs[pair[first] == k]) for k in present}

    def _rows(self, dtypes: Sequence[Dtypes]) -> Tensor:
        """Rows of all chunks; those of a unit are neighbours, and within it those of the same dtypes."""
        order = _host(sorted(range(len(dtypes)), key=lambda i: (self.entries[i].unit, str(dtypes[i]))))
        blocks = _host(list(map(_blocks, self.sizes)))[order]
        first = torch.repeat_interleave(blocks.cumsum(0) - blocks, blocks)
        return torch.stack([torch.repeat_interleave(order, blocks), torch.arange(len(first), device="cpu") - first], 1)

    def _chunks(self, dtypes: Dtypes, rows: Tensor, programs: Tensor) -> Chunks:
        unit = programs[:, PROGRAM.index("unit")]
        spans = _spans(unit, int(unit.max()) + 1).tolist()
        units = {u: slice(first, last) for u, (first, last) in enumerate(spans) if first < last}
        param, gradient = (torch.zeros(1, dtype=dtype, device=self.device) for dtype in dtypes)
        return Chunks(param, gradient, rows, self._upload(programs.int()), units)

    def _place(self, gradients: Sequence[Tensor | None]) -> None:
        places = [[0, 0, 0] for _ in gradients]
        for chunks in self.by_dtypes.values():
            chunks.aligned = True
        for i, (p, g) in enumerate(zip(self.params, gradients, strict=True)):
            if g is None or not self.sizes[i]:
                continue
            chunks = self.by_dtypes[p.dtype, g.dtype]
            places[i] = [_distance(p, chunks.param), _distance(g, chunks.gradient), 1]
            chunks.aligned &= p.data_ptr() % ALIGNED_BYTES == 0 and g.data_ptr() % ALIGNED_BYTES == 0
        self.places = self._upload(_host(places))

    def _upload(self, host: Tensor) -> Tensor:
        return upload(host, self.device)


def launched(kernel: Any, programs: int, *, compile_only: bool) -> Callable:
    """The launch of a kernel with this many programs, or what compiles and loads it: a first launch may fail so."""
    if not compile_only:
        return kernel[(programs,)]

    def load(**arguments: Any) -> None:
        compiled = kernel.warmup(grid=(programs,), **arguments)
        if compiled is not None:  # the interpreter compiles nothing
            compiled.run  # noqa: B018

    return load


def upload(host: Tensor, device: torch.device) -> Tensor:
    """Copy to the device without waiting for it; the allocator keeps the pinned memory until the copy is made."""
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host


def _host(rows: list) -> Tensor:
    return torch.tensor(rows, dtype=torch.int64, device="cpu")


def _blocks(size: int) -> int:
    return -(-size // BLOCK)


def _hand_out(sizes: Tensor, kind: Tensor) -> tuple[Tensor, Tensor]:
    """First and last + 1 chunk of each program: neighbours of one kind, at most two whole ones.

    The chunks of a kind are laid end to end, small ones as if they had :data:`MOST_ELEMENTS` / :data:`MOST_CHUNKS`
    elements. A program takes those that begin within the same :data:`MOST_ELEMENTS`.
    """
    sizes = sizes.clamp(min=MOST_ELEMENTS // MOST_CHUNKS)
    begin = sizes.cumsum(0) - sizes
    _, run, chunks = torch.unique_consecutive(kind, return_inverse=True, return_counts=True)
    begin -= begin[chunks.cumsum(0) - chunks][run]
    program = torch.stack([run, begin // MOST_ELEMENTS], 1)
    _, counts = torch.unique_consecutive(program, dim=0, return_counts=True)
    last = counts.cumsum(0)
    return last - counts, last


def _spans(unit: Tensor, units: int) -> Tensor:
    """First and last + 1 index at which each unit stands in a sorted list of them."""
    counts = torch.bincount(unit, minlength=units)
    last = counts.cumsum(0)
    return torch.stack([last - counts, last], 1).int()


def _fingerprint(params: Sequence[Tensor], gradients: Sequence[Tensor]) -> list:
    """Addresses and forms that the rows of a table depend on; every step compares them, so there are few.

    A gradient has the size of its parameter, and autograd gives it the same layout and dtype: these are read from the
    gradients only.
    """
    fingerprint: list = list(map(Tensor.data_ptr, params))
    for read in (Tensor.data_ptr, Tensor.numel, Tensor.is_contiguous, _dtype):
        fingerprint += map(read, gradients)
    return fingerprint


def _distance(tensor: Tensor, anchor: Tensor) -> int:
    return (tensor.data_ptr() - anchor.data_ptr()) // anchor.itemsize
