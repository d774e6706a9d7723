"""Armijo backtracking on scalars: it sees losses, slopes and step sizes, never weights.

A search begins at the step ``start`` and judges one trial loss after another; η is accepted if and only if

    f(w − η d) ≤ R − c η s

and multiplied by ``backtrack`` otherwise. If rounding hides a decrease of c η s, in the loss or in parameters of low
precision, the test asks for f(w − η d) ≤ R only (in the spirit of the approximate test of Hager and Zhang, SIAM J.
Optim. 16, 2005). The memory of a unit lies in its parameter group (:data:`MEMORY`); :meth:`Search.remember` and
:func:`schedule_next_search` write it.
"""

import math
import random
from collections.abc import Callable, MutableMapping
from dataclasses import KW_ONLY, dataclass, field
from numbers import Integral, Real
from typing import Any, NamedTuple

from fastals.kernels.arena import INITIALS, LEAST_RMS, REFERENCES
from fastals.report import ACCEPTED, EXHAUSTED


class Range(NamedTuple):
    """The values that make sense for a constant, as a test and in words."""

    holds: Callable[[Any], bool]
    words: str


def number(holds: Callable[[Any], bool], words: str, kind: type = Real) -> Range:
    """The range of a constant that is a number, which no bool, no text and no tensor is."""
    return Range(lambda x: isinstance(x, kind) and not isinstance(x, bool) and holds(x), words)


FINITE = number(math.isfinite, "a finite number")
BETWEEN_0_AND_1 = number(lambda x: 0 < x < 1, "between 0 and 1, both excluded")
POSITIVE = number(lambda x: 0 < x < math.inf, "greater than 0, and finite")
POSITIVE_OR_NONE = Range(lambda x: x is None or POSITIVE.holds(x), "greater than 0 and finite, or None")
NON_NEGATIVE = number(lambda x: 0 <= x < math.inf, "0 or more, and finite")
COUNT = number(lambda x: x >= 0, "an integer of at least 0", Integral)
COUNT_FROM_1 = number(lambda x: x >= 1, "an integer of at least 1", Integral)


def one_of(names: tuple[str, ...]) -> Range:
    """The range of a constant that is a name."""
    return Range(lambda x: x in names, f"one of {', '.join(names)}")


#: The constants of a search, arguments of :class:`fastals.ALS` and entries of each unit's parameter group.
RANGES: dict[str, Range] = {
    "c": BETWEEN_0_AND_1,
    "backtrack": BETWEEN_0_AND_1,
    "growth": number(lambda x: 1 <= x < math.inf, "1 or more, and finite"),
    "max_trials": COUNT_FROM_1,
    "trust": POSITIVE_OR_NONE,
    "initial": one_of(INITIALS),
    "eta_init": POSITIVE_OR_NONE,
    "eta_min": POSITIVE,
    "eta_max": number(lambda x: 0 < x < math.inf, "at least eta_min, and finite"),
    "reference": one_of(REFERENCES),
    "polyak_c": POSITIVE,
    "nonmonotone_weight": number(lambda x: 0 <= x <= 1, "from 0 to 1"),
    "smoothing": number(lambda x: 0 <= x < 1, "from 0 up to 1, 1 excluded"),
}

#: The memory of a unit, all scalars, 0 until the first search.
MEMORY: dict[str, float | int] = {
    "step_size": 0.0,  # last accepted step
    "backtracks": 0,  # PoNoS: backtracks carried to the next Polyak step
    "average": 0.0,  # Zhang-Hager C
    "average_weight": 0.0,  # Zhang-Hager Q
    "mean_decrease": 0.0,  # SaLSA h
    "mean_slope": 0.0,  # SaLSA s
    "mean_step_fast": 0.0,  # SaLSA search frequency
    "mean_step_slow": 0.0,
    "relative_step": 0.0,  # relay: r_u, see fastals.relay
    "direction_rms": 0.0,  # relay: RMS of the direction in the last step of the unit; 0 stands for not known
    "weight_rms": 0.0,  # relay: the size of the weights in that step, see :func:`size_of_weights`
    "factor": 0.0,  # relay: common factor a of the next joint test; 0 stands for 1
    "next_search": 0,  # count of the step that searches next
    "last_search": 0,  # schedules that take turns: count after the last step that searched the unit; 0 for never
    "count": 0,  # steps taken
}
MEMORY_RANGES: dict[str, Range] = {
    k: NON_NEGATIVE if isinstance(initial, float) else COUNT for k, initial in MEMORY.items()
}
MEMORY_RANGES |= {"average": FINITE, "mean_decrease": FINITE}  # losses may be negative, and may rise


