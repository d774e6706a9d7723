"""Units that do not move: a line search that takes no step looks like one that trains, unless someone says so."""

import warnings
from collections import Counter
from collections.abc import Collection

from fastals.report import EXHAUSTED, NOT_DESCENT, StepReport

PATIENCE = 20  # steps in a row without a move
ADVICE = {
    EXHAUSTED: "every trial raised the loss or lowered it by too little. Look whether the closure returns the loss "
    "that the gradients belong to, whether something scales the gradients, and whether c is too close to 1; or the "
    "loss cannot fall any further",
    NOT_DESCENT: "no step was tried, because the gradient is zero or not finite, or weight decay outweighs it. Look "
    "whether the loss depends on these weights",
}


class Standstill:
    """Counts, by unit, the steps in a row in which it took part and did not move, and warns when they are many.

    A unit is named once, and again only after it has moved in between. Steps in which its ``lr`` is 0 do not count:
    that is the user's wish.
    """

    def __init__(self) -> None:
        self._steps: Counter[str] = Counter()

    def note(self, report: StepReport, resting: Collection[str] = ()) -> None:
        """Count a step, the units ``resting`` being those whose ``lr`` is 0."""
        long: dict[str, list[str]] = {outcome: [] for outcome in ADVICE}
        for unit in report.units:
            if unit.step_size:
                del self._steps[unit.name]
            elif unit.name not in resting:
                self._steps[unit.name] += 1
                if self._steps[unit.name] == PATIENCE:
                    long[unit.outcome].append(unit.name)
        for outcome, names in long.items():
            if names:
                _warn(names, outcome)


def _warn(names: list[str], outcome: str) -> None:
    who = ", ".join(map(repr, names))
    warnings.warn(
        f"fastals: {PATIENCE} steps in a row have not moved {who} ({outcome}): {ADVICE[outcome]}",
        stacklevel=11,  # where the user has asked for the step
    )
