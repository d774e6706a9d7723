"""What one step did: losses, and per unit the step size, slope, trials and outcome."""

from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

ACCEPTED = "accepted"  # a trial passed the test
EXHAUSTED = "exhausted"  # no trial passed; the unit stands where it stood
NOT_DESCENT = "not_descent"  # slope <= 0 or not finite; the unit was not tried
KEPT = "kept"  # moved by its remembered step, untested


@dataclass(frozen=True, slots=True)
class UnitReport:
    """One unit in one step; ``step_size`` is 0 where the unit did not move, ``trials`` counts loss evaluations."""

    name: str
    step_size: float
    slope: float
    trials: int
    outcome: str


@dataclass(frozen=True, slots=True)
class StepReport:
    """One step on one mini-batch, units in forward order.

    ``loss_after`` is the loss at the new weights under the same dropout masks; NaN where the new weights
    were never evaluated (steps that were kept or moved along an untested momentum direction).
    """

    loss_before: float
    loss_after: float
    units: list[UnitReport] = field(default_factory=list)
    joint_trials: int = 0

    @property
    def trials(self) -> int:
        """Loss evaluations of the searches: those of single units and those of all at once."""
        return self.joint_trials + sum(u.trials for u in self.units)

    def as_dict(self) -> dict[str, Any]:
        """Plain types, ready for JSON."""
        return asdict(self)


KEPT_REPORTS = 64


class Reports:
    """The reports of the last steps; that of a step on the device is read at the first look.

    Attributes:
        forwards: forward passes of the last step.
    """

    def __init__(self) -> None:
        self.forwards = 0.0
        self._last: deque[StepReport | Callable[[], StepReport]] = deque(maxlen=KEPT_REPORTS)

    def add(self, report: StepReport | Callable[[], StepReport], forwards: float) -> None:
        """Enter a step; a function is called at the first look."""
        self._last.append(report)
        self.forwards = forwards

    def read(self) -> list[StepReport]:
        """All of them, the oldest first."""
        found = [r if isinstance(r, StepReport) else r() for r in self._last]
        self._last = deque(found, maxlen=KEPT_REPORTS)
        return found

    def last(self) -> StepReport | None:
        """The last step's report, or None before the first."""
        if self._last and not isinstance(self._last[-1], StepReport):
            self._last[-1] = self._last[-1]()
        return self._last[-1] if self._last else None  # type: ignore[return-value]
