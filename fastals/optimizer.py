"""ALS: Armijo line search per unit as a ``torch.optim.Optimizer``."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from operator import is_not
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fastals.callers import refuse_lost_micro_batches, unwrapped
from fastals.distributed import Processes
from fastals.engine import Engine
from fastals.errors import NO_CLOSURE
from fastals.groups import SAVED, as_group, check_entry, check_group, check_modules, check_saved, listed
from fastals.interrupt import held_back
from fastals.microbatches import Backward, Closure, MicroBatches, check_given
from fastals.partition import named, units
from fastals.report import StepReport
from fastals.reports import Reports
from fastals.search import MEMORY, plain_memory
from fastals.settings import check_coverage, sort_arguments, warn_of_decay_groups, warn_of_small_lr
from fastals.shards import refuse_unsupported

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from fastals.graphs.graphed import GraphedStep, GraphMode


class ALS(torch.optim.Optimizer):
    """Adam or SGD with step sizes from an Armijo line search in every unit of the model.

    For every mini-batch with loss f, unit u with gradient g and direction d tries step sizes η, the largest first,
    until

        f(w_u − η d_u) ≤ R − c η ⟨g_u, d_u⟩

    with the other units frozen and the dropout masks held. A unit is a parameter group, see :func:`fastals.units`.

    Example::

        opt = fastals.ALS(model)
        for batch in loader:
            loss = opt.step(lambda: model(**batch).loss)

    Args:
        params: a model (its blocks become units and its activations are cached), the groups of
            :func:`fastals.units`, or parameters / groups as for any optimizer (one unit each).
        lr: factor on the largest step that may be tried (``trust`` and ``eta_max``), for schedulers. It is no learning
            rate: 1 is the usual value. In the relay it multiplies the remembered steps as well. Accepted
            steps are in ``group["step_size"]``.
        betas: decay rates of the averages of gradient and squared gradient, as in AdamW.
        eps: is added to the root of the averaged squares, as in AdamW.
        weight_decay: as in AdamW; the decay is decoupled and part of the tested direction.
        model: the module whose activations are cached and whose buffers (running statistics) trials leave alone;
            needed only if ``params`` is neither the model nor the groups of :func:`fastals.units`.
        modules: further modules that the closure uses and this optimizer does not train (a teacher, a discriminator):
            their buffers, and what a forward writes into their parameters, are held within a step, and their blocks
            are cached.
        direction: ``"adam"`` or ``"sgd"`` (heavy ball with ``betas[0]``).
        momentum: ``"none"``, ``"after"`` (test along the gradient's direction, move along the averaged
            one) or ``"tested"`` (test and move along the averaged one, or along the gradient's if the averaged
            one does not descend).
        schedule: which units are searched in a step, see :mod:`fastals.schedule`. ``"relay"``: one unit in turn is
            searched alone, to learn how far it may go, and all move together by what they have learned, tested
            jointly; ``"sweep"``: every unit in turn, in every step; ``"independent"``, ``"cycle"`` (PLASLS),
            ``"joint"``.
        order: order of the searches in a sweep: ``"top_down"``, ``"bottom_up"`` or ``"random"``.
        every: an integer N searches in every N-th step and repeats the remembered steps in between, untested but for
            the relay, which tests its joint move in every step; ``"auto"`` (SaLSA) chooses the steps that search, and
            waits for the device after each of them. Default: 2 for the relay, 1 for the others.
        c: sufficient-decrease constant in (0, 1). Default: 0.3 for the relay, 0.1 for the others.
        backtrack: factor β in (0, 1) on rejection.
        growth: factor γ ≥ 1 on the remembered step for the next mini-batch, in the relay on the common factor of all
            steps. Default: 1.1 for the relay, 1.3 for the others.
        max_trials: trials per search at most; after them the unit is put back, bitwise.
        trust: largest relative change of a unit in one step: RMS(η d) over the entries with a nonzero gradient,
            divided by the largest of RMS(w) of the unit, RMS(w) of all trained weights, and 0.01 (so that heads that
            start small and adapters that start at zero can move); ``None`` for no cap. Default: 0.2 for the relay, for
            which it is a guard, 0.006 for the others.
        initial: first step of a search: ``"warm"``, ``"reset"``, ``"polyak"`` or ``"random"``.
        eta_init: first step ever; ``None``: the largest allowed.
        eta_min: smallest step; a search ends below it.
        eta_max: largest step.
        reference: R of the test: ``"monotone"``, ``"nonmonotone"`` (Zhang-Hager) or ``"smoothed"`` (SaLSA).
        polyak_c: constant of ``initial="polyak"``, whose first step is f / (polyak_c ⟨g, d⟩).
        nonmonotone_weight: weight of the past in the nonmonotone reference, from 0 to 1.
        smoothing: weight of the past in SaLSA's averages of decrease and slope.
        merge_below: if the smallest step of a unit is below this, merge the unit with that of the next smallest step;
            two units stay.
        max_grad_norm: clip the gradient's norm in the direction; the slope keeps the true gradient. Use
            it in place of ``clip_grad_norm_``, which would make the test too easy. A relative step along SGD's
            direction is of the same length with it and without.
        cache: replay the calls of modules that a trial cannot change. ``"check"`` compares every cached trial with a
            full forward and raises an error that names the call if they differ: for tests, and for closures in doubt.
            Without the cache the steps are the same, but units are cut and ordered as modules are registered, not as a
            forward uses them.
        fused: ``"auto"`` runs the searches on the device with Triton kernels if all parameters are on one CUDA
            device in float32, bfloat16 or float16; ``True`` raises an error if they are not; ``False`` never does.
            The steps are the same up to rounding.
        seed: seeds ``order="random"`` and ``initial="random"``.
        process_group: the processes that train this model together, all of torch.distributed by default. f is the mean
            of their losses, and each takes the same step.

    Attributes:
        last_forwards: forward passes of the last step, the first one included; a cached trial counts as the share
            of the blocks that it ran. NaN after a graphed step.

    Raises:
        TypeError: params, model, modules or process_group of another kind.
        ValueError: an argument or a constant of a group out of its range, parameters twice, complex ones to be trained,
            units that do not fit the model, or modules of FSDP1 or DeepSpeed.

    References: arXiv 2403.18506 (per-layer search, Adam direction), 2407.20650 (SaLSA), 2306.12747 (PoNoS),
    1905.09997 (SLS).
    """

    def __init__(
        self,
        params: nn.Module | Iterable,
        lr: float = 1.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        model: nn.Module | None = None,
        modules: Sequence[nn.Module] = (),
        direction: str = "adam",
        momentum: str = "none",
        schedule: str = "relay",
        order: str = "top_down",
        every: int | str = "default",
        c: float | str = "default",
        backtrack: float = 0.5,
        growth: float | str = "default",
        max_trials: int = 8,
        trust: float | str | None = "default",
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
        cache: bool | str = True,
        fused: bool | str = "auto",
        seed: int = 0,
        process_group: "ProcessGroup | None" = None,
    ) -> None:
        self.settings, constants = sort_arguments(locals())
        warn_of_small_lr(lr)
        self.modules = check_modules(params, model, modules)
        self._processes = Processes(process_group)
        self._observe = isinstance(params, nn.Module) or getattr(params, "by", "") == "block"
        cut_from = getattr(params, "model", None) if model is None else model
        self.model = params if isinstance(params, nn.Module) else cut_from
        for module in (self.model, *self.modules):
            refuse_unsupported(module.modules() if module is not None else ())
        self._reports = Reports()
        self._graphed: GraphedStep | None = None
        self._engine: Engine | None = None
        super().__init__(units(params) if isinstance(params, nn.Module) else listed(params), constants | MEMORY)
        numbers: dict[int, int] = {}  # those of fastals.units differ from run to run, and checkpoints hold them
        for group in self.param_groups:
            group["unit"] = numbers.setdefault(group["unit"], len(numbers))
        listed(chain.from_iterable(g["params"] for g in self.param_groups))  # refuses groups that are all empty
        check_coverage(self.param_groups, self.model)
        warn_of_decay_groups(self.param_groups)
        self.engine.fused  # noqa: B018  (refuses fused=True if it is not possible)

    def step(  # type: ignore[override]
        self,
        closure: Closure | Iterable[Closure] | None = None,
        loss: Tensor | float | None = None,
        *,
        backward: Backward | None = None,
    ) -> Tensor:
        """One mini-batch: gradients, the searches of the schedule, the moments. Returns f(w_t).

        With several processes f is the mean of their losses.

        Args:
            closure: evaluates the loss of this mini-batch and returns it; it must not call backward. A list of
                closures, one for each micro-batch, stands for the sum of their losses: each has its own forward and
                backward, so that one graph at a time is in memory, and every trial adds up all of them under the same
                masks.
            loss: the loss whose gradients are in ``p.grad`` already (accumulated, reduced). Without it the gradients
                are computed here, by one backward of each closure.
            backward: takes a loss and adds its gradients to ``p.grad``, in place of ``loss.backward()``:
                ``accelerator.backward``, Lightning's ``self.manual_backward``. If it divides the loss, as Accelerate
                does by its accumulation steps, trials do so too, and f is the loss so divided. Random numbers that it
                draws between two micro-batches cannot be drawn again in trials.

        Raises:
            TypeError: no closure, or one that returns no tensor; both ``loss`` and ``backward``.
            ValueError: a loss that is no real scalar, or that differs between two evaluations at the same weights; a
                constant of a group that has been set out of its range.
            FloatingPointError: a loss that is not finite at w_t.
            RuntimeError: a closure that calls backward, as that of Lightning's automatic optimization, or ``step``; one
                micro-batch of several that Accelerate accumulates; gradients that a GradScaler has scaled; parameters
                converted since construction.
            ValueError: a trainable parameter of the model is in no unit: it was unfrozen or put in place later.
            RuntimeError: with ``cache="check"``, a cached trial is not what a full forward gives.
            RuntimeError: with several processes, another one has failed in this step, or their gradients, arguments or
                closures differ.

        After any error, of the closure too, parameters, state and random generators are as before. Signals (Ctrl-C,
        SIGTERM) come in the closure or the backward, at the end of an evaluation, or when the step is made. A handler
        that raises nothing sees the weights of a trial there: one that is to save a checkpoint should set a flag, and
        the loop save after the step.
        """
        if closure is None:
            if any(float(g["lr"]) for g in self.param_groups):
                raise TypeError(NO_CLOSURE)
            self.engine.make_state()  # torch.distributed.checkpoint sets every lr to 0 and steps, to get a state
            return torch.zeros(())
        if loss is not None and backward is not None:
            raise TypeError("backward= computes the gradients, and loss= says that they are there: pass one of them")
        if backward is not None and not callable(backward):
            raise TypeError(f"backward must be a function of a loss, as accelerator.backward, not {backward!r}")
        check_given(loss)
        with held_back(), torch.no_grad(), self._processes.failing_together():
            own, ready = unwrapped(closure)
            if loss is None:
                refuse_lost_micro_batches(own, backward, self.model)
            return self.engine.step(MicroBatches(own, backward, ready), loss)

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

    @property
    def last_forwards(self) -> float:
        """Forward passes of the last step, the first one included.

        A cached trial counts as the share of the blocks that it ran. NaN after a graphed step.
        """
        return self._reports.forwards

    @property
    def engine(self) -> Engine:
        """Makes the steps; a new one if groups, state, model or settings were replaced."""
        parts = (self.param_groups, self.state, self.model, self.modules, self.settings)
        if self._engine is None or any(map(is_not, parts, self._engine.parts)):
            self._engine = Engine(*parts, self._reports, self._processes, observe=self._observe)
        return self._engine

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a unit, for example one that has just been unfrozen: ``opt.add_param_group({"params": [...]})``.

        Raises:
            TypeError: no dict with parameters.
            ValueError: a parameter that the model does not have, that is in a unit already, or that is complex; a
                constant out of its range.
        """
        group, index = as_group(param_group, self.param_groups), len(self.param_groups)
        if self.model is not None and any("param_names" in g for g in self.param_groups):
            group = named(group, self.model)
        super().add_param_group({"name": f"group{index}", "unit": index} | group)
        try:
            check_group(self.param_groups[-1], self.model)
        except ValueError:
            del self.param_groups[-1]
            raise
        self._engine = None

    @property
    def report(self) -> StepReport | None:
        """The last step's :class:`fastals.StepReport`, None before the first; on the fused path the look waits."""
        return self._reports.last()

    @property
    def reports(self) -> list[StepReport]:
        """The reports of the last 64 steps at most, the oldest first."""
        return self._reports.read()

    def state_dict(self) -> dict[str, Any]:
        """State by parameter under AdamW's names; the memory of the units is plain numbers in the groups."""
        with _removed(self.register_state_dict_post_hook(_with_plain_memory, prepend=True)):
            return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state that :meth:`state_dict` gave, dtypes kept.

        Raises:
            TypeError: it is no dict.
            ValueError: the state belongs to another partition of the model into units or to a model of other shapes,
                lacks something, or holds a number out of its range.
        """
        if not isinstance(state_dict, dict):
            raise TypeError(f"a state is a dict, not a {type(state_dict).__name__}: {SAVED}")
        loaded: dict[str, Any] = {}  # as the hooks of the user hand it over

        def check(_: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
            loaded.update(state_dict)
            check_saved(state_dict)
            self._check_moments(state_dict["state"].values())
            self._check_shapes(state_dict)
            self._fit(state_dict["param_groups"])

        with (
            _removed(self.register_load_state_dict_pre_hook(check)),
            _removed(self.register_load_state_dict_post_hook(lambda _: self._keep_dtypes(loaded), prepend=True)),
        ):
            super().load_state_dict(state_dict)

    def _keep_dtypes(self, loaded: dict[str, Any]) -> None:
        """Load the state as it is; torch has cast it to the dtypes of the parameters."""
        params = [p for g in self.param_groups for p in g["params"]]
        indices = [i for g in loaded["param_groups"] for i in g["params"]]
        for p, i in zip(params, indices, strict=True):
            for key, value in loaded["state"].get(i, {}).items():
                if isinstance(value, Tensor):
                    self.state[p][key] = value.to(p.device if value.ndim else "cpu", copy=True)
        self._engine = None

    def _check_moments(self, saved: Iterable[dict[str, Any]]) -> None:
        wanted = {"exp_avg": self.settings.momentum != "none", "exp_avg_sq": self.settings.direction == "adam"}
        for name in (n for n, needed in wanted.items() if needed):
            if any(name not in entry for entry in saved):
                raise ValueError(f"the state has no {name!r}: it was saved with another momentum or direction")

    def _check_shapes(self, state_dict: dict[str, Any]) -> None:
        """Before units are regrouped, so that a refused state changes nothing."""
        params, indices = _by_name(self.param_groups), _by_name(state_dict["param_groups"])
        for name in params.keys() & indices.keys():
            if indices[name] in state_dict["state"]:
                check_entry(name, params[name], state_dict["state"][indices[name]])

    def _fit(self, saved: list[dict[str, Any]]) -> None:
        """Take over the units of a saved state if they hold the same parameters; refuse other units."""
        ours: list[list[str]] = [g.get("param_names", []) for g in self.param_groups]
        theirs: list[list[str]] = [g.get("param_names", []) for g in saved]
        if self._observe and len(ours) == len(theirs) and sorted(chain(*ours)) == sorted(chain(*theirs)):
            self.engine.regroup(theirs)
            ours = theirs
        if ours != theirs or [len(g["params"]) for g in self.param_groups] != [len(g["params"]) for g in saved]:
            raise ValueError(
                f"the state was saved with units {[g.get('name') for g in saved]} and this optimizer has "
                f"{[g.get('name') for g in self.param_groups]}: build it with the same fastals.units(...) arguments"
            )

    def __getstate__(self) -> dict[str, Any]:
        self._reports.read()
        return super().__getstate__() | {
            k: getattr(self, k) for k in ("model", "modules", "settings", "_reports", "_processes", "_observe")
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # load_state_dict comes here with new groups and a new state
        self.__dict__.setdefault("_processes", Processes())
        for group in self.param_groups:
            group.update({k: initial for k, initial in MEMORY.items() if k not in group})  # saved before there was a k
        self._graphed = self._engine = None

    def __repr__(self) -> str:
        names = ", ".join(f"{g['name']}: {sum(p.numel() for p in g['params']):,}" for g in self.param_groups)
        rules = {k: v for k, v in self.defaults.items() if k not in MEMORY}
        return f"ALS({self.settings}, {rules}, units=[{names}])"


@contextmanager
def _removed(handle: RemovableHandle) -> Iterator[None]:
    """Remove a hook at the end of the ``with`` block."""
    try:
        yield
    finally:
        handle.remove()


def _with_plain_memory(_: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    for group in saved["param_groups"]:
        group.update(plain_memory(group))


def _by_name(groups: Iterable[dict[str, Any]]) -> dict[str | int, Any]:
    """What groups hold for each parameter by its name, by its position if they hold no names."""
    params = [p for g in groups for p in g["params"]]
    names: list[str | int] = [name for g in groups for name in g.get("param_names", [])]
    return dict(zip(names if len(names) == len(params) else range(len(params)), params, strict=True))
