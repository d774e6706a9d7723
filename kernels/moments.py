r"""Directions, slopes and moments of all units in one launch each.

:func:`survey` reads g, v (m if there is one) and p, snapshots p into w and sums up, over every chunk,

    ⟨g, d⟩, ‖d‖², the entries with g ≠ 0, ‖w‖² and the elements, and ⟨g, d⟩ and ‖d‖² of the averaged direction where
    it is tested,

in float32, a row of partial sums per chunk; the rows of each unit are added up in float64, by many programs and then
by one. No atomics, a fixed order: the same inputs give the same bits. The moments stay as they are until
:func:`advance`, so that a step that fails has nothing to undo in them. Bytes per parameter (float32, Adam):
survey 16, and 20 with the averaged direction; advance 12, and 20 with a first moment. Plain torch versions:
``direction``, ``snapshot`` and ``advance`` of :mod:`fastals.kernels.plain`.
"""

import torch
import triton
import triton.language as tl

from fastals.kernels.arena import Arena
from fastals.kernels.columns import AVERAGED, MOVE, N_CONSTANTS, N_RULES, N_SPLIT, N_STATE, N_SUMS, SLOPE
from fastals.kernels.table import BLOCK, BY_CHUNK, LAUNCH, Table


@triton.jit(do_not_specialize=["n"])
def constants_kernel(layout, counts, rules, out, n, BLOCK: tl.constexpr):
    """1/(1−β₁ᵗ) and 1/√(1−β₂ᵗ), with t the count of the update to come, and the rest of :data:`CONSTANTS`."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < n
    rule = rules + tl.load(layout + 4 * i + 3, mask=mask, other=0) * N_RULES
    beta1 = tl.load(rule, mask=mask, other=0.5)
    beta2 = tl.load(rule + 1, mask=mask, other=0.5)
    t = tl.load(counts + i, mask=mask, other=0.0).to(tl.float64) + 1
    power1 = tl.where(beta1 > 0, tl.exp(t * tl.log(tl.maximum(beta1, 1e-300))), 0.0)
    power2 = tl.where(beta2 > 0, tl.exp(t * tl.log(tl.maximum(beta2, 1e-300))), 0.0)
    row = out + i * N_CONSTANTS
    tl.store(row, beta1.to(tl.float32), mask=mask)
    tl.store(row + 1, (1 - beta1).to(tl.float32), mask=mask)
    tl.store(row + 2, beta2.to(tl.float32), mask=mask)
    tl.store(row + 3, (1 - beta2).to(tl.float32), mask=mask)
    tl.store(row + 4, (1 / (1 - power1)).to(tl.float32), mask=mask)
    tl.store(row + 5, (1 / tl.sqrt(1 - power2)).to(tl.float32), mask=mask)
    tl.store(row + 6, tl.load(rule + 2, mask=mask, other=0.0).to(tl.float32), mask=mask)
    tl.store(row + 7, tl.load(rule + 3, mask=mask, other=0.0).to(tl.float32), mask=mask)


@triton.jit
def direction_of(g, m, v, w, constants, averaged, ADAM: tl.constexpr, FIRST: tl.constexpr):
    """X / (√v̂ + ε) + λ w, or x + λ w for SGD; x is the average m̂ where ``averaged``, else the gradient."""
    x = g
    if ADAM:
        v = tl.load(constants + 2) * v + tl.load(constants + 3) * g * g
        scale = 1 / (tl.sqrt(v) * tl.load(constants + 5) + tl.load(constants + 6))
        if FIRST:
            mean = (tl.load(constants) * m + tl.load(constants + 1) * g) * tl.load(constants + 4)
            x = tl.where(averaged, mean, g)
        x = x * scale
    elif FIRST:
        x = tl.where(averaged, tl.load(constants) * m + g, g)
    decay = tl.load(constants + 7)
    return tl.where(decay == 0, x, x + decay * w)


@triton.jit
def master_of(p, w):
    """The master of a parameter below float32, or the parameter itself where someone else wrote it since."""
    same = w.to(p.dtype).to(tl.int16, bitcast=True) == p.to(tl.int16, bitcast=True)
    return tl.where(same, w, p.to(tl.float32))


@triton.jit
def _survey_chunk(
    p, g, m, v, w, constants, scale, partials, i_row, n_rows, length,
    ADAM: tl.constexpr, FIRST: tl.constexpr, LOW: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    o = tl.arange(0, BLOCK)
    mask = (o < length) if MASKED else None
    other = 0.0 if MASKED else None
    b_g = tl.load(g + o, mask=mask, other=other).to(tl.float32)
    b_p = tl.load(p + o, mask=mask, other=other)
    b_v = tl.load(v + o, mask=mask, other=other) if ADAM else b_g
    b_m = tl.load(m + o, mask=mask, other=other) if FIRST else b_g
    b_w = master_of(b_p, tl.load(w + o, mask=mask, other=other)) if LOW else b_p
    tl.store(w + o, b_w, mask=mask)
    scaled = b_g * scale
    d = direction_of(scaled, b_m, b_v, b_w, constants, False, ADAM, FIRST)
    if MASKED:
        d = tl.where(mask, d, 0.0)
    out = partials + i_row
    tl.store(out, tl.sum(b_g * d))
    tl.store(out + n_rows, tl.sum(d * d))
    tl.store(out + 2 * n_rows, tl.sum((b_g != 0).to(tl.float32)))
    tl.store(out + 3 * n_rows, tl.sum(b_w * b_w))
    tl.store(out + 4 * n_rows, length.to(tl.float32))
    if FIRST:
        d = direction_of(scaled, b_m, b_v, b_w, constants, True, ADAM, FIRST)
        if MASKED:
            d = tl.where(mask, d, 0.0)
    tl.store(out + 5 * n_rows, tl.sum(b_g * d))
    tl.store(out + 6 * n_rows, tl.sum(d * d))


@triton.jit(do_not_specialize=["n_rows"])
def survey_kernel(
    p_base, g_base, m, v, w, chunks, places, layout, constants, grad_scale, partials, n_rows,
    ADAM: tl.constexpr, FIRST: tl.constexpr, LOW: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One chunk: snapshot of the weights and a row of partial sums."""
    i_c = tl.program_id(0)
    i_p = tl.load(chunks + 3 * i_c)
    start = tl.load(chunks + 3 * i_c + 1).to(tl.int64) * BLOCK
    i_row = tl.load(chunks + 3 * i_c + 2)
    present = tl.load(places + 3 * i_p + 2)
    length = (tl.load(layout + 4 * i_p + 1) - start) * present
    o_p = tl.load(places + 3 * i_p) + start
    o_g = tl.load(places + 3 * i_p + 1) + start
    o_f = tl.multiple_of(tl.load(layout + 4 * i_p) + start, 16)
    if ALIGNED:
        o_p = tl.multiple_of(o_p, 16)
        o_g = tl.multiple_of(o_g, 16)
    scale = tl.load(grad_scale)
    constants += i_p * N_CONSTANTS
    if length >= BLOCK:
        _survey_chunk(
            p_base + o_p, g_base + o_g, m + o_f, v + o_f, w + o_f, constants, scale, partials, i_row, n_rows,
            tl.minimum(length, BLOCK), ADAM, FIRST, LOW, False, BLOCK,
        )  # fmt: skip
    else:
        _survey_chunk(
            p_base + o_p, g_base + o_g, m + o_f, v + o_f, w + o_f, constants, scale, partials, i_row, n_rows,
            length, ADAM, FIRST, LOW, True, BLOCK,
        )  # fmt: skip


