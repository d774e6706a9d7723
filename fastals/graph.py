"""``opt.graphed(loss_fn)``: steps as captured graphs, one program per signature of inputs."""

import math
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from contextlib import nullcontext
from functools import partial
from operator import attrgetter
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_is_leaf, tree_unflatten

from fastals.schedule import SCHEDULES, keep

if TYPE_CHECKING:
    from fastals.device import DeviceBatch
    from fastals.optimizer import ALS
    from fastals.program import Backend, Program, Tail

WARMUP = 3  # eager steps of each signature: compilation, workspaces, verification of the cache
Batch = Any


class GraphMode(NamedTuple):
    """How steps run: ``while`` (loops on the device), ``host`` (pieces, a flag read per trial) or ``eager``."""

    name: str
    reason: str


class Captured(NamedTuple):
    """A program with the static inputs that its graphs read."""

    program: "Program"
    inputs: list[Any]


class GraphedStep:
    """Takes one step on a batch; the step is captured once per signature (shapes, dtypes, training mode).

    The first steps of a signature run eagerly, as steps that count; then forward, backward, trials and updates are
    captured as CUDA graphs and replayed. The step sizes are those of the eager path. Dropout masks differ
    from step to step and are the same in all trials of a step. ``p.grad`` is not kept: gradients live in the graphs'
    memory. Where graphs cannot be used, or a capture fails, steps run eagerly and :attr:`mode` says why.

    Args:
        optimizer: the :class:`fastals.ALS`.
        loss_fn: loss of a batch, a scalar tensor. It must not wait for the device (``.item()``, prints of values,
            branches on them) to be captured. A mapping of another class, such as a ``BatchEncoding``, reaches it as a
            plain ``dict``: ``batch["labels"]`` works, ``batch.labels`` does not.
        pad_to_multiple_of: pad text batches (mappings with ``input_ids`` and ``attention_mask``) on the right to a
            multiple of this length, so that there are few signatures; labels are padded with -100.
        max_signatures: programs kept; the one used least recently goes first, with its memory.

    Attributes:
        mode: :class:`GraphMode`, how steps run and why.
        pool_bytes: device memory that captures have reserved so far.

    Raises:
        FloatingPointError: the loss is not finite at the current weights; nothing has moved. In mode ``while`` nobody
            waits for the loss, and the error comes with a later step.
    """

    def __init__(
        self,
        optimizer: "ALS",
        loss_fn: Callable[[Batch], Tensor],
        *,
        pad_to_multiple_of: int | None = None,
        max_signatures: int = 8,
        backend: Callable[..., "Backend"] | None = None,
    ) -> None:
        if max_signatures < 1 or (pad_to_multiple_of is not None and pad_to_multiple_of < 1):
            raise ValueError("max_signatures and pad_to_multiple_of must be at least 1")
        self.optimizer, self.loss_fn, self.max_signatures = optimizer, loss_fn, max_signatures
        self.pad_to_multiple_of, self._make_backend = pad_to_multiple_of, backend or _cuda_graphs
        self.mode = GraphMode("eager", "nothing has been captured yet")
        self._seen: dict[Hashable, int] = {}
        self._programs: OrderedDict[Hashable, Captured] = OrderedDict()
        self._identity: Hashable = None
        self._draws = False
        self._give_up = why_not_graphed(optimizer) if backend is None else why_not_recorded(optimizer)
        if self._give_up:
            self.mode = GraphMode("eager", self._give_up)
        device = optimizer.param_groups[0]["params"][0].device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" and not self._give_up else None
        self.pool_bytes = 0

    def __call__(self, batch: Batch) -> Tensor:
        """One step; returns f(w_t) before it, on the device."""
        if isinstance(batch, Mapping) and tree_is_leaf(batch):
            batch = dict(batch)
        if self.pad_to_multiple_of is not None:
            batch = pad(batch, self.pad_to_multiple_of)
        if self._give_up:
            return self._eagerly(batch)
        self._forget_if_changed()
        leaves, spec = tree_flatten(batch)
        signature = _signature(leaves, spec, self.optimizer.model)
        if self._seen.get(signature, 0) < WARMUP:
            loss = self._eagerly(batch)
            self._seen[signature] = self._seen.get(signature, 0) + 1
            self._identity = self._parameters()  # the step itself may have built its tables
            return loss
        try:
            captured, tail, due = self._captured(signature, leaves, spec)
        except Exception as error:
            self._drop_captures()
            loss = self._eagerly(batch)  # an error of the loss itself is raised here as in any eager step
            self._fall_back(error)
            return loss
        return self._replay(captured, tail, leaves, due)

    def _eagerly(self, batch: Batch) -> Tensor:
        before = self._generator_state()
        with self._on_stream():
            loss = self.optimizer.step(lambda: self.loss_fn(batch))
        self._draws |= before is not None and not torch.equal(before, self._generator_state())
        return loss

    def _generator_state(self) -> Any:
        return None if self._stream is None else torch.cuda.get_rng_state(self._stream.device)

    def _on_stream(self) -> Any:
        if self._stream is None:
            return nullcontext()
        from fastals.cuda_graphs import on_stream

        return on_stream(self._stream)

    def _captured(self, signature: Hashable, leaves: list[Any], spec: TreeSpec) -> "tuple[Captured, Tail, bool]":
        """The program of the signature, its tail for this step, and whether the step searches."""
        opt = self.optimizer
        if signature not in self._programs:
            while len(self._programs) >= self.max_signatures:
                self._programs.popitem(last=False)
            self._programs[signature] = self._capture(leaves, spec)
        self._programs.move_to_end(signature)
        captured = self._programs[signature]
        units = captured.program.units
        due = opt._search_is_due(units)
        turn = units[0].rules["count"] % len(units) if opt.settings.schedule == "cycle" else 0
        kind = turn if due else "keep"
        held = self._reserved()
        with self._on_stream():
            tail = captured.program.tail(kind, partial(self._record, due), opt._device_batch)
        self.pool_bytes += max(self._reserved() - held, 0)
        name = "while" if tail.launch is not None else "host"
        self.mode = GraphMode(name, tail.reason or "loops are nodes of the graph")
        return captured, tail, due

    def _record(self, due: bool, batch: "DeviceBatch") -> None:
        """The schedule of one step, as :meth:`fastals.ALS.step` runs it."""
        opt = self.optimizer
        if due:
            SCHEDULES[opt.settings.schedule](batch, opt.settings.order)
        else:
            keep(batch)
        batch.executor.always()
        if opt.settings.momentum == "after":
            batch.follow_momentum()

    def _capture(self, leaves: list[Any], spec: TreeSpec) -> Captured:
        from fastals.program import Program

        opt = self.optimizer
        params = [p for g in opt.param_groups for p in g["params"]]
        device = params[0].device
        inputs = [leaf.to(device, copy=True) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        batch = tree_unflatten(inputs, spec)
        backend = self._make_backend(device, self._stream, draws=self._draws)
        opt._built_units()
        held = self._reserved()
        with self._on_stream():
            program = Program(
                opt._device, lambda: self.loss_fn(batch), params, opt.model if opt.settings.cache else None,
                opt._learned, backend, opt.settings.max_grad_norm,
            )  # fmt: skip
        self.pool_bytes += max(self._reserved() - held, 0)
        return Captured(program, inputs)

    def _reserved(self) -> int:
        return 0 if self._stream is None else torch.cuda.memory_reserved(self._stream.device)

    def _replay(self, captured: Captured, tail: "Tail", leaves: list[Any], due: bool) -> Tensor:
        opt, program = self.optimizer, captured.program
        program.raise_if_refused()
        with self._on_stream():
            for static, leaf in zip(captured.inputs, leaves, strict=True):
                if isinstance(static, Tensor):
                    static.copy_(leaf, non_blocking=True)
            program.device.refresh_rules(opt._seed())
            program.run(tail)
            loss = program.loss.clone()
        program.device.arena.steps += 1
        opt._count(tail.batch, searched=due)
        opt.last_forwards = math.nan
        return loss

    def _forget_if_changed(self) -> None:
        """Recapture where parameters have moved, been frozen or got another partition."""
        if self._parameters() != self._identity:
            self._programs.clear()
            self._seen.clear()

    def _parameters(self) -> Hashable:
        opt = self.optimizer
        params = [p for g in opt.param_groups for p in g["params"]]
        trained = tuple(map(attrgetter("requires_grad"), params))
        return tuple(map(Tensor.data_ptr, params)), trained, opt._device and id(opt._device.arena)

    def _drop_captures(self) -> None:
        self._programs.clear()
        for group in self.optimizer.param_groups:
            for p in group["params"]:
                p.grad = None

    def _fall_back(self, error: Exception) -> None:
        self._give_up = f"the capture failed: {type(error).__name__}: {error}"
        self.mode = GraphMode("eager", self._give_up)
        warnings.warn(f"fastals: steps run eagerly, because {self._give_up}", stacklevel=3)


def why_not_recorded(optimizer: "ALS") -> str:
    """Why the steps of this optimizer cannot be a fixed sequence of pieces; empty if they can."""
    settings = optimizer.settings
    if settings.order == "random":
        return "order='random' draws another sequence of searches in every step"
    if settings.merge_below is not None:
        return "merge_below looks at the step sizes after every step"
    return "" if optimizer._is_fused() else "the optimizer does not run its fused kernels (fused=True says why)"


def why_not_graphed(optimizer: "ALS") -> str:
    """Why steps cannot be CUDA graphs; empty if they can."""
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    return why_not_recorded(optimizer)


def pad(batch: Batch, multiple: int) -> Batch:
    """Pad the tensors that are as long as ``input_ids`` on the right; what is padded is masked.

    Raises:
        TypeError: the batch is no mapping with ``input_ids`` and ``attention_mask``.
    """
    if not isinstance(batch, Mapping) or not {"input_ids", "attention_mask"} <= set(batch):
        raise TypeError("pad_to_multiple_of needs batches that are mappings with input_ids and attention_mask")
    length = batch["input_ids"].shape[1]
    missing = -length % multiple

    def padded(name: str, value: Any) -> Any:
        if not missing or not isinstance(value, Tensor) or value.dim() < 2 or value.shape[1] != length:
            return value
        filling = -100 if name == "labels" else 0
        widths = [0, 0] * (value.dim() - 2) + [0, missing]
        return torch.nn.functional.pad(value, widths, value=filling)

    return {name: padded(name, value) for name, value in batch.items()}


def _signature(leaves: list[Any], spec: TreeSpec, model: torch.nn.Module | None) -> Hashable:
    kinds = tuple((leaf.shape, leaf.dtype) if isinstance(leaf, Tensor) else leaf for leaf in leaves)
    return str(spec), kinds, model.training if model is not None else None, torch.is_autocast_enabled("cuda")


def _cuda_graphs(device: torch.device, stream: torch.cuda.Stream | None, *, draws: bool) -> "Backend":
    from fastals.cuda_graphs import CudaGraphs

    assert stream is not None
    return CudaGraphs(device, stream, draws=draws)
