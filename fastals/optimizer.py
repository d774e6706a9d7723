"""ALS: Armijo line search per unit as a ``torch.optim.Optimizer``."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastals import kernels, rng
from fastals.buffers import Scratch, Unit
from fastals.cache import ActivationCache
from fastals.host import MiniBatch
from fastals.interrupt import uninterrupted
from fastals.losses import NO_CLOSURE, Learned, Losses, OutdatedError
from fastals.partition import named, observed, units
from fastals.report import Reports, StepReport
from fastals.schedule import SCHEDULES, keep
from fastals.search import MEMORY, plain_memory, schedule_next_search
from fastals.settings import Settings, check_coverage, check_ranges, warn_of_processes

if TYPE_CHECKING:
    from fastals.graphs.graphed import GraphedStep, GraphMode


class ALS(torch.optim.Optimizer):
    r"""Adam or SGD whose step sizes are found by an Armijo line search in every unit of the model.

    For every mini-batch with loss f, unit u with gradient g and direction d tries step sizes η, from a first
    one downwards, until

    .. math:: f(w_u - \eta d_u) \le R - c\,\eta\,\langle g_u, d_u\rangle

    with the other units frozen and the dropout masks held. See :func:`fastals.partition` for what a unit is.

    Example::

        opt = fastals.ALS(model)
        for batch in loader:
            loss = opt.step(lambda: model(**batch).loss)

    Args:
        params: a model (its blocks become units and its activations are cached), the groups of
            :func:`fastals.partition`, or parameters / groups as for any optimizer (one unit each).
        lr: multiplies the largest step that may be tried (``trust`` and ``eta_max``), so that
            schedulers attach; no learning rate, 1 is the usual value. Found steps are in ``group["step_size"]``.
        betas, eps, weight_decay: as in AdamW; the decay is decoupled and part of the tested direction.
        model: the module whose activations are cached and whose buffers (running statistics) trials leave alone;
            needed only where ``params`` is neither the model nor the groups of :func:`fastals.partition`.
        direction: ``"adam"`` or ``"sgd"`` (heavy ball with ``betas[0]``).
        momentum: ``"none"``, ``"after"`` (test along the gradient's direction, move along the averaged
            one) or ``"tested"`` (test and move along the averaged one; where it does not descend, fall back).
        schedule: ``"sweep"``, ``"independent"``, ``"cycle"`` or ``"joint"``, see :mod:`fastals.schedule`.
        order: order of the searches in a sweep: ``"top_down"``, ``"bottom_up"`` or ``"random"``.
        every: search in every N-th step only and keep the found steps in between, or ``"auto"`` (SaLSA), which
            waits for the device after every step that searches.
        c: sufficient-decrease constant in (0, 1).
        backtrack: factor β in (0, 1) on rejection.
        growth: factor γ ≥ 1 on the remembered step for the next mini-batch.
        max_trials: trials per search at most; after them the unit is put back, bitwise.
        trust: largest relative change of a unit in one step, RMS(η d) over the entries that have a gradient by
            RMS(w) of the unit or of the model, whichever is larger (so that heads that start small and
            zero-initialised adapters can move); ``None`` for no cap.
        initial: first step of a search: ``"warm"``, ``"reset"``, ``"polyak"`` or ``"random"``.
        eta_init, eta_min, eta_max: first step ever (``None``: the largest allowed), smallest and largest step.
        reference: R of the test: ``"monotone"``, ``"nonmonotone"`` (Zhang-Hager) or ``"smoothed"`` (SaLSA).
        polyak_c, nonmonotone_weight, smoothing: constants of those rules.
        merge_below: merge a unit whose step falls below this with the one of next smallest step.
        max_grad_norm: clip the gradient's norm in the direction; the slope keeps the true gradient. Use
            it in place of ``clip_grad_norm_``, which would make the test too easy.
        cache: replay activations below the unit under search.
        fused: ``"auto"`` runs the searches on the device with Triton kernels where all parameters are on one CUDA
            device in float32, bfloat16 or float16, ``True`` insists on it, ``False`` never does. The steps are the
            same up to rounding.
        seed: of the random order and the random first step.

    Attributes:
        last_forwards: forward passes of the last step, the first one included; a cached trial counts as the share
            of the blocks that it ran. NaN after a graphed step.

    Raises:
        ValueError: an argument out of its range, parameters twice or units that do not fit the model.

    References: arXiv 2403.18506 (per-layer search, Adam direction), 2407.20650 (SaLSA), 2306.12747 (PoNoS),
    1905.09997 (SLS).
    """

    last_forwards: float
    _reports: Reports
    _units: list[Unit] | None
    _frozen: list[Tensor] | None
    _device: Any
    _scratch: Scratch
    _cache: ActivationCache | None
    _learned: Learned
    _repeatable: bool

    def __init__(
        self,
        params: nn.Module | Iterable,
        lr: float = 1.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        model: nn.Module | None = None,
        direction: str = "adam",
        momentum: str = "none",
        schedule: str = "sweep",
        order: str = "top_down",
        every: int | str = 1,
        c: float = 0.1,
        backtrack: float = 0.5,
        growth: float = 1.3,
        max_trials: int = 8,
        trust: float | None = 0.006,
        initial: str = "warm",
        eta_init: float | None = None,
        eta_min: float = 1e-10,
        eta_max: float = 10.0,
        reference: str = "monotone",
        polyak_c: float = 0.1,
        nonmonotone_weight: float = 1.0,
        smoothing: float = 0.9,
        merge_below: float | None = None,
        max_grad_norm: float | None = None,
        cache: bool = True,
        fused: bool | str = "auto",
        seed: int = 0,
    ) -> None:
        known = getattr(params, "model", None) if model is None else model
        self.model = params if isinstance(params, nn.Module) else known
        self._by_observation = isinstance(params, nn.Module)
        self.settings = Settings(
            direction, momentum, schedule, order, every, merge_below, max_grad_norm, cache, fused, seed
        )
        defaults = {
            "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "c": c, "backtrack": backtrack,
            "growth": growth, "max_trials": max_trials, "trust": trust, "initial": initial, "eta_init": eta_init,
            "eta_min": eta_min, "eta_max": eta_max, "reference": reference, "polyak_c": polyak_c,
            "nonmonotone_weight": nonmonotone_weight, "smoothing": smoothing,
        }  # fmt: skip
        check_ranges(defaults)
        self._reports, self.last_forwards = Reports(), 0.0
        self._graphed: GraphedStep | None = None
        self._forget()
        super().__init__(units(params) if isinstance(params, nn.Module) else params, defaults | MEMORY)
        check_coverage(self.param_groups, self.model)
        self._is_fused()

    @torch.no_grad()
    def step(  # type: ignore[override]
        self, closure: Callable[[], Tensor] | None = None, loss: Tensor | float | None = None
    ) -> Tensor:
        """One mini-batch: gradients, the searches of the schedule, the moments. Returns f(w_t).

        Args:
            closure: evaluates the loss of this mini-batch and returns it; it must not call backward.
            loss: pass the loss whose gradients are in ``p.grad`` already (accumulated, reduced). Without it
                the gradients are computed here, by one backward.

        Raises:
            TypeError: no closure, or one that returns no tensor.
            ValueError: a loss that is no scalar, or that differs between two evaluations at the same weights.
            FloatingPointError: a loss that is not finite at w_t.
            RuntimeError: a closure that calls backward; parameters converted since construction.
            ValueError: a parameter of the model has been unfrozen that is in no unit.

        Whatever is raised, by the closure too, leaves parameters, state and random generators as before.
        """
        if closure is None:
            return self._step_of_length_zero()
        batch = self._mini_batch(closure)
        self._refuse_unfrozen()
        with self._transaction(batch):
            start = batch.losses.differentiate() if loss is None else batch.losses.given(loss)
            self._begin(batch, start)
            due = self._search_is_due(batch.units)
            self._search(batch, due)
            if self.settings.momentum == "after":
                batch.follow_momentum()
            with uninterrupted():
                self._commit(batch, searched=due)
        return start

    def _search(self, batch: Any, due: bool) -> None:
        """Run the schedule, once more if its first look at the device says that the cache was misjudged."""
        try:
            self._run_schedule(batch, due)
        except OutdatedError:
            batch.restart()
            self._run_schedule(batch, due)

    def _run_schedule(self, batch: Any, due: bool) -> None:
        if due:
            SCHEDULES[self.settings.schedule](batch, self.settings.order)
        else:
            keep(batch)

    def graphed(
        self, loss_fn: Callable[[Any], Tensor], *, pad_to_multiple_of: int | None = None, max_signatures: int = 8
    ) -> "GraphedStep":
        """A function of a batch that takes one step, on a CUDA GPU as captured graphs.

        ``loss_fn(batch)`` evaluates the loss of a batch, any nest of tensors. See
        :class:`fastals.graphs.graphed.GraphedStep`.
        """
        from fastals.graphs.graphed import GraphedStep

        self._graphed = GraphedStep(self, loss_fn, pad_to_multiple_of=pad_to_multiple_of, max_signatures=max_signatures)
        return self._graphed

    @property
    def graph_mode(self) -> "GraphMode | None":
        """How the steps of the last :meth:`graphed` function run and why, or None without one."""
        return self._graphed.mode if self._graphed is not None else None

    def _step_of_length_zero(self) -> Tensor:
        """Make the state and move nothing: torch.distributed.checkpoint steps so, with every lr at 0, to have one."""
        if any(float(g["lr"]) for g in self.param_groups):
            raise TypeError(NO_CLOSURE)
        for unit in self._built_units():
            unit.show(self.state)
        return torch.zeros(())

    def _refuse_unfrozen(self) -> None:
        """Refuse parameters that were frozen at first and would not be trained."""
        if self._frozen is None:
            held = set(map(id, self._parameters()))
            self._frozen = [p for p in self.model.parameters() if id(p) not in held] if self.model is not None else []
        if any(p.requires_grad for p in self._frozen):
            check_coverage(self.param_groups, self.model)

    def _mini_batch(self, closure: Callable[[], Tensor]) -> Any:
        """The mini-batch under search, on the host or on the device."""
        params = self._parameters()
        cache, fused = self._current_cache(), self._is_fused() if self._units is None else bool(self._device)
        losses = Losses(closure, params, self.model, cache, self._learned, lazy=fused)
        if fused:
            return self._device_batch(losses)
        own = self.settings.schedule in ("independent", "joint")
        return MiniBatch(losses, momentum=self.settings.momentum, keep_directions=own, seed=self._seed())

    def _device_batch(self, losses: Losses, executor: Any = None) -> Any:
        from fastals.device import DeviceBatch

        return DeviceBatch(losses, momentum=self.settings.momentum, seed=self._seed(), executor=executor)

    def _seed(self) -> str:
        return f"{self.settings.seed}-{self.param_groups[0]['count']}"

    def _current_cache(self) -> ActivationCache | None:
        """The cache of the model as it is now; a changed module tree starts a new one, verified anew."""
        if self._cache is None or self._cache.outdated():
            self._cache, self._frozen = self._new_cache(), None
            self._learned = Learned() if self._cache is not None else self._learned
        return self._cache

    def _new_cache(self) -> ActivationCache | None:
        if self.model is None or not self.settings.cache:
            return None
        return ActivationCache(self.model, rng.cuda_devices(self._parameters()))

    def _parameters(self) -> list[Tensor]:
        return [p for g in self.param_groups for p in g["params"]]

    def _begin(self, batch: Any, loss: Tensor) -> None:
        """Put the units in forward order and start the batch with those that have gradients."""
        cache = batch.losses.cache
        if self._by_observation and cache is not None and not self.param_groups[0]["count"]:
            self._regroup(observed(self.param_groups, cache.position))
        active = [u for u in self._built_units() if u.find_active()]
        if cache is not None:
            active.sort(key=lambda u: cache.start(u.active_params()))
        batch.begin(self._device or self._scratch, active, loss, self.settings.max_grad_norm)
        batch.check_replay(loss)
        if not self._repeatable:
            warn_of_processes()
            batch.losses.check_repeatable(float(loss))
            self._repeatable = True

    def _built_units(self) -> list[Unit]:
        if self._units is None:
            self._build()
        assert self._units is not None
        return self._units

    def _build(self) -> None:
        """Make the units and their buffers, on the device for the fused kernels if they can be used."""
        for group in self.param_groups:
            group.update(plain_memory(group))
        members: dict[int, list[dict]] = {}
        for group in self.param_groups:
            if group["params"]:  # a group may be left empty by what was observed
                members.setdefault(group["unit"], []).append(group)
        kind, averages = self.settings.direction, self.settings.momentum != "none"
        if self._is_fused():
            from fastals.device import Device

            self._device = Device(self.param_groups, list(members.values()), kind, averages, self.state)
            self._units = self._device.units
            return
        self._units = [Unit(groups, kind, self.state, averages=averages) for groups in members.values()]
        widest = max(self._units, key=lambda u: u.dtype.itemsize)
        self._scratch = Scratch(max(u.size for u in self._units), widest.dtype, widest.device)

    def _is_fused(self) -> bool:
        params, wanted = self._parameters(), self.settings.fused
        if wanted is False or (wanted == "auto" and any(p.device.type != "cuda" for p in params)):
            return False
        reason = kernels.why_not_fused(params)
        if reason and wanted is True:
            raise ValueError(
                f"fused=True is not possible here: {reason}. With fused='auto' the plain path runs instead"
            )
        return not reason

    @staticmethod
    def _search_is_due(active: list[Unit]) -> bool:
        return any(u.rules["count"] >= u.rules["next_search"] or not u.rules["count"] for u in active)

    @contextmanager
    def _transaction(self, batch: Any) -> Iterator[None]:
        """Undo everything if anything is raised before the commit; moments and memory are written in it alone."""
        with torch.cuda.device_of(batch.losses.params[0]):  # kernels go to the current device
            try:
                yield
            except BaseException:
                if not batch.committed:
                    with uninterrupted():
                        batch.restore()
                        batch.losses.undo()
                raise

    def _commit(self, batch: Any, searched: bool) -> None:
        batch.commit(self.state)
        self._count(batch, searched)
        self.last_forwards = batch.losses.forwards
        if self.settings.merge_below is not None:
            self._merge(self.settings.merge_below)
        batch.losses.finish()
        batch.committed = True

    def _count(self, batch: Any, searched: bool) -> None:
        """What the host notes of a step."""
        for group in self.param_groups:
            group["count"] += 1
            if searched:
                schedule_next_search(group, self.settings.every)
        self._reports.add(batch.report())

    def _merge(self, threshold: float) -> None:
        """Merge the unit of smallest step, if it is under the threshold, with the next smallest."""
        found = sorted(self._built_units(), key=lambda u: float(u.rules["step_size"]))
        if len(found) <= 2 or not 0 < found[0].rules["step_size"] < threshold:
            return
        low, high = found[0], found[1]
        joined = low.groups + high.groups
        memory = {k: low.rules[k] for k in MEMORY}
        memory["step_size"] = (low.rules["step_size"] + high.rules["step_size"]) / 2
        index = min(g["unit"] for g in joined)
        for group in joined:
            group.update(memory, unit=index)
        self._units = self._device = None

    def _regroup(self, names: list[list[str]]) -> None:
        """Deal the same parameters to the groups by name."""
        named = {n: p for g in self.param_groups for n, p in zip(g["param_names"], g["params"], strict=True)}
        for group, members in zip(self.param_groups, names, strict=True):
            if members != group["param_names"]:
                group["param_names"], group["params"] = members, [named[n] for n in members]
                self._units = self._device = None

    def _forget(self) -> None:
        """Drop what can be rebuilt from the groups, the state and the model."""
        self._units = self._device = self._cache = self._frozen = None
        self._learned, self._repeatable = Learned(), False

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a unit, for example one that has just been unfrozen: ``opt.add_param_group({"params": [...]})``.

        Raises:
            ValueError: a parameter that the model does not have, or that is in a unit already.
        """
        if self.model is not None and any("param_names" in g for g in self.param_groups):
            param_group = named(param_group, self.model)
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        index = len(self.param_groups) - 1
        group.setdefault("name", f"group{index}")
        group.setdefault("unit", index)
        self._forget()

    @property
    def report(self) -> StepReport | None:
        """The last step's report; on the fused path it is read from the device at the first look."""
        return self._reports.last()

    @property
    def reports(self) -> list[StepReport]:
        """The reports of the last 64 steps at most, the oldest first."""
        return self._reports.read()

    def state_dict(self) -> dict[str, Any]:
        """State by parameter under AdamW's names; what the units remember is plain numbers in the groups."""
        saved = super().state_dict()
        for group in saved["param_groups"]:
            group.update(plain_memory(group))
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` gave, dtypes kept.

        Raises:
            ValueError: the state belongs to another partition of the model into units, or lacks a moment.
        """
        self._check_moments(state_dict["state"].values())
        self._fit(state_dict["param_groups"])
        super().load_state_dict(state_dict)
        order = self._parameters()
        indices = [i for g in state_dict["param_groups"] for i in g["params"]]
        for p, i in zip(order, indices, strict=True):  # torch casts float state to the dtype of p
            for key, value in state_dict["state"].get(i, {}).items():
                self.state[p][key] = value.to(p.device if value.ndim else "cpu", copy=True)
        self._forget()

    def _check_moments(self, saved: Iterable[dict[str, Any]]) -> None:
        wanted = {"exp_avg": self.settings.momentum != "none", "exp_avg_sq": self.settings.direction == "adam"}
        for name in (n for n, needed in wanted.items() if needed):
            if any(name not in entry for entry in saved):
                raise ValueError(f"the state has no {name!r}: it was saved with another momentum or direction")

    def _fit(self, saved: list[dict[str, Any]]) -> None:
        """Bring the units of a saved state about, if they are units of the same parameters."""
        ours: list[list[str]] = [g.get("param_names", []) for g in self.param_groups]
        theirs: list[list[str]] = [g.get("param_names", []) for g in saved]
        if self._by_observation and len(ours) == len(theirs) and _flat(ours) == _flat(theirs):
            self._regroup(theirs)
            ours = theirs
        if ours != theirs or [len(g["params"]) for g in self.param_groups] != [len(g["params"]) for g in saved]:
            raise ValueError(
                f"the state was saved with units {[g.get('name') for g in saved]} and this optimizer has "
                f"{[g.get('name') for g in self.param_groups]}: build it with the same fastals.units(...) arguments"
            )

    def __getstate__(self) -> dict[str, Any]:
        self._reports.read()
        kept = ("model", "settings", "last_forwards", "_reports", "_by_observation")
        return super().__getstate__() | {k: getattr(self, k) for k in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._graphed = None
        self._forget()

    def __repr__(self) -> str:
        names = ", ".join(f"{g['name']}: {sum(p.numel() for p in g['params']):,}" for g in self.param_groups)
        rules = {k: v for k, v in self.defaults.items() if k not in MEMORY}
        return f"ALS({self.settings}, {rules}, units=[{names}])"


def _flat(names: list[list[str]]) -> list[str]:
    return sorted(n for group in names for n in group)