@triton.jit(do_not_specialize=["n_rows"])
def reduce_kernel(partials, spans, parts, n_rows, SUMS: tl.constexpr, ROWS: tl.constexpr):
    """Every :data:`SPLIT`-th block of a unit's rows of partial sums, added in a fixed order in float64."""
    i_u, i_s = tl.program_id(0), tl.program_id(1)
    first = tl.load(spans + 2 * i_u)
    last = tl.load(spans + 2 * i_u + 1)
    k = tl.arange(0, SUMS)
    total = tl.zeros([SUMS, ROWS], tl.float64)
    for start in range(first + i_s * ROWS, last, N_SPLIT * ROWS):
        i = start + tl.arange(0, ROWS)
        mask = (k < N_SUMS)[:, None] & (i < last)[None, :]
        total += tl.load(partials + k[:, None] * n_rows + i[None, :], mask=mask, other=0.0).to(tl.float64)
    tl.store(parts + (i_u * N_SPLIT + i_s) * N_SUMS + k, tl.sum(total, axis=1), mask=k < N_SUMS)


@triton.jit
def add_parts_kernel(parts, sums, SUMS: tl.constexpr):
    """One program a unit: the sum of its parts."""
    i_u = tl.program_id(0)
    k, s = tl.arange(0, SUMS), tl.arange(0, N_SPLIT)
    mask = (k < N_SUMS)[:, None] & (s < N_SPLIT)[None, :]
    b_part = tl.load(parts + (i_u * N_SPLIT + s[None, :]) * N_SUMS + k[:, None], mask=mask, other=0.0)
    tl.store(sums + i_u * N_SUMS + k, tl.sum(b_part, axis=1), mask=k < N_SUMS)


