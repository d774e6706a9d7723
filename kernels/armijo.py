r"""The Armijo test of one unit on the device: scalar programs in float64 over its row of the arena.

They compute the same as :class:`fastals.search.Search`, their plain version: a step η is accepted if and only if

    f(w − η d) ≤ R − c η s

and multiplied by the backtracking factor otherwise; the last rejection puts the unit back. If rounding hides a
decrease of c η s, f(w − η d) ≤ R is enough. A NaN loss is a rejection, and the programs count the trials, so every
loop on ``go`` ends. In a step whose f(w_t) is not finite (``refused``) nothing is tried and nothing is learned.
A program that asks for a move writes the column ``move``; the next :func:`fastals.kernels.trial.trial` makes it.

``UP`` is the number of rows of ``state``, units + 1, rounded up to a power of two.
"""

import triton
import triton.language as tl
from torch import Tensor

from fastals.kernels.arena import Arena
from fastals.kernels.columns import (
    AT,
    AVERAGED,
    BATCH_LOSS,
    BATCH_LOSS_BEFORE,
    BATCH_OUTCOME,
    ETA,
    FINAL_LOSS,
    FLAG_ACCEPTED,
    FLAG_GO,
    FLAG_REFUSED,
    GO,
    HIDDEN,
    INITIAL_POLYAK,
    INITIAL_RANDOM,
    INITIAL_RESET,
    LEAST_RMS,
    LOSS,
    MEMORY_AVERAGE,
    MEMORY_AVERAGE_WEIGHT,
    MEMORY_BACKTRACKS,
    MEMORY_MEAN_DECREASE,
    MEMORY_MEAN_SLOPE,
    MEMORY_RELATIVE_STEP,
    MEMORY_STEP_SIZE,
    MEMORY_WEIGHT_RMS,
    MOVE,
    N_FLAGS,
    N_MEMORY,
    N_RULES,
    N_STATE,
    N_SUMS,
    OUTCOME,
    OUTCOME_ACCEPTED,
    OUTCOME_EXHAUSTED,
    OUTCOME_KEPT,
    OUTCOME_NOT_DESCENT,
    OUTCOME_RUNNING,
    REFERENCE,
    REFERENCE_NONMONOTONE,
    REFERENCE_SMOOTHED,
    REQUIRED_SLOPE,
    RESOLUTION,
    RULE_BACKTRACK,
    RULE_C,
    RULE_ETA_INIT,
    RULE_ETA_MAX,
    RULE_ETA_MIN,
    RULE_FLOOR,
    RULE_GROWTH,
    RULE_INITIAL,
    RULE_LR,
    RULE_MAX_TRIALS,
    RULE_NONMONOTONE_WEIGHT,
    RULE_POLYAK_C,
    RULE_REFERENCE,
    RULE_SMOOTHING,
    RULE_TRUST,
    RULE_UNIFORM,
    SCALE,
    SLOPE,
    START,
    SUM_AVERAGED_DIRECTION,
    SUM_AVERAGED_SLOPE,
    SUM_DIRECTION,
    SUM_ELEMENTS,
    SUM_MOVING,
    SUM_SLOPE,
    SUM_WEIGHTS,
    TRIALS,
)
from fastals.kernels.table import SCALAR


@triton.jit
def unit_rms(sums, unit):
    """Root mean square of the unit's weights."""
    row = sums + unit * N_SUMS
    return tl.sqrt(tl.load(row + SUM_WEIGHTS) / tl.maximum(tl.load(row + SUM_ELEMENTS), 1.0))


@triton.jit
def larger_rms(sums, unit, units, UP: tl.constexpr):
    """The larger of the RMS of the weights of the unit and of the model; all units have been measured."""
    o_u = tl.arange(0, UP)
    m_u = o_u < units
    weights = tl.sum(tl.load(sums + o_u * N_SUMS + SUM_WEIGHTS, mask=m_u, other=0.0))
    elements = tl.sum(tl.load(sums + o_u * N_SUMS + SUM_ELEMENTS, mask=m_u, other=0.0))
    return tl.maximum(unit_rms(sums, unit), tl.sqrt(weights / tl.maximum(elements, 1.0)))


