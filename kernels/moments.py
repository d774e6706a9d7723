r"""Sums over all units at the start of a step (:func:`survey`), and the update of the moments (:func:`advance`).

:func:`survey` reads g, v (m if there is one) and p, snapshots p into w and sums up, over every chunk,

    ⟨g, d⟩, ‖d‖², the entries with g ≠ 0, ‖w‖² and the elements, and ⟨g, d⟩ and ‖d‖² of the averaged direction if
    it is tested,

in float32, a row of partial sums per chunk. The rows of a unit are added up in float64, by many programs and then
by one, without atomics and in a fixed order: the same inputs give the same bits. :func:`advance` alone changes the
moments, so that a step that fails has nothing to undo in them. Bytes per parameter (float32, Adam):
survey 16, and 20 with the averaged direction; advance 12, and 20 with a first moment. Plain torch versions:
``direction``, ``snapshot`` and ``advance`` of :mod:`fastals.kernels.plain`.
"""

import torch
import triton
import triton.language as tl

from fastals.kernels.arena import Arena
from fastals.kernels.chunk import chunk_of, direction_of, length_of, offsets_of
from fastals.kernels.columns import (
    AVERAGED,
    CONSTANT_BETA1,
    CONSTANT_BETA2,
    CONSTANT_CORRECTION1,
    CONSTANT_CORRECTION2,
    CONSTANT_DECAY,
    CONSTANT_EPS,
    CONSTANT_NEW1,
    CONSTANT_NEW2,
    LAYOUT_RULES,
    LAYOUT_UNIT,
    MOVE,
    N_CONSTANTS,
    N_LAYOUT,
    N_PLACES,
    N_RULES,
    N_SPANS,
    N_SPLIT,
    N_STATE,
    N_SUMS,
    PLACE_PRESENT,
    RULE_BETA1,
    RULE_BETA2,
    RULE_EPS,
    RULE_WEIGHT_DECAY,
    SLOPE,
    SPAN_FIRST,
    SPAN_LAST,
    SUM_AVERAGED_DIRECTION,
    SUM_AVERAGED_SLOPE,
    SUM_DIRECTION,
    SUM_ELEMENTS,
    SUM_MOVING,
    SUM_SLOPE,
    SUM_WEIGHTS,
)
from fastals.kernels.table import BLOCK, BY_CHUNK, LAUNCH, Table

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
    """The float32 masters of parameters below float32; a parameter that was written since is its own master."""
    b_same = b_w.to(b_p.dtype).to(tl.int16, bitcast=True) == b_p.to(tl.int16, bitcast=True)
    return tl.where(b_same, b_w, b_p.to(tl.float32))


