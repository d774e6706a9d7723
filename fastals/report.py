"""What one step did: losses, and per unit the step size, slope, trials and outcome."""

from dataclasses import asdict, dataclass, field
from typing import Any

ACCEPTED = "accepted"  # a trial passed the test
EXHAUSTED = "exhausted"  # no trial passed; the unit is back at its old weights
NOT_DESCENT = "not_descent"  # slope <= 0 or not finite, or lr = 0; no step was tried
KEPT = "kept"  # moved by its remembered step without a test


@dataclass(frozen=True, slots=True)
class UnitReport:
    """One unit in one step.

    Attributes:
        name: as in :func:`fastals.units`.
        step_size: η of its move, with the common factor in schedules that have one; 0 if it did not move.
        slope: ⟨g, d⟩, what a unit of step size promises.
        trials: loss evaluations of its own search; 0 if it was not searched in this step, as most units in the relay.
            What its searches have found there, the relative step, is ``relative_step`` of its parameter group.
        outcome: of its move. ``accepted``: it has passed a test, alone or with the others. ``exhausted``: no trial has
            passed, and it is back at its old weights. ``not_descent``: the slope is not positive or not finite, or
            ``lr`` is 0, and no step was tried. ``kept``: it has moved by its remembered step without a test.
    """

    name: str
    step_size: float
    slope: float
    trials: int
    outcome: str


@dataclass(frozen=True, slots=True)
class StepReport:
    """One step on one mini-batch.

    Attributes:
        loss_before: f at the weights before the step.
        loss_after: the loss at the new weights under the same dropout masks. It is NaN if no trial was made there: a
            unit kept its remembered step, or moved along a momentum direction that was not tested.
        units: the reports of the units, in forward order.
        joint_trials: loss evaluations in which several units moved together.
        factor: the common factor of the steps that the joint test has accepted: 1 without such a test, 0 if it has
            put all units back.
        collectives: with several processes, the number of reductions that the step has made besides those of the
            closure and its backward; 0 after a graphed step.
        reduced_bytes: what this process has put into them.
    """

    loss_before: float
    loss_after: float
    units: list[UnitReport] = field(default_factory=list)
    joint_trials: int = 0
    factor: float = 1.0
    collectives: int = 0
    reduced_bytes: int = 0

    @property
    def trials(self) -> int:
        """Loss evaluations of the step: trials of single units and joint trials."""
        return self.joint_trials + sum(u.trials for u in self.units)

    def as_dict(self) -> dict[str, Any]:
        """Plain types, ready for JSON."""
        return asdict(self)