@triton.jit
def size_of_weights(rms):
    """What ``trust`` bounds a step by, as :func:`fastals.search.size_of_weights`, LEAST_RMS at least."""
    return tl.where(rms < LEAST_RMS, tl.full([], LEAST_RMS, tl.float64), rms)


@triton.jit
def largest_and_scale(rules, rms, length, USUAL: tl.constexpr):
    """Largest step if lr is 1: min(η_max, trust · scale), and the scale of :mod:`fastals.relay`, USUAL its ℓ."""
    trust = tl.load(rules + RULE_TRUST)
    limited = (trust < float("inf")) & (length > 0)
    divisor = tl.where(length > 0, tl.maximum(length, USUAL), float("inf"))
    limit = tl.where(limited, tl.where(limited, trust, 0.0) * rms / divisor, float("inf"))
    return tl.minimum(tl.load(rules + RULE_ETA_MAX), limit), rms / divisor


@triton.jit
def _initial_step(rules, memory, loss, slope, cap, remembered):
    """First step to try, as :func:`fastals.search.initial_step`; ``remembered`` is where a warm search starts."""
    initial = tl.load(rules + RULE_INITIAL)
    backtrack = tl.load(rules + RULE_BACKTRACK)
    eta_init = tl.load(rules + RULE_ETA_INIT)
    eta = tl.where(eta_init > 0, eta_init, cap)
    eta = tl.where(remembered > 0, tl.maximum(remembered, cap * tl.load(rules + RULE_FLOOR)), eta)
    polyak = tl.maximum(loss, 0.0) / (tl.load(rules + RULE_POLYAK_C) * slope)
    polyak *= tl.exp(tl.load(memory + MEMORY_BACKTRACKS) * tl.log(backtrack))
    eta = tl.where(initial == INITIAL_POLYAK, tl.where(polyak > 0, polyak, cap), eta)
    low = tl.minimum(tl.maximum(tl.load(rules + RULE_ETA_MIN), cap * 1e-4), cap)
    low = tl.where(low > 0, low, 1.0)
    drawn = low * tl.exp(tl.load(rules + RULE_UNIFORM) * tl.log(tl.where(cap > 0, cap, 1.0) / low))
    eta = tl.where(initial == INITIAL_RANDOM, drawn, eta)
    eta = tl.where(initial == INITIAL_RESET, cap, eta)
    return tl.minimum(cap, eta)


@triton.jit
def _zhang_hager(rules, memory, loss):
    """C ← (ξ Q C + f) / (ξ Q + 1)."""
    carried = tl.load(rules + RULE_NONMONOTONE_WEIGHT) * tl.load(memory + MEMORY_AVERAGE_WEIGHT)
    return (carried * tl.load(memory + MEMORY_AVERAGE) + loss) / (carried + 1)


@triton.jit
def reference_and_slope(rules, memory, loss, slope):
    """R and the slope of the test, as :func:`fastals.search.reference_and_slope`."""
    kind = tl.load(rules + RULE_REFERENCE)
    average = _zhang_hager(rules, memory, loss)
    smoothing = tl.load(rules + RULE_SMOOTHING)
    ratio = tl.where(kind == REFERENCE_SMOOTHED, smoothing / (1 - smoothing), 0.0)
    reference = tl.where(kind == REFERENCE_NONMONOTONE, tl.maximum(average, loss), loss)
    reference += ratio * tl.load(memory + MEMORY_MEAN_DECREASE)
    return reference, slope + ratio * tl.load(memory + MEMORY_MEAN_SLOPE)


@triton.jit
def aim(sums, flags, unit, TESTED: tl.constexpr):
    """Whether the direction is the averaged one, its slope (NaN if f(w_t) is not finite), and its RMS."""
    row = sums + unit * N_SUMS
    slope, square = tl.load(row + SUM_SLOPE), tl.load(row + SUM_DIRECTION)
    averaged = False
    if TESTED:
        averaged = tl.load(row + SUM_AVERAGED_SLOPE) > 0
        slope = tl.where(averaged, tl.load(row + SUM_AVERAGED_SLOPE), slope)
        square = tl.where(averaged, tl.load(row + SUM_AVERAGED_DIRECTION), square)
    slope = tl.where(tl.load(flags + FLAG_REFUSED) != 0, float("nan"), slope)
    return averaged, slope, tl.sqrt(square / tl.maximum(tl.load(row + SUM_MOVING), 1.0))