@triton.jit
def _survey_chunk(
    p,
    g,
    m,
    v,
    w,
    constants,
    grad_scale,
    partials,
    i_row,
    n_rows,
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
    b_g = tl.load(g + o_e, mask=m_e, other=other).to(tl.float32)
    b_p = tl.load(p + o_e, mask=m_e, other=other)
    b_v = tl.load(v + o_e, mask=m_e, other=other) if ADAM else b_g
    b_m = tl.load(m + o_e, mask=m_e, other=other) if HAS_M else b_g
    b_w = _master_of(b_p, tl.load(w + o_e, mask=m_e, other=other)) if LOW else b_p
    tl.store(w + o_e, b_w, mask=m_e)
    b_scaled = b_g * grad_scale
    b_d = direction_of(b_scaled, b_m, b_v, b_w, constants, averaged=False, ADAM=ADAM, HAS_M=HAS_M)
    if MASKED:
        b_d = tl.where(m_e, b_d, 0.0)
    out = partials + i_row
    tl.store(out + SUM_SLOPE * n_rows, tl.sum(b_g * b_d))
    tl.store(out + SUM_DIRECTION * n_rows, tl.sum(b_d * b_d))
    tl.store(out + SUM_MOVING * n_rows, tl.sum((b_g != 0).to(tl.float32)))
    tl.store(out + SUM_WEIGHTS * n_rows, tl.sum(b_w * b_w))
    tl.store(out + SUM_ELEMENTS * n_rows, length.to(tl.float32))
    if HAS_M:
        b_d = direction_of(b_scaled, b_m, b_v, b_w, constants, averaged=True, ADAM=ADAM, HAS_M=HAS_M)
        if MASKED:
            b_d = tl.where(m_e, b_d, 0.0)
    tl.store(out + SUM_AVERAGED_SLOPE * n_rows, tl.sum(b_g * b_d))
    tl.store(out + SUM_AVERAGED_DIRECTION * n_rows, tl.sum(b_d * b_d))


@triton.jit(do_not_specialize=["n_rows"])
def survey_kernel(
    p_base,
    g_base,
    m,
    v,
    w,
    chunks,
    places,
    layout,
    constants,
    grad_scale,
    partials,
    n_rows,
    ADAM: tl.constexpr,
    HAS_M: tl.constexpr,
    LOW: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One chunk: snapshot of the weights and a row of partial sums, zeros without a gradient."""
    i_p, _, start, i_row = chunk_of(chunks, tl.program_id(0), BLOCK=BLOCK)
    present = tl.load(places + i_p * N_PLACES + PLACE_PRESENT)
    length = length_of(layout, i_p, start) * present
    o_p, o_g, o_f = offsets_of(places, layout, i_p, start, ALIGNED=ALIGNED)
    scale = tl.load(grad_scale)
    constants += i_p * N_CONSTANTS
    for masked in tl.static_range(2):
        if (length >= BLOCK) != masked:
            _survey_chunk(
                p=p_base + o_p,
                g=g_base + o_g,
                m=m + o_f,
                v=v + o_f,
                w=w + o_f,
                constants=constants,
                grad_scale=scale,
                partials=partials,
                i_row=i_row,
                n_rows=n_rows,
                length=length if masked else tl.minimum(length, BLOCK),
                ADAM=ADAM,
                HAS_M=HAS_M,
                LOW=LOW,
                MASKED=masked,
                BLOCK=BLOCK,
            )


@triton.jit(do_not_specialize=["n_rows"])
def reduce_kernel(partials, spans, parts, n_rows, COLUMNS: tl.constexpr, ROWS: tl.constexpr):
    """Every :data:`SPLIT`-th block of a unit's rows of partial sums, added in a fixed order in float64."""
    i_u, i_s = tl.program_id(0), tl.program_id(1)
    first = tl.load(spans + i_u * N_SPANS + SPAN_FIRST)
    last = tl.load(spans + i_u * N_SPANS + SPAN_LAST)
    o_k = tl.arange(0, COLUMNS)
    b_total = tl.zeros([COLUMNS, ROWS], tl.float64)
    for start in range(first + i_s * ROWS, last, N_SPLIT * ROWS):
        o_r = start + tl.arange(0, ROWS)
        m_kr = (o_k < N_SUMS)[:, None] & (o_r < last)[None, :]
        b_total += tl.load(partials + o_k[:, None] * n_rows + o_r[None, :], mask=m_kr, other=0.0).to(tl.float64)
    tl.store(parts + (i_u * N_SPLIT + i_s) * N_SUMS + o_k, tl.sum(b_total, axis=1), mask=o_k < N_SUMS)


@triton.jit
def add_parts_kernel(parts, sums, COLUMNS: tl.constexpr):
    """One program a unit: the sum of its parts."""
    i_u = tl.program_id(0)
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
        tl.store(w + o_e, tl.where(eta == 0, b_w, b_w - eta * b_d), mask=m_e)
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
    """One chunk: take the gradient into the moments and the step into the masters, unless the slope is not finite."""
    i_p, i_b, start, _ = chunk_of(chunks, tl.program_id(0), BLOCK=BLOCK)
    row = state + tl.load(layout + i_p * N_LAYOUT + LAYOUT_UNIT) * N_STATE
    slope = tl.load(row + SLOPE)
    if (tl.load(places + i_p * N_PLACES + PLACE_PRESENT) == 1) & (tl.abs(slope) < float("inf")):
        length = length_of(layout, i_p, start)
        _o_p, o_g, o_f = offsets_of(places, layout, i_p, start, ALIGNED=ALIGNED)
        scale = tl.load(grad_scale)
        eta = tl.load(row + MOVE).to(tl.float32)
        averaged = tl.load(row + AVERAGED) != 0
        constants += i_p * N_CONSTANTS
        for masked in tl.static_range(1, -1, -1):  # this order takes fewer registers on sm_100
            if (length >= BLOCK) != masked:
                _advance_chunk(
                    g=g_base + o_g,
                    m=m + o_f,
                    v=v + o_f,
                    w=w + o_f,
                    constants=constants,
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
        if i_b == 0:
            tl.store(counts + i_p, tl.load(counts + i_p) + 1)


def survey(table: Table, arena: Arena, *, averaged: bool = True) -> None:
    """Snapshot the weights and sum up the slopes of all units; 3 launches and one per pair of dtypes.

    ``averaged``: along the averaged direction as well, if there is a first moment.
    """
    _prepare_constants(table, arena)
    for chunks in table.by_dtypes.values():
        survey_kernel[(len(chunks.rows),)](
            p_base=chunks.param,
            g_base=chunks.gradient,
            m=arena.m,
            v=arena.v,
            w=arena.w,
            chunks=chunks.rows,
            places=table.places,
            layout=table.layout,
            constants=arena.constants,
            grad_scale=arena.grad_scale,
            partials=arena.partials,
            n_rows=table.n_chunks,
            ADAM=arena.adam,
            HAS_M=arena.has_m and averaged,
            LOW=_is_low(chunks.param),
            ALIGNED=chunks.aligned,
            BLOCK=BLOCK,
            **BY_CHUNK,
        )
    _add_up(table, arena)


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


def _add_up(table: Table, arena: Arena) -> None:
    columns = triton.next_power_of_2(N_SUMS.value)
    reduce_kernel[arena.units, N_SPLIT.value](
        partials=arena.partials,
        spans=table.spans,
        parts=arena.parts,
        n_rows=table.n_chunks,
        COLUMNS=columns,
        ROWS=1024,
        **BY_CHUNK,
    )
    add_parts_kernel[(arena.units,)](parts=arena.parts, sums=arena.sums, COLUMNS=columns, **LAUNCH)


def advance(table: Table, arena: Arena) -> None:
    """Take the mini-batch into the moments, counts and masters of every unit whose slope is finite."""
    for chunks in table.by_dtypes.values():
        advance_kernel[(len(chunks.rows),)](
            g_base=chunks.gradient,
            m=arena.m,
            v=arena.v,
            w=arena.w,
            chunks=chunks.rows,
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
