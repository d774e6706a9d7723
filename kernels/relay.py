"""The move of all units by their remembered steps, as :mod:`fastals.relay`: scalar programs before and after its pass.

:func:`recall` sets the steps as far as they are known, :func:`fastals.kernels.moments.survey` moves all units by them
and measures them in one pass, and :func:`aim` sets the steps by what was measured. Where the two differ, the first
trial moves the unit again: one that is bounded, does not descend or had no scale yet.

``UP`` is the number of rows of ``state``, units + 1, rounded up to a power of two. Lanes beyond the last unit read its
row and write nothing.
"""

import triton
import triton.language as tl

from fastals.kernels.arena import Arena
from fastals.kernels.armijo import aim as aim_of
from fastals.kernels.armijo import larger_rms, largest_and_scale, reference_and_slope, size_of_weights, unit_rms
from fastals.kernels.columns import (
    AT,
    AVERAGED,
    BATCH_LOSS,
    DIRECTION_RMS,
    ETA,
    FINAL_LOSS,
    FLAG_REFUSED,
    HIDDEN,
    LOSS,
    MEMORY_DIRECTION_RMS,
    MEMORY_FACTOR,
    MEMORY_RELATIVE_STEP,
    MEMORY_WEIGHT_RMS,
    MOVE,
    N_MEMORY,
    N_RULES,
    N_STATE,
    N_SUMS,
    OUTCOME,
    OUTCOME_ACCEPTED,
    OUTCOME_EXHAUSTED,
    OUTCOME_NOT_DESCENT,
    OUTCOME_RUNNING,
    REFERENCE,
    RELATIVE_STEP,
    REQUIRED_SLOPE,
    RULE_BACKTRACK,
    RULE_FLOOR,
    RULE_LR,
    SCALE,
    SLOPE,
    START,
    SUM_ELEMENTS,
    WEIGHT_RMS,
)
from fastals.kernels.table import SCALAR


@triton.jit
def _searched_step(b_row, b_rules, b_remembered, b_scale):
    """The relative step after a search of the unit in this step, as :func:`fastals.relay.searched_step`."""
    b_outcome, b_found = tl.load(b_row + OUTCOME), tl.load(b_row + ETA) / tl.where(b_scale > 0, b_scale, 1.0)
    b_mean = tl.where(b_remembered > 0, tl.sqrt(b_remembered * b_found), b_found)
    b_shrunk = tl.load(b_rules + RULE_BACKTRACK) * b_remembered
    b_learned = (b_outcome == OUTCOME_ACCEPTED) & (b_scale > 0)
    return tl.where(b_learned, b_mean, tl.where(b_outcome == OUTCOME_EXHAUSTED, b_shrunk, b_remembered))


@triton.jit(do_not_specialize=["unit", "units"])
def recall_kernel(
    state, memory, rules, lead, flags, unit, units, TESTED: tl.constexpr, USUAL: tl.constexpr, UP: tl.constexpr
):
    """Ask for the move of every unit by lr r scale and the common factor that the unit remembers."""
    o_u = tl.arange(0, UP)
    m_u = o_u < units
    o_c = tl.minimum(o_u, units - 1)
    b_row, b_memory = state + o_c * N_STATE, memory + o_c * N_MEMORY
    b_rules = rules + tl.load(lead + o_c) * N_RULES
    b_outcome, b_length = tl.load(b_row + OUTCOME), tl.load(b_memory + MEMORY_DIRECTION_RMS)
    b_scale = tl.zeros([UP], tl.float64)  # as fastals.relay.last_scale
    if USUAL:
        b_divisor = tl.where(b_length > 0, tl.maximum(b_length, USUAL), float("inf"))
        b_scale = tl.load(b_memory + MEMORY_WEIGHT_RMS) / b_divisor
    b_searched = (b_outcome == OUTCOME_ACCEPTED) | (b_outcome == OUTCOME_EXHAUSTED)
    b_scale = tl.where(b_searched, tl.load(b_row + SCALE), b_scale)
    b_relative = _searched_step(b_row, b_rules, tl.load(b_memory + MEMORY_RELATIVE_STEP), b_scale)
    factor = tl.load(memory + unit * N_MEMORY + MEMORY_FACTOR)
    b_move = tl.where(factor > 0, factor, 1.0) * (tl.load(b_rules + RULE_LR) * (b_relative * b_scale))
    b_move = tl.where(tl.load(flags + FLAG_REFUSED) != 0, 0.0, b_move)
    tl.debug_barrier()  # every lane has read its row
    tl.store(b_row + MOVE, b_move, mask=m_u)
    tl.store(b_row + AT, tl.zeros([UP], tl.float64), mask=m_u)
    tl.store(b_row + AVERAGED, tl.zeros([UP], tl.float64) + (1.0 if TESTED else 0.0), mask=m_u)
    tl.store(b_row + SCALE, b_scale, mask=m_u)
    tl.store(b_row + RELATIVE_STEP, b_relative, mask=m_u)


