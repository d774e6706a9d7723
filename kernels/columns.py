"""Columns of the arena's tables by name, for the kernels."""

import triton.language as tl

from fastals.kernels.arena import CONSTANTS, FLAGS, MEMORY, OUTCOMES, RING, RULES, SPLIT, STATE, SUMS


def _indices(names):
    return (tl.constexpr(i) for i in range(len(names)))


N_STATE, N_SUMS, N_RULES = tl.constexpr(len(STATE)), tl.constexpr(len(SUMS)), tl.constexpr(len(RULES))
N_MEMORY, N_FLAGS, N_CONSTANTS = tl.constexpr(len(MEMORY)), tl.constexpr(len(FLAGS)), tl.constexpr(len(CONSTANTS))
N_RING, N_SPLIT = tl.constexpr(RING), tl.constexpr(SPLIT)

(ETA, MOVE, AT, GO, TRIALS, OUTCOME, START, LOSS, REFERENCE, REQUIRED_SLOPE, SLOPE, FINAL, RESOLUTION, HIDDEN,
 AVERAGED) = _indices(STATE)  # fmt: skip
(BETA1, BETA2, EPS, DECAY, LR, C, BACKTRACK, GROWTH, MAX_TRIALS, TRUST, INITIAL, ETA_INIT, ETA_MIN, ETA_MAX, FLOOR,
 RULE, POLYAK_C, NM_WEIGHT, SMOOTHING, UNIFORM) = _indices(RULES)  # fmt: skip
STEP_SIZE, BACKTRACKS, AVERAGE, AVERAGE_WEIGHT, MEAN_DECREASE, MEAN_SLOPE = _indices(MEMORY)
S_SLOPE, S_DIRECTION, S_MOVING, S_WEIGHTS, S_ELEMENTS, S_AVG_SLOPE, S_AVG_DIRECTION = _indices(SUMS)
F_GO, F_ACCEPTED, F_REFUSED, F_OUTDATED = _indices(FLAGS)
RUNNING, ACCEPTED, EXHAUSTED, NOT_DESCENT, KEPT = _indices(OUTCOMES)
WARM, RESET, POLYAK, RANDOM = _indices(range(4))  # fastals.search.INITIALS
MONOTONE, NONMONOTONE, SMOOTHED = _indices(range(3))  # fastals.search.REFERENCES
