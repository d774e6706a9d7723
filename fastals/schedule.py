"""Which units are searched in one step, and how their steps are put together.

A schedule is written in the verbs of a mini-batch and never looks at a loss or a step size, so that the same lines
drive searches on the host and on the device.
"""

import random
from collections.abc import Callable
from typing import Protocol

from fastals.buffers import Unit

ORDERS = ("top_down", "bottom_up", "random")


class Searches(Protocol):
    """A mini-batch as a schedule sees it; ``units`` stand in forward order."""

    units: list[Unit]
    random: random.Random

    def search(self, unit: Unit, *, record: bool = False, put_back: bool = False) -> None:
        """Backtrack from the unit's first step until the loss has fallen enough, the others frozen.

        ``record`` keeps the activations of the accepted trial for the searches to come; ``put_back`` leaves the
        unit at w_t, its step to be used by :meth:`move_together`.
        """

    def propose(self, unit: Unit) -> None:
        """Set the unit's first step, untested."""

    def move_together(self, *, once: bool) -> bool:
        """Move all units by a common factor 1, β, β² … of their steps, tested jointly; whether one was accepted.

        With ``once`` only the factor 1 is tried, and every unit is credited with its part of the decrease.
        """

    def keep(self, unit: Unit) -> None:
        """Move the unit by its remembered step, untested."""


def sweep(batch: Searches, order: str) -> None:
    """Search every unit in turn, each from where the ones before it stand now."""
    left = _in_order(batch, order)
    while left:
        unit = left.pop(0)
        above = any(batch.units.index(other) > batch.units.index(unit) for other in left)
        batch.search(unit, record=above)


def independent(batch: Searches, order: str) -> None:
    """Search every unit from w_t with the others at w_t, then move all by one common, jointly tested factor."""
    for unit in _in_order(batch, order):
        batch.search(unit, put_back=True)
    batch.move_together(once=False)


def cycle(batch: Searches, order: str) -> None:
    """Search one unit per step and move the others by their remembered steps, untested (PLASLS)."""
    if _first_step(batch):
        sweep(batch, order)
        return
    turn = batch.units[batch.units[0].rules["count"] % len(batch.units)]
    batch.search(turn)
    for unit in batch.units:
        if unit is not turn:
            batch.keep(unit)


def joint(batch: Searches, order: str) -> None:
    """Try all remembered steps at once; sweep only if that fails."""
    if not _first_step(batch):
        for unit in batch.units:
            batch.propose(unit)
        if batch.move_together(once=True):
            return
    sweep(batch, order)


def keep(batch: Searches) -> None:
    """Move every unit by its remembered step without a trial."""
    for unit in batch.units:
        batch.keep(unit)


def _in_order(batch: Searches, order: str) -> list[Unit]:
    """The units in the order of their searches; ``random`` draws a new one every step."""
    if order == "random":
        return batch.random.sample(batch.units, len(batch.units))
    return batch.units[::-1] if order == "top_down" else list(batch.units)


def _first_step(batch: Searches) -> bool:
    return any(not unit.rules["count"] for unit in batch.units)


Schedule = Callable[[Searches, str], None]
SCHEDULES: dict[str, Schedule] = {"sweep": sweep, "independent": independent, "cycle": cycle, "joint": joint}
