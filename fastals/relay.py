"""Relay: relative steps that single units find, and a common factor that the joint test finds.

The relative step of a unit is r_u = η_u / scale_u, with

    scale_u = max(RMS(w_u), RMS(w), 0.01) / max(RMS(d_u), ℓ)

where w are the trained weights, 0.01 is :data:`fastals.search.LEAST_RMS`, by which those that start at 0 can move, and
ℓ is 1 for Adam's direction g / √v, whose RMS is usually about 1, and 0 for SGD's. So r_u is the share of its weights
that a usual step changes, what ``trust`` caps; on a mini-batch with a small gradient, such as one that the model has
learned, d_u is shorter and so is the step, as Adam's. A unit that is searched alone updates r_u; all units move by

    η_u = a · lr · min(r_u · scale_u, largest)

with one common factor a that the joint test shrinks and later steps let grow back to 1. Units are searched alone as if
``lr`` were 1, and a grows only if the move that ``lr`` has not shortened would pass, so that a scheduler shortens the
moves and leaves alone what has been learned.

Along Adam's direction the scale is that of the unit's last step, so that η_u is known before the weights are read: one
pass measures the unit and moves it. Where RMS(d_u) is above 1, such a step is longer or shorter by the ratio of this
RMS to the last one. The scale of this step is taken for a unit that has just been searched, for one that has no last
step, and along SGD's direction, whose length may change by any factor from one mini-batch to the next. The largest
step, ``trust`` among its bounds, is always that of this step; a unit that was moved further is moved again.
"""

import math
from collections.abc import MutableMapping

from fastals.search import Search, last_step


def usual_length(schedule: str, direction: str) -> float:
    """ℓ, below which a shorter direction makes a shorter step; 0 in other schedules, whose cap is of any direction."""
    return 1.0 if (schedule, direction) == ("relay", "adam") else 0.0


def scale_of(weight_rms: float, direction_rms: float, usual: float) -> float:
    """scale_u, 0 if the direction is 0 or not known."""
    return weight_rms / max(direction_rms, usual) if direction_rms > 0 else 0.0


def last_scale(rules: MutableMapping, usual: float) -> float:
    """scale_u of the unit's last step; 0 if there is none, or no usual length by which it would hold in this step."""
    return scale_of(rules["weight_rms"], rules["direction_rms"], usual) if usual else 0.0


def known_step(rules: MutableMapping, relative_step: float, scale: float) -> float:
    """The step lr r_u scale_u before it is bounded, which needs no look at the weights."""
    return float(rules["lr"]) * (relative_step * scale)


def warm_step(rules: MutableMapping, scale: float) -> float:
    """Where a further search of the unit alone starts: one backtrack above r_u, so that r_u can grow."""
    return rules["relative_step"] * scale / rules["backtrack"]


def searched_step(rules: MutableMapping, search: Search, scale: float) -> float:
    """r_u after a search of the unit alone: √(r_u · found), or β r_u if no trial was accepted.

    Where the scale is 0, as along a direction whose length overflows, a step is no share of the weights: r_u stays.
    """
    remembered = rules["relative_step"]
    if not search.accepted:
        return rules["backtrack"] * remembered
    if not scale:
        return remembered
    found = search.eta / scale
    return math.sqrt(remembered * found) if remembered else found


def recalled_step(rules: MutableMapping, relative_step: float, scale: float, largest: float) -> float:
    """The step lr r_u scale_u, lr ``largest`` at most; by the last trial of a first search if there is no r_u yet."""
    return float(rules["lr"]) * min(largest, relative_step * scale or last_step(rules, largest))


def first_factor(rules: MutableMapping) -> float:
    """The common factor that the joint test tries first."""
    return rules["factor"] or 1.0


def unshortened(rules: MutableMapping) -> float:
    """How many times the required decrease lets the factor grow: 1 + (1 − lr) (1 − c) / c.

    A move misses a part of the decrease η s that the slopes promise; along a parabola this part is in proportion to its
    length, and 1 − c may be missed. So this is what a move shows if and only if the one that ``lr`` has not shortened
    would pass.
    """
    c = rules["c"]
    return 1 + max(0.0, 1 - float(rules["lr"])) * (1 - c) / c


def next_factor(rules: MutableMapping, accepted: float, trials: int, may_grow: bool) -> float:
    """The first factor of the next joint test, after one that has accepted this factor, 0 if none.

    It grows after a first trial that has shown :func:`unshortened` times the required decrease (``may_grow``). It is
    β^(K − 1) at least, as in the searches: below, no loss could show a decrease, and nothing would grow again.
    """
    factor = accepted if accepted else rules["backtrack"] * first_factor(rules)
    grown = min(1.0, rules["growth"] * factor) if may_grow and trials == 1 else factor
    return max(grown, last_step(rules, 1.0))
