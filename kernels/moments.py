r"""Sums over all units at the start of a step (:func:`survey`), and the update of the moments (:func:`advance`).

:func:`survey` reads g, v (m if there is one) and p, snapshots p into w and sums up, over the chunks of every program,

    ⟨g, d⟩, ‖d‖², the entries with g ≠ 0, ‖w‖² and the elements, and ⟨g, d⟩ and ‖d‖² of the averaged direction if
    it is tested,

in float32, a row of partial sums per program. The rows of a unit are added up in float64, by many programs and then
by one, without atomics and in a fixed order: the same inputs give the same bits. A survey may move the parameters to
a step that is known beforehand, in the same pass. The masters of parameters below float32 are written only in chunks
that hold a parameter which someone else has written. :func:`advance` alone changes the moments, so that a step that
fails has nothing to undo in them. Bytes per parameter (Adam) in float32: survey 16, with the move 20, and 4 more with
the averaged direction; advance 12, and 20 with a first moment. In bfloat16: survey 12, with the move 14. Plain torch
versions: ``direction``, ``snapshot``, ``trial`` and ``advance`` of :mod:`fastals.kernels.plain`.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from fastals.kernels.arena import Arena
from fastals.kernels.chunk import chunk_of, direction_of, length_of, moved_of, offsets_of, program_of
from fastals.kernels.columns import (
    AT,
    AVERAGED,
    CONSTANT_BETA1,
    CONSTANT_BETA2,
    CONSTANT_CORRECTION1,
    CONSTANT_CORRECTION2,
    CONSTANT_DECAY,
    CONSTANT_EPS,
    CONSTANT_NEW1,
    CONSTANT_NEW2,
    HELD,
    LAYOUT_RULES,
    MOVE,
    N_CONSTANTS,
    N_LAYOUT,
    N_RULES,
    N_SPANS,
    N_SPLIT,
    N_STATE,
    N_SUMS,
    RULE_BETA1,
    RULE_BETA2,
    RULE_EPS,
    RULE_WEIGHT_DECAY,
    SLOPE,
    SPAN_FIRST,
    SPAN_LAST,
    SUM_AVERAGED_SLOPE,
    SUM_DIRECTION,
    SUM_ELEMENTS,
)
from fastals.kernels.table import BLOCK, BY_CHUNK, LAUNCH, REGISTERS, WARPS, Chunks, Table, launched
from fastals.kernels.trial import trial

ROWS = 1024  # of partial sums that a program adds up at a time
PIECE = BLOCK // 4  # elements that a survey takes at a time of a chunk that is not whole: few registers
SURVEY = BY_CHUNK | {"maxnreg": REGISTERS}  # left alone, the compiler takes up to 110
PARAMETERS = 128  # parameters that one program of constants_kernel handles


@triton.jit
def _power(b_beta, b_t):
    """βᵗ in float64."""
    return tl.where(b_beta > 0, tl.exp(b_t * tl.log(tl.maximum(b_beta, 1e-300))), 0.0)


@triton.jit(do_not_specialize=["n"])
def constants_kernel(layout, counts, rules, out, n, BLOCK: tl.constexpr):
    """1/(1−β₁ᵗ) and 1/√(1−β₂ᵗ), with t the count of the update to come, and the rest of :data:`CONSTANTS`."""
    o_p = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m_p = o_p < n
    rules += tl.load(layout + o_p * N_LAYOUT + LAYOUT_RULES, mask=m_p, other=0) * N_RULES
    b_beta1 = tl.load(rules + RULE_BETA1, mask=m_p, other=0.5)
    b_beta2 = tl.load(rules + RULE_BETA2, mask=m_p, other=0.5)
    b_t = tl.load(counts + o_p, mask=m_p, other=0.0).to(tl.float64) + 1
    b_power1, b_power2 = _power(b_beta1, b_t), _power(b_beta2, b_t)
    out += o_p * N_CONSTANTS
    tl.store(out + CONSTANT_BETA1, b_beta1.to(tl.float32), mask=m_p)
    tl.store(out + CONSTANT_NEW1, (1 - b_beta1).to(tl.float32), mask=m_p)
    tl.store(out + CONSTANT_BETA2, b_beta2.to(tl.float32), mask=m_p)
    tl.store(out + CONSTANT_NEW2, (1 - b_beta2).to(tl.float32), mask=m_p)
    tl.store(out + CONSTANT_CORRECTION1, (1 / (1 - b_power1)).to(tl.float32), mask=m_p)
    tl.store(out + CONSTANT_CORRECTION2, (1 / tl.sqrt(1 - b_power2)).to(tl.float32), mask=m_p)
    tl.store(out + CONSTANT_EPS, tl.load(rules + RULE_EPS, mask=m_p, other=0.0).to(tl.float32), mask=m_p)
    tl.store(out + CONSTANT_DECAY, tl.load(rules + RULE_WEIGHT_DECAY, mask=m_p, other=0.0).to(tl.float32), mask=m_p)


@triton.jit
def _master_of(b_p, b_w):
    """The float32 masters of parameters below float32, and 1 where a parameter was written since: it is its own."""
    b_new = b_w.to(b_p.dtype).to(tl.int16, bitcast=True) != b_p.to(tl.int16, bitcast=True)
    return tl.where(b_new, b_p.to(tl.float32), b_w), b_new.to(tl.int32)


@triton.jit
def _by_thread(b_x, THREADS: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """Sums of what each thread holds, ``WIDE`` neighbours or several times as many."""
    b_x = tl.sum(tl.reshape(b_x, [BLOCK // WIDE, WIDE]), axis=1)
    return tl.sum(tl.reshape(b_x, [BLOCK // WIDE // THREADS, THREADS]), axis=0)


@triton.jit
def _survey_chunk(
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
    LOW: tl.constexpr,
    MOVE_TOO: tl.constexpr,
    MASKED: tl.constexpr,
    THREADS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Snapshot and move a chunk; the sums of each thread."""
    narrow: tl.constexpr = min(p.dtype.element_ty.primitive_bitwidth, g.dtype.element_ty.primitive_bitwidth)
    wide: tl.constexpr = min(128 // narrow, BLOCK // THREADS)
    o_e = tl.arange(0, BLOCK)
    m_e = (o_e < length) if MASKED else None
    other = 0.0 if MASKED else None
    b_g = tl.load(g + o_e, mask=m_e, other=other).to(tl.float32)
    b_p = tl.load(p + o_e, mask=m_e, other=other)
    b_v = tl.load(v + o_e, mask=m_e, other=other) if ADAM else b_g
    b_m = tl.load(m + o_e, mask=m_e, other=other) if HAS_M else b_g
    if LOW:
        b_w, b_new = _master_of(b_p, tl.load(w + o_e, mask=m_e, other=other))
        if tl.max(b_new) != 0:  # else the masters are what they were
            tl.store(w + o_e, b_w, mask=m_e)
    else:
        b_w = b_p
        tl.store(w + o_e, b_w, mask=m_e)
    b_moving = _by_thread((b_g != 0).to(tl.float32), THREADS=THREADS, BLOCK=BLOCK, WIDE=wide)
    b_weights = _by_thread(b_w * b_w, THREADS=THREADS, BLOCK=BLOCK, WIDE=wide)
    b_scaled = b_g * grad_scale
    b_d = direction_of(b_scaled, b_m, b_v, b_w, constants, averaged=False, ADAM=ADAM, HAS_M=HAS_M)
    b_step = b_d
    if HAS_M:
        b_mean = direction_of(b_scaled, b_m, b_v, b_w, constants, averaged=True, ADAM=ADAM, HAS_M=HAS_M)
        b_step = tl.where(averaged, b_mean, b_d)
    if MOVE_TOO:
        m_p = tl.zeros([BLOCK], tl.float32) + eta != 0  # a mask, as a branch would take more registers
        b_moved = moved_of(b_w, b_step, eta).to(p.dtype.element_ty)
        tl.store(p + o_e, b_moved, mask=(m_p & m_e) if MASKED else m_p)
    if MASKED:
        b_d = tl.where(m_e, b_d, 0.0)
    b_slope = _by_thread(b_g * b_d, THREADS=THREADS, BLOCK=BLOCK, WIDE=wide)
    b_direction = _by_thread(b_d * b_d, THREADS=THREADS, BLOCK=BLOCK, WIDE=wide)
    if HAS_M:
        if MASKED:
            b_mean = tl.where(m_e, b_mean, 0.0)
        b_mean_slope = _by_thread(b_g * b_mean, THREADS=THREADS, BLOCK=BLOCK, WIDE=wide)
        b_mean_direction = _by_thread(b_mean * b_mean, THREADS=THREADS, BLOCK=BLOCK, WIDE=wide)
        b_zero = tl.zeros_like(b_slope)
        b_even = tl.join(tl.join(b_slope, b_zero), tl.join(b_moving, b_mean_direction))
        b_sums = tl.join(b_even, tl.join(tl.join(b_direction, b_mean_slope), tl.join(b_weights, b_zero)))
    else:
        b_sums = tl.join(tl.join(b_slope, b_moving), tl.join(b_direction, b_weights))
    return b_sums


@triton.jit(do_not_specialize=["n_rows", "first_program"])
def survey_kernel(
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
    partials,
    n_rows,
    first_program,
    ADAM: tl.constexpr,
    HAS_M: tl.constexpr,
    LOW: tl.constexpr,
    MOVE_TOO: tl.constexpr,
    ALIGNED: tl.constexpr,
    THREADS: tl.constexpr,
    PIECE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Snapshots of the weights and a row of partial sums, and with MOVE_TOO the move to the step in ``state``."""
    first, last, i_row, i_u = program_of(programs, tl.program_id(0) + first_program)
    row = state + i_u * N_STATE
    scale = tl.load(grad_scale)
    move, eta, averaged = 0.0, 0.0, False
    if MOVE_TOO:
        move = tl.load(row + MOVE)
        eta = move.to(tl.float32)
        averaged = tl.load(row + AVERAGED) != 0
    elements = 0
    fewer: tl.constexpr = 2 if MOVE_TOO and not ALIGNED else 1
    parts: tl.constexpr = fewer * ((2 if ALIGNED or not LOW else 4) if HAS_M and (ADAM or LOW) else 1)
    whole: tl.constexpr = BLOCK // parts  # what fits into the registers at a time
    b_sums = tl.zeros([THREADS, 2, 2, 2] if HAS_M else [THREADS, 2, 2], tl.float32)
    for i_c in range(first, last):
        i_p, _, start = chunk_of(chunks, i_c, BLOCK=BLOCK)
        length = length_of(places, layout, i_p, start, BLOCK=BLOCK)
        elements += length
        o_p, o_g, o_f = offsets_of(places, layout, i_p, start, ALIGNED=ALIGNED)
        for masked in tl.static_range(2):
            if (length == BLOCK) != masked:
                for o_s in range(0, length if masked else BLOCK, PIECE if masked else whole):
                    b_sums += _survey_chunk(
                        p=p_base + o_p + o_s,
                        g=g_base + o_g + o_s,
                        m=m + o_f + o_s,
                        v=v + o_f + o_s,
                        w=w + o_f + o_s,
                        constants=constants + i_p * N_CONSTANTS,
                        grad_scale=scale,
                        eta=eta,
                        averaged=averaged,
                        length=length - o_s,
                        ADAM=ADAM,
                        HAS_M=HAS_M,
                        LOW=LOW,
                        MOVE_TOO=MOVE_TOO,
                        MASKED=masked,
                        THREADS=THREADS,
                        BLOCK=PIECE if masked else whole,
                    )
    _store_sums(partials + i_row, b_sums, elements, n_rows, HAS_M=HAS_M, THREADS=THREADS)
    if elements > 0:
        tl.store(row + HELD, 1.0)
        if MOVE_TOO:
            tl.store(row + AT, move)


@triton.jit
def _store_sums(out, b_sums, elements, n_rows, HAS_M: tl.constexpr, THREADS: tl.constexpr):
    """Add up the threads, and write the row; without a first moment the averaged direction is the plain one."""
    columns: tl.constexpr = 8 if HAS_M else 4
    o_k = tl.arange(0, columns)
    b_total = tl.sum(tl.reshape(b_sums, [THREADS, columns]), axis=0)
    tl.store(out + o_k * n_rows, b_total, mask=(o_k != SUM_ELEMENTS) & (o_k < N_SUMS))
    tl.store(out + SUM_ELEMENTS * n_rows, elements.to(tl.float32))
    if not HAS_M:
        tl.store(out + (o_k + SUM_AVERAGED_SLOPE) * n_rows, b_total, mask=o_k <= SUM_DIRECTION)


@triton.jit(do_not_specialize=["n_rows", "first_unit"])
def reduce_kernel(partials, spans, parts, n_rows, first_unit, COLUMNS: tl.constexpr, ROWS: tl.constexpr):
    """Every :data:`SPLIT`-th block of a unit's rows of partial sums, added in a fixed order in float64.

    The parts of programs that no unit has rows for stay 0.
    """
    i_u, i_s = tl.program_id(0) + first_unit, tl.program_id(1)
    first = tl.load(spans + i_u * N_SPANS + SPAN_FIRST)
    last = tl.load(spans + i_u * N_SPANS + SPAN_LAST)
    o_k = tl.arange(0, COLUMNS)
    b_total = tl.zeros([COLUMNS, ROWS], tl.float64)
    for start in range(first + i_s * ROWS, last, N_SPLIT * ROWS):
        o_r = start + tl.arange(0, ROWS)
        m_kr = (o_k < N_SUMS)[:, None] & (o_r < last)[None, :]
        b_total += tl.load(partials + o_k[:, None] * n_rows + o_r[None, :], mask=m_kr, other=0.0).to(tl.float64)
    tl.store(parts + (i_u * N_SPLIT + i_s) * N_SUMS + o_k, tl.sum(b_total, axis=1), mask=o_k < N_SUMS)


@triton.jit(do_not_specialize=["first_unit"])
def add_parts_kernel(parts, sums, first_unit, COLUMNS: tl.constexpr):
    """One program a unit: the sum of its parts."""
    i_u = tl.program_id(0) + first_unit
    o_k, o_s = tl.arange(0, COLUMNS), tl.arange(0, N_SPLIT)
    m_ks = (o_k < N_SUMS)[:, None] & (o_s < N_SPLIT)[None, :]
    b_part = tl.load(parts + (i_u * N_SPLIT + o_s[None, :]) * N_SUMS + o_k[:, None], mask=m_ks, other=0.0)
    tl.store(sums + i_u * N_SUMS + o_k, tl.sum(b_part, axis=1), mask=o_k < N_SUMS)


@triton.jit
def _advance_chunk(
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
    LOW: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    o_e = tl.arange(0, BLOCK)
    m_e = (o_e < length) if MASKED else None
    other = 0.0 if MASKED else None
    b_g = tl.load(g + o_e, mask=m_e, other=other).to(tl.float32) * grad_scale
    b_v = tl.load(v + o_e, mask=m_e, other=other) if ADAM else b_g
    b_m = tl.load(m + o_e, mask=m_e, other=other) if HAS_M else b_g
    if LOW:  # the parameters have moved already; their masters follow
        b_w = tl.load(w + o_e, mask=m_e, other=other)
        b_d = direction_of(b_g, b_m, b_v, b_w, constants, averaged, ADAM=ADAM, HAS_M=HAS_M)
        tl.store(w + o_e, tl.where(eta == 0, b_w, moved_of(b_w, b_d, eta)), mask=m_e)
    if ADAM:
        b_v = tl.load(constants + CONSTANT_BETA2) * b_v + tl.load(constants + CONSTANT_NEW2) * b_g * b_g
        tl.store(v + o_e, b_v, mask=m_e)
    if HAS_M:
        new1 = tl.load(constants + CONSTANT_NEW1) if ADAM else 1.0
        tl.store(m + o_e, tl.load(constants + CONSTANT_BETA1) * b_m + new1 * b_g, mask=m_e)


@triton.jit
def advance_kernel(
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
    counts,
    ADAM: tl.constexpr,
    HAS_M: tl.constexpr,
    LOW: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Take the gradient into the moments and the step into the masters, unless the unit's slope is not finite."""
    first, last, _, i_u = program_of(programs, tl.program_id(0))
    row = state + i_u * N_STATE
    if tl.abs(tl.load(row + SLOPE)) < float("inf"):
        scale = tl.load(grad_scale)
        eta = tl.load(row + MOVE).to(tl.float32)
        averaged = tl.load(row + AVERAGED) != 0
        for i_c in range(first, last):
            i_p, i_b, start = chunk_of(chunks, i_c, BLOCK=BLOCK)
            length = length_of(places, layout, i_p, start, BLOCK=BLOCK)
            _o_p, o_g, o_f = offsets_of(places, layout, i_p, start, ALIGNED=ALIGNED)
            for masked in tl.static_range(1, -1, -1):  # this order takes fewer registers on sm_100
                if (length == BLOCK) != masked:
                    _advance_chunk(
                        g=g_base + o_g,
                        m=m + o_f,
                        v=v + o_f,
                        w=w + o_f,
                        constants=constants + i_p * N_CONSTANTS,
                        grad_scale=scale,
                        eta=eta,
                        averaged=averaged,
                        length=length,
                        ADAM=ADAM,
                        HAS_M=HAS_M,
                        LOW=LOW,
                        MASKED=masked,
                        BLOCK=BLOCK,
                    )
            if (i_b == 0) & (length > 0):
                tl.store(counts + i_p, tl.load(counts + i_p) + 1)


def survey(table: Table, arena: Arena, *, averaged: bool = True, unit: int | None = None, move: bool = False) -> None:
    """Snapshot the weights and sum up the slopes of the unit (None: of all), and note that its snapshot is held.

    3 launches and one per pair of dtypes. A unit without a gradient sums up to zeros.

    Args:
        table: what there is to survey.
        arena: what is read and written.
        averaged: along the averaged direction as well, if there is a first moment.
        unit: row of the unit; the sums, snapshots and parameters of all others stay as they are.
        move: in the same pass put the parameters at the step in ``state``'s column ``move``, as
            :func:`fastals.kernels.trial.trial` does. Without ``averaged`` it goes along the plain direction.

    If the launch for a pair of dtypes fails, the tensors of those before are put back, and nothing is held.
    """
    _prepare_constants(table, arena)
    surveyed: list[Chunks] = []
    try:
        for chunks in table.by_dtypes.values():
            _survey_chunks(table, arena, chunks, averaged=averaged, unit=unit, move=move)
            surveyed.append(chunks)
    except BaseException:
        _let_go(table, arena, unit, surveyed)
        raise
    _add_up(table, arena, unit)


def _let_go(table: Table, arena: Arena, unit: int | None, surveyed: Sequence[Chunks]) -> None:
    """Put these tensors back, and note that no snapshot is held: those of other dtypes may be of an earlier step."""
    rows = arena.state[:-1] if unit is None else arena.state[unit]
    rows[..., MOVE.value], rows[..., AT.value] = 0.0, float("nan")
    trial(table, arena, unit, surveyed)
    rows[..., HELD.value] = rows[..., AT.value] = 0.0


def _survey_chunks(table: Table, arena: Arena, chunks: Chunks, *, averaged: bool, unit: int | None, move: bool) -> None:
    if programs := chunks.of_unit(unit):
        survey_kernel[(len(programs),)](
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
            partials=arena.partials,
            n_rows=table.n_chunks,
            first_program=programs.start,
            ADAM=arena.adam,
            HAS_M=arena.has_m and averaged,
            LOW=_is_low(chunks.param),
            MOVE_TOO=move,
            ALIGNED=chunks.aligned,
            THREADS=32 * WARPS,
            PIECE=PIECE,
            BLOCK=BLOCK,
            **SURVEY,
        )


def _prepare_constants(table: Table, arena: Arena) -> None:
    n = len(table.params)
    constants_kernel[(triton.cdiv(n, PARAMETERS),)](
        layout=table.layout,
        counts=arena.counts,
        rules=arena.rules,
        out=arena.constants,
        n=n,
        BLOCK=PARAMETERS,
        **LAUNCH,
    )


def _add_up(table: Table, arena: Arena, unit: int | None) -> None:
    columns = triton.next_power_of_2(N_SUMS.value)
    first, units = (0, arena.units) if unit is None else (unit, 1)
    programs = min(N_SPLIT.value, triton.cdiv(table.most_chunks, ROWS) or 1)
    reduce_kernel[units, programs](
        partials=arena.partials,
        spans=table.spans,
        parts=arena.parts,
        n_rows=table.n_chunks,
        first_unit=first,
        COLUMNS=columns,
        ROWS=ROWS,
        **BY_CHUNK,
    )
    add_parts_kernel[(units,)](parts=arena.parts, sums=arena.sums, first_unit=first, COLUMNS=columns, **LAUNCH)


def advance(table: Table, arena: Arena, *, compile_only: bool = False) -> None:
    """Take the mini-batch into the moments, counts and masters of every unit whose slope is finite."""
    for chunks in table.by_dtypes.values():
        launched(advance_kernel, len(chunks.programs), compile_only=compile_only)(
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
            counts=arena.counts,
            ADAM=arena.adam,
            HAS_M=arena.has_m,
            LOW=_is_low(chunks.param),
            ALIGNED=chunks.aligned,
            BLOCK=BLOCK,
            **BY_CHUNK,
        )


def _is_low(param: torch.Tensor) -> bool:
    """Whether parameters of this dtype have a float32 master."""
    return param.dtype != torch.float32
