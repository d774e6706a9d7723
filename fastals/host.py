"""Searches that the host drives: plain torch passes over flat buffers, and a read of the loss after every trial.

:mod:`fastals.device` has the same verbs as fused kernels.
"""

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import NamedTuple

import torch
from torch import Tensor

from fastals.buffers import Gradients, Unit, unit_groups
from fastals.distributed import Processes
from fastals.learned import ALL_UNITS
from fastals.losses import Losses
from fastals.passes import Passes, Scratch, Sums
from fastals.relay import (
    first_factor,
    known_step,
    last_scale,
    next_factor,
    recalled_step,
    scale_of,
    searched_step,
    unshortened,
    usual_length,
    warm_step,
)
from fastals.repeatable import reconsider, replay_outdated
from fastals.replicas import refuse_drift, share
from fastals.report import EXHAUSTED, KEPT, NOT_DESCENT, StepReport, UnitReport
from fastals.schedule import Schedule, is_first
from fastals.search import MEMORY, Search, initial_step, size_of_weights, uniform, visible
from fastals.settings import Settings


class HostUnits:
    """The units of a model, with the buffers of searches on the host."""

    fused = False

    def __init__(self, groups: Sequence[dict], settings: Settings, state: dict, processes: Processes) -> None:
        adam, averages = settings.direction == "adam", settings.momentum != "none"
        self.settings = settings
        self.units = [
            Unit(members, state, adam=adam, averages=averages, share=partial(share, processes=processes.size))
            for members in unit_groups(groups)
        ]
        kinds = {(unit.dtype, unit.device) for unit in self.units}
        scratch = {kind: Scratch(*kind) for kind in kinds}
        self.passes = {unit: Passes(unit, scratch[unit.dtype, unit.device]) for unit in self.units}
        for unit in self.units:
            unit.show_known(state)

    def begin(self, losses: Losses, units: list[Unit], start: Tensor, seed: str) -> "HostBatch":
        """Start a mini-batch at f(w_t) = ``start`` with the units that have gradients, in forward order."""
        return HostBatch({unit: self.passes[unit] for unit in units}, losses, self.settings, start, seed)


class Aim(NamedTuple):
    """A direction that was measured: its slope, the largest step if ``lr`` is 1, the step below which moves may hide.

    ``scale`` is the step of which the relative step is a share, see :mod:`fastals.relay`.
    """

    slope: float
    largest: float
    hidden: float
    scale: float
    lr: float

    @property
    def cap(self) -> float:
        """The largest step."""
        return self.lr * self.largest

    @property
    def descends(self) -> bool:
        """Whether a step may be tried."""
        return 0 < self.slope < math.inf and self.cap > 0


@dataclass(slots=True)
class Move:
    """The outcome of one unit: its search if there was one, and the step it stands at."""

    eta: float
    slope: float
    outcome: str
    trials: int = 0
    search: Search | None = None
    scale: float = 0.0
    relative_step: float | None = None


