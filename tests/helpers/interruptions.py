"""Errors and signals at every place of a step: at each point the process forks, and the fork is disturbed there.

A visit ends well if everything is as before the step and a second try gives what an undisturbed step gives, or if the
step is wholly made.
"""

import contextlib
import copy
import gc
import itertools
import os
import pickle
import random
import signal
import sys
import types
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import numpy as np
import torch
from helpers.remembered import remembered
from helpers.tiny import assert_same
from torch import nn
from torch.utils import _python_dispatch

import fastals
from fastals import kernels
from fastals.engine import Engine
from fastals.graphs.graphed import WARMUP

FOLDERS = tuple(str(Path(package.__file__).parent) for package in (fastals, kernels))
HARD = {"c": 0.9, "trust": 0.5, "max_trials": 2}


class BrokenError(RuntimeError):
    """What is raised on purpose."""


# What is disturbed


class Net(nn.Module):
    """Two blocks and a head, with dropout, a buffer that every forward writes, and numbers drawn on the host."""

    def __init__(self, drawing):
        super().__init__()
        self.drawing = drawing  # captured steps must not
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(2, 2), nn.Tanh()) for _ in range(2))
        self.norm, self.dropout, self.head = nn.BatchNorm1d(2), nn.Dropout(0.2), nn.Linear(2, 1)

    def forward(self, x):
        if self.drawing:
            x = x * (1 + 0.1 * np.random.rand() + 0.1 * random.random())
        for block in self.blocks:
            x = x + self.dropout(block(x))
        return (self.head(self.norm(x)) - 1).square().mean()


class Case:
    """A model after some steps, and the step that is to be disturbed."""

    def __init__(self, steps, dtype=torch.float32, *, recorded=False, **options):
        for seed in (torch.manual_seed, np.random.seed, random.seed):
            seed(0)
        self.model = Net(drawing=not recorded).to(dtype)
        self.opt = fastals.ALS(self.model, **(HARD | options))
        self.data = [torch.randn(4, 2).to(dtype) for _ in range(steps + 1)]
        self.evaluated, self.recorded = lambda: None, recorded
        self.take = self.take_eagerly
        if recorded:
            from helpers.recording import recorded as captured

            self.take = captured(self.opt, self.model, self.loss)
        for x in self.data[:-1]:
            self.take(x)

    def loss(self, x):
        loss = self.model(x)
        self.evaluated()
        return loss

    def take_eagerly(self, x):
        return self.opt.step(lambda: self.loss(x))

    def step(self):
        """The step that is disturbed."""
        self.take(self.data[-1])

    def snapshot(self):
        """Copies of everything that a step may change."""
        report = self.opt.report
        return {
            "weights": [p.detach().clone() for p in self.model.parameters()],
            "grads": self.gradients(),
            "buffers": [b.clone() for b in self.model.buffers()],
            "state": copy.deepcopy(self.opt.state_dict()),
            "generators": [torch.get_rng_state(), np.random.get_state()[1].tobytes(), random.getstate()],
            "modules": [_attributes(m) for m in self.model.modules()],
            "report": None if report is None else report.as_dict() | {"collectives": 0, "reduced_bytes": 0},
            "modes": _modes(),
        }

    def gradients(self):
        """Those that a step leaves; captured steps keep none."""
        return [] if self.recorded else [None if p.grad is None else p.grad.clone() for p in self.model.parameters()]


def _attributes(module):
    """Names of what a module holds, hooks included."""
    held = vars(module)
    return sorted(held), {k: len(v) for k, v in held.items() if isinstance(v, dict) and "hooks" in k}


def _modes():
    """What of the process a step may leave otherwise than it was."""
    return [
        torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch.backends.mha.get_fastpath_enabled(),
        _python_dispatch._len_torch_dispatch_stack(), signal.getsignal(signal.SIGINT) is signal.default_int_handler,
        signal.getsignal(signal.SIGTERM) is terminated,
    ]  # fmt: skip