@triton.jit(do_not_specialize=["units"])
def aim_kernel(
    state,
    memory,
    rules,
    lead,
    rounding,
    sums,
    flags,
    units,
    TESTED: tl.constexpr,
    USUAL: tl.constexpr,
    UP: tl.constexpr,
):
    """Set the step of every unit that has a gradient by its relative step and what the pass has measured."""
    o_u = tl.arange(0, UP)
    o_c = tl.minimum(o_u, units - 1)
    m_u = o_u < units
    b_present = tl.load(sums + o_c * N_SUMS + SUM_ELEMENTS) > 0
    b_row, b_memory = state + o_c * N_STATE, memory + o_c * N_MEMORY
    b_rules = rules + tl.load(lead + o_c) * N_RULES
    loss = tl.load(state + units * N_STATE + BATCH_LOSS)
    b_averaged, b_slope, b_length = aim_of(sums, flags, o_c, TESTED=TESTED)
    b_rms = size_of_weights(larger_rms(sums, o_c, units, UP=UP))
    b_largest, b_now = largest_and_scale(b_rules, b_rms, b_length, USUAL=USUAL)
    b_lr, b_scale, b_relative = tl.load(b_rules + RULE_LR), tl.load(b_row + SCALE), tl.load(b_row + RELATIVE_STEP)
    b_eta = b_relative * tl.where(b_scale > 0, b_scale, b_now)
    b_eta = b_lr * tl.minimum(b_largest, tl.where(b_eta > 0, b_eta, b_largest * tl.load(b_rules + RULE_FLOOR)))
    b_descends = b_present & (b_slope > 0) & (b_slope < float("inf")) & (b_lr * b_largest > 0)
    b_eta = tl.where(b_descends, b_eta, 0.0)
    b_hidden = tl.load(rounding + o_c) * unit_rms(sums, o_c) / tl.where(b_length > 0, b_length, float("inf"))
    b_reference, b_required_slope = reference_and_slope(b_rules, b_memory, loss, b_slope)
    b_outcome = tl.where(b_descends, OUTCOME_RUNNING, tl.where(b_present, OUTCOME_NOT_DESCENT, OUTCOME_RUNNING))
    b_turned = tl.load(b_row + AVERAGED) != b_averaged.to(tl.float64)
    b_at, b_loss = tl.where(b_turned, float("nan"), tl.load(b_row + AT)), tl.zeros([UP], tl.float64) + loss
    tl.debug_barrier()  # every lane has read its row
    tl.store(b_row + AT, b_at, mask=m_u & b_present)
    tl.store(b_row + AVERAGED, b_averaged.to(tl.float64), mask=m_u)
    tl.store(b_row + ETA, b_eta, mask=m_u)
    tl.store(b_row + START, b_eta, mask=m_u)
    tl.store(b_row + OUTCOME, b_outcome.to(tl.float64), mask=m_u)
    tl.store(b_row + LOSS, b_loss, mask=m_u)
    tl.store(b_row + FINAL_LOSS, b_loss, mask=m_u)
    tl.store(b_row + REFERENCE, b_reference, mask=m_u)
    tl.store(b_row + REQUIRED_SLOPE, b_required_slope, mask=m_u)
    tl.store(b_row + SLOPE, tl.where(b_present, b_slope, 0.0), mask=m_u)
    tl.store(b_row + HIDDEN, b_hidden, mask=m_u)
    tl.store(b_row + DIRECTION_RMS, b_length, mask=m_u)
    tl.store(b_row + WEIGHT_RMS, b_rms, mask=m_u)
    tl.store(b_row + RELATIVE_STEP, tl.where(b_present, b_relative, -1.0), mask=m_u)


def recall(arena: Arena, unit: int, *, tested: bool) -> None:
    """Set the moves of all units as far as they are known, by the common factor that ``unit`` remembers."""
    recall_kernel[(1,)](
        state=arena.state,
        memory=arena.memory,
        rules=arena.rules,
        lead=arena.lead,
        flags=arena.flags,
        unit=unit,
        units=arena.units,
        TESTED=tested,
        USUAL=int(arena.adam),
        UP=arena.padded_rows,
        **SCALAR,
    )


def aim(arena: Arena, *, tested: bool) -> None:
    """Set the steps of all units by what the pass has measured."""
    aim_kernel[(1,)](
        state=arena.state,
        memory=arena.memory,
        rules=arena.rules,
        lead=arena.lead,
        rounding=arena.rounding,
        sums=arena.sums,
        flags=arena.flags,
        units=arena.units,
        TESTED=tested,
        USUAL=int(arena.adam),
        UP=arena.padded_rows,
        **SCALAR,
    )
