"""Searches on the device: fused kernels, and one row of flags that the host reads after each trial.

The verbs are those of :mod:`fastals.host`. Losses, slopes and step sizes stay on the device:
:mod:`fastals.kernels.armijo` accepts or shrinks it there.
"""

import math
import random
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from fastals.buffers import Flat, Gradients, Unit, layout, unit_groups
from fastals.distributed import Processes
from fastals.errors import OutdatedError, non_finite
from fastals.kernels import all_units, armijo, relay
from fastals.kernels.arena import BATCH, FLAGS, OUTCOMES, REMEMBERED, RING, RULES, STATE, Arena
from fastals.kernels.moments import advance, survey
from fastals.kernels.table import Entry, Table
from fastals.kernels.trial import trial
from fastals.learned import ALL_UNITS
from fastals.losses import Losses
from fastals.repeatable import reconsider, replay_outdated
from fastals.replicas import share
from fastals.report import ACCEPTED, EXHAUSTED, NOT_DESCENT, StepReport, UnitReport
from fastals.schedule import Schedule, is_first, keep_all
from fastals.search import INITIALS, REFERENCES, uniform
from fastals.settings import Settings
from fastals.shards import is_sharded, local
from fastals.verify import inspect

Action = Callable[[], object]
OUTDATED = FLAGS.index("outdated")


class DeviceUnits:
    """The units of a model, with the tables and the arena of the kernels.

    The parameter groups show the memory of their unit as 0-d tensors on the device.
    """

    fused = True

    def __init__(self, groups: Sequence[dict], settings: Settings, state: dict, processes: Processes) -> None:
        self.groups, self.settings = groups, settings
        members = unit_groups(groups)
        rows = {id(g): i for i, g in enumerate(groups)}
        entries, starts = _entries(members, rows)
        self.table = Table(entries)
        adam, averages = settings.direction == "adam", settings.momentum != "none"
        lead = [rows[id(unit[0])] for unit in members]
        self.arena = Arena(self.table, starts[-1], lead, len(groups), adam=adam, has_m=averages)
        self.units = []
        for row, unit in enumerate(members):
            flat = self._flat(row, slice(starts[row], starts[row + 1]))
            self.units.append(
                Unit(
                    unit, state, adam=adam, averages=averages, flat=flat, share=partial(share, processes=processes.size)
                )
            )
            self.units[-1].row = row
        self._fill_arena()
        self.parts = {
            id(p): e.param for (p, _), e in zip(_all_members(members), entries, strict=True) if e.param is not p
        }
        shares = [unit.shares[0] for unit in self.units]
        self.shares = self.arena.sums.new_tensor(shares).unsqueeze(1) if set(shares) != {1.0} else None
        self._compiled: set[tuple] = set()  # dtypes and alignments for which the kernels of a commit are
        self.shown: dict[int, list[int]] = {}  # by row, the parameters of the unit that the optimizer's state shows
        self._show(state)

    def _flat(self, row: int, where: slice) -> Flat:
        """The unit's part of the arena's buffers."""
        arena = self.arena
        first = next(i for i, entry in enumerate(self.table.entries) if entry.unit == row)
        m, v, w = (buffer[where] if buffer.numel() else buffer for buffer in (arena.m, arena.v, arena.w))
        return Flat(m, v, w, arena.counts[first:])

    def _fill_arena(self) -> None:
        """Write counts, roundings and memory of the units into the arena."""
        arena, units = self.arena, self.units
        counts = [count for unit in units for count in unit.counts]
        memory = [[float(unit.rules[name]) for name in REMEMBERED] for unit in units]
        arena.counts.copy_(torch.tensor(counts, dtype=torch.float32, device="cpu"))
        arena.rounding.copy_(torch.tensor([u.rounding for u in units], dtype=torch.float64, device="cpu"))
        arena.memory.copy_(torch.tensor(memory, dtype=torch.float64, device="cpu"))

    def _show(self, state: dict) -> None:
        """Show the arena's memory in the groups and in the optimizer's state, once everything is written there."""
        for unit in self.units:
            for group in unit.groups:
                group.update({name: self.arena.memory[unit.row, i] for i, name in enumerate(REMEMBERED)})
            unit.show_known(state)

    def begin(
        self, losses: Losses, units: list[Unit], start: Tensor, seed: str, executor: "Executor | None" = None
    ) -> "DeviceBatch":
        """Start a mini-batch at f(w_t) = ``start`` with the units that have gradients, in forward order."""
        return DeviceBatch(self, losses, units, start, seed, executor or DirectExecutor())

    def refresh_rules(self, seed: str) -> None:
        """Bring the constants of the groups up to date, and the numbers drawn for this step."""
        random_first = any(g["initial"] == "random" for g in self.groups)
        drawn = {id(g): uniform(seed, u.name) for u in self.units for g in u.groups} if random_first else {}
        self.arena.set_rules([_rules(g, drawn.get(id(g), 0.0)) for g in self.groups])

    def refresh_table(self, gradients: Gradients) -> None:
        """Bring the addresses of parameters and gradients up to date."""
        params = [self.parts.get(id(p), p) for p in gradients.params]
        held = [local(g) for g in gradients.held]
        if self.table.moved(params, held):
            for unit in self.units:
                unit.check()
            self.table.rebuild(params, held)

    def compile_commit(self) -> None:
        """Compile the kernels of a commit if a launch would: one that cannot be compiled is met before all writes."""
        kinds = {(dtypes, chunks.aligned) for dtypes, chunks in self.table.by_dtypes.items()}
        if not kinds <= self._compiled:
            advance(self.table, self.arena, compile_only=True)
            all_units.remember(self.arena, compile_only=True)
            self._compiled |= kinds

    def show(self, units: list[Unit], state: dict) -> None:
        """Show parameters in the optimizer's state from their first gradient on."""
        if (active := {unit.row: unit.active for unit in units}) != self.shown:
            for unit in units:
                unit.show(state, active=True)
            self.shown = active