SETUPS = {
    "relay": lambda: Case(3),
    "relay between": lambda: Case(2),
    "first step": lambda: Case(0),
    "sweep": lambda: Case(1, schedule="sweep", momentum="after"),
    "independent": lambda: Case(1, schedule="independent", momentum="tested", max_grad_norm=0.1),
    "cycle": lambda: Case(1, schedule="cycle"),
    "kept": lambda: Case(1, schedule="cycle", every=2, direction="sgd", momentum="tested"),
    "joint": lambda: Case(1, schedule="joint", momentum="after", merge_below=1e9),
    "bfloat16": lambda: Case(1, torch.bfloat16, momentum="after"),
    "fused": lambda: Case(1, fused=True),
    "fused first": lambda: Case(0, fused=True),
    "fused between": lambda: Case(2, fused=True),
    "fused bfloat16": lambda: Case(1, torch.bfloat16, fused=True, schedule="sweep", momentum="after"),
    "fused joint": lambda: Case(1, fused=True, schedule="joint", merge_below=1e9),
    "captured": lambda: Case(WARMUP + 1, fused=True, recorded=True, schedule="sweep", momentum="after"),
    "capture": lambda: Case(WARMUP, fused=True, recorded=True),
}


# How it is disturbed


def broken():
    raise BrokenError("deliberate")


def out_of_memory():
    raise torch.OutOfMemoryError("deliberate")


def terminated(number, frame):
    """What Slurm scripts do."""
    raise SystemExit(number)


ACTIONS = {
    "error": broken,
    "memory": out_of_memory,
    "ctrl-c": lambda: signal.raise_signal(signal.SIGINT),
    "sigterm": lambda: signal.raise_signal(signal.SIGTERM),
}


class Points:
    """Counts the points of a step; at those to visit it forks, once for each way, and the fork is disturbed there."""

    def __init__(self, pairs=()):
        self.where, self.outcomes, self.committing, self.off = [], {}, False, False
        self.action = self.sending = None  # of a fork
        self.ways = {}
        for number, action in pairs:
            self.ways.setdefault(number, []).append(action)

    def __call__(self, where):
        """A point."""
        if self.off:
            return
        if self.sending:
            if self.action == "memory":  # it lasts
                ACTIONS[self.action]()
            return
        number = len(self.where)
        self.where.append(where)
        for action in self.ways.get(number, ()):
            fork = Fork()
            if fork.child:
                self.outcomes[number, action] = fork.received()
                continue
            self.action, self.sending = action, fork.send
            ACTIONS[action]()
            return


@contextlib.contextmanager
def at_evaluations(case, points):
    case.evaluated = lambda: points("evaluation")
    with whole_launches(points):
        yield
    case.evaluated = lambda: None


@contextlib.contextmanager
def at_operations(case, points):
    """At every operation of torch; in the commit, which must not be able to fail, at those that give new memory."""
    with commit_noted(points), whole_launches(points), Operations(points):
        yield


@contextlib.contextmanager
def at_allocations(case, points):
    """At every operation that gives new memory."""
    with commit_noted(points), whole_launches(points), Operations(points, allocating=True):
        yield


@contextlib.contextmanager
def whole_launches(points):
    """No points within a launch or a replayed piece, which the device does as a whole."""
    places = []
    if find_spec("triton"):
        from helpers.recording import Recording
        from triton.runtime.interpreter import InterpretedFunction

        places = [(InterpretedFunction, "run"), (Recording, "replay")]
    with contextlib.ExitStack() as changes:
        for place, name in places:
            changes.enter_context(patch.object(place, name, as_a_whole(getattr(place, name), points)))
        yield


def as_a_whole(plain, points):
    """A function without points inside."""

    def whole(*args, **kwargs):
        before, points.off = points.off, True
        try:
            return plain(*args, **kwargs)
        finally:
            points.off = before

    return whole


