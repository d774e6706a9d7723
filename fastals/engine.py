"""One step from start to commit, on the host and on the device: :meth:`Engine.step`.

Captured steps use :meth:`Engine.is_due`, :meth:`Engine.move` and :meth:`Engine.count`.
"""

import random
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from fastals import kernels, rng
from fastals.anatomy import Anatomy, anatomy, distinct_modules
from fastals.buffers import Unit, unit_groups
from fastals.cache import ActivationCache
from fastals.callers import FreshGradients
from fastals.compiler import TracedError, is_compiled
from fastals.distributed import Processes
from fastals.errors import ChangedError
from fastals.given import refuse_scaled
from fastals.host import HostUnits
from fastals.learned import Learned
from fastals.losses import Losses
from fastals.microbatches import MicroBatches
from fastals.partition import observed
from fastals.repeatable import check_recompiled, check_repeatable
from fastals.replicas import refuse_different_gradients, share
from fastals.report import StepReport
from fastals.reports import Reports
from fastals.schedule import BETWEEN, SCHEDULES, Batch, is_due, keep_all, note_turn
from fastals.search import plain_memory, schedule_next_search
from fastals.settings import Settings, check_constants, refuse_replaced, refuse_resized
from fastals.shards import connected, has_collectives, is_sharded, local, refuse_unsupported, reshard
from fastals.surroundings import FirstWriteError
from fastals.verify import SPOT_CHECKS, inspect

SUMS_ON_HOST, SUMS_ON_DEVICE = 5, 7  # numbers of a unit: those of passes.Sums, those of kernels.arena.SUMS
MOST_RESTARTS = 2  # of a step that has found out something new
MOST_ANATOMIES = 8  # states of the modules (training and evaluation mode) whose facts are kept
NOTHING_TO_MOVE = (
    "fastals: no parameter of the optimizer has a gradient, so the step moves nothing. Make the optimizer on the model "
    "that the closure evaluates, and with loss= call loss.backward() before the step"
)


class Known(NamedTuple):
    """What is known of the modules in one state; it holds them and their parameters, so that ids stay theirs."""

    learned: Learned
    cache: ActivationCache | None
    modules: list[nn.Module]
    parameters: Sequence[Tensor]


class Partition(Protocol):
    """The units of a model with the buffers of their searches, on the host or on the device.

    Attributes:
        fused: whether searches run on the device.
    """

    fused: bool
    units: list[Unit]

    def begin(self, losses: Losses, units: list[Unit], start: Tensor, seed: str) -> Batch:
        """Start a mini-batch at f(w_t) = ``start`` with the units that have gradients, in forward order."""


