"""Which units are searched in one step, and how their steps are put together.

A schedule is written in the verbs of a :class:`Batch` and never looks at a loss or a step size, so that the same lines
drive searches on the host, on the device and while a step is recorded.
"""

import random
from collections.abc import Callable, MutableMapping, Sequence
from typing import Protocol

from torch import Tensor

from fastals.buffers import Gradients, Unit
from fastals.losses import Losses
from fastals.report import StepReport
from fastals.search import LONGEST_WAIT

ORDERS = ("top_down", "bottom_up", "random")


class Batch(Protocol):
    """A mini-batch under search: the verbs of the schedules and those of the step around them.

    Attributes:
        losses: evaluates the loss of this mini-batch.
        gradients: those of this step.
        units: those that have a gradient, in forward order.
        random: draws the order of the searches.
        seed: seeds the numbers drawn for this step.
    """

    losses: Losses
    gradients: Gradients
    units: list[Unit]
    random: random.Random
    seed: str

    def run(self, schedule: "Schedule", order: str) -> None:
        """Make the searches of the schedule."""

    def search(self, unit: Unit, *, record: bool = False, put_back: bool = False) -> None:
        """Backtrack from the unit's first step until the loss has fallen enough, the others frozen.

        ``record`` keeps the activations of the accepted trial for the searches to come; ``put_back`` leaves the
        unit at w_t, its step to be used by :meth:`move_together`.
        """

    def propose(self, unit: Unit) -> None:
        """Set the unit's first step, untested, if its direction descends."""

    def move_together(self, *, once: bool = False) -> bool:
        """Move all units by a common factor 1, β, β² … of their steps, tested jointly; whether one was accepted.

        It returns True if no unit has a step, and False while a step is recorded. With ``once`` only 1 is tried, and
        every unit is credited with its part of the decrease.
        """

    def move_by_remembered(self) -> None:
        """Move all units by their relative steps and a common factor a, β a, β² a …, tested jointly.

        The relative step of a unit that was searched in this step is the mean of the remembered and the found one; a
        is the factor that the last joint tests have left. The first trial is made in the pass that measures the
        units. Every unit is credited with its part of the decrease. No search may follow in this step.
        """

    def keep(self, unit: Unit) -> None:
        """Move the unit by its remembered step, untested."""

    def follow_momentum(self) -> None:
        """Carry the accepted steps over to the averaged direction; the new point is not tested."""

    def check_replay(self, loss: Tensor) -> None:
        """Check whether the closure is repeatable and still as the cache assumes; f(w_t) is ``loss``."""

    def prepare(self) -> None:
        """Do what may fail before :meth:`commit`.

        Raises:
            RuntimeError: a trial changed the gradients.
        """

    def commit(self, state: dict) -> None:
        """Advance moments and memory and enter them in the optimizer's state; the parameters have moved already."""

    def hold(self) -> None:
        """Keep the weights of all units, before something else than a trial moves them."""

    def restore(self) -> None:
        """Put every unit back to w_t, bitwise."""

    def rewind(self) -> None:
        """Put every unit back to w_t, and go on from there."""

    def report(self) -> StepReport | Callable[[], StepReport]:
        """The outcome of the step, or a function that waits for the device and reads it."""


Schedule = Callable[[Batch, str], None]


def sweep(batch: Batch, order: str) -> None:
    """Search every unit in turn; a search starts from the weights that the searches before it have left."""
    left = _in_order(batch, order)
    while left:
        unit = left.pop(0)
        above = any(batch.units.index(other) > batch.units.index(unit) for other in left)
        batch.search(unit, record=above)  # the searches above replay this unit's new activations


def independent(batch: Batch, order: str) -> None:
    """Search every unit from w_t with the others at w_t, then move all by one common, jointly tested factor."""
    for unit in _in_order(batch, order):
        batch.search(unit, put_back=True)
    batch.move_together(once=False)


def cycle(batch: Batch, order: str) -> None:
    """Search one unit per step and move the others by their remembered steps, untested (PLASLS)."""
    if _first_step(batch):
        sweep(batch, order)
        return
    turn = _turn(batch)
    batch.search(turn)
    for unit in batch.units:
        if unit is not turn:
            batch.keep(unit)


def turn_of(rules: Sequence[MutableMapping]) -> int:
    """Index of the unit that :func:`cycle` and :func:`relay` search in this step: the one searched the longest ago."""
    return min(range(len(rules)), key=lambda i: rules[i]["last_search"])


def is_first(rules: Sequence[MutableMapping]) -> bool:
    """Whether a unit makes its first step, so that all are searched."""
    return any(not r["count"] for r in rules)


def is_due(rules: Sequence[MutableMapping], every: int | str, *, turns: bool) -> bool:
    """Whether the step of these units searches, by the last search of any, or because the turn of one is overdue."""
    due = is_first(rules) or any(r["count"] >= r["next_search"] for r in rules)
    return due or (turns and _is_overdue(rules, every))


def _is_overdue(rules: Sequence[MutableMapping], every: int | str) -> bool:
    """Whether a unit was never searched, or not for twice the steps in which all have their turn.

    Otherwise a unit without a gradient in every other mini-batch would miss all its turns.
    """
    longest = 2 * len(rules) * (LONGEST_WAIT if every == "auto" else int(every))
    return any(not r["last_search"] or r["count"] - r["last_search"] >= longest for r in rules)


def note_turn(units: Sequence[Sequence[MutableMapping]]) -> None:
    """Note in the groups of the units, before the step is counted, which of them it has searched."""
    rules = [groups[0] for groups in units]
    for groups in units if is_first(rules) else [units[turn_of(rules)]]:
        for group in groups:
            group["last_search"] = group["count"] + 1


def joint(batch: Batch, order: str) -> None:
    """Try all remembered steps at once; sweep only if that fails."""
    if not _first_step(batch):
        for unit in batch.units:
            batch.propose(unit)
        if batch.move_together(once=True):
            return
    sweep(batch, order)


def relay(batch: Batch, order: str) -> None:
    """Search one unit alone to learn its step, then move all by their remembered steps, tested jointly."""
    for unit in _in_order(batch, order) if _first_step(batch) else [_turn(batch)]:
        batch.search(unit, put_back=True)
    move_by_remembered(batch, order)


def move_by_remembered(batch: Batch, order: str) -> None:
    """Move all units by their remembered steps, tested jointly; a step of :func:`relay` that searches no unit."""
    del order
    batch.move_by_remembered()


def keep_all(batch: Batch, order: str) -> None:
    """Move every unit by its remembered step, untested; a step that does not search."""
    del order
    for unit in batch.units:
        batch.keep(unit)


def _in_order(batch: Batch, order: str) -> list[Unit]:
    """The units in the order of their searches; ``random`` draws a new one every step."""
    if order == "random":
        return batch.random.sample(batch.units, len(batch.units))
    return batch.units[::-1] if order == "top_down" else list(batch.units)


def _turn(batch: Batch) -> Unit:
    return batch.units[turn_of([unit.rules for unit in batch.units])]


def _first_step(batch: Batch) -> bool:
    return is_first([unit.rules for unit in batch.units])


SCHEDULES: dict[str, Schedule] = {
    "relay": relay,
    "sweep": sweep,
    "independent": independent,
    "cycle": cycle,
    "joint": joint,
}
#: The schedules that do something else than :func:`keep_all` in a step that does not search.
BETWEEN: dict[str, Schedule] = {"relay": move_by_remembered}
