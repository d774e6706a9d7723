r"""The Armijo test on the device: scalar programs in float64 over the rows of the arena; nothing visits the host.

They compute what :class:`fastals.search.Search`, their plain version, computes: a step η is accepted iff

    f(w − η d) ≤ R − c η s

and multiplied by the backtracking factor otherwise; the last rejection puts the unit back. Where rounding hides a
decrease of c η s, R is asked for alone. A NaN loss compares as a
rejection, and the bound on the trials is in the kernel, so every loop on ``go`` ends. In a step whose f(w_t) is not
finite (``refused``) nothing is tried and nothing is learned.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastals.kernels.arena import Arena
from fastals.kernels.columns import (
    ACCEPTED,
    AT,
    AVERAGE,
    AVERAGE_WEIGHT,
    AVERAGED,
    BACKTRACK,
    BACKTRACKS,
    ETA,
    ETA_INIT,
    ETA_MAX,
    ETA_MIN,
    EXHAUSTED,
    F_ACCEPTED,
    F_GO,
    F_OUTDATED,
    F_REFUSED,
    FINAL,
    FLOOR,
    GO,
    GROWTH,
    HIDDEN,
    INITIAL,
    KEPT,
    LOSS,
    LR,
    MAX_TRIALS,
    MEAN_DECREASE,
    MEAN_SLOPE,
    MOVE,
    N_FLAGS,
    N_MEMORY,
    N_RING,
    N_RULES,
    N_STATE,
    N_SUMS,
    NM_WEIGHT,
    NONMONOTONE,
    NOT_DESCENT,
    OUTCOME,
    POLYAK,
    POLYAK_C,
    RANDOM,
    REFERENCE,
    REQUIRED_SLOPE,
    RESET,
    RESOLUTION,
    RULE,
    RUNNING,
    S_AVG_DIRECTION,
    S_AVG_SLOPE,
    S_DIRECTION,
    S_ELEMENTS,
    S_MOVING,
    S_SLOPE,
    S_WEIGHTS,
    SLOPE,
    SMOOTHED,
    SMOOTHING,
    START,
    STEP_SIZE,
    TRIALS,
    TRUST,
    UNIFORM,
    C,
)
from fastals.kernels.table import SCALAR


@triton.jit(do_not_specialize=["loss", "units"])
def begin_kernel(state, flags, loss, units, eps, UP: tl.constexpr):
    """Empty every row; f(w_t) and the smallest change it can show go where they are needed."""
    f = tl.load(loss).to(tl.float64)
    refused = (tl.abs(f) < float("inf")) == 0
    o = tl.arange(0, UP)
    for column in tl.static_range(N_STATE):
        value = tl.zeros([UP], tl.float64)
        if column == RESOLUTION:
            value += eps * tl.abs(f) / 2
        if column == START or column == LOSS:  # noqa: SIM109
            value = tl.where(o == units, f, value)
        tl.store(state + o * N_STATE + column, value, mask=o <= units)
    tl.store(flags + o * N_FLAGS + F_GO, tl.zeros([UP], tl.int32), mask=o <= units)
    tl.store(flags + o * N_FLAGS + F_ACCEPTED, tl.zeros([UP], tl.int32), mask=o <= units)
    tl.store(flags + o * N_FLAGS + F_OUTDATED, tl.zeros([UP], tl.int32), mask=o <= units)
    tl.store(flags + o * N_FLAGS + F_REFUSED, tl.zeros([UP], tl.int32) + refused.to(tl.int32), mask=o <= units)


@triton.jit
def _own_rms(sums, unit):
    sums += unit * N_SUMS
    return tl.sqrt(tl.load(sums + S_WEIGHTS) / tl.maximum(tl.load(sums + S_ELEMENTS), 1.0))


@triton.jit
def _cap(sums, rules, unit, units, length, UP: tl.constexpr):
    """Largest step: η_max, and the relative change ``trust`` of the larger of the unit's and the model's RMS."""
    o = tl.arange(0, UP)
    mask = o < units
    weights = tl.sum(tl.load(sums + o * N_SUMS + S_WEIGHTS, mask=mask, other=0.0))
    elements = tl.sum(tl.load(sums + o * N_SUMS + S_ELEMENTS, mask=mask, other=0.0))
    rms = tl.maximum(_own_rms(sums, unit), tl.sqrt(weights / tl.maximum(elements, 1.0)))
    trust = tl.load(rules + TRUST)
    limited = (trust < float("inf")) & (length > 0)
    limit = tl.where(limited, trust * rms / tl.where(length > 0, length, 1.0), float("inf"))
    return tl.minimum(tl.load(rules + ETA_MAX), limit) * tl.load(rules + LR)


@triton.jit
def _initial_step(rules, memory, loss, slope, cap):
    kind = tl.load(rules + INITIAL)
    backtrack = tl.load(rules + BACKTRACK)
    remembered = tl.load(memory + STEP_SIZE)
    first = tl.load(rules + ETA_INIT)
    eta = tl.where(first > 0, first, cap)
    eta = tl.where(remembered > 0, tl.maximum(tl.load(rules + GROWTH) * remembered, cap * tl.load(rules + FLOOR)), eta)
    polyak = tl.maximum(loss, 0.0) / (tl.load(rules + POLYAK_C) * slope)
    polyak *= tl.exp(tl.load(memory + BACKTRACKS) * tl.log(backtrack))
    eta = tl.where(kind == POLYAK, tl.where(polyak > 0, polyak, cap), eta)
    low = tl.minimum(tl.maximum(tl.load(rules + ETA_MIN), cap * 1e-4), cap)
    low = tl.where(low > 0, low, 1.0)
    drawn = low * tl.exp(tl.load(rules + UNIFORM) * tl.log(tl.where(cap > 0, cap, 1.0) / low))
    eta = tl.where(kind == RANDOM, drawn, eta)
    eta = tl.where(kind == RESET, cap, eta)
    return tl.minimum(cap, eta)


@triton.jit
def _zhang_hager(rules, memory, loss):
    carried = tl.load(rules + NM_WEIGHT) * tl.load(memory + AVERAGE_WEIGHT)
    return (carried * tl.load(memory + AVERAGE) + loss) / (carried + 1), carried + 1


@triton.jit(do_not_specialize=["unit", "units"])
def open_kernel(
    state, memory, rules, lead, rounding, sums, flags, unit, units,
    TESTED: tl.constexpr, KEEP: tl.constexpr, UP: tl.constexpr,
):  # fmt: skip
    """Start a search of the unit, or with KEEP put it at its remembered step.

    Nothing happens where all units have been moved together already.
    """
    batch = state + units * N_STATE
    if tl.load(batch + OUTCOME) != ACCEPTED:
        row, sum_row = state + unit * N_STATE, sums + unit * N_SUMS
        rules += tl.load(lead + unit) * N_RULES
        memory += unit * N_MEMORY
        loss = tl.load(batch + LOSS)
        slope, square = tl.load(sum_row + S_SLOPE), tl.load(sum_row + S_DIRECTION)
        averaged = False
        if TESTED:
            averaged = tl.load(sum_row + S_AVG_SLOPE) > 0
            slope = tl.where(averaged, tl.load(sum_row + S_AVG_SLOPE), slope)
            square = tl.where(averaged, tl.load(sum_row + S_AVG_DIRECTION), square)
        slope = tl.where(tl.load(flags + F_REFUSED) != 0, float("nan"), slope)
        length = tl.sqrt(square / tl.maximum(tl.load(sum_row + S_MOVING), 1.0))
        cap = _cap(sums, rules, unit, units, length, UP)
        hidden = tl.load(rounding + unit) * _own_rms(sums, unit) / tl.where(length > 0, length, float("inf"))
        descends = (slope > 0) & (slope < float("inf")) & (cap > 0)
        if KEEP:
            eta = tl.where(descends, tl.minimum(cap, tl.load(memory + STEP_SIZE)), 0.0)
            outcome = tl.where(eta > 0, KEPT, NOT_DESCENT)
            tl.store(batch + LOSS, tl.where(eta > 0, float("nan"), loss))
            go = False
        else:
            eta = tl.where(descends, _initial_step(rules, memory, loss, tl.where(descends, slope, 1.0), cap), 0.0)
            outcome = tl.where(descends, RUNNING, NOT_DESCENT)
            go = descends
        rule = tl.load(rules + RULE)
        average, _ = _zhang_hager(rules, memory, loss)
        smoothing = tl.load(rules + SMOOTHING)
        ratio = tl.where(rule == SMOOTHED, smoothing / (1 - smoothing), 0.0)
        reference = tl.where(rule == NONMONOTONE, tl.maximum(average, loss), loss)
        tl.store(row + ETA, eta)
        tl.store(row + MOVE, eta)
        tl.store(row + AT, 0.0)
        tl.store(row + START, eta)
        tl.store(row + GO, tl.where(go, 1.0, 0.0))
        tl.store(row + TRIALS, 0.0)
        tl.store(row + OUTCOME, outcome.to(tl.float64))
        tl.store(row + LOSS, loss)
        tl.store(row + FINAL, loss)
        tl.store(row + REFERENCE, reference + ratio * tl.load(memory + MEAN_DECREASE))
        tl.store(row + REQUIRED_SLOPE, slope + ratio * tl.load(memory + MEAN_SLOPE))
        tl.store(row + SLOPE, slope)
        tl.store(row + HIDDEN, hidden)
        tl.store(row + AVERAGED, tl.where(averaged, 1.0, 0.0))
        tl.store(flags + unit * N_FLAGS + F_GO, tl.where(go, 1, 0))
        tl.store(flags + unit * N_FLAGS + F_ACCEPTED, 0)


@triton.jit
def _visible(decrease, eta, hidden, resolution):
    """The decrease asked for, or 0 where rounding hides it."""
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
        asked = _visible(tl.load(rules + C) * eta * slope, eta, tl.load(row + HIDDEN), tl.load(row + RESOLUTION))
        accepted = (tl.abs(f) < float("inf")) & (f <= reference - asked)
        smaller = eta * tl.load(rules + BACKTRACK)
        too_small = smaller < tl.load(rules + ETA_MIN)
        exhausted = (accepted == 0) & (too_small | (trials >= tl.load(rules + MAX_TRIALS)))
        going = (accepted == 0) & (exhausted == 0)
        eta_next = tl.where(accepted, eta, tl.where(exhausted, 0.0, smaller))
        tl.store(row + AT, eta)
        tl.store(row + ETA, eta_next)
        tl.store(row + MOVE, eta_next)
        tl.store(row + TRIALS, trials)
        tl.store(row + GO, tl.where(going, 1.0, 0.0))
        outcome = tl.where(accepted, ACCEPTED, tl.where(exhausted, EXHAUSTED, RUNNING))
        tl.store(row + OUTCOME, outcome.to(tl.float64))
        tl.store(flags + unit * N_FLAGS + F_GO, tl.where(going, 1, 0))
        tl.store(flags + unit * N_FLAGS + F_ACCEPTED, tl.where(accepted, 1, 0))
        if accepted:
            tl.store(row + FINAL, f)
            tl.store(state + units * N_STATE + LOSS, f)


@triton.jit(do_not_specialize=["unit", "units"])
def put_back_kernel(state, unit, units):
    """Take the unit's move back, whatever its search has found, and the loss to f(w_t)."""
    batch = state + units * N_STATE
    tl.store(state + unit * N_STATE + MOVE, 0.0)
    tl.store(batch + LOSS, tl.load(batch + START))