class Executor(Protocol):
    """Carries out the actions of a mini-batch: at once, or by recording them for replays."""

    def do(self, action: Action) -> None:
        """Carry out an action."""

    def repeat(self, arena: Arena, row: int, attempt: Action) -> bool | None:
        """Attempt until the row's flag ``go`` is 0; whether a trial was accepted, None while a step is recorded."""

    def look(self, arena: Arena) -> None:
        """Read the flags of the mini-batch, if the host carries out the actions."""

    def skip_rest_if_accepted(self) -> None:
        """Skip the actions up to :meth:`end_skip` if the last trial was accepted."""

    def end_skip(self) -> None:
        """End of the actions that may be skipped."""

    def join(self) -> None:
        """The actions from here to the end of the step are the same in every step that comes here."""


class DirectExecutor:
    """Carries out actions at once; the host reads a flag after each trial, by :func:`read_flags` or ``read``."""

    def __init__(self, read: Callable[[Tensor], list[int]] | None = None) -> None:
        self.read = read or read_flags

    def do(self, action: Action) -> None:
        """Carry out an action."""
        action()

    def repeat(self, arena: Arena, row: int, attempt: Action) -> bool:
        """Attempt until the row's flag ``go`` is 0; whether a trial was accepted.

        Raises:
            FloatingPointError: f(w_t) is not finite.
            OutdatedError: the attempt may have relied on what was known of the activation cache and no longer holds.
            RuntimeError: the flag is not 0 after the last trial.
        """
        for _ in range(arena.most_trials + 1):
            try:
                attempt()
            except Exception:
                self._verdict(arena, row)  # an outdated cache explains the error
                raise
            go, accepted = self._verdict(arena, row)
            if not go:
                return accepted
        raise RuntimeError(
            f"a search goes on after {arena.most_trials + 1} trials, more than max_trials: the flags on the device are "
            "wrong. Please report it"
        )

    def look(self, arena: Arena) -> None:
        """Read the flags of the mini-batch.

        Raises:
            FloatingPointError: f(w_t) is not finite.
            OutdatedError: what was known of the activation cache no longer holds.
        """
        self._verdict(arena, -1)

    def _verdict(self, arena: Arena, row: int) -> tuple[bool, bool]:
        return verdict(arena, self.read(arena.flags[row]))

    def skip_rest_if_accepted(self) -> None:
        """Nothing to do: the schedule knows what was accepted and returns."""

    def end_skip(self) -> None:
        """Nothing to do."""

    def join(self) -> None:
        """Nothing to do."""