class HostBatch:
    """One mini-batch under search: the current loss, the moves made so far, and how to undo them.

    Attributes:
        loss: f at the current weights, NaN while it is unknown.
        at: the step at which the parameters of each unit stand, 0 if none is noted.
        measured: what the passes over the weights have summed up so far.
        whole: whether all units are measured.
    """

    def __init__(
        self, passes: dict[Unit, Passes], losses: Losses, settings: Settings, start: Tensor, seed: str
    ) -> None:
        """Start from f(w_t) = ``start``; measure the units, unless a pass is to move them that measures them too."""
        self.passes, self.losses, self.settings, self.seed = passes, losses, settings, seed
        self.units, self.random = list(passes), random.Random(seed)
        self.start = self.loss = float(start)
        self.resolution = torch.finfo(start.dtype).eps * abs(self.start) / 2
        self.usual = usual_length(settings.schedule, settings.direction)
        self.gradients = Gradients(self.units)
        for unit in self.units:
            passes[unit].begin()
        self._clip(settings.max_grad_norm)
        self.at: dict[Unit, float] = {}
        self.measured: dict[Unit, Sums] = {}
        self.moves: dict[Unit, Move] = {}
        self.proposed: dict[Unit, Search] = {}  # their units move together
        self.joint_trials, self.factor, self.may_grow = 0, 1.0, False
        self.whole = settings.schedule != "relay" or is_first([unit.rules for unit in self.units])
        if self.whole:
            self._measure(dict.fromkeys(self.units, 0.0))

    def _clip(self, max_grad_norm: float | None) -> None:
        """Scale by min(1, max_grad_norm / ‖g‖); by 1 if the norm is not finite: units with such gradients stay."""
        if max_grad_norm is None:
            return
        own = math.hypot(*(passes.gradient_norm() for passes in self.passes.values()))
        processes = self.losses.processes
        norm = math.sqrt(processes.total([own**2], "norm")[0]) if processes.several else own
        scale = min(1.0, max_grad_norm / (norm + 1e-6)) if math.isfinite(norm) else 1.0
        for passes in self.passes.values():
            passes.grad_scale = scale

    def check_replay(self, loss: Tensor) -> None:
        """Correct what is known of the cache if it no longer holds."""
        if replay_outdated(self.losses, loss):
            reconsider(self.losses, loss)

    def run(self, schedule: Schedule, order: str) -> None:
        """Make the searches of the schedule."""
        schedule(self, order)

    def propose(self, unit: Unit) -> None:
        """Set the unit's first step, if its direction descends."""
        aim, rules = self._aim(unit), unit.rules
        self.moves[unit] = Move(0.0, aim.slope, NOT_DESCENT, scale=aim.scale)
        warm = None
        if self.settings.schedule == "relay":
            aim, warm = aim._replace(lr=1.0), warm_step(rules, aim.scale)
        if aim.descends:
            drawn = uniform(self.seed, unit.name)
            start = initial_step(rules, self.loss, aim.slope, aim.cap, uniform=drawn, warm=warm)
            self.proposed[unit] = self._search_from(unit, aim, start)

    def _search_from(self, unit: Unit, aim: Aim, start: float) -> Search:
        return Search(unit.rules, self.loss, aim.slope, start, resolution=self.resolution, hidden=aim.hidden)

    def _measure(self, moves: Mapping[Unit, float]) -> None:
        """Sum up the directions that are tested, averaged ones if asked for and they descend; move on the way."""
        tested = self.settings.momentum == "tested"
        self._survey(moves, averaged=tested)
        if tested and (ascending := [unit for unit in moves if not self.measured[unit].slope > 0]):
            self._survey(dict.fromkeys(ascending, 0.0), averaged=False)
            self.at.update({unit: math.nan for unit in ascending if moves[unit]})

    def _survey(self, moves: Mapping[Unit, float], *, averaged: bool) -> None:
        """Sum up the directions, over all processes."""
        self.gradients.check()
        for unit, move in moves.items():
            self.measured[unit], self.at[unit] = self.passes[unit].survey(averaged, move), move
        processes = self.losses.processes
        if processes.several:
            own = [number for unit in moves for number in self.measured[unit].squared()]
            total = processes.total(own, f"sums of {[unit.name for unit in moves]}")
            for i, unit in enumerate(moves):
                mine, all_sums = self.measured[unit], total[i * len(Sums._fields) : (i + 1) * len(Sums._fields)]
                self.measured[unit] = Sums.of_squared(all_sums)
                refuse_drift(processes, unit.name, unit.shares, mine.squared()[1::2], all_sums[1::2])

    def _aim(self, unit: Unit) -> Aim:
        """The bounds of the unit's step by its sums."""
        if unit not in self.measured:
            self._measure({unit: 0.0})
        rules, measured = unit.rules, self.measured[unit]
        weights, slope, length = measured.weight_rms, measured.slope, measured.length
        largest, scale, hidden = rules["eta_max"], 0.0, 0.0
        if length > 0:
            rms, divisor = self._weight_rms(unit), max(length, self.usual)
            scale, hidden = scale_of(rms, length, self.usual), unit.rounding * weights / length
            if rules["trust"] is not None:
                largest = min(largest, rules["trust"] * rms / divisor)
        return Aim(slope, largest, hidden, scale, float(rules["lr"]))

    def _weight_rms(self, unit: Unit) -> float:
        """The size of the weights; that of the unit's last step as long as not all units are measured."""
        own = self.measured[unit].weight_rms
        if self.whole:
            return size_of_weights(own, self.all_weights_rms)
        return size_of_weights(unit.rules["weight_rms"] or own)

    @cached_property
    def all_weights_rms(self) -> float:
        """RMS of the weights of all units, which have been measured."""
        total = math.hypot(*(self.measured[unit].weights for unit in self.units))
        return total / math.sqrt(max(sum(self.measured[unit].elements for unit in self.units), 1))

    def _place(self, unit: Unit, eta: float) -> None:
        """Put the unit at w − η d, unless it stands there."""
        if self.at.get(unit, 0.0) != eta:
            if eta:
                self.gradients.check()
            self.passes[unit].trial(eta)
            self.at[unit] = eta

    def search(self, unit: Unit, *, record: bool = False, put_back: bool = False) -> None:
        """Backtrack from the unit's first step until the loss has fallen enough, the others frozen."""
        if self.losses.learned.own_writes:
            self.hold()  # the forward writes trained weights, perhaps those of other units
        self.propose(unit)
        if unit not in self.proposed:
            return
        search = self.proposed.pop(unit)
        while search.running:
            self._place(unit, search.eta)
            search.judge(float(self.losses.at(unit.name, unit.active_params(), record=record)))
        if put_back or not search.accepted:
            self._place(unit, 0.0)
            self.losses.put_back(unit.active_params())
        else:
            self.losses.adopt()
        if put_back and search.accepted:
            self.proposed[unit] = search
        self.loss = self.start if put_back else search.final_loss
        self.moves[unit].trials = search.trials
        self._note(unit, search, search.eta)

    def move_together(self, *, once: bool = False) -> bool:
        """Move all proposed units by a common factor of their steps; True if one is accepted or no unit is proposed."""
        searches, self.proposed = self.proposed, {}
        if not searches:
            return True
        self._move(searches, 1.0, tries=1 if once else self.units[0].rules["max_trials"], credit=once)
        return self.factor > 0

    def move_by_remembered(self) -> None:
        """Move all units by their relative steps and one common factor, tested jointly."""
        rules = self.units[0].rules
        factor, self.proposed = first_factor(rules), {}
        steps = {unit: self._expect(unit, factor) for unit in self.units}
        for unit in self.measured:
            self._place(unit, steps[unit])
        self._measure({unit: step for unit, step in steps.items() if unit not in self.measured})
        self.whole = True
        searches = {unit: search for unit in self.units if (search := self._recall(unit, factor)) is not None}
        if searches:
            self._move(searches, factor, tries=rules["max_trials"], credit=True)

    def _expect(self, unit: Unit, factor: float) -> float:
        """The unit's step, as far as it is known before it is measured."""
        rules, searched = unit.rules, self.moves.get(unit)
        relative_step, trials = rules["relative_step"], 0
        scale = last_scale(rules, self.usual)
        if searched is not None and searched.search is not None:
            relative_step, trials = searched_step(rules, searched.search, searched.scale), searched.trials
            scale = searched.scale
        self.moves[unit] = Move(0.0, math.nan, NOT_DESCENT, trials, scale=scale, relative_step=relative_step)
        return factor * known_step(rules, relative_step, scale)

    def _recall(self, unit: Unit, factor: float) -> Search | None:
        """A search that stands at the relative step, to which the unit is put; None if the direction does not descend.

        All units are measured.
        """
        aim, move = self._aim(unit), self.moves[unit]
        move.slope, step, search = aim.slope, 0.0, None
        if aim.descends:
            assert move.relative_step is not None
            step = recalled_step(unit.rules, move.relative_step, move.scale or aim.scale, aim.largest)
            search = self._search_from(unit, aim, step)
            search.trials = move.trials
        self._place(unit, factor * step)
        return search

    def _move(self, searches: dict[Unit, Search], factor: float, tries: int, *, credit: bool) -> None:
        """Test the units jointly, note the outcome and, if asked to, credit every unit with its part."""
        start = self.loss
        self.factor = self._common_factor(searches, factor, tries)
        moved = {unit: self.factor * search.eta for unit, search in searches.items()}
        if credit and self.factor:
            self._credit(searches, start)
        for unit, eta in moved.items():
            self._note(unit, searches[unit], eta)

    def _credit(self, searches: Mapping[Unit, Search], start: float) -> None:
        """Give every unit its step and its part of the decrease of the loss from ``start``."""
        parts = [search.required for search in searches.values()]
        for search, part in zip(searches.values(), parts, strict=True):
            search.eta *= self.factor
            search.accept(start - (start - self.loss) * (part / sum(parts) if part else 0.0))

    def _common_factor(self, searches: Mapping[Unit, Search], factor: float, tries: int) -> float:
        """First of a, β a, β² a … with f(w_t − factor η d) ≤ R − factor Σ c η s; 0 puts all units back."""
        reference = max(s.reference for s in searches.values())
        required = sum(s.required for s in searches.values())
        for _ in range(tries):
            self.joint_trials += 1
            for unit, search in searches.items():
                self._place(unit, factor * search.eta)
            loss = float(self.losses.at(ALL_UNITS, [p for unit in searches for p in unit.active_params()]))
            if math.isfinite(loss) and loss <= reference - visible(factor * required, self.resolution):
                shown = unshortened(self.units[0].rules) * factor * required
                self.loss, self.may_grow = loss, loss <= reference - visible(shown, self.resolution)
                return factor
            factor *= self.units[0].rules["backtrack"]
        for unit in searches:
            self._place(unit, 0.0)
            self.losses.put_back(unit.active_params())
        return 0.0

    def _note(self, unit: Unit, search: Search, eta: float) -> None:
        """Note the outcome of a finished search and the step of the unit, 0 if it has not moved."""
        move = self.moves[unit]
        move.eta, move.search, move.outcome = eta, search, search.outcome if eta else EXHAUSTED

    def keep(self, unit: Unit) -> None:
        """Move the unit by its remembered step, untested."""
        aim = self._aim(unit)
        eta = min(aim.cap, unit.rules["step_size"]) if aim.descends else 0.0
        self.loss = math.nan if eta else self.loss
        self.moves[unit] = Move(eta, aim.slope, KEPT if eta else NOT_DESCENT)
        self._place(unit, eta)

    def follow_momentum(self) -> None:
        """Carry the accepted steps over to the averaged direction; the new point is not tested."""
        for unit in self.units:
            move = self.moves[unit]
            if move.eta:
                self.gradients.check()
                self.passes[unit].averaged = True
                self.passes[unit].trial(move.eta)
                self.loss = math.nan

    def prepare(self) -> None:
        """Check what :meth:`commit` reads.

        Raises:
            RuntimeError: a trial changed the gradients.
        """
        self.gradients.check()

    def commit(self, state: dict) -> None:
        """Advance moments and memory; the parameters have moved already."""
        for unit, passes in self.passes.items():
            move = self.moves[unit]
            if not math.isfinite(move.slope):
                continue  # a non-finite gradient must not reach the moments
            passes.commit(state, move.eta)
            if move.search is not None:
                move.search.remember()
            if move.relative_step is not None:
                self._remember_scale(unit, move.relative_step)
        if self.settings.schedule == "relay" and self.joint_trials:
            self._remember_factor()
        for unit in self.units:
            for group in unit.groups[1:]:  # the groups of a merged unit remember alike
                group.update({k: unit.rules[k] for k in MEMORY})

    def _remember_scale(self, unit: Unit, relative_step: float) -> None:
        """Write what the next move by the relative step needs; a direction of 0 tells nothing."""
        unit.rules["relative_step"] = relative_step
        if self.measured[unit].length > 0:
            unit.rules["direction_rms"], unit.rules["weight_rms"] = self.measured[unit].length, self._weight_rms(unit)

    def _remember_factor(self) -> None:
        factor = next_factor(self.units[0].rules, self.factor, self.joint_trials, self.may_grow)
        for unit in self.units:
            unit.rules["factor"] = factor

    def hold(self) -> None:
        """Keep the weights of all units, before something else than a trial moves them."""
        for passes in self.passes.values():
            passes.hold()

    def restore(self) -> None:
        """Put every unit back to w_t, bitwise."""
        for passes in self.passes.values():
            passes.trial(0.0)

    def rewind(self) -> None:
        """Put every unit back to w_t, and go on from there."""
        self.restore()
        for unit in self.units:
            self.losses.put_back(unit.active_params())

    def report(self) -> StepReport:
        """The outcome of every unit, in forward order."""
        moves = [(unit.name, self.moves[unit]) for unit in self.units]
        reports = [UnitReport(name, move.eta, move.slope, move.trials, move.outcome) for name, move in moves]
        return StepReport(self.start, self.loss, reports, self.joint_trials, self.factor)