class Operations(_python_dispatch.TorchDispatchMode):
    def __init__(self, points, *, allocating=False):
        super().__init__()
        self.points, self.allocating = points, allocating

    def __torch_dispatch__(self, func, kinds, args=(), kwargs=None):
        if func.namespace == "profiler":  # around the step
            return func(*args, **(kwargs or {}))
        allocates = any(str(r.type) == "Tensor" and r.alias_info is None for r in func._schema.returns)
        if allocates if self.points.committing or self.allocating else True:
            self.points(f"{func}{' in the commit' if self.points.committing else ''}")
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def commit_noted(points):
    plain = Engine._commit

    def noted(*args, **kwargs):
        points.committing = True
        try:
            plain(*args, **kwargs)
        finally:
            points.committing = False

    with patch.object(Engine, "_commit", noted):
        yield


@contextlib.contextmanager
def at_launches(case, points):
    """Before every launch of a kernel, but for those of the commit, which are compiled before."""
    from triton.runtime.interpreter import InterpretedFunction

    plain = InterpretedFunction.run

    def launched(kernel, *args, warmup, **kwargs):
        if not points.committing:
            points(f"{'compilation' if warmup else 'launch'} of {kernel.__name__}")
        return plain(kernel, *args, warmup=warmup, **kwargs)

    with commit_noted(points), patch.object(InterpretedFunction, "run", launched):
        yield


@contextlib.contextmanager
def at_pieces(case, points):
    """Before every piece of a captured step, every capture and every look at flags."""
    from helpers.recording import Recording

    with contextlib.ExitStack() as changes:
        for name in ("capture", "replay", "look"):
            plain = getattr(Recording, name)

            def pointed(*args, plain=plain, name=name):
                points(name)
                return plain(*args)

            changes.enter_context(patch.object(Recording, name, pointed))
        yield


@contextlib.contextmanager
def at_lines(case, points):
    """At every line of fastals that the host executes."""

    def at_call(frame, event, arg):
        code = frame.f_code
        return at_line if code.co_filename.startswith(FOLDERS) and code not in kernel_code() else None

    def at_line(frame, event, arg):
        if event == "line":
            points(f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}")
        return at_line

    sys.settrace(at_call)
    try:
        yield
    finally:
        sys.settrace(None)


@contextlib.contextmanager
def at_lines_after_ctrl_c(case, points):
    """The same after a first Ctrl-C at the second evaluation: a user who presses it twice."""
    evaluations = itertools.count()

    def evaluated():
        if next(evaluations) == 1:
            points.off = False
            signal.raise_signal(signal.SIGINT)

    points.off, case.evaluated = True, evaluated
    with at_lines(case, points):
        yield
    case.evaluated = lambda: None


def kernel_code():
    """What the interpreter executes in place of a kernel, which on a device is one launch."""
    interpreter = sys.modules.get("triton.runtime.interpreter")
    if interpreter is None:
        return ()
    return {f.__code__ for fn in list(interpreter.InterpretedFunction.rewritten_fn.items()) for f in fn
            if isinstance(f, types.FunctionType)}  # fmt: skip


#: Where a step is disturbed, and how.
KINDS = {
    "evaluations": (at_evaluations, ("error", "memory", "ctrl-c", "sigterm")),
    "operations": (at_operations, ("error",)),
    "allocations": (at_allocations, ("memory",)),
    "launches": (at_launches, ("error",)),
    "pieces": (at_pieces, ("error",)),
    "lines": (at_lines, ("ctrl-c", "sigterm")),
    "lines after ctrl-c": (at_lines_after_ctrl_c, ("ctrl-c",)),
}


# Visits


class Outcome(NamedTuple):
    """How a visit has ended: ``as before``, ``made``, ``passed`` if nothing was raised, or what is wrong."""

    ended: str
    fault: str = ""


class Fork:
    """A copy of this process, which sends a result and ends."""

    def __init__(self):
        self.reading, self.writing = os.pipe()
        generator = random.getstate()  # Python seeds it anew in a fork
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # from Python 3.12 on if other threads wait
            self.child = os.fork()
        if not self.child:
            random.setstate(generator)
        os.close(self.writing if self.child else self.reading)

    def send(self, function):
        """In the copy: the result of the function, or its error; nothing is executed after it."""
        try:
            result = function()
        except BaseException as error:
            result = Outcome("", f"{type(error).__name__}: {error}"[:500])
        with os.fdopen(self.writing, "wb") as pipe:
            pickle.dump(result, pipe)
        os._exit(0)

    def received(self):
        """What the copy has sent."""
        with os.fdopen(self.reading, "rb") as pipe:
            result = pickle.load(pipe)
        os.waitpid(self.child, 0)
        return result