def read_flags(flags: Tensor) -> list[int]:
    """Wait for the device and read the flags of a row."""
    return flags.tolist()


def verdict(arena: Arena, flags: Sequence[int]) -> tuple[bool, bool]:
    """Whether there is another trial to make, and whether the last one was accepted, by the flags of a row.

    Raises:
        FloatingPointError: f(w_t) is not finite.
        OutdatedError: what was known of the activation cache no longer holds.
    """
    go, accepted, refused, outdated = flags
    if refused:
        raise non_finite(float(arena.state[-1, BATCH.index("loss_before")]))
    if outdated:
        raise OutdatedError
    return bool(go), bool(accepted)


class DeviceBatch:
    """One mini-batch under search; losses, slopes and step sizes stay in the arena."""

    def __init__(
        self, device: DeviceUnits, losses: Losses, units: list[Unit], start: Tensor, seed: str, executor: Executor
    ) -> None:
        """Start from f(w_t) = ``start``; measure the units, unless a pass is to move them that measures them too."""
        self.device, self.arena, self.table, self.executor = device, device.arena, device.table, executor
        self.losses, self.units, self.seed, self.random = losses, units, seed, random.Random(seed)
        self.tested, self.loss_dtype = device.settings.momentum == "tested", start.dtype
        self.gradients, self.do = Gradients(units), executor.do
        device.refresh_rules(seed)
        device.refresh_table(self.gradients)
        limit = device.settings.max_grad_norm
        if limit is not None and self.gradients.held:
            shares = [unit.shares[i] for unit in units for i in unit.active]
            self.do(
                partial(_write_clipping, self.gradients.held, shares, limit, self.arena.grad_scale[0], losses.processes)
            )
        self.do(partial(all_units.begin, self.arena, start))
        self.relative = device.settings.schedule == "relay"
        self.alone = self.relative and not is_first([unit.rules for unit in units])
        if not self.alone:
            self.do(self.hold)

    def hold(self) -> None:
        """Measure all units, which keeps their weights."""
        self._measure()

    @property
    def _writes_weights(self) -> bool:
        """Whether the forward writes trained weights, perhaps those of other units than the one that is searched."""
        return bool(self.losses.learned.own_writes)

    def _put_all_back(self) -> None:
        rows = self.arena.state[:-1]
        rows[:, STATE.index("move")], rows[:, STATE.index("at")] = 0.0, math.nan
        trial(self.table, self.arena)

    def _measure(self, unit: int | None = None, *, move: bool = False) -> None:
        survey(self.table, self.arena, averaged=self.tested, unit=unit, move=move)
        if self.losses.processes.several:
            rows = slice(None) if unit is None else slice(unit, unit + 1)
            sums = self.arena.sums[rows]
            if self.device.shares is not None:
                sums.mul_(self.device.shares[rows])
            self.losses.processes.add_up(sums)

    def check_replay(self, loss: Tensor) -> None:
        """Have the device compare recorded outputs with f(w_t) = ``loss``; the next read of a flag tells."""
        self.arena.flags[:, OUTDATED] = replay_outdated(self.losses, loss)

    def run(self, schedule: Schedule, order: str) -> None:
        """Make the searches of the schedule; if a flag says that the cache was misjudged, start them again."""
        try:
            if schedule is keep_all:  # no search will read the flags
                self.executor.look(self.arena)
            schedule(self, order)
        except OutdatedError:
            self.random = random.Random(self.seed)
            self.rewind()
            self.arena.flags[:, OUTDATED] = 0
            reconsider(self.losses, self.start)
            self.losses.learned.trusted.clear()
            with self.losses.waiting():  # no guess can be wrong
                if schedule is not keep_all:
                    inspect(self)
                schedule(self, order)

    def rewind(self) -> None:
        """Put every unit back to w_t, and go on from there."""
        start, outdated = self.start, self.arena.flags[:, OUTDATED].clone()
        _to_start(self.table, self.arena)
        all_units.begin(self.arena, start, again=True)
        self.arena.flags[:, OUTDATED] = outdated
        for unit in self.units:
            self.losses.put_back(unit.active_params())

    @property
    def start(self) -> Tensor:
        """f(w_t), on the device."""
        return self.arena.state[-1, BATCH.index("loss_before")].to(self.loss_dtype, copy=True)

    def propose(self, unit: Unit) -> None:
        """Set the unit's first step, if its direction descends."""
        if self.alone:
            self.do(self.hold if self._writes_weights else partial(self._measure, unit.row))
        how = {"tested": self.tested, "relative": self.relative, "alone": self.alone}
        self.do(partial(armijo.open_search, self.arena, unit.row, **how))

    def search(self, unit: Unit, *, record: bool = False, put_back: bool = False) -> None:
        """Backtrack from the unit's first step until the loss has fallen enough, the others frozen."""
        self.propose(unit)
        params = unit.active_params()
        record |= self.losses.records(unit.name)
        accepted = self.executor.repeat(self.arena, unit.row, partial(self._try, unit, params, record))
        if put_back:
            self.do(partial(armijo.put_back, self.arena, unit.row))
        if put_back or not accepted:
            self.do(partial(trial, self.table, self.arena, unit.row))
        if self.relative and self._writes_weights:
            self.do(self._put_all_back)
        if put_back or accepted is False:
            self.do(partial(self.losses.put_back, params))
            return
        if record and accepted is None:  # the last trial may have been rejected: evaluate the present weights
            self.do(partial(self.losses.at, unit.name, params, record=True))
        self.do(self.losses.adopt)

    def _try(self, unit: Unit, params: Sequence[Tensor], record: bool) -> None:
        trial(self.table, self.arena, unit.row)
        armijo.judge(self.arena, unit.row, self.losses.at(unit.name, params, record=record))
        self._note_doubt()

    def _note_doubt(self) -> None:
        """Have the next read of a flag tell if the trial has replayed what it should have computed."""
        doubt = self.losses.take_doubt()
        if doubt is not None:
            self.arena.flags[:, OUTDATED].bitwise_or_(doubt)

    def move_together(self, *, once: bool = False) -> bool:
        """Move all units by a common factor of their steps; whether one was accepted (False while recorded)."""
        accepted = self._move(once=once)
        self.executor.skip_rest_if_accepted()
        return bool(accepted)

    def move_by_remembered(self) -> None:
        """Move all units by their relative steps and one common factor, tested jointly; no search may follow."""
        self.executor.join()
        self.do(partial(relay.recall, self.arena, self.units[0].row, tested=self.tested))
        self.do(partial(self._measure, move=True))
        self.do(partial(relay.aim, self.arena, tested=self.tested))
        self._move(remembered=True)

    def _move(self, *, once: bool = False, remembered: bool = False) -> bool | None:
        """Test a common factor; whether one was accepted, None while recorded: then what follows is of a rejection."""
        self.do(partial(all_units.open_together, self.arena, self.units[0].row, remembered=remembered))
        params = [p for unit in self.units for p in unit.active_params()]
        attempt = partial(self._try_together, params, once, remembered)
        accepted = self.executor.repeat(self.arena, self.arena.units, attempt)
        if not accepted:
            self.do(partial(trial, self.table, self.arena))
            self.do(partial(self.losses.put_back, params))
        return accepted

    def _try_together(self, params: Sequence[Tensor], once: bool, remembered: bool) -> None:
        trial(self.table, self.arena)
        loss = self.losses.at(ALL_UNITS, params)
        all_units.judge_together(self.arena, self.units[0].row, loss, once=once, remembered=remembered)
        self._note_doubt()

    def keep(self, unit: Unit) -> None:
        """Move the unit by its remembered step, untested."""
        self.do(partial(armijo.open_search, self.arena, unit.row, tested=self.tested, keep=True))
        self.do(partial(trial, self.table, self.arena, unit.row))

    def follow_momentum(self) -> None:
        """Carry the accepted steps over to the averaged direction; the new point is not tested."""
        self.executor.end_skip()
        self.do(partial(all_units.follow, self.arena))
        self.do(partial(trial, self.table, self.arena))

    def learn(self) -> None:
        """Advance moments, counts and memory; the parameters have moved already."""
        self.do(partial(advance, self.table, self.arena))
        self.do(partial(all_units.remember, self.arena))

    def prepare(self) -> None:
        """Check what :meth:`commit` reads, and compile what it launches.

        Raises:
            RuntimeError: a trial changed the gradients.
        """
        self.gradients.check()
        self.device.compile_commit()

    def commit(self, state: dict) -> None:
        """Advance moments and memory and enter them in the optimizer's state."""
        self.learn()
        self.device.show(self.units, state)
        self.arena.steps += 1

    def restore(self) -> None:
        """Put every unit back to w_t, bitwise."""
        put_back(self.table, self.arena)

    def report(self) -> Callable[[], StepReport]:
        """A function that reads the outcome of the step from the arena's history, units in forward order."""
        names = {unit.row: unit.name for unit in self.units}
        return partial(_read, self.arena.history, names, self.arena.steps - 1)


