"""One mini-batch under search on the device: fused kernels, and one flag read by the host after each trial.

The verbs are those of :class:`fastals.host.MiniBatch`; losses, slopes and step sizes stay on the device, where
:mod:`fastals.kernels.armijo` decides.
"""

import random
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from fastals.buffers import Flat, Gradients, Unit, layout
from fastals.interrupt import uninterrupted
from fastals.kernels import armijo
from fastals.kernels.arena import BATCH, FLAGS, OUTCOMES, REMEMBERED, RING, RULES, STATE, Arena
from fastals.kernels.moments import advance, survey
from fastals.kernels.table import Entry, Table
from fastals.kernels.trial import trial
from fastals.losses import Losses, OutdatedError, non_finite
from fastals.report import ACCEPTED, EXHAUSTED, StepReport, UnitReport
from fastals.search import INITIALS, REFERENCES, uniform


class Device:
    """Units of one partition of a model, with the tables and the arena of the kernels.

    The parameter groups see what their unit remembers as 0-d tensors on the device.
    """

    def __init__(
        self, groups: Sequence[dict], members: Sequence[list[dict]], kind: str, averages: bool, state: dict
    ) -> None:
        self.groups = groups
        rows = {id(g): i for i, g in enumerate(groups)}
        entries, starts = _entries(members, rows)
        self.table = Table(entries)
        lead = [rows[id(unit[0])] for unit in members]
        self.arena = Arena(self.table, starts[-1], lead, len(groups), adam=kind == "adam", has_m=averages)
        self.units = [self._unit(u, unit, starts, kind, averages, state) for u, unit in enumerate(members)]
        counts = [count for unit in self.units for count in unit.counts]
        self.arena.counts.copy_(torch.tensor(counts, dtype=torch.float32, device="cpu"))
        rounding = [unit.rounding for unit in self.units]
        self.arena.rounding.copy_(torch.tensor(rounding, dtype=torch.float64, device="cpu"))
        memory = [[float(unit.rules[k]) for k in REMEMBERED] for unit in self.units]
        self.arena.memory.copy_(torch.tensor(memory, dtype=torch.float64, device="cpu"))
        self.shown: dict[int, list[int]] = {}  # by unit: which of its parameters the optimizer's state shows
        for unit in self.units:
            for group in unit.groups:
                group.update({k: self.arena.memory[unit.row, i] for i, k in enumerate(REMEMBERED)})

    def _unit(self, u: int, groups: list[dict], starts: list[int], kind: str, averages: bool, state: dict) -> Unit:
        arena, own = self.arena, slice(starts[u], starts[u + 1])
        first = next(i for i, e in enumerate(self.table.entries) if e.unit == u)
        m, v, w = (buffer[own] if buffer.numel() else buffer for buffer in (arena.m, arena.v, arena.w))
        flat = Flat(m, v, w, arena.counts[first:])
        unit = Unit(groups, kind, state, averages=averages, flat=flat)
        unit.row = u
        return unit

    def refresh_rules(self, seed: str) -> None:
        """Bring the constants of the groups up to date, and the numbers drawn for this step."""
        random_first = any(g["initial"] == "random" for g in self.groups)
        drawn = {id(g): uniform(seed, u.name) for u in self.units for g in u.groups} if random_first else {}
        self.arena.set_rules([_rules(g, drawn.get(id(g), 0.0)) for g in self.groups])

    def refresh(self, seed: str, gradients: Gradients) -> None:
        """Bring rules and addresses up to date."""
        self.refresh_rules(seed)
        if self.table.moved(gradients.params, gradients.held):
            for unit in self.units:
                unit.check()
            self.table.rebuild(gradients.params, gradients.held)

    def show(self, units: list[Unit], state: dict) -> None:
        """Show the state of parameters that have their first gradient."""
        if (active := {unit.row: unit.active for unit in units}) != self.shown:
            for unit in units:
                unit.show(state, active=True)
            self.shown = active