@triton.jit
def _required(rows, c, eta, mask):
    decrease = c * eta * tl.load(rows + REQUIRED_SLOPE, mask=mask, other=0.0)
    hidden = tl.load(rows + HIDDEN, mask=mask, other=0.0)
    return _visible(decrease, eta, hidden, tl.load(rows + RESOLUTION, mask=mask, other=0.0))


@triton.jit(do_not_specialize=["units"])
def open_together_kernel(state, rules, lead, flags, units, UP: tl.constexpr):
    """Start the test of a common factor on the steps of all units that have one."""
    o = tl.arange(0, UP)
    mask = o < units
    rows, batch = state + o * N_STATE, state + units * N_STATE
    eta = tl.load(rows + ETA, mask=mask, other=0.0)
    moving = eta > 0
    c = tl.load(rules + tl.load(lead + o, mask=mask, other=0) * N_RULES + C, mask=mask, other=0.0)
    required = tl.where(moving, _required(rows, c, eta, mask), 0.0)
    references = tl.load(rows + REFERENCE, mask=mask, other=0.0)
    any_moves = tl.sum(moving.to(tl.int32)) > 0
    tl.store(rows + MOVE, eta, mask=mask)
    tl.store(rows + AT, tl.zeros([UP], tl.float64), mask=mask)
    tl.store(rows + GO, tl.zeros([UP], tl.float64), mask=mask)
    tl.store(flags + o * N_FLAGS + F_GO, tl.zeros([UP], tl.int32), mask=mask)
    tl.store(batch + ETA, 1.0)
    tl.store(batch + TRIALS, 0.0)
    tl.store(batch + REFERENCE, tl.max(tl.where(moving, references, -float("inf"))))
    tl.store(batch + REQUIRED_SLOPE, tl.sum(required))
    tl.store(batch + GO, tl.where(any_moves, 1.0, 0.0))
    tl.store(batch + OUTCOME, tl.where(any_moves, RUNNING, ACCEPTED).to(tl.float64))  # nothing is left to search
    tl.store(flags + units * N_FLAGS + F_GO, tl.where(any_moves, 1, 0))
    tl.store(flags + units * N_FLAGS + F_ACCEPTED, tl.where(any_moves, 0, 1))