def put_back(table: Table, arena: Arena) -> None:
    """Put every unit back to w_t, bitwise, if a step is under way; after a launch that fails it may be tried again."""
    _to_start(table, arena)
    all_units.end(arena)


def _to_start(table: Table, arena: Arena) -> None:
    """Put every unit back to w_t, bitwise; the step stays under way, and if what follows fails, can still be undone."""
    all_units.restore(arena)
    trial(table, arena)


def _write_clipping(
    grads: list[Tensor], shares: Sequence[float], max_norm: float, scale: Tensor, processes: Processes
) -> None:
    """Write min(1, max_norm / ‖g‖), or 1 if the norm is not finite: units with such gradients do not move."""
    norms = torch._foreach_norm([local(g) for g in grads], 2, dtype=torch.float32)
    norm = torch.stack(norms).norm()
    if processes.several:
        square = torch.stack([share * n.double().square() for share, n in zip(shares, norms, strict=True)]).sum(0, True)
        processes.add_up(square)
        norm = square[0].sqrt().float()
    clipped = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
    torch.where(torch.isfinite(norm), clipped, torch.ones_like(clipped), out=scale)


def _read(history: Tensor, names: dict[int, str], step: int) -> StepReport:
    *rows, last = history[step % RING].tolist()
    batch = dict(zip(BATCH, last, strict=True))
    units = [_unit_report(dict(zip(STATE, rows[row], strict=True)), name) for row, name in names.items()]
    joint = int(batch["trials"])
    return StepReport(batch["loss_before"], batch["loss"], units, joint, batch["factor"] if joint else 1.0)


def _unit_report(row: dict[str, float], name: str) -> UnitReport:
    outcome = OUTCOMES[int(row["outcome"])]
    if outcome == ACCEPTED and not row["move"]:  # accepted alone, but the joint test put it back
        outcome = EXHAUSTED
    if outcome == OUTCOMES[0]:  # left out by the joint move: its tensors have no elements
        outcome = NOT_DESCENT
    return UnitReport(name, row["move"], row["slope"], int(row["trials"]), outcome)


def _all_members(members: Sequence[list[dict]]) -> list[tuple[Tensor, dict]]:
    return [(p, g) for groups in members for g in groups for p in g["params"]]


def _entries(members: Sequence[list[dict]], rows: dict[int, int]) -> tuple[list[Entry], list[int]]:
    """The entry of every parameter, and the first element of every unit, followed by the size of the buffers."""
    entries, starts = [], [0]
    for unit, groups in enumerate(members):
        params = [(local(p.detach()) if is_sharded(p) else p, g) for g in groups for p in g["params"]]
        offsets, _, size = layout([p.numel() for p, _ in params])
        entries += [Entry(p, starts[unit] + o, unit, rows[id(g)]) for (p, g), o in zip(params, offsets, strict=True)]
        starts.append(starts[unit] + size)
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
