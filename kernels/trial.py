r"""Put trial weights w − η d into the parameters, with d computed on the way.

One kernel serves first trial, retry, restore (η = 0, bitwise) and the move of all units at once: they differ in the
step in ``state``'s column ``move`` only. A unit that is at this step already is left alone.
Bytes per parameter (float32, Adam): 16 a trial along the gradient's direction, 20 along the averaged one, 8 a restore.
d is not kept, which saves a buffer. Keeping it would take 20 bytes in the first trial and 12 in each later one:
one trial is cheaper by 4 without it, two cost the same, and every further one costs 4 more. Plain torch versions:
``direction`` and ``trial`` of :mod:`fastals.kernels.plain`.
"""

from collections.abc import Sequence

import triton
import triton.language as tl

from fastals.kernels.arena import Arena
from fastals.kernels.chunk import chunk_of, direction_of, length_of, moved_of, offsets_of, program_of
from fastals.kernels.columns import (
    AT,
    AVERAGED,
    MOVE,
    N_CONSTANTS,
    N_STATE,
)
from fastals.kernels.table import BLOCK, BY_CHUNK, Chunks, Table


@triton.jit
def _trial_chunk(
    p,
    g,
    m,
    v,
    w,
    constants,
    grad_scale,
    eta,
    averaged,
    length,
    ADAM: tl.constexpr,
    HAS_M: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    o_e = tl.arange(0, BLOCK)
    m_e = (o_e < length) if MASKED else None
    other = 0.0 if MASKED else None
    b_w = tl.load(w + o_e, mask=m_e, other=other)
    if eta != 0:  # a restore takes w as it is, and reads nothing else
        b_g = tl.load(g + o_e, mask=m_e, other=other).to(tl.float32) * grad_scale
        b_v = tl.load(v + o_e, mask=m_e, other=other) if ADAM else b_g
        b_m = b_g
        if HAS_M:  # noqa: SIM102
            if averaged:  # the gradient's own direction reads no average
                b_m = tl.load(m + o_e, mask=m_e, other=other)
        b_d = direction_of(b_g, b_m, b_v, b_w, constants, averaged, ADAM=ADAM, HAS_M=HAS_M)
        b_w = moved_of(b_w, b_d, eta)
    tl.store(p + o_e, b_w.to(p.dtype.element_ty), mask=m_e)


@triton.jit(do_not_specialize=["first_program"])
def trial_kernel(
    p_base,
    g_base,
    m,
    v,
    w,
    chunks,
    programs,
    places,
    layout,
    constants,
    grad_scale,
    state,
    first_program,
    ADAM: tl.constexpr,
    HAS_M: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program of a unit, counted from ``first_program``."""
    first, last, _, i_u = program_of(programs, tl.program_id(0) + first_program)
    row = state + i_u * N_STATE
    move = tl.load(row + MOVE)
    if move != tl.load(row + AT):
        scale = tl.load(grad_scale)
        averaged = tl.load(row + AVERAGED) != 0
        for i_c in range(first, last):
            i_p, _, start = chunk_of(chunks, i_c, BLOCK=BLOCK)
            length = length_of(places, layout, i_p, start, BLOCK=BLOCK)
            o_p, o_g, o_f = offsets_of(places, layout, i_p, start, ALIGNED=ALIGNED)
            for masked in tl.static_range(2):
                if (length == BLOCK) != masked:
                    _trial_chunk(
                        p=p_base + o_p,
                        g=g_base + o_g,
                        m=m + o_f,
                        v=v + o_f,
                        w=w + o_f,
                        constants=constants + i_p * N_CONSTANTS,
                        grad_scale=scale,
                        eta=move.to(tl.float32),
                        averaged=averaged,
                        length=length,
                        ADAM=ADAM,
                        HAS_M=HAS_M,
                        MASKED=masked,
                        BLOCK=BLOCK,
                    )


def trial(table: Table, arena: Arena, unit: int | None = None, parts: Sequence[Chunks] | None = None) -> None:
    """Put every parameter of the unit (None: of all) with a gradient at the step in ``state``'s column ``move``.

    ``parts``: the chunks of these dtypes alone.
    """
    for chunks in table.by_dtypes.values() if parts is None else parts:
        if programs := chunks.of_unit(unit):
            trial_kernel[(len(programs),)](
                p_base=chunks.param,
                g_base=chunks.gradient,
                m=arena.m,
                v=arena.v,
                w=arena.w,
                chunks=chunks.rows,
                programs=chunks.programs,
                places=table.places,
                layout=table.layout,
                constants=arena.constants,
                grad_scale=arena.grad_scale,
                state=arena.state,
                first_program=programs.start,
                ADAM=arena.adam,
                HAS_M=arena.has_m,
                ALIGNED=chunks.aligned,
                BLOCK=BLOCK,
                **BY_CHUNK,
            )