def forked(function):
    """The result of a function that runs in a fork of this process."""
    fork = Fork()
    return fork.received() if fork.child else fork.send(function)


class Visits:
    """All points of one kind in one set-up."""

    def __init__(self, case, kind):
        self.case = case
        self.at, self.actions = KINDS[kind]
        gc.collect()  # so that what others have left is not met in one step and gone in the next
        self.first = case.snapshot()
        self.memory = {}  # of launches
        self.last, self.memory = forked(self._undisturbed)
        self.where = forked(lambda: self._walked(Points()).where)

    def _undisturbed(self):
        with remembered(self.memory):
            self.case.step()
        return self.case.snapshot(), self.memory

    def pairs(self, *, every=True):
        """Points to visit, and how; without ``every`` the first and last execution of each line, the ways by turns."""
        numbers = range(len(self.where))
        if every or self.at not in (at_lines, at_lines_after_ctrl_c):
            return list(itertools.product(numbers, self.actions))
        last = {where: number for number, where in enumerate(self.where)}
        first = {where: number for number, where in reversed([*enumerate(self.where)])}
        numbers = sorted({*first.values(), *last.values()})
        return list(zip(numbers, itertools.cycle(self.actions), strict=False))

    def __call__(self, pairs):
        """Visit points, each in one way; the outcomes by point and way."""
        outcomes = forked(lambda: self._walked(Points(pairs)).outcomes)
        missed = Outcome("", "the point was not reached")
        return {pair: outcomes.get(pair, missed) for pair in pairs}

    def _walked(self, points):
        """Make a step with points; a fork that is disturbed at one sends how it has ended."""
        error = None
        gc.disable()  # a collection may call lines of fastals
        with warnings.catch_warnings(), remembered(self.memory):
            warnings.simplefilter("ignore")
            try:
                with self.at(self.case, points):
                    self.case.step()
            except BaseException as raised:
                error = raised
            self.case.evaluated = lambda: None
            if points.sending:
                points.sending(lambda: self._outcome(points.action, error))
        if error is not None and not isinstance(error, KeyboardInterrupt):
            raise error
        return points

    def _outcome(self, action, error):
        now = self.case.snapshot()
        if error is None:
            lost = "the signal was lost" if action in ("ctrl-c", "sigterm") else different(now, self.last)
            return Outcome("passed", lost)
        if not isinstance(error, RuntimeError | KeyboardInterrupt | SystemExit):
            raise error
        if not (left := different(now, self.first)):
            self.case.step()
            found = different(self.case.snapshot(), self.last)
            return Outcome("as before", found and f"the second try: {found}")
        found = different(now, self.last)
        notes = getattr(error, "__notes__", "")
        fault = f"neither as before ({left}) nor made ({found}); {type(error).__name__}: {error} {notes}"
        return Outcome("made", found and fault)


def different(a, b):
    """The names of what differs between two snapshots."""
    names = []
    for name in a:
        try:
            assert_same(a[name], b[name])
        except AssertionError:
            names.append(name)
    return ", ".join(names)


@contextlib.contextmanager
def handled():
    """Signals as a program has them that takes SIGTERM for an exit; in the background Ctrl-C would do nothing.

    A handler of SIGCHLD, which torch sets for its data loaders, would be called at the end of every visit.
    """
    handlers = {signal.SIGTERM: terminated, signal.SIGINT: signal.default_int_handler, signal.SIGCHLD: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def kinds_of(name):
    """The kinds of points that a set-up has."""
    if name == "captured":
        return ["allocations", "pieces", "lines"]
    if name == "capture":
        return ["evaluations", "pieces", "lines"]
    return [k for k in KINDS if k != "pieces" and (k != "launches" or name.startswith("fused"))]
