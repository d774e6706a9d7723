"""The eager baseline: the same line search with nothing made fast.

It does plainly what scripts for this method do: copies of all parameters in every step, a loop over
tensors for every direction and every trial, a full forward and a host read per trial, the random state put
back before each. What the host needs of a unit it reads once, not once a tensor. No cache, no flat buffers, no undo
after an error. It shares the scalar rules (:mod:`fastals.search`) with :class:`fastals.ALS` and nothing else, so that
tests and timings can hold one against the other.
"""

import inspect
import math
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fastals import rng
from fastals.optimizer import ALS
from fastals.partition import units
from fastals.report import EXHAUSTED, KEPT, NOT_DESCENT, StepReport, UnitReport
from fastals.search import MEMORY, Search, schedule_next_search, uniform, visible
from fastals.settings import check_coverage, sort_arguments, warn_of_small_lr


@dataclass(eq=False)
class Part:
    """One unit in one step: copies of its weights, moments with this mini-batch in, outcome of its search."""

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
    hidden: float = 0.0  # steps below this may vanish in the rounding of the parameters
    eta: float = 0.0
    trials: int = 0
    outcome: str = ""
    search: Any = None  # the Search, where there was one

    @property
    def name(self) -> str:
        """Names of its groups."""
        return "+".join(g["name"] for g in self.groups)

    @property
    def rules(self) -> dict:
        """The group that holds constants and memory."""
        return self.groups[0]

    def move(self, eta: float) -> None:
        """Put w − η d into the parameters, or w where η is 0."""
        for p, w, d in zip(self.params, self.weights, self.direction, strict=True):
            p.copy_(w - eta * d if eta else w)


