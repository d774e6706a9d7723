"""The Trainer of Hugging Face, and its subclasses in TRL and sentence-transformers, with steps by line search.

:class:`ALSTrainer` takes the place of ``Trainer``. Any other trainer gets its steps from the mixin::

    class SFTWithLineSearch(LineSearch, SFTTrainer):
        pass
"""

import copy
import inspect
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastals.files import check_sums, move, remove, settle
from fastals.optimizer import ALS
from fastals.partition import units
from fastals.settings import sort_arguments
from fastals.shards import is_sharded

try:
    from transformers import Trainer, TrainingArguments
    from transformers.trainer import TRAINER_STATE_NAME
    from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints
except ImportError as error:
    raise ImportError(
        f"fastals.integrations.transformers needs {error.name}: pip install 'fastals[trainer]'"
    ) from error

PASSED_OVER = ("adamw_torch", "adamw_torch_fused")  # optim is one of these unless another is asked for
UNFINISHED = "_unfinished"  # holds a checkpoint that is being written; a name that is not pushed to the hub
METRICS = ("_metrics", "_pending_metrics", "accum_loss_components")  # of TRL and sentence-transformers
#: Arguments that mean nothing to a line search, and what to set in their place.
MEANINGLESS = {
    "learning_rate": "no rate is needed; als={'lr': ...} multiplies the steps, and 1.0 is the usual value",
    "optim_args": "pass the arguments of fastals.ALS as als={...}",
    "learning_rate_mapping": "each unit finds its own step",
}


if TYPE_CHECKING:
    _Base = Trainer  # a mixin, which uses what a Trainer has
else:
    _Base = object