class Engine:
    """Makes the steps of one optimizer from its groups, its state and its model.

    It builds buffers and cache from these, so a new engine goes on with the same steps.

    Args:
        groups: the optimizer's parameter groups.
        state: the optimizer's state.
        model: the module whose activations are cached, or None.
        further: further modules that the closure uses.
        settings: the settings that all units share.
        reports: takes the report of every step.
        processes: those that train the model together.
        observe: whether the first forward may correct which unit a parameter belongs to.
    """

    def __init__(
        self,
        groups: list[dict],
        state: dict,
        model: nn.Module | None,
        further: Sequence[nn.Module],
        settings: Settings,
        reports: Reports,
        processes: Processes,
        *,
        observe: bool,
    ) -> None:
        self.groups, self.state, self.model, self.further = groups, state, model, further
        self.settings, self.reports, self.processes, self.observe = settings, reports, processes, observe
        self.cache: ActivationCache | None = None
        self.learned = Learned()
        self.modules: list[nn.Module] = []  # as the last step has found them
        self._known: dict[Anatomy, Known] = {}
        self._partition: Partition | None = None
        self._frozen: list[Tensor] = []
        self._repeatable = self._compiled = self._anew = False
        self._fresh = FreshGradients()
        self._orders: dict[tuple[str, ...], dict[str, float]] = {}
        self._seen: dict[int, tuple] = {}  # by id of a group, its constants when they were last looked at
        self._within = False

    def step(self, closure: MicroBatches, loss: Tensor | float | None = None) -> Tensor:
        """Make one step and return f(w_t); after an error everything is as before.

        Arguments and errors are those of :meth:`fastals.ALS.step`.
        """
        with self._not_within(), self.processes.failing_together():
            for _ in range(MOST_RESTARTS):
                try:
                    return self._attempt(closure, loss)
                except FirstWriteError as found:
                    self._watch_again(found)
                except ChangedError:
                    self._forget()
            return self._attempt(closure, loss)

    @contextmanager
    def _not_within(self) -> Iterator[None]:
        """Refuse a step inside of the ``with`` block.

        Raises:
            RuntimeError: the closure makes a step of this optimizer.
        """
        if self._within:
            raise RuntimeError("the closure called opt.step of its own optimizer: let it return the loss only")
        self._within = True
        try:
            yield
        finally:
            self._within = False

    def check_constants(self) -> None:
        """Refuse constants that the user has set out of their ranges since the last look.

        Raises:
            ValueError: one is.
        """
        for group in self.groups:
            self._seen[id(group)] = check_constants(group, self._seen.get(id(group), ()))
            if group["lr"] < 0:  # by the rounding of a scheduler
                group["lr"] = 0.0 * group["lr"]

    def _forget(self) -> None:
        """Forget what steps have found out about the modules, as all processes do."""
        self._known.clear()
        self._anew = False

    def _attempt(self, closure: MicroBatches, loss: Tensor | float | None) -> Tensor:
        """A step, made without the cache if it turns out that no calls can be intercepted."""
        try:
            return self._step(closure, loss)
        except TracedError:
            self._do_without_cache()
        return self._step(closure, loss)

    def _step(self, closure: MicroBatches, loss: Tensor | float | None) -> Tensor:
        self.meet()
        losses = self._losses(closure)
        with torch.cuda.device_of(losses.params[0]), undone_on_error() as undo:  # Triton launches on the current device
            undo += losses.undoing()
            start = self._start(losses, loss)
            undo.append(partial(self.regroup, [g["param_names"] for g in self.groups if "param_names" in g]))
            batch = self._begin(losses, start)
            undo.append(batch.restore)
            search = self.is_due(batch.units)
            self._look(batch, start, search=search)
            self.move(batch, search=search)
            batch.prepare()
            self.processes.agree()
            losses.finish()
            self._commit(batch, searched=search)
            undo.clear()  # the step is made, so nothing is undone
        self.reports.look()
        return start

    def _start(self, losses: Losses, loss: Tensor | float | None) -> Tensor:
        """f(w_t), with gradients in place."""
        if loss is None:
            self._fresh.warn_if_lost(losses.params)
            start = losses.differentiate()
        else:
            self._fresh.take()
            start = losses.given(loss)
        if losses.closure.ready is not None:
            losses.closure.ready()
        if loss is not None and not self._repeatable:
            refuse_scaled(losses)
        return start

    def meet(self) -> None:
        """Make sure that all processes train alike, and that weights of FSDP2 are the shards."""
        self.check_constants()
        self.modules = self.find_modules()
        if self.processes.apart:  # some have found out what others have not
            self._forget()
            self._repeatable = self.processes.apart = False
        if connected():
            refuse_unsupported(self.modules)
            reshard(self.modules)
        if self.processes.several:
            numbers = SUMS_ON_DEVICE if self.fused else SUMS_ON_HOST
            self.processes.meet(self.params()[0].device, numbers * len(self.groups), self._digest)

    def _digest(self) -> int:
        """A number that differs if the processes would decide otherwise."""
        names = [g.get("param_names", g["name"]) for g in self.groups]
        constants = [[v for k, v in sorted(g.items()) if not isinstance(v, list | Tensor)] for g in self.groups]
        shapes = [tuple(p.shape) for p in self.params()]
        return zlib.crc32(repr((names, constants, shapes, self.settings, self.fused)).encode())

    def _watch_again(self, found: FirstWriteError) -> None:
        """Have the next attempt keep what was lost in this one: values that the forward had never written before."""
        warnings.warn(
            f"fastals: the forward wrote {found} for the first time, and its value before is not kept. The step starts "
            "again from the value that this forward has left",
            stacklevel=6,
        )
        self.learned.memory.written |= found.keys
        self.learned.watched = False

    def _do_without_cache(self) -> None:
        """Forget the cache for good: the modules are compiled as parts of something larger."""
        warnings.warn(
            "fastals: torch.compile has compiled the blocks as parts of something larger, in which no call can be "
            "replayed, so every trial is a full forward. Trials are cached if the blocks are compiled one by one "
            "instead (block.compile() for each, or Accelerate's compile_regions) before the optimizer is built on the "
            "model that holds them. With cache=False the steps are the same, without this warning",
            stacklevel=2,
        )
        self._compiled, self.cache = True, None
        self._known = {now: known._replace(cache=None) for now, known in self._known.items()}

    def _losses(self, closure: MicroBatches) -> Losses:
        self.refresh()
        params, check = self.params(), self.settings.cache == "check"
        if random.Random(f"{self.seed}-watch").random() < SPOT_CHECKS:
            self.learned.watched = False  # a forward may have begun to write what it did not write before
        refuse_resized(self.groups)
        facts = self.cache, self.learned, self.processes
        losses = Losses(closure, params, self.modules, *facts, lazy=self.fused, check=check)
        losses.anew = self._anew and self.processes.several
        return losses

    def _begin(self, losses: Losses, start: Tensor) -> Batch:
        """Start the mini-batch with the units that have gradients, in forward order."""
        self._regroup_by_use(losses.cache)
        units = in_forward_order(self.partition.units, losses.cache)
        if not units:
            warnings.warn(NOTHING_TO_MOVE, stacklevel=7)
        if self.processes.several:
            units = [unit for unit in self.partition.units if unit.active]
            units = self._in_one_order(units, losses.cache)
        return self.partition.begin(losses, units, start, self.seed)

    def _in_one_order(self, units: list[Unit], cache: ActivationCache | None) -> list[Unit]:
        """The units in one order for all processes: where layers drop out at random each of them sees another one."""
        names = tuple(unit.name for unit in units)
        if names not in self._orders:
            seen = [float(cache.first_use(unit.active_params())) if cache is not None else 0.0 for unit in units]
            self._orders[names] = dict(zip(names, self.processes.total(seen, f"order of {names}"), strict=True))
        return sorted(units, key=lambda unit: self._orders[names][unit.name])

    def _look(self, batch: Batch, start: Tensor, *, search: bool) -> None:
        """Look whether the closure is repeatable, and before a search whether cached trials are right."""
        batch.check_replay(start)
        if not self._repeatable:
            refuse_different_gradients(self.processes, batch.losses.params)
            check_repeatable(batch.losses, start)
            self._repeatable = True
        check_recompiled(batch.losses, start)
        unseen = self.processes.several and batch.losses.unseen  # perhaps by a process that knows nothing yet
        if search or unseen or not any(self.learned.verdicts.values()):  # a captured search relies on a verdict
            inspect(batch)

    def is_due(self, units: Sequence[Unit]) -> bool:
        """Whether this step searches; otherwise it repeats the remembered steps."""
        return is_due([u.rules for u in units], self.settings.every, turns=self.settings.takes_turns)

    def move(self, batch: Batch, *, search: bool) -> None:
        """Move the weights: by the searches of the schedule, or by the remembered steps between two searches."""
        schedules = SCHEDULES if search else BETWEEN if batch.units else {}
        batch.run(schedules.get(self.settings.schedule, keep_all), self.settings.order)
        if self.settings.momentum == "after":
            batch.follow_momentum()

    def _commit(self, batch: Batch, *, searched: bool) -> None:
        """Write what cannot be undone: in place, into memory that is there, and in code that raises no error."""
        batch.commit(self.state)
        batch.losses.add_other_grads()
        self.count(batch.report(), batch.losses.forwards, batch.units if searched else [])
        if self.settings.merge_below is not None:
            self._merge(self.settings.merge_below)
        self._fresh.note(batch.losses.params)
        self._anew = False
        self.processes.note_made()

    def count(self, report: StepReport | Callable[[], StepReport], forwards: float, searched: Sequence[Unit]) -> None:
        """Count a step that was made, set when its units search next if it has searched, and report the step."""
        if searched and self.settings.takes_turns:
            note_turn([unit.groups for unit in searched])
        for group in self.groups:
            group["count"] += 1
            if searched:
                schedule_next_search(group, self.settings.every)
        resting = {unit.name for unit in self.partition.units if not float(unit.rules["lr"])}
        self.reports.add(report, forwards, resting, self.processes.counts())

    def make_state(self) -> None:
        """Make the state of all parameters and move nothing."""
        for unit in self.partition.units:
            unit.show(self.state)

    @property
    def parts(self) -> tuple[object, ...]:
        """Groups, state, model, further modules and settings that the engine was made with."""
        return self.groups, self.state, self.model, self.further, self.settings

    @property
    def seed(self) -> str:
        """The seed of this step's random numbers."""
        return f"{self.settings.seed}-{self.groups[0]['count']}"

    def params(self) -> list[Tensor]:
        """All parameters."""
        return [p for g in self.groups for p in g["params"]]

    @property
    def partition(self) -> Partition:
        """The units and their buffers, built at the first use."""
        if self._partition is None:
            for group in self.groups:
                group.update(plain_memory(group))
            self._partition = self._build()
        return self._partition

    @property
    def built(self) -> Partition | None:
        """The partition in use, None before the first step; a captured step is valid for one partition only."""
        return self._partition

    def _build(self) -> Partition:
        if not self.fused:
            return HostUnits(self.groups, self.settings, self.state, self.processes)
        from fastals.device import DeviceUnits  # needs Triton

        return DeviceUnits(self.groups, self.settings, self.state, self.processes)

    @property
    def fused(self) -> bool:
        """Whether searches run on the device.

        Raises:
            ValueError: ``fused=True`` is not possible.
        """
        if self._partition is not None:
            return self._partition.fused
        params, wanted = self.params(), self.settings.fused
        if wanted is False or (wanted == "auto" and any(p.device.type != "cuda" for p in params)):
            return False
        reason = kernels.why_not_fused([local(p.detach()) for p in params]) or self._why_not_shared()
        if reason and wanted is True:
            raise ValueError(
                f"fused=True is not possible here: {reason}. With fused='auto' the plain path runs instead"
            )
        return not reason

    def _why_not_shared(self) -> str:
        """Why the kernels cannot sum over the processes; empty if they can."""
        shares = [
            {share(p, self.processes.size) for g in groups for p in g["params"]} for groups in unit_groups(self.groups)
        ]
        if all(len(found) == 1 for found in shares):
            return ""
        return "tensor parallelism shards some parameters of a unit and replicates others, and the kernels weigh a unit"

    @property
    def is_sharded(self) -> bool:
        """Whether this process holds parts of parameters."""
        return any(map(is_sharded, self.params()))

    def new_cache(self) -> ActivationCache | None:
        """A cache of the modules as they are now, or None."""
        if not self.settings.cache or not self.modules or self._compiled:
            return None
        generators = rng.Generators(rng.cuda_devices(self.params()))
        cache = ActivationCache(self.model, self.further, generators)
        if not cache.boundaries and any(map(is_compiled, self.modules)):
            self._do_without_cache()
            return None
        return cache

    def find_modules(self) -> list[nn.Module]:
        """All modules that a step looks after, as they are now."""
        return distinct_modules([self.model, *self.further])

    def refresh(self) -> None:
        """If the modules have changed, start a new cache, and go by what is known of modules like these."""
        now = anatomy(self.modules)
        self._anew |= now not in self._known and bool(self._known)
        if now not in self._known:
            refuse_replaced(self.groups, self.model)
            if len(self._known) >= MOST_ANATOMIES:
                self._known.pop(next(iter(self._known)))
            parts = [p for m in self.modules for p in m._parameters.values() if p is not None]
            collective = self.processes.several and has_collectives(self.modules)
            self._known[now] = Known(Learned(collective), self.new_cache(), self.modules, parts)
        known = self._known[now]
        if known.learned is not self.learned:
            self.cache, self.learned = known.cache, known.learned
            in_units = set(map(id, self.params()))
            own = self.model.parameters() if self.model is not None else []
            self._frozen = [p for p in own if id(p) not in in_units]
        if any(p.requires_grad for p in self._frozen):
            refuse_replaced(self.groups, self.model)

    def _regroup_by_use(self, cache: ActivationCache | None) -> None:
        """Before the first step, move each parameter to the unit in which the forward first used it."""
        if self.observe and cache is not None and not self.groups[0]["count"]:
            names = observed(self.groups, cache.position)
            if self.processes.same(zlib.crc32(repr(names).encode())):
                self.regroup(names)

    def regroup(self, names: list[list[str]]) -> None:
        """Deal the same parameters to the groups by name."""
        if not names:
            return
        by_name = {n: p for g in self.groups for n, p in zip(g["param_names"], g["params"], strict=True)}
        for group, members in zip(self.groups, names, strict=True):
            if members != group["param_names"]:
                group["param_names"], group["params"] = members, [by_name[n] for n in members]
                self._partition = None

    def _merge(self, threshold: float) -> None:
        """If the smallest step is under the threshold, merge its unit with that of the next; two units stay."""
        units = sorted(self.partition.units, key=lambda u: float(u.rules["step_size"]))
        if len(units) <= 2 or not 0 < units[0].rules["step_size"] < threshold:
            return
        low, high = units[:2]
        groups = low.groups + high.groups
        memory, other = plain_memory(low.rules), plain_memory(high.rules)
        for step in ("step_size", "relative_step"):
            memory[step] = (memory[step] + other[step]) / 2
        memory["direction_rms"] = 0.0  # not known of both together
        index = min(g["unit"] for g in groups)
        for group in groups:
            group.update(memory, unit=index)
        self._partition = None


def in_forward_order(units: Sequence[Unit], cache: ActivationCache | None) -> list[Unit]:
    """The units that have a gradient, sorted by the first recorded call that they can change."""
    active = [u for u in units if u.find_active()]
    return active if cache is None else sorted(active, key=lambda u: cache.first_use(u.active_params()))


@contextmanager
def undone_on_error() -> Iterator[list[Callable[[], object]]]:
    """A list of actions that run if an error leaves the ``with`` block, the last one first; signals are held back.

    Each is tried; the error that leaves is the first one, with a note on every action that failed.
    """
    undo: list[Callable[[], object]] = []
    try:
        yield undo
    except BaseException as error:
        for action in reversed(undo):
            try:
                action()
            except Exception as failed:
                error.add_note(f"fastals could not undo a part of the step: {type(failed).__name__}: {failed}")
        raise
