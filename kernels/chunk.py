"""Shared by the kernels that go through chunks: what a program takes, and the direction of its elements.

Prefixes in all kernels: ``i_`` index of a row, ``o_`` offsets, ``m_`` mask, ``b_`` values of a block.
"""

import triton
import triton.language as tl

from fastals.kernels.columns import (
    CHUNK_BLOCK,
    CHUNK_PARAM,
    CONSTANT_BETA1,
    CONSTANT_BETA2,
    CONSTANT_CORRECTION1,
    CONSTANT_CORRECTION2,
    CONSTANT_DECAY,
    CONSTANT_EPS,
    CONSTANT_NEW1,
    CONSTANT_NEW2,
    LAYOUT_FLAT,
    LAYOUT_SIZE,
    N_CHUNK,
    N_LAYOUT,
    N_PLACES,
    N_PROGRAM,
    PLACE_GRADIENT,
    PLACE_PARAM,
    PLACE_PRESENT,
    PROGRAM_FIRST,
    PROGRAM_LAST,
    PROGRAM_ROW,
    PROGRAM_UNIT,
)


@triton.jit
def program_of(programs, i_g):
    """First and last + 1 chunk of the program, its row of partial sums, and the row of its unit."""
    row = programs + i_g * N_PROGRAM
    first, last = tl.load(row + PROGRAM_FIRST), tl.load(row + PROGRAM_LAST)
    return first, last, tl.load(row + PROGRAM_ROW), tl.load(row + PROGRAM_UNIT)


@triton.jit
def chunk_of(chunks, i_c, BLOCK: tl.constexpr):
    """Parameter of the chunk, number and first element of the block within it."""
    row = chunks + i_c * N_CHUNK
    i_p, i_b = tl.load(row + CHUNK_PARAM), tl.load(row + CHUNK_BLOCK)
    return i_p, i_b, i_b.to(tl.int64) * BLOCK


@triton.jit
def length_of(places, layout, i_p, start, BLOCK: tl.constexpr):
    """Elements of the chunk that begins at ``start``; 0 without a gradient."""
    length = tl.minimum(tl.load(layout + i_p * N_LAYOUT + LAYOUT_SIZE) - start, BLOCK).to(tl.int32)
    return length * tl.load(places + i_p * N_PLACES + PLACE_PRESENT).to(tl.int32)


@triton.jit
def offsets_of(places, layout, i_p, start, ALIGNED: tl.constexpr):
    """Offsets of the element ``start`` in the parameter, the gradient and the flat buffers."""
    o_p = tl.load(places + i_p * N_PLACES + PLACE_PARAM) + start
    o_g = tl.load(places + i_p * N_PLACES + PLACE_GRADIENT) + start
    o_f = tl.multiple_of(tl.load(layout + i_p * N_LAYOUT + LAYOUT_FLAT) + start, 16)
    if ALIGNED:
        o_p = tl.multiple_of(o_p, 16)
        o_g = tl.multiple_of(o_g, 16)
    return o_p, o_g, o_f


@triton.jit
def direction_of(b_g, b_m, b_v, b_w, constants, averaged, ADAM: tl.constexpr, HAS_M: tl.constexpr):
    """The direction x / (√v̂ + ε) + λ w, or x + λ w for SGD; x is the average if ``averaged``, else the gradient.

    What is fused is said, not left to the compiler: every kernel gets the same bits.
    """
    b_x = b_g
    if ADAM:
        b_v = tl.fma(tl.load(constants + CONSTANT_BETA2), b_v, tl.load(constants + CONSTANT_NEW2) * b_g * b_g)
        b_root = tl.sqrt(b_v)
        b_scale = 1 / tl.fma(b_root, tl.load(constants + CONSTANT_CORRECTION2), tl.load(constants + CONSTANT_EPS))
        if HAS_M:
            b_m = tl.fma(tl.load(constants + CONSTANT_BETA1), b_m, tl.load(constants + CONSTANT_NEW1) * b_g)
            b_x = tl.where(averaged, b_m * tl.load(constants + CONSTANT_CORRECTION1), b_g)
        b_x = b_x * b_scale
    elif HAS_M:
        b_x = tl.where(averaged, tl.fma(tl.load(constants + CONSTANT_BETA1), b_m, b_g), b_g)
    decay = tl.load(constants + CONSTANT_DECAY)
    return tl.where(decay == 0, b_x, tl.fma(decay, b_w, b_x))


@triton.jit
def moved_of(b_w, b_d, eta):
    """The weights w − η d."""
    return tl.fma(-eta, b_d, b_w)
