r"""Put trial weights w − η d into the parameters, with d computed on the way.

One kernel for every use: first trial, retry, restore (η = 0, bitwise) and the move of all units at once differ in the
step that ``state`` holds for the unit. Parameters that stand there already are left alone.
Bytes per parameter (float32, Adam): 16 a trial along the gradient's direction, 20 along the averaged one, 8 a restore.
d is not kept, which spares a buffer: keeping it would cost 20 in the first trial and 12 in each that follows, so one
trial is cheaper by 4 as it is, two cost the same, and every further one costs 4 more. Plain torch versions:
``direction`` and ``trial`` of :mod:`fastals.kernels.plain`.
"""

import triton
import triton.language as tl

from fastals.kernels.arena import Arena
from fastals.kernels.columns import AT, AVERAGED, MOVE, N_CONSTANTS, N_STATE
from fastals.kernels.moments import direction_of
from fastals.kernels.table import BLOCK, BY_CHUNK, Table


@triton.jit
def _trial_chunk(
    p, g, m, v, w, constants, scale, eta, averaged, length,
    ADAM: tl.constexpr, FIRST: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    o = tl.arange(0, BLOCK)
    mask = (o < length) if MASKED else None
    other = 0.0 if MASKED else None
    b_w = tl.load(w + o, mask=mask, other=other)
    if eta != 0:  # a restore takes w as it is, and reads nothing else
        b_g = tl.load(g + o, mask=mask, other=other).to(tl.float32) * scale
        b_v = tl.load(v + o, mask=mask, other=other) if ADAM else b_g
        b_m = b_g
        if FIRST:  # noqa: SIM102
            if averaged:  # the gradient's own direction reads no average
                b_m = tl.load(m + o, mask=mask, other=other)
        b_w -= eta * direction_of(b_g, b_m, b_v, b_w, constants, averaged, ADAM, FIRST)
    tl.store(p + o, b_w.to(p.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["first"])
def trial_kernel(
    p_base, g_base, m, v, w, chunks, places, layout, constants, grad_scale, state, first,
    ADAM: tl.constexpr, FIRST: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One chunk of a unit, from row ``first`` of the chunks on."""
    i_c = tl.program_id(0) + first
    i_p = tl.load(chunks + 3 * i_c)
    start = tl.load(chunks + 3 * i_c + 1).to(tl.int64) * BLOCK
    row = state + tl.load(layout + 4 * i_p + 2) * N_STATE
    move = tl.load(row + MOVE)
    if (tl.load(places + 3 * i_p + 2) == 1) & (move != tl.load(row + AT)):
        length = tl.load(layout + 4 * i_p + 1) - start
        o_p = tl.load(places + 3 * i_p) + start
        o_g = tl.load(places + 3 * i_p + 1) + start
        o_f = tl.multiple_of(tl.load(layout + 4 * i_p) + start, 16)
        if ALIGNED:
            o_p = tl.multiple_of(o_p, 16)
            o_g = tl.multiple_of(o_g, 16)
        scale = tl.load(grad_scale)
        averaged = tl.load(row + AVERAGED) != 0
        constants += i_p * N_CONSTANTS
        if length >= BLOCK:
            _trial_chunk(
                p_base + o_p, g_base + o_g, m + o_f, v + o_f, w + o_f, constants, scale, move.to(tl.float32), averaged,
                length, ADAM, FIRST, False, BLOCK,
            )  # fmt: skip
        else:
            _trial_chunk(
                p_base + o_p, g_base + o_g, m + o_f, v + o_f, w + o_f, constants, scale, move.to(tl.float32), averaged,
                length, ADAM, FIRST, True, BLOCK,
            )  # fmt: skip


def trial(table: Table, arena: Arena, unit: int | None = None) -> None:
    """Put every parameter of the unit (None: of all) with a gradient at the step in ``state``'s column ``move``."""
    for kind in table.kinds.values():
        rows = slice(0, len(kind.chunks)) if unit is None else kind.units.get(unit, slice(0, 0))
        if rows.stop > rows.start:
            trial_kernel[(rows.stop - rows.start,)](
                kind.param, kind.gradient, arena.m, arena.v, arena.w, kind.chunks, table.places, table.layout,
                arena.constants, arena.grad_scale, arena.state, rows.start,
                ADAM=arena.adam, FIRST=arena.first, ALIGNED=kind.aligned, BLOCK=BLOCK, **BY_CHUNK,
            )  # fmt: skip
