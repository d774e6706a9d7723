"""Searches that the host drives: plain torch passes over flat buffers, and a read of the loss after every trial.

:mod:`fastals.device` has the same verbs as fused kernels.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fastals.buffers import Gradients, Unit, unit_groups
from fastals.kernels import plain
from fastals.learned import ALL_UNITS
from fastals.losses import Losses
from fastals.relay import first_factor, next_factor, recalled_step, searched_step, unshortened, usual_length, warm_step
from fastals.repeatable import reconsider, replay_outdated
from fastals.report import EXHAUSTED, KEPT, NOT_DESCENT, StepReport, UnitReport
from fastals.schedule import Schedule
from fastals.search import MEMORY, Search, initial_step, uniform, visible
from fastals.settings import Settings


class HostUnits:
    """The units of a model, with the buffers of searches on the host."""

    fused = False

    def __init__(self, groups: Sequence[dict], settings: Settings, state: dict) -> None:
        adam, averages = settings.direction == "adam", settings.momentum != "none"
        self.settings = settings
        self.units = [Unit(members, state, adam=adam, averages=averages) for members in unit_groups(groups)]
        widest = max(self.units, key=lambda unit: unit.dtype.itemsize)
        scratch = Scratch(max(unit.size for unit in self.units), widest.dtype, widest.device)
        together = settings.moves_together
        self.passes = {unit: Passes(unit, scratch, keep_direction=together) for unit in self.units}

    def begin(self, losses: Losses, units: list[Unit], start: Tensor, seed: str) -> "HostBatch":
        """Start a mini-batch at f(w_t) = ``start`` with the units that have gradients, in forward order."""
        return HostBatch({unit: self.passes[unit] for unit in units}, losses, self.settings, start, seed)


class Scratch:
    """Gradient, direction and work space of the unit that is searched now, as large as the largest unit."""

    def __init__(self, size: int, dtype: torch.dtype, device: torch.device) -> None:
        self.g, self.d, self.work = (torch.zeros(size, dtype=dtype, device=device) for _ in range(3))


class Passes:
    """The computations of a step over the buffers of one unit.

    Attributes:
        d: the direction that was written last, in the shared scratch or, with ``keep_direction``, in a buffer of the
            unit's own.
        weight_norm, weight_rms: norm and RMS of w_t over the parameters that have a gradient.
    """

    def __init__(self, unit: Unit, scratch: Scratch, *, keep_direction: bool) -> None:
        self.unit, self.scratch, self.keep_direction = unit, scratch, keep_direction
        self.kept: Tensor | None = None
        self.d = unit.w[:0]
        self.weight_norm = self.weight_rms = 0.0

    def snapshot(self) -> None:
        """Copy the weights of the parameters that have a gradient."""
        unit = self.unit
        unit.check()
        plain.snapshot(unit.pick_active(unit.params), unit.pick_active(unit.w_views))
        self.weight_norm = self._norm(unit.w)
        self.weight_rms = self.weight_norm / math.sqrt(max(unit.numel, 1))

    def gradient_norm(self) -> float:
        """‖g‖."""
        grads = [p.grad for p in self.unit.active_params() if p.grad is not None]
        return math.hypot(*(float(torch.linalg.vector_norm(g, dtype=self.unit.dtype)) for g in grads))

    def direct(self, averaged: bool, grad_scale: float) -> tuple[float, float]:
        """Write the direction; returns the slope ⟨g, d⟩ and the RMS of d over the entries with g ≠ 0."""
        if self.keep_direction and self.kept is None:
            self.kept = self.unit.buffer()
        self.d = self.scratch.d if self.kept is None else self.kept
        unit, g, d, segments = self.unit, self._gradient(), self.d, list(self.unit.segments())
        for s in segments:
            plain.direction(
                g[s.where],
                unit.m[s.where],
                unit.v[s.where],
                unit.w[s.where],
                out=d[s.where],
                scratch=self.scratch.work[s.where],
                adam=unit.adam,
                averaged=averaged,
                betas=s.group["betas"],
                eps=s.group["eps"],
                weight_decay=s.group["weight_decay"],
                count=s.count + 1,
                grad_scale=grad_scale,
            )
        moving = sum(int(torch.count_nonzero(g[s.where])) for s in segments)
        slope = sum(float(torch.dot(g[s.where], d[s.where])) for s in segments)
        return slope, self._norm(d) / math.sqrt(max(moving, 1))

    def trial(self, eta: float) -> None:
        """Put w − η d into the parameters; η = 0 restores them bitwise."""
        unit, weights = self.unit, self.unit.pick_active(self.unit.w_views)
        directions = unit.pick_active(unit.views(self.d)) if eta else weights
        plain.trial(unit.pick_active(unit.params), weights, directions, eta)

    def commit(self, state: dict, grad_scale: float, eta: float) -> None:
        """Advance moments, update counts and master weights; the parameters have moved already."""
        unit = self.unit
        for i in unit.active:
            if eta and unit.has_master(i):
                unit.w_views[i].sub_(unit.views(self.d)[i], alpha=eta)
        g = self._gradient()
        for s in unit.segments():
            plain.advance(
                g[s.where],
                unit.m[s.where],
                unit.v[s.where],
                adam=unit.adam,
                betas=s.group["betas"],
                grad_scale=grad_scale,
            )
        for i in unit.active:
            unit.count(i, state)

    def _gradient(self) -> Tensor:
        unit, g = self.unit, self.scratch.g
        plain.snapshot([unit.members[i][0].grad for i in unit.active], unit.pick_active(unit.views(g)))
        for gap in unit.gaps:  # the scratch may hold another unit's gradient there
            g[gap].zero_()
        return g

    def _norm(self, flat: Tensor) -> float:
        return math.hypot(*(float(torch.linalg.vector_norm(flat[s.where])) for s in self.unit.segments()))


class Aim(NamedTuple):
    """A direction that was written: its slope, the largest step if ``lr`` is 1, the step below which moves may hide.

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
    relative_step: float | None = None