LONGEST_WAIT = 10  # steps between two searches at most with ``every="auto"``


def plain_memory(group: MutableMapping) -> dict[str, float | int]:
    """The group's memory as numbers of the host; fused searches keep it on the device."""
    return {k: type(initial)(group[k]) for k, initial in MEMORY.items()}


@dataclass
class Search:
    """Backtracking of one unit on one mini-batch.

    Args:
        rules: the unit's parameter group, with the constants of the search and the unit's memory.
        loss: f at the start of this search.
        slope: s = ⟨g, d⟩ > 0.
        start: the first step to try.
        resolution: smallest difference the loss can show.
        hidden: steps below this may vanish in the rounding of the parameters, so that only the masters move.
    """

    rules: MutableMapping
    loss: float
    slope: float
    start: float
    _: KW_ONLY
    resolution: float = 0.0
    hidden: float = 0.0
    trials: int = 0
    outcome: str = ""
    eta: float = field(init=False)
    reference: float = field(init=False)
    required_slope: float = field(init=False)
    final_loss: float = field(init=False)

    def __post_init__(self) -> None:
        self.eta = self.start
        self.reference, self.required_slope = reference_and_slope(self.rules, self.loss, self.slope)
        self.final_loss = self.loss

    @property
    def running(self) -> bool:
        """Whether there is another trial to make."""
        return not self.outcome

    @property
    def accepted(self) -> bool:
        """Whether a step was accepted."""
        return self.outcome == ACCEPTED

    @property
    def required(self) -> float:
        """The decrease that the test asks for: c η s, or 0 if rounding would hide it."""
        decrease = self.rules["c"] * self.eta * self.required_slope
        return 0.0 if self.eta < self.hidden else visible(decrease, self.resolution)

    def judge(self, trial_loss: float) -> None:
        """Accept the current step or shrink it; the last rejection ends the search with a step of 0."""
        self.trials += 1
        if math.isfinite(trial_loss) and trial_loss <= self.reference - self.required:
            self.accept(trial_loss)
            return
        self.eta *= self.rules["backtrack"]
        if self.trials >= self.rules["max_trials"] or self.eta < self.rules["eta_min"]:
            self.outcome, self.eta = EXHAUSTED, 0.0

    def accept(self, loss: float) -> None:
        """End the search at the current step, which gave ``loss``."""
        self.outcome, self.final_loss = ACCEPTED, loss

    def remember(self) -> None:
        """Write the unit's memory. After a failed search the remembered step is β times the first step tried."""
        r = self.rules
        r["average"], r["average_weight"] = zhang_hager(r, self.loss)
        if self.accepted:
            decrease = self.loss - self.final_loss
            r["step_size"] = self.eta
            r["backtracks"] = max(r["backtracks"] + self.trials - 2, 0)
            r["mean_decrease"] = _mean(r["mean_decrease"], decrease, r["smoothing"])
            r["mean_slope"] = _mean(r["mean_slope"], self.slope, r["smoothing"])
        else:
            r["step_size"] = r["backtrack"] * self.start
            r["backtracks"] += 1


def visible(decrease: float, resolution: float) -> float:
    """The decrease that a test may ask for: 0 if it is smaller than the loss can show."""
    return 0.0 if decrease < resolution else decrease