class EagerALS(torch.optim.Optimizer):
    """The slow twin of :class:`fastals.ALS`: same arguments, same ``step``, same ``report``, same step sizes.

    Units are searched in the order of the parameter groups, which have to stand in forward order. ``model`` and
    ``cache`` are accepted and mean nothing here.

    Attributes:
        margins: loss of every trial of the last step minus the largest that its test would have accepted.
    """

    def __init__(self, params: nn.Module | Iterable, *args: Any, **options: Any) -> None:
        bound = inspect.signature(ALS).bind(params, *args, **options)
        bound.apply_defaults()
        values = {k: v for k, v in bound.arguments.items() if k not in ("params", "model")}
        self.settings, values = sort_arguments(values)
        warn_of_small_lr(values["lr"])
        self.report: StepReport | None = None
        self.margins: list[float] = []
        super().__init__(units(params) if isinstance(params, nn.Module) else params, values | MEMORY)
        check_coverage(self.param_groups, params if isinstance(params, nn.Module) else bound.arguments["model"])
        for i, group in enumerate(self.param_groups):
            group.setdefault("name", f"group{i}")
            group.setdefault("unit", i)

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor], loss: Tensor | float | None = None) -> Tensor:  # type: ignore[override]
        """One mini-batch, as :meth:`fastals.ALS.step`."""
        self.closure = closure
        self.devices = rng.cuda_devices(p for g in self.param_groups for p in g["params"])
        self.before = rng.get_state(self.devices)
        start = self._differentiate() if loss is None else closure()
        after = rng.get_state(self.devices) if loss is None else self.before
        self._begin(float(start), torch.finfo(start.dtype).eps)
        due = any(p.rules["count"] >= p.rules["next_search"] or not p.rules["count"] for p in self.parts)
        if due:
            getattr(self, f"_{self.settings.schedule}")()
        else:
            self._keep(self.parts)
        if self.settings.momentum == "after":
            self._follow_momentum()
        self._finish(float(start), due)
        rng.set_state(after)
        return start

    def _differentiate(self) -> Tensor:
        self.zero_grad()
        with torch.enable_grad():
            loss = self.closure()
        loss.backward()
        return loss.detach()

    def _begin(self, start: float, eps: float) -> None:
        """Copy weights and take the gradients into copies of the moments."""
        self.loss, self.resolution, self.joint_trials = start, eps * abs(start) / 2, 0
        self.margins, self.seed = [], f"{self.settings.seed}-{self.param_groups[0]['count']}"
        self.random = random.Random(self.seed)
        grads = [p.grad for g in self.param_groups for p in g["params"] if p.grad is not None]
        limit, self.scale = self.settings.max_grad_norm, 1.0
        if limit is not None and math.isfinite(norm := _norm(grads)):
            self.scale = min(1.0, limit / (norm + 1e-6))
        self.parts = [part for part in map(self._part, self._unit_groups()) if part.params]
        self.weight_rms = _rms([w for part in self.parts for w in part.weights])

    def _unit_groups(self) -> list[list[dict]]:
        indices = dict.fromkeys(g["unit"] for g in self.param_groups)
        return [[g for g in self.param_groups if g["unit"] == i] for i in indices]

    def _part(self, groups: list[dict]) -> Part:
        part = Part(groups)
        for group in groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                exact = torch.promote_types(p.dtype, torch.float32)
                state, clipped = self.state[p], p.grad.to(exact) * self.scale
                master = state.get("master")  # of a parameter below float32, unless someone else wrote it since
                keeps = master is not None and torch.equal(master.to(p.dtype), p)
                part.params.append(p)
                part.owners.append(group)
                part.weights.append(master.clone() if keeps else p.detach().to(exact, copy=True))
                part.grads.append(p.grad.to(exact, copy=True))
                part.means.append(self._mean(state.get("exp_avg"), clipped, group["betas"][0]))
                part.squares.append(self._square(state.get("exp_avg_sq"), clipped, group["betas"][1]))
                part.counts.append(int(state.get("step", 0)) + 1)
        return part

    def _mean(self, m: Tensor | None, g: Tensor, beta: float) -> Tensor | None:
        """The first moment with this gradient in, where something reads it."""
        if self.settings.momentum == "none":
            return None
        if self.settings.direction == "adam":
            return _average(m, g, beta)
        return g if m is None else beta * m + g

    def _square(self, v: Tensor | None, g: Tensor, beta: float) -> Tensor | None:
        """The second moment with this gradient in; SGD has none."""
        return _average(v, g**2, beta) if self.settings.direction == "adam" else None

    def _aim(self, part: Part, averaged: bool) -> float:
        """Compute the direction and slope of a unit; returns the largest step it may try."""
        part.direction = [self._direction(part, i, averaged) for i in range(len(part.params))]
        part.slope = float(sum((g * d).sum().double() for g, d in zip(part.grads, part.direction, strict=True)))
        largest, trust = part.rules["eta_max"], part.rules["trust"]
        moving = int(sum(torch.count_nonzero(g) for g in part.grads))
        length = _norm(part.direction) / math.sqrt(max(moving, 1))
        dtypes = [p.dtype for g in part.groups for p in g["params"]]
        coarse = max(torch.finfo(t).eps if t.itemsize < 4 else 0.0 for t in dtypes)
        part.hidden = coarse / 2 * _rms(part.weights) / length if length > 0 else 0.0
        if trust is not None and length > 0:
            largest = min(largest, trust * max(_rms(part.weights), self.weight_rms) / length)
        return float(part.rules["lr"]) * largest

    def _direction(self, part: Part, i: int, averaged: bool) -> Tensor:
        group, t = part.owners[i], part.counts[i]
        beta1, beta2 = group["betas"]
        d = part.means[i] if averaged else part.grads[i] * self.scale
        if self.settings.direction == "adam":
            d = d / (1 - beta1**t) if averaged else d
            d = d / ((part.squares[i] / (1 - beta2**t)).sqrt() + group["eps"])
        return d + group["weight_decay"] * part.weights[i]

    def _aim_tested(self, part: Part) -> float:
        """The direction that the test is made along: averaged if asked for and if it descends."""
        cap = self._aim(part, averaged=self.settings.momentum == "tested")
        if self.settings.momentum == "tested" and not part.slope > 0:
            cap = self._aim(part, averaged=False)
        return cap

    def _evaluate(self) -> float:
        rng.set_state(self.before)
        return float(self.closure())

    def _propose(self, part: Part) -> bool:
        """Start a search from the current loss, if the direction descends."""
        cap = self._aim_tested(part)
        part.search, part.eta, part.trials, part.outcome = None, 0.0, 0, NOT_DESCENT
        if 0 < part.slope < math.inf and cap > 0:
            drawn = uniform(self.seed, part.name)
            part.search = Search(
                part.rules,
                loss=self.loss,
                slope=part.slope,
                cap=cap,
                uniform=drawn,
                resolution=self.resolution,
                hidden=part.hidden,
            )
        return part.search is not None

    def _search(self, part: Part) -> None:
        """Try steps until one is accepted."""
        if not self._propose(part):
            return
        search = part.search
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
        if self.settings.order == "random":
            return self.random.sample(self.parts, len(self.parts))
        return self.parts[::-1] if self.settings.order == "top_down" else self.parts

    def _sweep(self) -> None:
        for part in self._in_order():
            self._search(part)

    def _independent(self) -> None:
        start = self.loss
        for part in self._in_order():
            self._search(part)
            part.move(0.0)
            self.loss = start
        found = [part for part in self.parts if part.outcome == "accepted"]
        factor = self._jointly(found, self.parts[0].rules["max_trials"]) if found else 0.0
        for part in found:
            part.eta = factor * part.search.eta
            part.outcome = part.outcome if factor else EXHAUSTED

    def _jointly(self, parts: list[Part], tries: int) -> float:
        """The first common factor of the proposed steps under which the loss falls enough; 0 if none does."""
        start, factor = self.loss, 1.0
        highest = max(part.search.reference for part in parts)
        required = sum(part.search.required for part in parts)
        for _ in range(tries):
            for part in parts:
                part.move(factor * part.search.eta)
            self.joint_trials += 1
            loss = self._evaluate()
            largest = start + (highest - start) - visible(factor * required, self.resolution)
            self.margins.append(loss - largest)
            if math.isfinite(loss) and loss <= largest:
                self.loss = loss
                return factor
            factor *= self.parts[0].rules["backtrack"]
        for part in parts:
            part.move(0.0)
        return 0.0

    def _cycle(self) -> None:
        if not all(part.rules["count"] for part in self.parts):
            self._sweep()
            return
        turn = self.parts[self.parts[0].rules["count"] % len(self.parts)]
        self._search(turn)
        self._keep([part for part in self.parts if part is not turn])

    def _joint(self) -> None:
        if not all(part.rules["count"] for part in self.parts):
            self._sweep()
            return
        start, found = self.loss, [part for part in self.parts if self._propose(part)]
        if found and not self._jointly(found, tries=1):
            self._sweep()
            return
        total = sum(part.search.required for part in found)
        for part in found:  # each is credited with its share of the decrease
            share = part.search.required / total if total else 0.0
            part.search.accept(start - (start - self.loss) * share)
            part.eta, part.outcome = part.search.eta, part.search.outcome

    def _keep(self, parts: list[Part]) -> None:
        """Move by the remembered steps without a trial."""
        for part in parts:
            cap = self._aim_tested(part)
            part.eta = min(cap, part.rules["step_size"]) if 0 < part.slope < math.inf else 0.0
            part.outcome = KEPT if part.eta else NOT_DESCENT
            if part.eta:
                part.move(part.eta)
                self.loss = math.nan

    def _follow_momentum(self) -> None:
        """Move from w_t along the averaged directions instead, by the steps found."""
        for part in self.parts:
            if part.eta:
                slope = part.slope
                self._aim(part, averaged=True)
                part.move(part.eta)
                part.slope, self.loss = slope, math.nan

    def _finish(self, start: float, due: bool) -> None:
        for part in self.parts:
            if math.isfinite(part.slope):
                self._remember(part)
        for group in self.param_groups:
            group["count"] += 1
            if due:
                schedule_next_search(group, self.settings.every)
        reports = [UnitReport(p.name, p.eta, p.slope, p.trials, p.outcome) for p in self.parts]
        self.report = StepReport(start, self.loss, reports, self.joint_trials)
        if self.settings.merge_below is not None:
            self._merge(self.settings.merge_below)

    def _remember(self, part: Part) -> None:
        """Store moments, counts and what the search learned."""
        for i, p in enumerate(part.params):
            moments = {"exp_avg": part.means[i], "exp_avg_sq": part.squares[i]}
            self.state[p] |= {"step": part.counts[i]} | {k: m for k, m in moments.items() if m is not None}
            if p.dtype != part.weights[i].dtype:
                w = part.weights[i]
                self.state[p]["master"] = w - part.eta * part.direction[i] if part.eta else w
        if part.search is not None:
            part.search.remember()
            for group in part.groups[1:]:
                group.update({k: part.rules[k] for k in MEMORY})

    def _merge(self, threshold: float) -> None:
        found = sorted(self._unit_groups(), key=lambda groups: groups[0]["step_size"])
        smallest = found[0][0]["step_size"]
        if len(found) > 2 and 0 < smallest < threshold:
            memory = {k: found[0][0][k] for k in MEMORY}
            memory["step_size"] = (smallest + found[1][0]["step_size"]) / 2
            unit = min(g["unit"] for g in found[0] + found[1])
            for group in found[0] + found[1]:
                group.update(memory, unit=unit)


def _average(old: Tensor | None, new: Tensor, beta: float) -> Tensor:
    return (1 - beta) * new if old is None else beta * old + (1 - beta) * new


def _norm(tensors: list[Tensor]) -> float:
    norms = [torch.linalg.vector_norm(t, dtype=torch.promote_types(t.dtype, torch.float32)) for t in tensors]
    return float(torch.stack([n.double() for n in norms]).norm())


def _rms(tensors: list[Tensor]) -> float:
    return _norm(tensors) / math.sqrt(max(sum(t.numel() for t in tensors), 1))