class HostBatch:
    """One mini-batch under search: the current loss, the moves made so far, and how to undo them.

    ``loss`` is f at the current weights, NaN while it is unknown.
    """

    def __init__(
        self, passes: dict[Unit, Passes], losses: Losses, settings: Settings, start: Tensor, seed: str
    ) -> None:
        """Start from f(w_t) = ``start``: snapshot the weights, scale the gradients."""
        self.passes, self.losses, self.settings, self.seed = passes, losses, settings, seed
        self.units, self.random = list(passes), random.Random(seed)
        self.start = self.loss = float(start)
        self.resolution = torch.finfo(start.dtype).eps * abs(self.start) / 2
        self.gradients = Gradients(self.units)
        for unit in self.units:
            passes[unit].snapshot()
        total = math.hypot(*(passes[unit].weight_norm for unit in self.units))
        self.weight_rms = total / math.sqrt(max(sum(unit.numel for unit in self.units), 1))
        self.grad_scale = self._clipping(settings.max_grad_norm)
        self.moves: dict[Unit, Move] = {}
        self.proposed: dict[Unit, Search] = {}  # their units move together
        self.joint_trials, self.factor, self.may_grow = 0, 1.0, False

    def _clipping(self, max_grad_norm: float | None) -> float:
        """min(1, max_grad_norm / ‖g‖), or 1 if the norm is not finite: units with such gradients do not move."""
        if max_grad_norm is None:
            return 1.0
        norm = math.hypot(*(p.gradient_norm() for p in self.passes.values()))
        return min(1.0, max_grad_norm / (norm + 1e-6)) if math.isfinite(norm) else 1.0

    def check_replay(self, loss: Tensor) -> None:
        """Correct what is known of the cache if it no longer holds."""
        if replay_outdated(self.losses, loss):
            reconsider(self.losses, loss)

    def run(self, schedule: Schedule, order: str) -> None:
        """Make the searches of the schedule."""
        schedule(self, order)

    def propose(self, unit: Unit) -> None:
        """Set the unit's first step, if its direction descends."""
        aim, rules = self._aim_tested(unit), unit.rules
        self.moves[unit] = Move(0.0, aim.slope, NOT_DESCENT)
        warm = None
        if self.settings.schedule == "relay":
            aim, warm = aim._replace(lr=1.0), warm_step(rules, aim.scale)
        if aim.descends:
            drawn = uniform(self.seed, unit.name)
            start = initial_step(rules, self.loss, aim.slope, aim.cap, uniform=drawn, warm=warm)
            self.proposed[unit] = self._search_from(unit, aim, start)

    def recall(self, unit: Unit) -> None:
        """Set the unit's step to its relative step: the mean of the remembered and of a searched one."""
        aim, rules, searched = self._aim_tested(unit), unit.rules, self.moves.get(unit)
        relative_step, trials = rules["relative_step"], 0
        if searched is not None and searched.search is not None:
            relative_step, trials = searched_step(rules, searched.search, aim.scale), searched.trials
        self.moves[unit] = Move(0.0, aim.slope, NOT_DESCENT, trials, relative_step=relative_step)
        self.proposed.pop(unit, None)
        if aim.descends:
            start = recalled_step(rules, relative_step, aim.scale, aim.largest)
            self.proposed[unit] = self._search_from(unit, aim, start)
            self.proposed[unit].trials = trials

    def _search_from(self, unit: Unit, aim: Aim, start: float) -> Search:
        return Search(unit.rules, self.loss, aim.slope, start, resolution=self.resolution, hidden=aim.hidden)

    def _aim_tested(self, unit: Unit) -> Aim:
        """Aim along the direction that is tested: the averaged one if it is asked for and descends."""
        if self.settings.momentum == "tested":
            aim = self._aim(unit, averaged=True)
            if aim.slope > 0:
                return aim
        return self._aim(unit, averaged=False)

    def _aim(self, unit: Unit, *, averaged: bool) -> Aim:
        """Write the unit's direction."""
        self.gradients.check()
        rules, passes = unit.rules, self.passes[unit]
        slope, length = passes.direct(averaged, self.grad_scale)
        largest, scale, hidden = rules["eta_max"], 0.0, 0.0
        if length > 0:
            divisor = max(length, usual_length(self.settings.schedule, self.settings.direction))
            rms = max(passes.weight_rms, self.weight_rms)
            scale, hidden = rms / divisor, unit.rounding * passes.weight_rms / length
            if rules["trust"] is not None:
                largest = min(largest, rules["trust"] * rms / divisor)
        return Aim(slope, largest, hidden, scale, float(rules["lr"]))

    def search(self, unit: Unit, *, record: bool = False, put_back: bool = False) -> None:
        """Backtrack from the unit's first step until the loss has fallen enough, the others frozen."""
        self.propose(unit)
        if unit not in self.proposed:
            return
        search, passes = self.proposed.pop(unit), self.passes[unit]
        while search.running:
            passes.trial(search.eta)
            search.judge(float(self.losses.at(unit.name, unit.active_params(), record=record)))
        if put_back or not search.accepted:
            passes.trial(0.0)
            self.losses.put_back(unit.active_params())
        else:
            self.losses.adopt()
        if put_back and search.accepted:
            self.proposed[unit] = search
        self.loss = self.start if put_back else search.final_loss
        self.moves[unit].trials = search.trials
        self._note(unit, search, search.eta)

    def move_together(self, *, once: bool = False, remembered: bool = False) -> bool:
        """Move all proposed units by a common factor of their steps; True if one is accepted or no unit is proposed."""
        searches, self.proposed = self.proposed, {}
        if not searches:
            return True
        start, rules = self.loss, self.units[0].rules
        first = first_factor(rules) if remembered else 1.0
        self.factor = self._common_factor(searches, first, tries=1 if once else rules["max_trials"])
        moved = {unit: self.factor * search.eta for unit, search in searches.items()}
        if (once or remembered) and self.factor:
            self._credit(searches, start)
        for unit, eta in moved.items():
            self._note(unit, searches[unit], eta)
        return self.factor > 0

    def _credit(self, searches: dict[Unit, Search], start: float) -> None:
        """Give every unit its step and its part of the decrease of the loss from ``start``."""
        parts = [search.required for search in searches.values()]
        for search, part in zip(searches.values(), parts, strict=True):
            search.eta *= self.factor
            search.accept(start - (start - self.loss) * (part / sum(parts) if part else 0.0))

    def _common_factor(self, searches: dict[Unit, Search], factor: float, tries: int) -> float:
        """First of a, β a, β² a … with f(w_t − factor η d) ≤ R − factor Σ c η s; 0 puts all units back."""
        reference = max(s.reference for s in searches.values())
        required = sum(s.required for s in searches.values())
        for _ in range(tries):
            self.joint_trials += 1
            for unit, search in searches.items():
                self.passes[unit].trial(factor * search.eta)
            loss = float(self.losses.at(ALL_UNITS, [p for unit in searches for p in unit.active_params()]))
            if math.isfinite(loss) and loss <= reference - visible(factor * required, self.resolution):
                shown = unshortened(self.units[0].rules) * factor * required
                self.loss, self.may_grow = loss, loss <= reference - visible(shown, self.resolution)
                return factor
            factor *= self.units[0].rules["backtrack"]
        for unit in searches:
            self.passes[unit].trial(0.0)
            self.losses.put_back(unit.active_params())
        return 0.0

    def _note(self, unit: Unit, search: Search, eta: float) -> None:
        """Note the outcome of a finished search and the step of the unit, 0 if it has not moved."""
        move = self.moves[unit]
        move.eta, move.search, move.outcome = eta, search, search.outcome if eta else EXHAUSTED

    def keep(self, unit: Unit) -> None:
        """Move the unit by its remembered step, untested."""
        aim = self._aim_tested(unit)
        eta = min(aim.cap, unit.rules["step_size"]) if aim.descends else 0.0
        self.loss = math.nan if eta else self.loss
        self.moves[unit] = Move(eta, aim.slope, KEPT if eta else NOT_DESCENT)
        if eta:
            self.passes[unit].trial(eta)

    def follow_momentum(self) -> None:
        """Carry the accepted steps over to the averaged direction; the new point is not tested."""
        for unit in self.units:
            move = self.moves[unit]
            if move.eta:
                self._aim(unit, averaged=True)
                self.passes[unit].trial(move.eta)
                self.loss = math.nan

    def commit(self, state: dict) -> None:
        """Advance moments and memory; the parameters have moved already.

        Raises:
            RuntimeError: a trial changed the gradients.
        """
        self.gradients.check()
        for unit, passes in self.passes.items():
            move = self.moves[unit]
            if not math.isfinite(move.slope):
                continue  # a non-finite gradient must not reach the moments
            if move.eta and unit.has_masters and not passes.keep_direction:
                self._aim_moved(unit)
            passes.commit(state, self.grad_scale, move.eta)
            if move.search is not None:
                move.search.remember()
            if move.relative_step is not None:
                unit.rules["relative_step"] = move.relative_step
        if self.settings.schedule == "relay" and self.joint_trials:
            self._remember_factor()
        for unit in self.units:
            for group in unit.groups[1:]:  # the groups of a merged unit remember alike
                group.update({k: unit.rules[k] for k in MEMORY})

    def _remember_factor(self) -> None:
        factor = next_factor(self.units[0].rules, self.factor, self.joint_trials, self.may_grow)
        for unit in self.units:
            unit.rules["factor"] = factor

    def _aim_moved(self, unit: Unit) -> None:
        """Write the direction of the unit's move again, since other units have used the scratch."""
        if self.settings.momentum == "after":
            self._aim(unit, averaged=True)
        else:
            self._aim_tested(unit)

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