@triton.jit
def _advance_chunk(
    eta, g, m, v, w, constants, scale, averaged, length,
    ADAM: tl.constexpr, FIRST: tl.constexpr, LOW: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    o = tl.arange(0, BLOCK)
    mask = (o < length) if MASKED else None
    other = 0.0 if MASKED else None
    b_g = tl.load(g + o, mask=mask, other=other).to(tl.float32) * scale
    b_v = tl.load(v + o, mask=mask, other=other) if ADAM else b_g
    b_m = tl.load(m + o, mask=mask, other=other) if FIRST else b_g
    if LOW:  # the parameters have moved already; their masters follow
        b_w = tl.load(w + o, mask=mask, other=other)
        d = direction_of(b_g, b_m, b_v, b_w, constants, averaged, ADAM, FIRST)
        tl.store(w + o, tl.where(eta == 0, b_w, b_w - eta * d), mask=mask)
    if ADAM:
        tl.store(v + o, tl.load(constants + 2) * b_v + tl.load(constants + 3) * b_g * b_g, mask=mask)
    if FIRST:
        new = tl.load(constants + 1) if ADAM else 1.0
        tl.store(m + o, tl.load(constants) * b_m + new * b_g, mask=mask)


@triton.jit
def advance_kernel(
    g_base, m, v, w, chunks, places, layout, constants, grad_scale, state, counts,
    ADAM: tl.constexpr, FIRST: tl.constexpr, LOW: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One chunk: take the gradient into the moments and the step into the masters, unless the slope is not finite."""
    i_c = tl.program_id(0)
    i_p = tl.load(chunks + 3 * i_c)
    i_b = tl.load(chunks + 3 * i_c + 1)
    start = i_b.to(tl.int64) * BLOCK
    row = state + tl.load(layout + 4 * i_p + 2) * N_STATE
    slope = tl.load(row + SLOPE)
    if (tl.load(places + 3 * i_p + 2) == 1) & (tl.abs(slope) < float("inf")):
        length = tl.load(layout + 4 * i_p + 1) - start
        o_g = tl.load(places + 3 * i_p + 1) + start
        o_f = tl.multiple_of(tl.load(layout + 4 * i_p) + start, 16)
        if ALIGNED:
            o_g = tl.multiple_of(o_g, 16)
        scale = tl.load(grad_scale)
        eta = tl.load(row + MOVE).to(tl.float32)
        averaged = tl.load(row + AVERAGED) != 0
        constants += i_p * N_CONSTANTS
        if length >= BLOCK:
            _advance_chunk(
                eta, g_base + o_g, m + o_f, v + o_f, w + o_f, constants, scale, averaged, length,
                ADAM, FIRST, LOW, False, BLOCK,
            )  # fmt: skip
        else:
            _advance_chunk(
                eta, g_base + o_g, m + o_f, v + o_f, w + o_f, constants, scale, averaged, length,
                ADAM, FIRST, LOW, True, BLOCK,
            )  # fmt: skip
        if i_b == 0:
            tl.store(counts + i_p, tl.load(counts + i_p) + 1)


def survey(table: Table, arena: Arena, *, averaged: bool = True) -> None:
    """Snapshot the weights and sum up the slopes of all units; 3 launches and one per kind.

    ``averaged``: along the averaged direction as well, if there is a first moment.
    """
    n = len(table.params)
    constants_kernel[(triton.cdiv(n, 128),)](
        table.layout, arena.counts, arena.rules, arena.constants, n, BLOCK=128, **LAUNCH
    )
    for kind in table.kinds.values():
        survey_kernel[(len(kind.chunks),)](
            kind.param, kind.gradient, arena.m, arena.v, arena.w, kind.chunks, table.places, table.layout,
            arena.constants, arena.grad_scale, arena.partials, table.chunks,
            ADAM=arena.adam, FIRST=arena.first and averaged, LOW=is_low(kind.param), ALIGNED=kind.aligned, BLOCK=BLOCK,
            **BY_CHUNK,
        )  # fmt: skip
    columns = triton.next_power_of_2(N_SUMS.value)
    reduce_kernel[arena.units, N_SPLIT.value](
        arena.partials, table.spans, arena.parts, table.chunks, SUMS=columns, ROWS=1024, **BY_CHUNK
    )
    add_parts_kernel[(arena.units,)](arena.parts, arena.sums, SUMS=columns, **LAUNCH)


def advance(table: Table, arena: Arena) -> None:
    """Take the mini-batch into the moments, counts and masters of every unit whose slope is finite."""
    for kind in table.kinds.values():
        advance_kernel[(len(kind.chunks),)](
            kind.gradient, arena.m, arena.v, arena.w, kind.chunks, table.places, table.layout,
            arena.constants, arena.grad_scale, arena.state, arena.counts,
            ADAM=arena.adam, FIRST=arena.first, LOW=is_low(kind.param), ALIGNED=kind.aligned, BLOCK=BLOCK, **BY_CHUNK,
        )  # fmt: skip


def is_low(param: torch.Tensor) -> bool:
    """Whether parameters like this one have a float32 master."""
    return param.dtype != torch.float32