@triton.jit(do_not_specialize=["unit", "units", "alone"])
def open_kernel(
    state,
    memory,
    rules,
    lead,
    rounding,
    sums,
    flags,
    unit,
    units,
    alone,
    TESTED: tl.constexpr,
    KEEP: tl.constexpr,
    RELATIVE: tl.constexpr,
    USUAL: tl.constexpr,
    UP: tl.constexpr,
):
    """Start a search of the unit, or with KEEP put it at its remembered step.

    With RELATIVE the search is as if lr were 1, and a warm one starts by the relative step. If it is
    ``alone``, no other has been measured in this step, and it goes by the RMS of weights that it remembers or its own.

    Nothing happens if all units have been moved together already.
    """
    batch = state + units * N_STATE
    if tl.load(batch + BATCH_OUTCOME) != OUTCOME_ACCEPTED:
        row = state + unit * N_STATE
        rules += tl.load(lead + unit) * N_RULES
        memory += unit * N_MEMORY
        loss = tl.load(batch + BATCH_LOSS)
        averaged, slope, length = aim(sums, flags, unit, TESTED=TESTED)
        remembered_rms = tl.load(memory + MEMORY_WEIGHT_RMS)
        own_rms = tl.where(remembered_rms > 0, remembered_rms, unit_rms(sums, unit))
        rms = size_of_weights(tl.where(alone != 0, own_rms, larger_rms(sums, unit, units, UP=UP)))
        largest, scale = largest_and_scale(rules, rms, length, USUAL=USUAL)
        lr = tl.load(rules + RULE_LR)
        cap = largest if RELATIVE else largest * lr
        hidden = tl.load(rounding + unit) * unit_rms(sums, unit) / tl.where(length > 0, length, float("inf"))
        descends = (slope > 0) & (slope < float("inf")) & (cap > 0)
        if KEEP:
            eta = tl.where(descends, tl.minimum(cap, tl.load(memory + MEMORY_STEP_SIZE)), 0.0)
            outcome = tl.where(eta > 0, OUTCOME_KEPT, OUTCOME_NOT_DESCENT)
            tl.store(batch + BATCH_LOSS, tl.where(eta > 0, float("nan"), loss))
            go = False
        else:
            if RELATIVE:
                remembered = tl.load(memory + MEMORY_RELATIVE_STEP) * scale / tl.load(rules + RULE_BACKTRACK)
            else:
                remembered = tl.load(rules + RULE_GROWTH) * tl.load(memory + MEMORY_STEP_SIZE)
            first = _initial_step(rules, memory, loss, tl.where(descends, slope, 1.0), cap, remembered)
            eta = tl.where(descends, first, 0.0)
            outcome = tl.where(descends, OUTCOME_RUNNING, OUTCOME_NOT_DESCENT)
            go = descends
        reference, required_slope = reference_and_slope(rules, memory, loss, slope)
        tl.store(row + ETA, eta)
        tl.store(row + MOVE, eta)
        tl.store(row + AT, 0.0)
        tl.store(row + START, eta)
        tl.store(row + GO, tl.where(go, 1.0, 0.0))
        tl.store(row + TRIALS, 0.0)
        tl.store(row + OUTCOME, outcome.to(tl.float64))
        tl.store(row + LOSS, loss)
        tl.store(row + FINAL_LOSS, loss)
        tl.store(row + REFERENCE, reference)
        tl.store(row + REQUIRED_SLOPE, required_slope)
        tl.store(row + SLOPE, slope)
        tl.store(row + HIDDEN, hidden)
        tl.store(row + AVERAGED, tl.where(averaged, 1.0, 0.0))
        tl.store(row + SCALE, scale)
        tl.store(flags + unit * N_FLAGS + FLAG_GO, tl.where(go, 1, 0))
        tl.store(flags + unit * N_FLAGS + FLAG_ACCEPTED, 0)


