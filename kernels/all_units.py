"""Scalar programs over all units: start and end of a mini-batch, and the joint test of a common factor of the steps.

``UP`` is the number of rows of ``state``, units + 1, rounded up to a power of two.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastals.kernels.arena import BATCH, Arena
from fastals.kernels.armijo import visible
from fastals.kernels.columns import (
    AT,
    AVERAGED,
    BATCH_FACTOR,
    BATCH_GO,
    BATCH_LOSS,
    BATCH_LOSS_BEFORE,
    BATCH_NEXT_FACTOR,
    BATCH_OUTCOME,
    BATCH_REFERENCE,
    BATCH_REQUIRED,
    BATCH_RESOLUTION,
    BATCH_TRIALS,
    DIRECTION_RMS,
    ETA,
    FINAL_LOSS,
    FLAG_ACCEPTED,
    FLAG_GO,
    FLAG_OUTDATED,
    FLAG_REFUSED,
    GO,
    HELD,
    HIDDEN,
    LOSS,
    MEMORY_AVERAGE,
    MEMORY_AVERAGE_WEIGHT,
    MEMORY_BACKTRACKS,
    MEMORY_DIRECTION_RMS,
    MEMORY_FACTOR,
    MEMORY_MEAN_DECREASE,
    MEMORY_MEAN_SLOPE,
    MEMORY_RELATIVE_STEP,
    MEMORY_STEP_SIZE,
    MEMORY_WEIGHT_RMS,
    MOVE,
    N_FLAGS,
    N_MEMORY,
    N_RING,
    N_RULES,
    N_STATE,
    OUTCOME,
    OUTCOME_ACCEPTED,
    OUTCOME_EXHAUSTED,
    OUTCOME_RUNNING,
    REFERENCE,
    RELATIVE_STEP,
    REQUIRED_SLOPE,
    RESOLUTION,
    RULE_BACKTRACK,
    RULE_C,
    RULE_FLOOR,
    RULE_GROWTH,
    RULE_LR,
    RULE_MAX_TRIALS,
    RULE_NONMONOTONE_WEIGHT,
    RULE_SMOOTHING,
    SLOPE,
    START,
    TRIALS,
    WEIGHT_RMS,
)
from fastals.kernels.table import SCALAR, launched


@triton.jit(do_not_specialize=["loss", "units", "again"])
def begin_kernel(state, flags, loss, units, again, eps, UP: tl.constexpr):
    """Empty every row; enter f(w_t) and the smallest change that the loss can show.

    If the step begins ``again``, the snapshots still hold its weights.
    """
    f = tl.load(loss).to(tl.float64)
    refused = (tl.abs(f) < float("inf")) == 0
    o_r = tl.arange(0, UP)
    m_r = o_r <= units
    for column in tl.static_range(N_STATE):
        b_value = tl.zeros([UP], tl.float64)
        if column == HELD:
            b_value += tl.where(again != 0, tl.load(state + o_r * N_STATE + column, mask=m_r, other=0.0), 0.0)
        if column == RESOLUTION:
            b_value += eps * tl.abs(f) / 2
        if column == RELATIVE_STEP:  # in the last row: next_factor
            b_value -= 1
        if column == BATCH_LOSS_BEFORE or column == BATCH_LOSS:  # noqa: SIM109
            b_value = tl.where(o_r == units, f, b_value)
        tl.store(state + o_r * N_STATE + column, b_value, mask=m_r)
    b_zero = tl.zeros([UP], tl.int32)
    tl.store(flags + o_r * N_FLAGS + FLAG_GO, b_zero, mask=m_r)
    tl.store(flags + o_r * N_FLAGS + FLAG_ACCEPTED, b_zero, mask=m_r)
    tl.store(flags + o_r * N_FLAGS + FLAG_OUTDATED, b_zero, mask=m_r)
    tl.store(flags + o_r * N_FLAGS + FLAG_REFUSED, b_zero + refused.to(tl.int32), mask=m_r)


@triton.jit
def _required(rows, rules, lead, o_u, b_eta, m_u):
    """The decrease that the test of each unit requires at its step."""
    b_rules = rules + tl.load(lead + o_u, mask=m_u, other=0) * N_RULES
    b_c = tl.load(b_rules + RULE_C, mask=m_u, other=0.0)
    b_decrease = b_c * b_eta * tl.load(rows + REQUIRED_SLOPE, mask=m_u, other=0.0)
    b_hidden = tl.load(rows + HIDDEN, mask=m_u, other=0.0)
    return visible(b_decrease, b_eta, b_hidden, tl.load(rows + RESOLUTION, mask=m_u, other=0.0))


@triton.jit(do_not_specialize=["unit", "units"])
def open_together_kernel(state, memory, rules, lead, flags, unit, units, REMEMBERED: tl.constexpr, UP: tl.constexpr):
    """Start the test of a common factor on the steps of all units that have one; with REMEMBERED that of the unit."""
    o_u = tl.arange(0, UP)
    m_u = o_u < units
    rows, batch = state + o_u * N_STATE, state + units * N_STATE
    b_eta = tl.load(rows + ETA, mask=m_u, other=0.0)
    b_moving = b_eta > 0
    b_required = tl.where(b_moving, _required(rows, rules, lead, o_u, b_eta, m_u), 0.0)
    b_reference = tl.load(rows + REFERENCE, mask=m_u, other=0.0)
    any_moves = tl.sum(b_moving.to(tl.int32)) > 0
    factor = 0.0
    if REMEMBERED:
        factor = tl.load(memory + unit * N_MEMORY + MEMORY_FACTOR)
    factor = tl.where(factor > 0, factor, 1.0)
    tl.store(rows + MOVE, factor * b_eta, mask=m_u)
    if not REMEMBERED:  # those stand where the pass has left them
        tl.store(rows + AT, tl.zeros([UP], tl.float64), mask=m_u)
    tl.store(rows + GO, tl.zeros([UP], tl.float64), mask=m_u)
    tl.store(flags + o_u * N_FLAGS + FLAG_GO, tl.zeros([UP], tl.int32), mask=m_u)
    tl.store(batch + BATCH_FACTOR, factor)
    tl.store(batch + BATCH_TRIALS, 0.0)
    tl.store(batch + BATCH_REFERENCE, tl.max(tl.where(b_moving, b_reference, -float("inf"))))
    tl.store(batch + BATCH_REQUIRED, tl.sum(b_required))
    tl.store(batch + BATCH_GO, tl.where(any_moves, 1.0, 0.0))
    outcome = tl.where(any_moves, OUTCOME_RUNNING, OUTCOME_ACCEPTED)  # without moves nothing is left to search
    tl.store(batch + BATCH_OUTCOME, outcome.to(tl.float64))
    tl.store(flags + units * N_FLAGS + FLAG_GO, tl.where(any_moves, 1, 0))
    tl.store(flags + units * N_FLAGS + FLAG_ACCEPTED, tl.where(any_moves, 0, 1))


@triton.jit
def _credit(rows, batch, rules, lead, o_u, b_eta, m_u, f, required, factor):
    """Give every unit its step and its part of the decrease of the loss to ``f``, as the decrease that it requires."""
    b_part = _required(rows, rules, lead, o_u, b_eta, m_u) / tl.where(required > 0, required, 1.0)
    loss = tl.load(batch + BATCH_LOSS)
    tl.store(rows + ETA, factor * b_eta, mask=m_u)
    tl.store(rows + FINAL_LOSS, loss - (loss - f) * b_part, mask=m_u & (b_eta > 0))
    tl.store(rows + OUTCOME, tl.zeros_like(b_eta) + OUTCOME_ACCEPTED, mask=m_u & (b_eta > 0))


@triton.jit
def _unshortened(rule):
    """How many times the required decrease lets the factor grow, as :func:`fastals.relay.unshortened`."""
    c = tl.load(rule + RULE_C)
    return 1 + tl.maximum(0.0, 1 - tl.load(rule + RULE_LR)) * (1 - c) / c


@triton.jit
def _next_factor(memory, rule, accepted, factor, trials, may_grow):
    """The first factor of the next joint test, as :func:`fastals.relay.next_factor`."""
    first = tl.load(memory + MEMORY_FACTOR)
    shrunk = tl.load(rule + RULE_BACKTRACK) * tl.where(first > 0, first, 1.0)
    grown = tl.minimum(1.0, tl.load(rule + RULE_GROWTH) * factor)
    factor = tl.where(accepted, tl.where((trials == 1) & may_grow, grown, factor), shrunk)
    return tl.maximum(factor, tl.load(rule + RULE_FLOOR))


@triton.jit(do_not_specialize=["loss", "unit", "units"])
def judge_together_kernel(
    state, memory, rules, lead, flags, loss, unit, units, ONCE: tl.constexpr, REMEMBERED: tl.constexpr, UP: tl.constexpr
):
    """Accept the common factor or shrink it by the rules of the unit.

    With ONCE the first factor alone is tried. With it or REMEMBERED every unit is credited with its part.
    """
    batch = state + units * N_STATE
    if tl.load(batch + BATCH_GO) != 0:
        f = tl.load(loss).to(tl.float64)
        factor, trials = tl.load(batch + BATCH_FACTOR), tl.load(batch + BATCH_TRIALS) + 1
        required, reference = tl.load(batch + BATCH_REQUIRED), tl.load(batch + BATCH_REFERENCE)
        resolution = tl.load(batch + BATCH_RESOLUTION)
        decrease = visible(factor * required, factor, 0.0, resolution)
        accepted = (tl.abs(f) < float("inf")) & (f <= reference - decrease)
        rule = rules + tl.load(lead + unit) * N_RULES
        max_trials = 1 if ONCE else tl.load(rule + RULE_MAX_TRIALS)
        exhausted = (accepted == 0) & (trials >= max_trials)
        going = (accepted == 0) & (exhausted == 0)
        factor = tl.where(accepted, factor, tl.where(exhausted, 0.0, factor * tl.load(rule + RULE_BACKTRACK)))
        o_u = tl.arange(0, UP)
        m_u = o_u < units
        rows = state + o_u * N_STATE
        b_eta = tl.load(rows + ETA, mask=m_u, other=0.0)
        tl.store(rows + AT, tl.load(rows + MOVE, mask=m_u, other=0.0), mask=m_u)
        tl.store(rows + MOVE, factor * b_eta, mask=m_u)
        if ONCE or REMEMBERED:  # noqa: SIM102
            if accepted:
                _credit(rows, batch, rules, lead, o_u, b_eta, m_u, f, required, factor)
        if REMEMBERED:
            shown = _unshortened(rule) * factor * required
            may_grow = f <= reference - visible(shown, factor, 0.0, resolution)
            next_factor = _next_factor(memory + unit * N_MEMORY, rule, accepted, factor, trials, may_grow)
            tl.store(batch + BATCH_NEXT_FACTOR, next_factor)  # that of the last trial stays
            if exhausted:
                tl.store(rows + OUTCOME, tl.zeros_like(b_eta) + OUTCOME_EXHAUSTED, mask=m_u & (b_eta > 0))
        tl.store(batch + BATCH_FACTOR, factor)
        tl.store(batch + BATCH_TRIALS, trials)
        tl.store(batch + BATCH_GO, tl.where(going, 1.0, 0.0))
        outcome = tl.where(accepted, OUTCOME_ACCEPTED, tl.where(exhausted, OUTCOME_EXHAUSTED, OUTCOME_RUNNING))
        tl.store(batch + BATCH_OUTCOME, outcome.to(tl.float64))
        tl.store(flags + units * N_FLAGS + FLAG_GO, tl.where(going, 1, 0))
        tl.store(flags + units * N_FLAGS + FLAG_ACCEPTED, tl.where(accepted, 1, 0))
        if accepted:
            tl.store(batch + BATCH_LOSS, f)


@triton.jit(do_not_specialize=["units"])
def follow_kernel(state, units, UP: tl.constexpr):
    """Ask for every move along the averaged direction; the loss there is not known."""
    o_u = tl.arange(0, UP)
    m_u = o_u < units
    rows, batch = state + o_u * N_STATE, state + units * N_STATE
    b_moved = tl.load(rows + MOVE, mask=m_u, other=0.0) > 0
    tl.store(rows + AVERAGED, tl.zeros([UP], tl.float64) + 1, mask=m_u & b_moved)
    tl.store(rows + AT, tl.where(b_moved, float("nan"), 0.0), mask=m_u)  # the others stand at w_t
    any_moved = tl.sum(b_moved.to(tl.int32)) > 0
    tl.store(batch + BATCH_LOSS, tl.where(any_moved, float("nan"), tl.load(batch + BATCH_LOSS)))


@triton.jit(do_not_specialize=["units"])
def restore_kernel(state, units, UP: tl.constexpr):
    """Ask for every unit that is held to be put back to w_t, wherever it stands. Between two steps, ask for no move."""
    o_u = tl.arange(0, UP)
    m_u = o_u < units
    rows, loss_before = state + o_u * N_STATE, tl.load(state + units * N_STATE + BATCH_LOSS_BEFORE)
    under_way = loss_before == loss_before
    b_move = tl.where(under_way, 0.0, tl.load(rows + MOVE, mask=m_u, other=0.0))
    b_held = tl.load(rows + HELD, mask=m_u, other=0.0) != 0
    tl.store(rows + MOVE, b_move, mask=m_u)
    tl.store(rows + AT, tl.where(under_way, tl.where(b_held, float("nan"), b_move), b_move), mask=m_u)


@triton.jit
def _mean(weight, mean, new):
    return weight * mean + (1 - weight) * new


@triton.jit
def _learn(rows, memory, rules, m_u):
    """Write what the next searches need, as :meth:`fastals.search.Search.remember`."""
    b_outcome = tl.load(rows + OUTCOME, mask=m_u, other=0.0)
    b_slope = tl.load(rows + SLOPE, mask=m_u, other=0.0)
    b_accepted = b_outcome == OUTCOME_ACCEPTED
    m_s = m_u & (tl.abs(b_slope) < float("inf")) & (b_accepted | (b_outcome == OUTCOME_EXHAUSTED))  # searched
    b_loss, b_eta = tl.load(rows + LOSS, mask=m_s, other=0.0), tl.load(rows + ETA, mask=m_s, other=0.0)
    b_start, b_trials = tl.load(rows + START, mask=m_s, other=0.0), tl.load(rows + TRIALS, mask=m_s, other=0.0)
    b_carried = tl.load(rules + RULE_NONMONOTONE_WEIGHT, mask=m_s, other=0.0)
    b_carried *= tl.load(memory + MEMORY_AVERAGE_WEIGHT, mask=m_s, other=0.0)
    b_sum = b_carried * tl.load(memory + MEMORY_AVERAGE, mask=m_s, other=0.0) + b_loss
    tl.store(memory + MEMORY_AVERAGE, b_sum / (b_carried + 1), mask=m_s)
    tl.store(memory + MEMORY_AVERAGE_WEIGHT, b_carried + 1, mask=m_s)
    b_backtracks = tl.load(memory + MEMORY_BACKTRACKS, mask=m_s, other=0.0)
    b_shrunk = tl.load(rules + RULE_BACKTRACK, mask=m_s, other=0.0) * b_start
    tl.store(memory + MEMORY_STEP_SIZE, tl.where(b_accepted, b_eta, b_shrunk), mask=m_s)
    b_later = tl.where(b_accepted, tl.maximum(b_backtracks + b_trials - 2, 0.0), b_backtracks + 1)
    tl.store(memory + MEMORY_BACKTRACKS, b_later, mask=m_s)
    m_a = m_s & b_accepted
    b_weight = tl.load(rules + RULE_SMOOTHING, mask=m_a, other=0.0)
    b_decrease = b_loss - tl.load(rows + FINAL_LOSS, mask=m_a, other=0.0)
    b_mean = _mean(b_weight, tl.load(memory + MEMORY_MEAN_DECREASE, mask=m_a, other=0.0), b_decrease)
    tl.store(memory + MEMORY_MEAN_DECREASE, b_mean, mask=m_a)
    b_mean = _mean(b_weight, tl.load(memory + MEMORY_MEAN_SLOPE, mask=m_a, other=0.0), b_slope)
    tl.store(memory + MEMORY_MEAN_SLOPE, b_mean, mask=m_a)


@triton.jit
def _learn_relay(rows, memory, m_u, next_factor):
    """Write what the relay remembers: relative steps with their scale, and in all that took part the common factor."""
    b_relative = tl.load(rows + RELATIVE_STEP, mask=m_u, other=-1.0)
    b_slope = tl.load(rows + SLOPE, mask=m_u, other=0.0)
    m_r = m_u & (b_relative >= 0) & (tl.abs(b_slope) < float("inf"))
    tl.store(memory + MEMORY_RELATIVE_STEP, b_relative, mask=m_r)
    b_length = tl.load(rows + DIRECTION_RMS, mask=m_r, other=0.0)
    tl.store(memory + MEMORY_DIRECTION_RMS, b_length, mask=m_r & (b_length > 0))
    b_rms = tl.load(rows + WEIGHT_RMS, mask=m_r, other=0.0)
    tl.store(memory + MEMORY_WEIGHT_RMS, b_rms, mask=m_r & (b_length > 0))
    b_took_part = tl.load(rows + OUTCOME, mask=m_u, other=0.0) > OUTCOME_RUNNING
    b_factor = tl.zeros_like(b_slope) + next_factor
    tl.store(memory + MEMORY_FACTOR, b_factor, mask=m_u & b_took_part & (b_factor > 0))


@triton.jit
def _record(rows, history, step, o_r, units):
    """Write all rows into the ring of reports, and count the step."""
    now = tl.load(step)
    history += (now % N_RING) * (units + 1) * N_STATE
    for column in tl.static_range(N_STATE):
        b_value = tl.load(rows + column, mask=o_r <= units, other=0.0)
        tl.store(history + o_r * N_STATE + column, b_value, mask=o_r <= units)
    tl.store(step, now + 1)


@triton.jit(do_not_specialize=["units"])
def remember_kernel(state, memory, rules, lead, history, step, units, UP: tl.constexpr):
    """Learn from the searches, record the state, and end the step."""
    o_r = tl.arange(0, UP)
    m_u = o_r < units
    rows = state + o_r * N_STATE
    rules += tl.load(lead + o_r, mask=m_u, other=0) * N_RULES
    _learn(rows, memory + o_r * N_MEMORY, rules, m_u)
    _learn_relay(rows, memory + o_r * N_MEMORY, m_u, tl.load(state + units * N_STATE + BATCH_NEXT_FACTOR))
    _record(rows, history, step, o_r, units)
    tl.debug_barrier()  # every lane has read the row
    tl.store(state + units * N_STATE + BATCH_LOSS_BEFORE, float("nan"))  # no step is under way


def begin(arena: Arena, loss: Tensor, *, again: bool = False) -> None:
    """Start a mini-batch at f(w_t) = ``loss``, a 0-d tensor on the device; ``again`` after its units were put back."""
    begin_kernel[(1,)](
        state=arena.state,
        flags=arena.flags,
        loss=loss,
        units=arena.units,
        again=int(again),
        eps=torch.finfo(loss.dtype).eps,
        UP=arena.padded_rows,
        **SCALAR,
    )


def open_together(arena: Arena, unit: int, *, remembered: bool) -> None:
    """Start the joint test of all steps found; ``remembered`` starts from the factor that ``unit`` remembers."""
    open_together_kernel[(1,)](
        state=arena.state,
        memory=arena.memory,
        rules=arena.rules,
        lead=arena.lead,
        flags=arena.flags,
        unit=unit,
        units=arena.units,
        REMEMBERED=remembered,
        UP=arena.padded_rows,
        **SCALAR,
    )


def judge_together(arena: Arena, unit: int, loss: Tensor, *, once: bool, remembered: bool) -> None:
    """Accept or shrink the common factor, by the rules of ``unit``.

    ``once`` tries one factor only; with it or ``remembered`` every unit is credited with its part.
    """
    judge_together_kernel[(1,)](
        state=arena.state,
        memory=arena.memory,
        rules=arena.rules,
        lead=arena.lead,
        flags=arena.flags,
        loss=loss,
        unit=unit,
        units=arena.units,
        ONCE=once,
        REMEMBERED=remembered,
        UP=arena.padded_rows,
        **SCALAR,
    )


def follow(arena: Arena) -> None:
    """Ask for every move to be made along the averaged direction."""
    follow_kernel[(1,)](state=arena.state, units=arena.units, UP=arena.padded_rows, **SCALAR)


def restore(arena: Arena) -> None:
    """Ask for every unit to be put back to w_t, if a step is under way, which it is until :func:`end`."""
    restore_kernel[(1,)](state=arena.state, units=arena.units, UP=arena.padded_rows, **SCALAR)


def end(arena: Arena) -> None:
    """Note that no step is under way: its units have been put back."""
    arena.state[-1, BATCH.index("loss_before")].fill_(float("nan"))


def remember(arena: Arena, *, compile_only: bool = False) -> None:
    """Write the memory of all units and this step's row of the history."""
    launched(remember_kernel, 1, compile_only=compile_only)(
        state=arena.state,
        memory=arena.memory,
        rules=arena.rules,
        lead=arena.lead,
        history=arena.history,
        step=arena.step,
        units=arena.units,
        UP=arena.padded_rows,
        **SCALAR,
    )