@triton.jit(do_not_specialize=["loss", "unit", "units"])
def judge_together_kernel(state, rules, lead, flags, loss, unit, units, ONCE: tl.constexpr, UP: tl.constexpr):
    """Accept the common factor or shrink it by the rules of the unit.

    With ONCE it is 1, and every unit is credited with its part.
    """
    batch = state + units * N_STATE
    if tl.load(batch + GO) != 0:
        f = tl.load(loss).to(tl.float64)
        factor, trials = tl.load(batch + ETA), tl.load(batch + TRIALS) + 1
        required = tl.load(batch + REQUIRED_SLOPE)
        asked = _visible(factor * required, factor, 0.0, tl.load(batch + RESOLUTION))
        accepted = (tl.abs(f) < float("inf")) & (f <= tl.load(batch + REFERENCE) - asked)
        first = rules + tl.load(lead + unit) * N_RULES
        tries = 1 if ONCE else tl.load(first + MAX_TRIALS)
        exhausted = (accepted == 0) & (trials >= tries)
        going = (accepted == 0) & (exhausted == 0)
        factor = tl.where(accepted, factor, tl.where(exhausted, 0.0, factor * tl.load(first + BACKTRACK)))
        o = tl.arange(0, UP)
        mask = o < units
        rows = state + o * N_STATE
        eta = tl.load(rows + ETA, mask=mask, other=0.0)
        tl.store(rows + AT, tl.load(rows + MOVE, mask=mask, other=0.0), mask=mask)
        tl.store(rows + MOVE, factor * eta, mask=mask)
        if ONCE:  # noqa: SIM102
            if accepted:
                c = tl.load(rules + tl.load(lead + o, mask=mask, other=0) * N_RULES + C, mask=mask, other=0.0)
                part = _required(rows, c, eta, mask) / tl.where(required > 0, required, 1.0)
                start = tl.load(batch + LOSS)
                tl.store(rows + FINAL, start - (start - f) * part, mask=mask & (eta > 0))
                found = tl.zeros([UP], tl.float64) + ACCEPTED
                tl.store(rows + OUTCOME, found, mask=mask & (eta > 0))
        tl.store(batch + ETA, factor)
        tl.store(batch + TRIALS, trials)
        tl.store(batch + GO, tl.where(going, 1.0, 0.0))
        outcome = tl.where(accepted, ACCEPTED, tl.where(exhausted, EXHAUSTED, RUNNING))
        tl.store(batch + OUTCOME, outcome.to(tl.float64))
        tl.store(flags + units * N_FLAGS + F_GO, tl.where(going, 1, 0))
        tl.store(flags + units * N_FLAGS + F_ACCEPTED, tl.where(accepted, 1, 0))
        if accepted:
            tl.store(batch + LOSS, f)


