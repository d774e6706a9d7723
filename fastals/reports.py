"""The reports of the last steps; those that lie on the device are read on demand."""

from collections import deque
from collections.abc import Callable, Collection
from dataclasses import replace
from typing import NamedTuple

from fastals.report import StepReport
from fastals.standstill import Standstill

KEPT_REPORTS = 64


class Unread(NamedTuple):
    """The report of a step, or a function that reads it from the device, and what the host knows besides.

    ``resting`` are the units whose ``lr`` was 0, ``reduced`` the number of reductions and their bytes.
    """

    report: StepReport | Callable[[], StepReport]
    resting: Collection[str]
    reduced: tuple[int, int]

    def read(self) -> StepReport:
        """The report; waits for the device if it lies there."""
        report, (collectives, reduced_bytes) = self.report() if callable(self.report) else self.report, self.reduced
        return replace(report, collectives=collectives, reduced_bytes=reduced_bytes) if collectives else report


class Reports:
    """The reports of the last :data:`KEPT_REPORTS` steps.

    Attributes:
        forwards: forward passes of the last step.
    """

    def __init__(self) -> None:
        self.forwards = 0.0
        self._unread: list[Unread] = []
        self._read: deque[StepReport] = deque(maxlen=KEPT_REPORTS)
        self._standstill = Standstill()

    def add(
        self,
        report: StepReport | Callable[[], StepReport],
        forwards: float,
        resting: Collection[str] = (),
        reduced: tuple[int, int] = (0, 0),
    ) -> None:
        """Append a step's report, or a function that reads it from the device later."""
        self._unread.append(Unread(report, resting, reduced))
        self.forwards = forwards

    def look(self) -> None:
        """Warn of units that stand still, if the last report is here, or else before the oldest one goes."""
        if isinstance(self._unread[-1].report, StepReport) or len(self._unread) == KEPT_REPORTS:
            self.read()

    def read(self) -> list[StepReport]:
        """All reports, the oldest first."""
        steps, self._unread = [(step.read(), step.resting) for step in self._unread], []
        self._read += [report for report, _ in steps]
        for report, resting in steps:
            self._standstill.note(report, resting)
        return list(self._read)

    def last(self) -> StepReport | None:
        """The last step's report, or None before the first."""
        reports = self.read()
        return reports[-1] if reports else None