class LineSearch(_Base):
    """Mixin that lets a Trainer make its steps by :class:`fastals.ALS`.

    A step is made where the Trainer computes its loss and gradients: the micro-batches of
    ``gradient_accumulation_steps`` are collected, and each has its own forward and backward; the call of
    ``optimizer.step()`` in the Trainer's loop finds the step made. So ``on_pre_optimizer_step`` sees the weights after
    the step, and the gradients before it. A loss that is not finite moves nothing, and training goes on with the next
    mini-batch. Processes that torchrun has started make one step together, from the mean of their losses, with the
    model whole in each of them or sharded (``fsdp=True``).

    Of the training arguments the optimizer takes ``adam_beta1``, ``adam_beta2``, ``adam_epsilon``, ``weight_decay``
    (not on biases and norms, as in the Trainer), ``max_grad_norm`` (clips the direction) and ``seed``;
    ``lr_scheduler_type`` and ``warmup_steps`` anneal the steps. Logs have ``als/trials`` and ``als/factor``, means over
    the steps since the last log, and ``als/step_size/<unit>`` of the last step.

    Args:
        als: arguments of :class:`fastals.ALS`, which come before those of the training arguments, and ``by`` of
            :func:`fastals.units`. The other arguments are those of the Trainer.

    Raises:
        TypeError: ``als`` is no dict or has an argument that ALS does not have, or the mixin does not come first.
        ValueError: one of them is out of its range, another optimizer is asked for, or training that a line search does
            not support (``fp16``, whose gradients are scaled, DeepSpeed, FSDP1, DataParallel).
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if issubclass(cls, Trainer) and cls.mro().index(Trainer) < cls.mro().index(LineSearch):
            raise TypeError(f"LineSearch comes first: class {cls.__name__}(LineSearch, {cls.__bases__[0].__name__})")

    def __init__(self, *args: Any, als: dict[str, Any] | None = None, **kwargs: Any) -> None:
        self.als = _checked(als)
        self._micro_batches: list[Callable[[], Tensor]] = []
        self._unlogged_steps = 0
        super().__init__(*args, **kwargs)
        _refuse_optimizers(self)
        _refuse_unsupported(self)
        _warn_of_meaningless(self.args)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Make the optimizer from the training arguments and ``als``; a second ``train()`` goes on with it."""
        self._micro_batches, self._unlogged_steps = [], 0  # an earlier training may have been interrupted
        if self.optimizer is None:
            model = self._trained(self.model if model is None else model)  # type: ignore[arg-type]
            options = self._options() | {"modules": [*self.als.get("modules", []), *self._beside(model)]}
            decayed = set(self.get_decay_parameter_names(model))
            groups = units(
                model, options.pop("by"), weight_decay=options.pop("weight_decay"),
                decayed=[n for n, _ in model.named_parameters() if n in decayed],
            )  # fmt: skip
            self.optimizer = _MadeBefore(groups, model=model, **options)
        return self.optimizer

    def _options(self) -> dict[str, Any]:
        a: TrainingArguments = self.args
        return {
            "by": "block", "betas": (a.adam_beta1, a.adam_beta2), "eps": a.adam_epsilon, "seed": a.seed,
            "weight_decay": a.weight_decay, "max_grad_norm": a.max_grad_norm or None,
        } | self.als  # fmt: skip

    def _trained(self, model: nn.Module) -> nn.Module:
        """The module of all that is trained: losses of sentence-transformers may have parameters of their own."""
        loss, own = getattr(self, "loss", None), set(model.parameters())
        losses = loss.values() if isinstance(loss, dict) else [loss]
        further = [m for m in losses if isinstance(m, nn.Module) and not own.issuperset(m.parameters())]
        return nn.ModuleDict({"model": model} | {f"loss{i}": m for i, m in enumerate(further)}) if further else model

    def _beside(self, trained: nn.Module) -> list[nn.Module]:
        """The other modules of the trainer, such as the reference model of DPO."""
        own = set(trained.parameters())
        return [m for m in vars(self).values() if isinstance(m, nn.Module) and not own.issuperset(m.parameters())]

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Collect a micro-batch, and make the step with the last one; returns the loss of the mini-batch, or 0."""
        model.train()  # an evaluation may have come before
        inputs = self._prepare_inputs(inputs)
        self._micro_batches.append(_MicroBatch(self, model, inputs, num_items_in_batch))
        if not self.accelerator.sync_gradients:
            return torch.zeros((), device=self.args.device)
        micro_batches, self._micro_batches = self._micro_batches, []
        optimizer = _unwrapped(self.optimizer)
        try:
            loss = optimizer.step(micro_batches, backward=self.accelerator.backward)
            self._unlogged_steps += 1
        except FloatingPointError as error:
            warnings.warn(f"step {self.state.global_step + 1}: {error}", stacklevel=2)
            loss = torch.tensor(float("nan"), device=self.args.device)
        optimizer.made = True
        return loss.to(torch.float32)

    def loss_of(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any) -> Tensor:
        """The loss that the Trainer's own ``training_step`` would differentiate."""
        losses: list[Tensor] = []
        with (
            _set(self.accelerator, "backward", lambda loss, **_: losses.append(loss)),
            _set(self, "_prepare_inputs", lambda inputs: inputs),
        ):
            super().training_step(model, copy.copy(inputs), num_items_in_batch)
        if len(losses) != 1:
            raise RuntimeError(
                f"a line search needs one loss of a micro-batch, and {type(self).__name__}.training_step has "
                f"differentiated {len(losses)}"
            )
        return losses[0]

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log, with the searches since the last log beside the training loss."""
        if "loss" in logs:
            logs = logs | self._searches()
        super().log(logs, *args, **kwargs)

    def _searches(self) -> dict[str, float]:
        steps, self._unlogged_steps = self._unlogged_steps, 0
        if not steps:
            return {}
        reports = _unwrapped(self.optimizer).reports[-steps:]
        found = {"als/trials": fmean(r.trials for r in reports), "als/factor": fmean(r.factor for r in reports)}
        return found | {f"als/step_size/{u.name}": u.step_size for u in reports[-1].units}

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint aside, and move it to its place when it is on the disk: a kill leaves no part of one."""
        run, name = Path(self._get_output_dir(trial=trial)), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        aside = run / UNFINISHED
        self._once_a_node(remove, aside)
        try:
            with (
                _set(self, "_get_output_dir", lambda trial: str(aside)),
                _set(self, "_push_from_checkpoint", lambda folder: None),
            ):
                super()._save_checkpoint(model, trial)
            self._name_the_best(run, aside / name)
            self._once_a_node(_put, aside / name, run / name)
        except BaseException:
            remove(aside)  # of a full disk, say
            raise
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(run / name))
        if self.args.should_save:
            rotate_checkpoints(str(run), self.args.save_total_limit, self.state.best_model_checkpoint, use_mtime=True)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load the state of a checkpoint whose bytes are those that were written."""
        for path in Path(checkpoint).glob("*.pt") if checkpoint else ():
            try:
                check_sums(path)
            except ValueError as error:
                raise ValueError(f"{checkpoint} cannot be resumed from, go back to an earlier one: {error}") from error
        super()._load_optimizer_and_scheduler(checkpoint)

    def _once_a_node(self, action: Callable[..., object], *paths: Path) -> None:
        """Do something to files when all processes have come here; nodes may share them, and go one after another."""
        self.accelerator.wait_for_everyone()
        with self.args.main_process_first(local=False):
            if self.is_local_process_zero():
                action(*paths)
        self.accelerator.wait_for_everyone()

    def _name_the_best(self, run: Path, written: Path) -> None:
        """Let the state name the best checkpoint by its place; the Trainer has looked for it where it was writing."""
        best = run / f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"
        if self.state.best_model_checkpoint == str(written) or best.is_dir():
            self.state.best_model_checkpoint = str(best)
            if self.args.should_save:
                self.state.save_to_json(str(written / TRAINER_STATE_NAME))

    def _finalize_training(self, trial: Any, *arguments: Any) -> Any:
        """End the training. The last checkpoint vanishes as a whole where the best one alone is to stay."""
        best, limit = self.state.best_model_checkpoint, self.args.save_total_limit
        if self.args.should_save and best is not None and limit == 1:
            for folder in Path(self._get_output_dir(trial=trial)).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
                if not os.path.samefile(folder, best):
                    move(folder, folder.with_name(UNFINISHED))
                    remove(folder.with_name(UNFINISHED))
        return super()._finalize_training(trial, *arguments)

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        """The norm for the logs; ALS has clipped the direction."""
        norm: Any = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        return norm.full_tensor() if is_sharded(norm) else norm


class ALSTrainer(LineSearch, Trainer):
    """:class:`transformers.Trainer` with steps by line search, see :class:`LineSearch`."""


class _MicroBatch:
    """The loss of a micro-batch; trials run on a stand-in, so that the trainer's metrics count it once."""

    def __init__(self, trainer: LineSearch, *arguments: Any) -> None:
        self.trainer, self.arguments, self.counted = trainer, arguments, False

    def __call__(self) -> Tensor:
        loss = (_stand_in(self.trainer) if self.counted else self.trainer).loss_of(*self.arguments)
        self.counted = True
        return loss


