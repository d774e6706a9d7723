"""The eager baseline: the same line search with nothing made fast.

It works like plain scripts of this method: every step copies all parameters, every direction and every trial loops
over tensors, and every trial restores the random state, runs a full forward pass and reads the loss on the host. A
unit's norms and slope are read once per unit, not once per tensor. There is no cache, no flat buffer and no undo after
an error. It shares the scalar rules (:mod:`fastals.search`) with :class:`fastals.ALS` and none of the fast path, so
tests and timings can compare the two.
"""

import inspect
import math
import random
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fastals import rng
from fastals.errors import NO_GRADIENT, non_finite
from fastals.groups import as_group, check_group, check_modules, listed
from fastals.microbatches import Closure, MicroBatches, check_given, checked
from fastals.optimizer import ALS
from fastals.partition import units
from fastals.relay import (
    first_factor,
    last_scale,
    next_factor,
    recalled_step,
    scale_of,
    searched_step,
    unshortened,
    usual_length,
    warm_step,
)
from fastals.report import ACCEPTED, EXHAUSTED, KEPT, NOT_DESCENT, StepReport, UnitReport
from fastals.schedule import is_due, is_first, note_turn, turn_of
from fastals.search import MEMORY, Search, initial_step, schedule_next_search, size_of_weights, uniform, visible
from fastals.settings import check_constants, check_coverage, sort_arguments, warn_of_small_lr


@dataclass(eq=False)
class Part:
    """One unit in one step: copies of its weights, its updated moments, its direction and its search.

    The lists run over the parameters that have a gradient. ``means``, ``squares`` and ``counts`` are the moments and
    step counts with this mini-batch in; they go to the optimizer's state at the end of the step.
    """

    groups: list[dict]
    params: list[Tensor] = field(default_factory=list)
    owners: list[dict] = field(default_factory=list)  # group of each parameter
    weights: list[Tensor] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)
    means: list[Tensor | None] = field(default_factory=list)
    squares: list[Tensor | None] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    direction: list[Tensor] = field(default_factory=list)
    slope: float = 0.0
    hidden: float = 0.0  # smaller step sizes may vanish in the rounding of the parameters
    scale: float = 0.0  # the step size of which the relative step is a share
    largest: float = 0.0  # largest step if lr is 1
    eta: float = 0.0
    trials: int = 0
    outcome: str = ""
    search: Search | None = None
    relative_step: float | None = None  # relay: what the unit will remember, with the RMS of direction and weights
    length: float = 0.0
    weight_rms: float = 0.0

    @property
    def name(self) -> str:
        """The names of its groups, joined by +."""
        return "+".join(dict.fromkeys(g["name"] for g in self.groups))

    @property
    def rules(self) -> dict:
        """The first group; the constants and the memory of the unit's searches are read there."""
        return self.groups[0]

    def move(self, eta: float) -> None:
        """Set the parameters to w − η d, or to w itself if η is 0."""
        for p, w, d in zip(self.params, self.weights, self.direction, strict=True):
            p.copy_(w - eta * d if eta else w)