def size_of_weights(*rms: float) -> float:
    """What ``trust`` bounds a step by: the largest of RMS(w_u) and RMS(w), :data:`LEAST_RMS` at least."""
    return max(*rms, LEAST_RMS)


def uniform(seed: str, unit: str) -> float:
    """A number in [0, 1), drawn for one unit and one mini-batch, for ``initial="random"``."""
    return random.Random(f"{seed}-{unit}").random()


def initial_step(
    rules: MutableMapping, loss: float, slope: float, cap: float, *, uniform: float = 0.5, warm: float | None = None
) -> float:
    """First step to try, ``cap`` at most.

    ``warm``: the argument of this name, γ · last if there is none; ``reset``: the cap; ``polyak``: f/(c_p s) βˡ;
    ``random``: log-uniform by ``uniform`` in [0, 1).
    """
    rule, warm = rules["initial"], rules["growth"] * rules["step_size"] if warm is None else warm
    if rule == "polyak":
        polyak = max(loss, 0.0) / (rules["polyak_c"] * slope) * rules["backtrack"] ** rules["backtracks"]
        return min(cap, polyak or cap)
    if rule == "random":
        low = min(max(rules["eta_min"], cap * 1e-4), cap)
        return low * (cap / low) ** uniform
    if rule == "warm" and warm:
        return min(cap, max(warm, last_step(rules, cap)))
    return min(cap, rules["eta_init"] or cap) if rule == "warm" else cap


def last_step(rules: MutableMapping, cap: float) -> float:
    """β^(K − 1) · cap, the last trial of a search that starts at the cap; no warm search starts below."""
    return cap * rules["backtrack"] ** (rules["max_trials"] - 1)


def reference_and_slope(rules: MutableMapping, loss: float, slope: float) -> tuple[float, float]:
    """R and the slope of the test.

    ``monotone``: f and s. ``nonmonotone``: max(C, f) and s, C the Zhang-Hager average. ``smoothed``: the
    SaLSA test b h + (1−b)(f − f') ≥ c η (b s̄ + (1−b) s), solved for f' with r = b / (1−b).
    """
    if rules["reference"] == "nonmonotone":
        return max(zhang_hager(rules, loss)[0], loss), slope
    if rules["reference"] == "smoothed":
        r = rules["smoothing"] / (1 - rules["smoothing"])
        return loss + r * rules["mean_decrease"], slope + r * rules["mean_slope"]
    return loss, slope


def zhang_hager(rules: MutableMapping, loss: float) -> tuple[float, float]:
    """C ← (ξ Q C + f) / Q⁺ and Q⁺ = ξ Q + 1."""
    carried = rules["nonmonotone_weight"] * rules["average_weight"]
    return (carried * rules["average"] + loss) / (carried + 1), carried + 1


def schedule_next_search(rules: MutableMapping, every: int | str) -> None:
    """Set the count at which the unit searches next; call it after a step that searched, with ``count`` increased.

    An integer N searches in every N-th step. ``"auto"`` is SaLSA's rule, which searches rarely while the steps do not
    change: with fast and slow means of the step size (weights 0.9 and 0.99) and r the larger over the smaller, the
    next search comes after ⌊1 / (r - 1)⌋ steps, at least 1 and at most 10.
    """
    if every != "auto":
        rules["next_search"] = rules["count"] + int(every) - 1
        return
    step, has_means = float(rules["step_size"]), rules["mean_step_slow"] > 0
    rules["mean_step_fast"] = _mean(rules["mean_step_fast"], step, 0.9) if has_means else step
    rules["mean_step_slow"] = _mean(rules["mean_step_slow"], step, 0.99) if has_means else step
    low, high = sorted((rules["mean_step_fast"], rules["mean_step_slow"]))
    change = high / low - 1 if low > 0 else math.inf
    wait = LONGEST_WAIT if change <= 1 / LONGEST_WAIT else max(1, int(1 / change))
    rules["next_search"] = rules["count"] - 1 + wait


def _mean(old: float, new: float, weight: float) -> float:
    return weight * old + (1 - weight) * new