class Immediately:
    """Runs the actions of a mini-batch one by one; the host looks at a flag after each trial."""

    def do(self, action: Callable[[], object]) -> None:
        """Run it."""
        action()

    def repeat(self, arena: Arena, row: int, attempt: Callable[[], object]) -> bool | None:
        """Attempt until the row's flag says stop; whether it says accepted (None: not known yet).

        Raises:
            FloatingPointError: f(w_t) is not finite.
            OutdatedError: the attempt may have relied on what no longer holds of the activation cache.
            RuntimeError: the flag does not come to say stop.
        """
        for _ in range(arena.most_trials + 1):
            try:
                attempt()
            except Exception:
                self.verdict(arena, row)  # it may have missed what the cache leaves out
                raise
            go, accepted = self.verdict(arena, row)
            if not go:
                return accepted
        raise RuntimeError(
            f"a search goes on after {arena.most_trials + 1} trials, more than max_trials: the flags on the device are "
            "wrong. Please report it"
        )

    def verdict(self, arena: Arena, row: int) -> tuple[bool, bool]:
        """Wait for the device: whether there is another trial to make, and whether the last one was accepted.

        Raises:
            FloatingPointError: f(w_t) is not finite.
            OutdatedError: what the host assumes of the activation cache no longer holds.
        """
        go, accepted, refused, outdated = self.look(arena, row)
        if refused:
            raise non_finite(float(arena.state[-1, BATCH.index("loss_before")]))
        if outdated:
            raise OutdatedError
        return bool(go), bool(accepted)

    def look(self, arena: Arena, row: int) -> list[int]:
        """Wait for the device and read the row's flags."""
        return arena.flags[row].tolist()

    def skip_rest_if_accepted(self) -> None:
        """What follows is reached only where it is needed."""

    def always(self) -> None:
        """What follows is done in any case."""


class DeviceBatch:
    """Units and losses of one step; what it finds stays in the arena."""

    def __init__(self, losses: Losses, *, momentum: str, seed: str, executor: Immediately | None = None) -> None:
        self.losses, self.momentum, self.seed = losses, momentum, seed
        self.executor = executor or Immediately()
        self.do = self.executor.do
        self.random = random.Random(seed)
        self.units: list[Unit] = []
        self.started = self.searched = self.committed = False

    def begin(self, device: Device, units: list[Unit], loss: Tensor, max_grad_norm: float | None) -> None:
        """Start from f(w_t) = ``loss``: snapshot the weights and sum up the slopes."""
        self.device, self.arena, self.table, self.units = device, device.arena, device.table, units
        self.loss_dtype, self.gradients = loss.dtype, Gradients(units)
        device.refresh(self.seed, self.gradients)
        if max_grad_norm is not None and self.gradients.held:
            self.do(partial(_scale_gradients, self.gradients.held, max_grad_norm, self.arena.grad_scale[0]))
        self.do(partial(armijo.begin, self.arena, loss))
        self.do(partial(survey, self.table, self.arena, averaged=self.momentum == "tested"))
        self.started = True

    def check_replay(self, loss: Tensor) -> None:
        """Have the device see whether recorded outputs still give f(w_t), or still do not; the next look says so."""
        self.arena.flags[:, FLAGS.index("outdated")] = self.losses.replay_outdated(loss)

    def restart(self) -> None:
        """Begin the searches anew, now that a look has raised :class:`OutdatedError`."""
        with uninterrupted():
            self.losses.turn_replays()
            self.random, self.searched = random.Random(self.seed), False
            start = self.arena.state[-1, BATCH.index("loss_before")].to(self.loss_dtype, copy=True)
            armijo.restore(self.arena)
            trial(self.table, self.arena)
            armijo.begin(self.arena, start)

    def propose(self, unit: Unit) -> None:
        """Set the unit's first step, if its direction descends."""
        self.do(partial(armijo.open_search, self.arena, unit.row, tested=self.momentum == "tested"))

    def search(self, unit: Unit, *, record: bool = False, put_back: bool = False) -> None:
        """Backtrack from the unit's first step until the loss has fallen enough, the others frozen."""
        self.propose(unit)
        params = unit.active_params()
        accepted = self._repeat(unit.name, unit.row, partial(self._try, unit, params, record))
        if put_back:
            self.do(partial(armijo.put_back, self.arena, unit.row))
        if put_back or not accepted:
            self.do(partial(trial, self.table, self.arena, unit.row))
        if record and accepted is None:  # the last trial may have been rejected: evaluate where the unit stands now
            self.do(partial(self.losses.at, unit.name, params, record=True))
        if record and accepted is not False:
            self.do(self.losses.keep)

    def _repeat(self, name: str, row: int, attempt: Callable[[], object]) -> bool | None:
        """Attempt while the row's flag says so; whether it says accepted (None: not known yet).

        The first attempt comes before the first look. Only where it would verify the cache it has to move something.
        """
        self.searched = True
        if self.losses.cache is not None and name not in self.losses.trusted:
            go, accepted = self.executor.verdict(self.arena, row)
            if not go:
                return accepted
        return self.executor.repeat(self.arena, row, attempt)

    def _try(self, unit: Unit, params: Sequence[Tensor], record: bool) -> None:
        trial(self.table, self.arena, unit.row)
        armijo.judge(self.arena, unit.row, self.losses.at(unit.name, params, record=record))

    def move_together(self, *, once: bool) -> bool:
        """Move all units by a common factor of their steps; whether a factor was accepted."""
        self.do(partial(armijo.open_together, self.arena))
        params = [p for unit in self.units for p in unit.active_params()]
        accepted = self._repeat("all units", self.arena.units, partial(self._try_together, params, once))
        if not accepted:
            self.do(partial(trial, self.table, self.arena))
        self.executor.skip_rest_if_accepted()
        return bool(accepted)

    def _try_together(self, params: Sequence[Tensor], once: bool) -> None:
        trial(self.table, self.arena)
        armijo.judge_together(self.arena, self.units[0].row, self.losses.at("all units", params), once=once)

    def keep(self, unit: Unit) -> None:
        """Move the unit by its remembered step, untested."""
        self.do(partial(armijo.open_search, self.arena, unit.row, tested=self.momentum == "tested", keep=True))
        self.do(partial(trial, self.table, self.arena, unit.row))

    def follow_momentum(self) -> None:
        """Carry the found steps over to the averaged direction; the new point is not tested."""
        self.do(partial(armijo.follow, self.arena))
        self.do(partial(trial, self.table, self.arena))

    def learn(self) -> None:
        """Advance moments, counts and memory; the parameters have moved already."""
        self.do(partial(advance, self.table, self.arena))
        self.do(partial(armijo.remember, self.arena))

    def commit(self, state: dict) -> None:
        """Learn, and show the state of parameters that have their first gradient.

        Raises:
            FloatingPointError: f(w_t) is not finite, and no search has waited for it.
            RuntimeError: a trial changed the gradients.
        """
        self.gradients.check()
        if not self.searched:
            self._look_once()
        self.learn()
        self.device.show(self.units, state)
        self.arena.steps += 1

    def _look_once(self) -> None:
        """Wait for the device although nothing was tried: f(w_t) may not be finite."""
        try:
            self.executor.verdict(self.arena, self.arena.units)
        except OutdatedError:
            self.losses.turn_replays()

    def restore(self) -> None:
        """Put every unit back to w_t, bitwise."""
        if self.started:
            armijo.restore(self.arena)
            trial(self.table, self.arena)

    def report(self) -> Callable[[], StepReport]:
        """Reads what happened from the ring of histories, units in forward order."""
        names = {unit.row: unit.name for unit in self.units}
        return partial(_read, self.arena.history, names, self.arena.steps - 1)