@triton.jit(do_not_specialize=["units"])
def follow_kernel(state, units, UP: tl.constexpr):
    """Turn every move towards the averaged direction; the loss there is not known."""
    o = tl.arange(0, UP)
    mask = o < units
    rows, batch = state + o * N_STATE, state + units * N_STATE
    moved = tl.load(rows + MOVE, mask=mask, other=0.0) > 0
    tl.store(rows + AVERAGED, tl.zeros([UP], tl.float64) + 1, mask=mask & moved)
    tl.store(rows + AT, tl.where(moved, float("nan"), 0.0), mask=mask)  # the others stand at w_t
    tl.store(batch + LOSS, tl.where(tl.sum(moved.to(tl.int32)) > 0, float("nan"), tl.load(batch + LOSS)))


@triton.jit(do_not_specialize=["units"])
def restore_kernel(state, units, UP: tl.constexpr):
    """Ask for every unit to be put back, wherever it stands; between two steps, for nothing to be moved."""
    o = tl.arange(0, UP)
    mask = o < units
    rows, start = state + o * N_STATE, tl.load(state + units * N_STATE + START)
    under_way = start == start
    move = tl.where(under_way, 0.0, tl.load(rows + MOVE, mask=mask, other=0.0))
    tl.store(rows + MOVE, move, mask=mask)
    tl.store(rows + AT, tl.where(under_way, float("nan"), move), mask=mask)
    tl.debug_barrier()  # every lane has read it
    tl.store(state + units * N_STATE + START, float("nan"))