@triton.jit
def visible(decrease, eta, hidden, resolution):
    """The decrease that the test requires: 0 if rounding hides it."""
    return tl.where((decrease < resolution) | (eta < hidden), 0.0, decrease)


@triton.jit(do_not_specialize=["loss", "unit", "units"])
def judge_kernel(state, rules, lead, flags, loss, unit, units):
    """Accept the step of the trial just made, or shrink it; after the last trial it is 0."""
    row = state + unit * N_STATE
    if tl.load(row + GO) != 0:
        rules += tl.load(lead + unit) * N_RULES
        f = tl.load(loss).to(tl.float64)
        eta, trials = tl.load(row + ETA), tl.load(row + TRIALS) + 1
        reference, slope = tl.load(row + REFERENCE), tl.load(row + REQUIRED_SLOPE)
        decrease = tl.load(rules + RULE_C) * eta * slope
        required = visible(decrease, eta, tl.load(row + HIDDEN), tl.load(row + RESOLUTION))
        accepted = (tl.abs(f) < float("inf")) & (f <= reference - required)
        smaller = eta * tl.load(rules + RULE_BACKTRACK)
        too_small = smaller < tl.load(rules + RULE_ETA_MIN)
        exhausted = (accepted == 0) & (too_small | (trials >= tl.load(rules + RULE_MAX_TRIALS)))
        going = (accepted == 0) & (exhausted == 0)
        eta_next = tl.where(accepted, eta, tl.where(exhausted, 0.0, smaller))
        tl.store(row + AT, eta)
        tl.store(row + ETA, eta_next)
        tl.store(row + MOVE, eta_next)
        tl.store(row + TRIALS, trials)
        tl.store(row + GO, tl.where(going, 1.0, 0.0))
        outcome = tl.where(accepted, OUTCOME_ACCEPTED, tl.where(exhausted, OUTCOME_EXHAUSTED, OUTCOME_RUNNING))
        tl.store(row + OUTCOME, outcome.to(tl.float64))
        tl.store(flags + unit * N_FLAGS + FLAG_GO, tl.where(going, 1, 0))
        tl.store(flags + unit * N_FLAGS + FLAG_ACCEPTED, tl.where(accepted, 1, 0))
        if accepted:
            tl.store(row + FINAL_LOSS, f)
            tl.store(state + units * N_STATE + BATCH_LOSS, f)


@triton.jit(do_not_specialize=["unit", "units"])
def put_back_kernel(state, unit, units):
    """Ask for the unit to be put back, whatever its search has found, and set the loss to f(w_t)."""
    batch = state + units * N_STATE
    tl.store(state + unit * N_STATE + MOVE, 0.0)
    tl.store(batch + BATCH_LOSS, tl.load(batch + BATCH_LOSS_BEFORE))


def open_search(
    arena: Arena, unit: int, *, tested: bool, keep: bool = False, relative: bool = False, alone: bool = False
) -> None:
    """Aim the unit and set its first step; with ``keep`` its remembered step, untested.

    ``relative`` starts a warm search by the unit's relative step; ``alone`` if no other unit has been measured.
    """
    open_kernel[(1,)](
        state=arena.state,
        memory=arena.memory,
        rules=arena.rules,
        lead=arena.lead,
        rounding=arena.rounding,
        sums=arena.sums,
        flags=arena.flags,
        unit=unit,
        units=arena.units,
        alone=int(alone),
        TESTED=tested,
        KEEP=keep,
        RELATIVE=relative,
        USUAL=int(arena.adam and relative),
        UP=arena.padded_rows,
        **SCALAR,
    )


def judge(arena: Arena, unit: int, loss: Tensor) -> None:
    """Accept or shrink the unit's step by the loss of its trial."""
    judge_kernel[(1,)](
        state=arena.state,
        rules=arena.rules,
        lead=arena.lead,
        flags=arena.flags,
        loss=loss,
        unit=unit,
        units=arena.units,
        **SCALAR,
    )


def put_back(arena: Arena, unit: int) -> None:
    """Ask for the unit to be put back to w_t; the result of its search stays in its row."""
    put_back_kernel[(1,)](state=arena.state, unit=unit, units=arena.units, **SCALAR)