def _stand_in(trainer: LineSearch) -> LineSearch:
    """A copy that counts for itself."""
    other = copy.copy(trainer)
    for name in METRICS:
        if hasattr(trainer, name):
            setattr(other, name, copy.deepcopy(getattr(trainer, name)))
    return other


class _MadeBefore(ALS):
    """Passes the step of the Trainer's loop, which comes without a closure, if it has been made before."""

    made = False

    def step(self, closure: Any = None, loss: Any = None, **options: Any) -> Any:  # type: ignore[override]
        """Make a step."""
        if closure is None and self.made:
            self.made = False
            return None
        return super().step(closure, loss, **options)

    step.hooked = True  # type: ignore[attr-defined]  # hooks and profiler look at the step of ALS, once


if not getattr(ALS.step, "hooked", False):
    ALS.step = ALS.profile_hook_step(ALS.step)  # type: ignore[method-assign]
    ALS.step.hooked = True  # type: ignore[attr-defined]


def _unwrapped(optimizer: Any) -> _MadeBefore:
    """The optimizer inside of Accelerate's."""
    while not isinstance(optimizer, _MadeBefore):
        optimizer = optimizer.optimizer
    return optimizer


def _put(written: Path, place: Path) -> None:
    """Move a checkpoint to its place; another node that shares the files may have done so."""
    if written.is_dir():
        settle(written)
        move(written, place)
    remove(written.parent)


@contextmanager
def _set(owner: object, name: str, value: Any) -> Iterator[None]:
    """Cover a method of an object inside the ``with`` block."""
    own = vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        delattr(owner, name) if own is None else setattr(owner, name, own)


def _checked(als: object) -> dict[str, Any]:
    """The arguments of ALS, before time is spent on data."""
    if als is not None and not isinstance(als, Mapping):
        raise TypeError(
            f"als={als!r}: pass the arguments of fastals.ALS as a dict, such as als={{'schedule': 'sweep'}}"
        )
    given, signature = dict(als or {}), inspect.signature(ALS)
    known = {"by", *signature.parameters} - {"params", "model"}
    if unknown := set(given) - known:
        raise TypeError(f"als={{...}} has no argument {sorted(unknown)[0]!r}: there are {', '.join(sorted(known))}")
    bound = signature.bind(None, **{name: value for name, value in given.items() if name != "by"})
    bound.apply_defaults()
    sort_arguments(bound.arguments)
    return given


def _refuse_optimizers(trainer: Any) -> None:
    optim = getattr(trainer.args.optim, "value", trainer.args.optim)
    given = trainer.optimizer is not None or trainer.lr_scheduler is not None
    if given or trainer.optimizer_cls_and_kwargs is not None or optim not in PASSED_OVER:
        raise ValueError(
            "this trainer makes its own optimizer, fastals.ALS, when training starts: leave out optimizers=, "
            "optimizer_cls_and_kwargs= and optim=, pass the arguments of ALS as als={...}, and choose the schedule by "
            "lr_scheduler_type"
        )


def _refuse_unsupported(trainer: Any) -> None:
    if trainer.args.fp16:
        raise ValueError("fp16=True scales the gradients, which a line search cannot use: set bf16=True, or neither")
    if trainer.is_deepspeed_enabled:
        raise ValueError(
            "DeepSpeed makes the steps itself, without a closure: leave out deepspeed=, and set fsdp=True, which "
            "shards weights, gradients and moments as well"
        )
    if trainer.is_fsdp_enabled and trainer.accelerator.state.fsdp_plugin.fsdp_version == 1:
        raise ValueError(
            "FSDP1 holds its weights in flat parameters, which units cannot be cut from: set "
            "fsdp_config={'version': 2}, or `accelerate launch --fsdp_version 2`"
        )
    if trainer.args.n_gpu > 1:
        raise ValueError(
            f"{trainer.args.n_gpu} GPUs in one process (DataParallel) are not supported: start one process for each by "
            "torchrun, or set CUDA_VISIBLE_DEVICES=0"
        )


def _warn_of_meaningless(args: TrainingArguments) -> None:
    defaults: dict[str, Any] = {f.name: f.default if f.default_factory is not dict else {} for f in fields(args)}
    for name, instead in MEANINGLESS.items():
        value = getattr(args, name, None)
        if value and value != defaults.get(name):
            warnings.warn(f"{name}={value} has no meaning for a line search: {instead}", stacklevel=3)