@triton.jit(do_not_specialize=["units"])
def remember_kernel(state, memory, rules, lead, history, step, units, UP: tl.constexpr):
    """Write what the next searches need, and the whole state into the ring of reports."""
    o = tl.arange(0, UP)
    mask = o < units
    rows, memory = state + o * N_STATE, memory + o * N_MEMORY
    rules += tl.load(lead + o, mask=mask, other=0) * N_RULES
    outcome = tl.load(rows + OUTCOME, mask=mask, other=0.0)
    slope = tl.load(rows + SLOPE, mask=mask, other=0.0)
    accepted = outcome == ACCEPTED
    searched = mask & (tl.abs(slope) < float("inf")) & (accepted | (outcome == EXHAUSTED))
    loss, eta = tl.load(rows + LOSS, mask=searched, other=0.0), tl.load(rows + ETA, mask=searched, other=0.0)
    start, trials = tl.load(rows + START, mask=searched, other=0.0), tl.load(rows + TRIALS, mask=searched, other=0.0)
    carried = tl.load(rules + NM_WEIGHT, mask=searched, other=0.0)
    carried *= tl.load(memory + AVERAGE_WEIGHT, mask=searched, other=0.0)
    average = (carried * tl.load(memory + AVERAGE, mask=searched, other=0.0) + loss) / (carried + 1)
    tl.store(memory + AVERAGE, average, mask=searched)
    tl.store(memory + AVERAGE_WEIGHT, carried + 1, mask=searched)
    backtracks = tl.load(memory + BACKTRACKS, mask=searched, other=0.0)
    shrunk = tl.load(rules + BACKTRACK, mask=searched, other=0.0) * start
    tl.store(memory + STEP_SIZE, tl.where(accepted, eta, shrunk), mask=searched)
    later = tl.where(accepted, tl.maximum(backtracks + trials - 2, 0.0), backtracks + 1)
    tl.store(memory + BACKTRACKS, later, mask=searched)
    learned = searched & accepted
    weight = tl.load(rules + SMOOTHING, mask=learned, other=0.0)
    decrease = loss - tl.load(rows + FINAL, mask=learned, other=0.0)
    mean = weight * tl.load(memory + MEAN_DECREASE, mask=learned, other=0.0) + (1 - weight) * decrease
    tl.store(memory + MEAN_DECREASE, mean, mask=learned)
    mean = weight * tl.load(memory + MEAN_SLOPE, mask=learned, other=0.0) + (1 - weight) * slope
    tl.store(memory + MEAN_SLOPE, mean, mask=learned)
    now = tl.load(step)
    history += (now % N_RING) * (units + 1) * N_STATE
    for column in tl.static_range(N_STATE):
        value = tl.load(rows + column, mask=o <= units, other=0.0)
        tl.store(history + o * N_STATE + column, value, mask=o <= units)
    tl.store(step, now + 1)
    tl.debug_barrier()  # every lane has read the row
    tl.store(state + units * N_STATE + START, float("nan"))  # the snapshot is no longer that of a step under way