class EagerALS(torch.optim.Optimizer):
    """The slow twin of :class:`fastals.ALS`: same arguments, same ``step``, same ``report``, same step sizes.

    The parameter groups must be in forward order, because the order of the searches follows from it. ``cache`` and
    ``fused`` are accepted and ignored; ``model`` only serves to check the units.

    Attributes:
        margins: of every trial in the last step, its loss minus the largest loss that its test accepts.
    """

    def __init__(self, params: nn.Module | Iterable, *args: Any, **options: Any) -> None:
        bound = inspect.signature(ALS).bind(params, *args, **options)
        bound.apply_defaults()
        self.settings, defaults = sort_arguments(bound.arguments)
        warn_of_small_lr(defaults["lr"])
        self.report: StepReport | None = None
        self.margins: list[float] = []
        self.model = params if isinstance(params, nn.Module) else bound.arguments["model"]
        check_modules(params, bound.arguments["model"], bound.arguments["modules"])
        super().__init__(units(params) if isinstance(params, nn.Module) else listed(params), defaults | MEMORY)
        check_coverage(self.param_groups, self.model)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a unit; what :meth:`fastals.ALS.add_param_group` refuses is refused."""
        group, index = as_group(param_group, self.param_groups), len(self.param_groups)
        super().add_param_group({"name": f"group{index}", "unit": index} | group)
        try:
            check_group(self.param_groups[-1], self.model)
        except ValueError:
            del self.param_groups[-1]
            raise

    @torch.no_grad()
    def step(  # type: ignore[override]
        self, closure: Closure | Iterable[Closure], loss: Tensor | float | None = None
    ) -> Tensor:
        """Take one step on a mini-batch, as :meth:`fastals.ALS.step` does. Returns f(w_t)."""
        check_given(loss)
        for group in self.param_groups:
            check_constants(group)
        self.closure = MicroBatches(closure)
        self.devices = rng.cuda_devices(p for g in self.param_groups for p in g["params"])
        self.before = rng.get_state(self.devices)
        start = self._differentiate() if loss is None else self.closure()
        after = rng.get_state(self.devices) if loss is None else self.before
        if not math.isfinite(float(start)):
            raise non_finite(float(start))
        self._begin(float(start), torch.finfo(start.dtype).eps)
        due = is_due([part.rules for part in self.parts], self.settings.every, turns=self.settings.takes_turns)
        if not self.parts:
            pass
        elif due:
            getattr(self, f"_{self.settings.schedule}")()
        elif self.settings.schedule == "relay":
            self._move_by_remembered()
        else:
            self._keep(self.parts)
        if self.settings.momentum == "after":
            self._follow_momentum()
        self._finish(float(start), due)
        rng.set_state(after)
        return start

    def _differentiate(self) -> Tensor:
        """Compute the loss and leave the gradients in ``p.grad``."""
        self.zero_grad()
        losses = []
        for closure in self.closure.closures:
            with torch.enable_grad():
                losses.append(checked(closure()))
            if not losses[-1].requires_grad:
                raise RuntimeError(NO_GRADIENT)
            losses[-1].backward()
        return sum((loss.detach() for loss in losses[1:]), losses[0].detach())

    def _begin(self, start: float, eps: float) -> None:
        """Copy the weights and add the gradients to copies of the moments."""
        self.loss, self.resolution, self.joint_trials, self.factor = start, eps * abs(start) / 2, 0, 1.0
        self.may_grow, self.margins, self.seed = False, [], f"{self.settings.seed}-{self.param_groups[0]['count']}"
        self.random = random.Random(self.seed)
        self.scale = self._clipping_factor()
        self.parts = [part for part in map(self._part, self._unit_groups()) if part.params]
        self.weight_rms = _rms([w for part in self.parts for w in part.weights]) if self.parts else 0.0
        self.alone = self.settings.schedule == "relay" and not is_first([part.rules for part in self.parts])

    def _clipping_factor(self) -> float:
        """The factor that brings the norm of all gradients down to ``max_grad_norm``; 1 if the norm is not finite."""
        limit = self.settings.max_grad_norm
        grads = [p.grad for g in self.param_groups for p in g["params"] if p.grad is not None]
        if limit is not None and math.isfinite(norm := _norm(grads)):
            return min(1.0, limit / (norm + 1e-6))
        return 1.0

    def _unit_groups(self) -> list[list[dict]]:
        """The parameter groups of every unit; merged units have several."""
        indices = dict.fromkeys(g["unit"] for g in self.param_groups)
        return [[g for g in self.param_groups if g["unit"] == i] for i in indices]

    def _part(self, groups: list[dict]) -> Part:
        """Copies of a unit's weights, gradients and moments, of the parameters that have a gradient."""
        part = Part(groups)
        for group in groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._add(part, group, p)
        return part

    def _add(self, part: Part, group: dict, p: Tensor) -> None:
        """Append one parameter to a unit, in float32 at least."""
        assert p.grad is not None
        precise = torch.promote_types(p.dtype, torch.float32)
        state, grad = self.state[p], p.grad.to(precise, copy=True)
        clipped = grad * self.scale
        part.params.append(p)
        part.owners.append(group)
        part.weights.append(_weight(p, state.get("master"), precise))
        part.grads.append(grad)
        part.means.append(self._mean(state.get("exp_avg"), clipped, group["betas"][0]))
        part.squares.append(self._square(state.get("exp_avg_sq"), clipped, group["betas"][1]))
        part.counts.append(int(state.get("step", 0)) + 1)

    def _mean(self, m: Tensor | None, g: Tensor, beta: float) -> Tensor | None:
        """The first moment with this gradient in; None without momentum."""
        if self.settings.momentum == "none":
            return None
        if self.settings.direction == "adam":
            return _average(m, g, beta)
        return g if m is None else beta * m + g

    def _square(self, v: Tensor | None, g: Tensor, beta: float) -> Tensor | None:
        """The second moment with this gradient in; None for SGD."""
        return _average(v, g**2, beta) if self.settings.direction == "adam" else None

    def _aim(self, part: Part, averaged: bool) -> float:
        """Compute the direction and slope of a unit; returns the largest step size it may try."""
        part.direction = [self._direction(part, i, averaged) for i in range(len(part.params))]
        part.slope = float(sum((g * d).sum().double() for g, d in zip(part.grads, part.direction, strict=True)))
        moving = int(sum(torch.count_nonzero(g) for g in part.grads))
        length = _norm(part.direction) / math.sqrt(max(moving, 1))  # RMS of d over the entries with g ≠ 0
        part.hidden = self._smallest_visible_step(part, length)
        return self._largest_step(part, length)

    def _smallest_visible_step(self, part: Part, length: float) -> float:
        """The step size below which a move may round to nothing in parameters under float32; else 0."""
        dtypes = [p.dtype for g in part.groups for p in g["params"]]
        eps = max(torch.finfo(t).eps if t.itemsize < 4 else 0.0 for t in dtypes)
        return eps / 2 * _rms(part.weights) / length if length > 0 else 0.0

    def _largest_step(self, part: Part, length: float) -> float:
        """The cap on the step size: ``eta_max`` and the trust ratio, times ``lr``."""
        largest, part.scale, part.length = part.rules["eta_max"], 0.0, length
        if length > 0:
            usual = usual_length(self.settings.schedule, self.settings.direction)
            rms = self._weight_rms(part)
            part.scale, part.weight_rms = scale_of(rms, length, usual), rms
            if part.rules["trust"] is not None:
                largest = min(largest, part.rules["trust"] * rms / max(length, usual))
        part.largest = largest
        return float(part.rules["lr"]) * largest

    def _weight_rms(self, part: Part) -> float:
        """The size of the weights; that of the last step for a unit on its own."""
        own = _rms(part.weights)
        if self.alone:
            return size_of_weights(part.rules["weight_rms"] or own)
        return size_of_weights(own, self.weight_rms)

    def _direction(self, part: Part, i: int, averaged: bool) -> Tensor:
        """The direction d of one parameter, along the first moment if ``averaged``, else along the gradient."""
        group, t = part.owners[i], part.counts[i]
        beta1, beta2 = group["betas"]
        d = part.means[i] if averaged else part.grads[i] * self.scale
        if self.settings.direction == "adam":
            d = d / (1 - beta1**t) if averaged else d
            d = d / ((part.squares[i] / (1 - beta2**t)).sqrt() + group["eps"])
        return d + group["weight_decay"] * part.weights[i]

    def _aim_tested(self, part: Part) -> float:
        """Aim along the direction to test: the averaged one if ``momentum`` is "tested" and it descends."""
        cap = self._aim(part, averaged=self.settings.momentum == "tested")
        if self.settings.momentum == "tested" and not part.slope > 0:
            cap = self._aim(part, averaged=False)
        return cap

    def _evaluate(self) -> float:
        """The loss at the current parameters, under the dropout masks of the gradient."""
        rng.set_state(self.before)
        return float(self.closure())

    def _propose(self, part: Part) -> bool:
        """Start a search from the current loss if the direction descends; returns whether it does."""
        cap = self._aim_tested(part)
        part.search, part.eta, part.trials, part.outcome = None, 0.0, 0, NOT_DESCENT
        warm = None
        if self.settings.schedule == "relay":
            cap, warm = part.largest, warm_step(part.rules, part.scale)
        if 0 < part.slope < math.inf and cap > 0:
            drawn = uniform(self.seed, part.name)
            start = initial_step(part.rules, self.loss, part.slope, cap, uniform=drawn, warm=warm)
            part.search = self._search_from(part, start)
        return part.search is not None

    def _search_from(self, part: Part, start: float) -> Search:
        return Search(part.rules, self.loss, part.slope, start, resolution=self.resolution, hidden=part.hidden)

    def _search(self, part: Part) -> None:
        """Search one unit: try smaller and smaller steps until one is accepted or none is left."""
        if not self._propose(part):
            return
        search = part.search
        assert search is not None
        while not search.outcome:
            part.move(search.eta)
            loss = self._evaluate()
            self.margins.append(loss - (search.reference - search.required))
            search.judge(loss)
        if not search.accepted:
            part.move(0.0)
        part.eta, part.trials, part.outcome = search.eta, search.trials, search.outcome
        self.loss = search.final_loss

    def _in_order(self) -> list[Part]:
        """The units in the order of their searches."""
        if self.settings.order == "random":
            return self.random.sample(self.parts, len(self.parts))
        return self.parts[::-1] if self.settings.order == "top_down" else self.parts

    def _sweep(self) -> None:
        """Search every unit in turn, from the loss at which the search before it ended."""
        for part in self._in_order():
            self._search(part)

    def _independent(self) -> None:
        """Search every unit from w_t alone, then move them together."""
        start = self.loss
        for part in self._in_order():
            self._search(part)
            part.move(0.0)
            self.loss = start
        accepted = {part: part.search for part in self.parts if part.search and part.search.accepted}
        factor = self._jointly(accepted, self.parts[0].rules["max_trials"]) if accepted else 0.0
        for part, search in accepted.items():
            part.eta = factor * search.eta
            part.outcome = part.outcome if factor else EXHAUSTED

    def _relay(self) -> None:
        """Search one unit alone to learn its step, in the first step each, then move all by what they remember."""
        first = not all(part.rules["count"] for part in self.parts)
        start = self.loss
        for part in self._in_order() if first else [self._turn()]:
            self._search(part)
            part.move(0.0)
            self.loss = start
        self._move_by_remembered()

    def _turn(self) -> Part:
        """The unit whose turn it is to be searched."""
        return self.parts[turn_of([part.rules for part in self.parts])]

    def _move_by_remembered(self) -> None:
        """Move all units by their relative steps and one common factor, tested jointly."""
        start, rules, self.alone = self.loss, self.parts[0].rules, False
        searches = {part: search for part in self.parts if (search := self._recall(part)) is not None}
        factor = self._jointly(searches, rules["max_trials"], first_factor(rules)) if searches else 0.0
        shares = [search.required for search in searches.values()]
        for (part, search), share in zip(searches.items(), shares, strict=True):
            part.eta, part.search, part.outcome = factor * search.eta, search, EXHAUSTED
            if factor:
                search.eta, part.outcome = part.eta, ACCEPTED
                search.accept(start - (start - self.loss) * (share / sum(shares) if share else 0.0))
        if searches:
            self.next_factor = next_factor(rules, factor, self.joint_trials, self.may_grow)

    def _recall(self, part: Part) -> Search | None:
        """A search that stands at the relative step of the unit, None if the direction does not descend."""
        rules, relative_step = part.rules, part.rules["relative_step"]
        scale = last_scale(rules, usual_length(self.settings.schedule, self.settings.direction))
        if part.search is not None:
            relative_step, scale = searched_step(rules, part.search, part.scale), part.scale
        cap = self._aim_tested(part)
        part.relative_step, part.eta, part.outcome, part.search = relative_step, 0.0, NOT_DESCENT, None
        if not (0 < part.slope < math.inf and cap > 0):
            return None
        search = self._search_from(part, recalled_step(rules, relative_step, scale or part.scale, part.largest))
        search.trials = part.trials
        return search

    def _jointly(self, searches: dict[Part, Search], tries: int, factor: float = 1.0) -> float:
        """Move units together; the first common factor of their steps with a sufficient decrease, 0 if none has it."""
        start = self.loss
        highest = max(search.reference for search in searches.values())
        required = sum(search.required for search in searches.values())
        for _ in range(tries):
            for part, search in searches.items():
                part.move(factor * search.eta)
            self.joint_trials += 1
            loss = self._evaluate()
            reference = start + (highest - start)
            largest = reference - visible(factor * required, self.resolution)
            self.margins.append(loss - largest)
            if math.isfinite(loss) and loss <= largest:
                shown = unshortened(self.parts[0].rules) * factor * required
                self.may_grow = loss <= reference - visible(shown, self.resolution)
                self.loss, self.factor = loss, factor
                return factor
            factor *= self.parts[0].rules["backtrack"]
        for part in searches:
            part.move(0.0)
        self.factor = 0.0
        return 0.0

    def _cycle(self) -> None:
        """Search one unit per step and keep the remembered steps of the others."""
        if not all(part.rules["count"] for part in self.parts):
            self._sweep()
            return
        turn = self._turn()
        self._search(turn)
        self._keep([part for part in self.parts if part is not turn])

    def _joint(self) -> None:
        """Try the first steps of all units at once; sweep if that fails."""
        if not all(part.rules["count"] for part in self.parts):
            self._sweep()
            return
        start = self.loss
        for part in self.parts:
            self._propose(part)
        proposed = {part: part.search for part in self.parts if part.search is not None}
        if proposed and not self._jointly(proposed, tries=1):
            self._sweep()
            return
        total = sum(search.required for search in proposed.values())
        for part, search in proposed.items():  # each is credited with its share of the decrease
            share = search.required / total if total else 0.0
            search.accept(start - (start - self.loss) * share)
            part.eta, part.outcome = search.eta, search.outcome

    def _keep(self, parts: list[Part]) -> None:
        """Move units by their remembered step sizes, without a trial."""
        for part in parts:
            cap = self._aim_tested(part)
            part.eta = min(cap, part.rules["step_size"]) if 0 < part.slope < math.inf else 0.0
            part.outcome = KEPT if part.eta else NOT_DESCENT
            if part.eta:
                part.move(part.eta)
                self.loss = math.nan

    def _follow_momentum(self) -> None:
        """Move from w_t along the averaged directions instead, by the accepted step sizes; slopes stay those tested."""
        for part in self.parts:
            if part.eta:
                slope, length = part.slope, part.length
                self._aim(part, averaged=True)
                part.move(part.eta)
                part.slope, part.length, self.loss = slope, length, math.nan

    def _finish(self, start: float, due: bool) -> None:
        """Store state and memory, count the step, report it and merge units."""
        for part in self.parts:
            if math.isfinite(part.slope):
                self._store(part)
                self._remember(part)
        if self.settings.schedule == "relay" and self.joint_trials:
            for part in self.parts:
                part.rules["factor"] = self.next_factor
        for part in self.parts:
            for group in part.groups[1:]:  # the groups of a merged unit remember alike
                group.update({k: part.rules[k] for k in MEMORY})
        if due and self.settings.takes_turns:
            note_turn([part.groups for part in self.parts])
        for group in self.param_groups:
            group["count"] += 1
            if due:
                schedule_next_search(group, self.settings.every)
        reports = [UnitReport(p.name, p.eta, p.slope, p.trials, p.outcome) for p in self.parts]
        self.report = StepReport(start, self.loss, reports, self.joint_trials, self.factor)
        if self.settings.merge_below is not None:
            self._merge(self.settings.merge_below)

    def _store(self, part: Part) -> None:
        """Store the moments, counts and float32 master weights of a unit's parameters."""
        for i, p in enumerate(part.params):
            moments = {"exp_avg": part.means[i], "exp_avg_sq": part.squares[i]}
            self.state[p] |= {"step": part.counts[i]} | {k: m for k, m in moments.items() if m is not None}
            if p.dtype != part.weights[i].dtype:
                w = part.weights[i]
                self.state[p]["master"] = w - part.eta * part.direction[i] if part.eta else w

    def _remember(self, part: Part) -> None:
        """Write what the unit will remember of its search."""
        if part.search is not None:
            part.search.remember()
        if part.relative_step is not None:
            part.rules["relative_step"] = part.relative_step
            if part.length > 0:
                part.rules["direction_rms"], part.rules["weight_rms"] = part.length, part.weight_rms

    def _merge(self, threshold: float) -> None:
        """If the smallest step is under the threshold, merge its unit with that of the next; two units stay."""
        units_by_step = sorted(self._unit_groups(), key=lambda groups: groups[0]["step_size"])
        if len(units_by_step) <= 2 or not 0 < units_by_step[0][0]["step_size"] < threshold:
            return
        low, high = units_by_step[:2]
        memory = {k: low[0][k] for k in MEMORY}
        for step in ("step_size", "relative_step"):
            memory[step] = (low[0][step] + high[0][step]) / 2
        memory["direction_rms"] = 0.0  # not known of both together
        unit = min(g["unit"] for g in low + high)
        for group in low + high:
            group.update(memory, unit=unit)


def _weight(p: Tensor, master: Tensor | None, dtype: torch.dtype) -> Tensor:
    """A copy of the master weights; of the parameter if it has none, or if other code has written to it since."""
    if master is not None and torch.equal(master.to(p.dtype), p):
        return master.clone()
    return p.detach().to(dtype, copy=True)


def _average(old: Tensor | None, new: Tensor, beta: float) -> Tensor:
    return (1 - beta) * new if old is None else beta * old + (1 - beta) * new


def _norm(tensors: list[Tensor]) -> float:
    """The 2-norm of all entries of the tensors together."""
    norms = [torch.linalg.vector_norm(t, dtype=torch.promote_types(t.dtype, torch.float32)) for t in tensors]
    return float(torch.stack([n.double() for n in norms]).norm())


def _rms(tensors: list[Tensor]) -> float:
    """The root mean square of all entries of the tensors together."""
    return _norm(tensors) / math.sqrt(max(sum(t.numel() for t in tensors), 1))