def _scale_gradients(grads: list[Tensor], max_norm: float, scale: Tensor) -> None:
    """Write min(1, limit / ‖g‖), or 1 where the norm is not finite: the units that it comes from are left out."""
    norm = torch.stack(torch._foreach_norm(grads, 2, dtype=torch.float32)).norm()
    clipped = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
    torch.where(torch.isfinite(norm), clipped, torch.ones_like(clipped), out=scale)


def _read(history: Tensor, names: dict[int, str], step: int) -> StepReport:
    *rows, last = history[step % RING].tolist()
    units = [dict(zip(STATE, row, strict=True)) for row in rows]
    batch = dict(zip(BATCH, last, strict=True))
    return StepReport(
        batch["loss_before"], batch["loss"], [_unit(units[r], n) for r, n in names.items()], int(batch["trials"])
    )


def _unit(row: dict[str, float], name: str) -> UnitReport:
    outcome = OUTCOMES[int(row["outcome"])]
    if outcome == ACCEPTED and not row["move"]:  # found, but the joint test put it back
        outcome = EXHAUSTED
    return UnitReport(name, row["move"], row["slope"], int(row["trials"]), outcome)


def _entries(members: Sequence[list[dict]], rows: dict[int, int]) -> tuple[list[Entry], list[int]]:
    """Every parameter's place, and the first element of every unit, behind the last one too."""
    entries, starts = [], [0]
    for u, groups in enumerate(members):
        owned = [(p, g) for g in groups for p in g["params"]]
        offsets, _, size = layout([p for p, _ in owned])
        entries += [Entry(p, starts[u] + o, u, rows[id(g)]) for (p, g), o in zip(owned, offsets, strict=True)]
        starts.append(starts[u] + size)
    return entries, starts


def _rules(group: dict, drawn: float) -> list[float]:
    """The group's constants in the order of :data:`RULES`."""
    values = {k: group[k] for k in RULES if k in group}
    values |= {
        "beta1": group["betas"][0], "beta2": group["betas"][1],
        "trust": float("inf") if group["trust"] is None else group["trust"],
        "eta_init": 0.0 if group["eta_init"] is None else group["eta_init"],
        "floor": group["backtrack"] ** (group["max_trials"] - 1),
        "initial": INITIALS.index(group["initial"]), "reference": REFERENCES.index(group["reference"]),
        "uniform": drawn,
    }  # fmt: skip
    return [float(values[k]) for k in RULES]
