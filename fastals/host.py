"""One mini-batch under search on the host: the current loss, the moves made so far, and how to undo them."""

import math
import random
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastals.buffers import Gradients, Scratch, Unit
from fastals.losses import Losses
from fastals.report import EXHAUSTED, KEPT, NOT_DESCENT, StepReport, UnitReport
from fastals.search import MEMORY, Search, uniform, visible


@dataclass(slots=True)
class Move:
    """What happened to one unit: its search if there was one, and the step it stands at."""

    eta: float
    slope: float
    outcome: str
    trials: int = 0
    search: Search | None = None


class MiniBatch:
    """Units, losses and moves of one step.

    ``loss`` is f at the current weights (NaN while unknown); ``units`` stand in forward order.
    """

    def __init__(self, losses: Losses, *, momentum: str, keep_directions: bool, seed: str) -> None:
        self.losses, self.momentum, self.keep_directions, self.seed = losses, momentum, keep_directions, seed
        self.random = random.Random(seed)
        self.units: list[Unit] = []
        self.start = self.loss = math.nan
        self.grad_scale = 1.0
        self.moves: dict[Unit, Move] = {}
        self.proposed: dict[Unit, Search] = {}  # to be moved together
        self.joint_trials = 0
        self.committed = False

    def begin(self, scratch: Scratch, units: list[Unit], loss: Tensor, max_grad_norm: float | None) -> None:
        """Start from f(w_t) = ``loss``: snapshot the weights, scale the gradients."""
        self.scratch = scratch
        self.start = self.loss = float(loss)
        self.resolution = torch.finfo(loss.dtype).eps * abs(self.start) / 2
        self.gradients = Gradients(units)
        for unit in units:
            unit.begin()
        self.units = units  # only a whole snapshot can be restored
        total = math.hypot(*(unit.weight_norm for unit in units))
        self.weight_rms = total / math.sqrt(max(sum(unit.numel for unit in units), 1))
        if max_grad_norm is not None:
            norm = math.hypot(*(u.gradient_norm() for u in units))
            self.grad_scale = min(1.0, max_grad_norm / (norm + 1e-6)) if math.isfinite(norm) else 1.0

    def check_replay(self, loss: Tensor) -> None:
        """See whether recorded outputs still give f(w_t), or still do not."""
        if self.losses.replay_outdated(loss):
            self.losses.turn_replays()

    def aim(self, unit: Unit, *, averaged: bool | None = None) -> tuple[float, float, float]:
        """Write the unit's direction; returns its slope, the largest step to try, and below which steps may hide."""
        self.gradients.check()
        tested = self.momentum == "tested" if averaged is None else averaged
        slope, length = unit.direct(self.scratch, tested, self.grad_scale, own=self.keep_directions)
        if averaged is None and tested and not slope > 0:
            slope, length = unit.direct(self.scratch, False, self.grad_scale, own=self.keep_directions)
        rules, rms = unit.rules, unit.weight_norm / math.sqrt(max(unit.numel, 1))
        largest = rules["eta_max"]
        if rules["trust"] is not None and length > 0:
            largest = min(largest, rules["trust"] * max(rms, self.weight_rms) / length)
        return slope, float(rules["lr"]) * largest, unit.rounding * rms / length if length > 0 else 0.0

    def propose(self, unit: Unit) -> None:
        """Set the unit's first step, if its direction descends."""
        slope, cap, hidden = self.aim(unit)
        self.moves[unit] = Move(0.0, slope, NOT_DESCENT)
        if 0 < slope < math.inf and cap > 0:
            drawn = uniform(self.seed, unit.name)
            self.proposed[unit] = Search(unit.rules, self.loss, slope, cap, drawn, self.resolution, hidden)

    def search(self, unit: Unit, *, record: bool = False, put_back: bool = False) -> None:
        """Backtrack from the unit's first step until the loss has fallen enough, the others frozen."""
        self.propose(unit)
        if unit not in self.proposed:
            return
        search = self.proposed.pop(unit)
        while search.running:
            unit.trial(search.eta)
            search.judge(float(self.losses.at(unit.name, unit.active_params(), record=record)))
        if put_back or not search.accepted:
            unit.trial(0.0)
        elif record:
            self.losses.keep()
        if put_back and search.accepted:
            self.proposed[unit] = search
        self.loss = self.start if put_back else search.final_loss
        self._note(unit, search, search.eta)

    def move_together(self, *, once: bool) -> bool:
        """Move all proposed units by a common factor of their steps; whether a factor was accepted."""
        searches, self.proposed = self.proposed, {}
        if not searches:
            return True
        start = self.loss
        factor = self._common_factor(searches, tries=1 if once else self.units[0].rules["max_trials"])
        required = sum(s.required for s in searches.values())
        for unit, search in searches.items():
            if once and factor:
                search.accept(start - (start - self.loss) * (search.required / required if required else 0.0))
            self._note(unit, search, eta=factor * search.eta)
        return factor > 0

    def _common_factor(self, searches: dict[Unit, Search], tries: int) -> float:
        """First factor of 1, β, β² … with f(w_t − factor η d) ≤ R − factor Σ c η s; 0 puts all units back."""
        reference = max(s.reference for s in searches.values())
        required = sum(s.required for s in searches.values())
        factor = 1.0
        for _ in range(tries):
            self.joint_trials += 1
            for unit, search in searches.items():
                unit.trial(factor * search.eta)
            loss = float(self.losses.at("all units", [p for unit in searches for p in unit.active_params()]))
            if math.isfinite(loss) and loss <= reference - visible(factor * required, self.resolution):
                self.loss = loss
                return factor
            factor *= self.units[0].rules["backtrack"]
        for unit in searches:
            unit.trial(0.0)
        return 0.0

    def _note(self, unit: Unit, search: Search, eta: float) -> None:
        """Enter the outcome of a finished search, and the step that the unit has made (0: none)."""
        self.moves[unit] = Move(eta, search.slope, search.outcome if eta else EXHAUSTED, search.trials, search)

    def keep(self, unit: Unit) -> None:
        """Move the unit by its remembered step, untested."""
        slope, cap, _ = self.aim(unit)
        eta = min(cap, unit.rules["step_size"]) if 0 < slope < math.inf else 0.0
        self.loss = math.nan if eta else self.loss
        self.moves[unit] = Move(eta, slope, KEPT if eta else NOT_DESCENT)
        if eta:
            unit.trial(eta)

    def follow_momentum(self) -> None:
        """Carry the found steps over to the averaged direction; the new point is not tested."""
        for unit in self.units:
            move = self.moves[unit]
            if move.eta:
                self.aim(unit, averaged=True)
                unit.trial(move.eta)
                self.loss = math.nan

    def commit(self, state: dict) -> None:
        """Advance moments and memory; the parameters have moved already."""
        self.gradients.check()
        for unit in self.units:
            move = self.moves[unit]
            if not math.isfinite(move.slope):
                continue  # a non-finite gradient must not reach the moments
            if move.eta and unit.low_precision and not self.keep_directions:
                self.aim(unit, averaged=True if self.momentum == "after" else None)
            unit.commit(self.scratch, state, self.grad_scale, move.eta)
            if move.search is not None:
                move.search.remember()
                for group in unit.groups[1:]:  # the groups of a merged unit remember alike
                    group.update({k: unit.rules[k] for k in MEMORY})

    def restore(self) -> None:
        """Put every unit back to w_t, bitwise."""
        for unit in self.units:
            unit.trial(0.0)

    def report(self) -> StepReport:
        """What happened, units in forward order."""
        return StepReport(self.start, self.loss, list(self._unit_reports()), self.joint_trials)

    def _unit_reports(self) -> Iterable[UnitReport]:
        for unit in self.units:
            move = self.moves[unit]
            yield UnitReport(unit.name, move.eta, move.slope, move.trials, move.outcome)