def _padded(arena: Arena) -> int:
    return triton.next_power_of_2(arena.units + 1)


def begin(arena: Arena, loss: Tensor) -> None:
    """Start a mini-batch at f(w_t) = ``loss``, a 0-d tensor on the device."""
    eps = torch.finfo(loss.dtype).eps
    begin_kernel[(1,)](arena.state, arena.flags, loss, arena.units, eps, UP=_padded(arena), **SCALAR)


def open_search(arena: Arena, unit: int, *, tested: bool, keep: bool = False) -> None:
    """Aim the unit and set its first step; with ``keep`` its remembered step, untested."""
    open_kernel[(1,)](
        arena.state, arena.memory, arena.rules, arena.lead, arena.rounding, arena.sums, arena.flags, unit, arena.units,
        TESTED=tested, KEEP=keep, UP=_padded(arena), **SCALAR,
    )  # fmt: skip


def judge(arena: Arena, unit: int, loss: Tensor) -> None:
    """Accept or shrink the unit's step by the loss of its trial."""
    judge_kernel[(1,)](arena.state, arena.rules, arena.lead, arena.flags, loss, unit, arena.units, **SCALAR)


def put_back(arena: Arena, unit: int) -> None:
    """Ask for the unit to stand at w_t again; what its search found stays in its row."""
    put_back_kernel[(1,)](arena.state, unit, arena.units, **SCALAR)


def open_together(arena: Arena) -> None:
    """Start the joint test of all steps found."""
    open_together_kernel[(1,)](
        arena.state, arena.rules, arena.lead, arena.flags, arena.units, UP=_padded(arena), **SCALAR
    )


def judge_together(arena: Arena, unit: int, loss: Tensor, *, once: bool) -> None:
    """Accept or shrink the common factor, by the rules of ``unit``.

    ``once`` tries the factor 1 only and credits every unit with its part.
    """
    judge_together_kernel[(1,)](
        arena.state, arena.rules, arena.lead, arena.flags, loss, unit, arena.units,
        ONCE=once, UP=_padded(arena), **SCALAR,
    )  # fmt: skip


def follow(arena: Arena) -> None:
    """Ask for every move to be made along the averaged direction."""
    follow_kernel[(1,)](arena.state, arena.units, UP=_padded(arena), **SCALAR)


def restore(arena: Arena) -> None:
    """Ask for every unit to be put back to w_t, if a step is under way."""
    restore_kernel[(1,)](arena.state, arena.units, UP=_padded(arena), **SCALAR)


def remember(arena: Arena) -> None:
    """Write the memory of all units and this step's row of the history."""
    remember_kernel[(1,)](
        arena.state, arena.memory, arena.rules, arena.lead, arena.history, arena.step, arena.units,
        UP=_padded(arena), **SCALAR,
    )  # fmt: skip
