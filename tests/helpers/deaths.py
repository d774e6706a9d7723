"""Trainings in processes of their own that are killed, at a random time or at a chosen instant, and go on.

An instant is a call of ``torch.save``, ``os.fsync`` or ``os.replace`` by its number, and whether death comes before
it, amid its bytes or after it.
"""

import contextlib
import io
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
import transformers as hf
from helpers import films, trainers

from fastals.cli.main import main
from fastals.files import replacing

PRELOADED = ["helpers.deaths", "pandas", "rich.progress", "matplotlib.backends.backend_agg", "transformers.trainer"]
CALLS = {"save": (torch, "save"), "fsync": (os, "fsync"), "replace": (os, "replace")}
STEPS = 12
TIMES = {"seconds", "forwards"}  # of a summary: a resumed run finds everything out once more
EACH_STEP = {"save_strategy": "steps", "save_steps": 1, "max_steps": STEPS}
BEST = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True, "save_total_limit": 1}


class Finetune:
    """``fastals finetune`` with a checkpoint after every step."""

    def __init__(self, folder, *, shell=False):
        self.folder, self.shell, self.inputs = folder, shell, folder.parent / "inputs"
        if not self.inputs.exists():
            films.save_model(self.inputs)
            films.save_table(self.inputs / "films.csv")

    def command(self):
        """The command that begins the run, or goes on with it."""
        run = self.folder / "runs" / "one"
        if run.exists():
            return ["finetune", "--resume", str(run)]
        steps = ["--steps", str(STEPS), "--checkpoint-every", "1"]
        return films.arguments(self.inputs, self.inputs / "films.csv", self.folder, *steps)

    def start(self, instant=None):
        """A process of the command line, by the shell's way or as a fork, which can die at an instant."""
        if not self.shell:
            return fork(_finetune, self.folder / "log", self.command(), instant)
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        with (self.folder / "log").open("w") as log:
            command = [sys.executable, "-P", "-m", "fastals.cli.main", *self.command()]
            return _Shell(subprocess.Popen(command, env=environment, stdout=log, stderr=log))

    def outcome(self):
        """What the run has left, but for times."""
        run = self.folder / "runs" / "one"
        summary = json.loads((run / "summary.json").read_text())
        files = sorted(path.name for path in run.iterdir() if path.name != "checkpoint.pt")  # a finished run needs none
        kept = {k: v for k, v in summary.items() if k not in TIMES}
        return {"lines": films.lines(run), "weights": dict(films.weights(run)), "summary": kept, "files": files}


class Training:
    """The training of an ALSTrainer with a checkpoint after every step."""

    def __init__(self, folder, *, best=False):
        self.folder, self.best = folder, best

    def start(self, instant=None):
        """A fork that trains from the last checkpoint on."""
        return fork(_train, self.folder / "log", self.folder, self.best, instant)

    def outcome(self):
        """Weights, logs and optimizer at the end, and the checkpoints there are."""
        names = sorted(path.name for path in self.folder.glob("checkpoint-*"))
        return torch.load(self.folder / "outcome.pt", weights_only=True) | {"checkpoints": names}


class _Shell:
    """A process of the shell with the methods of a fork."""

    def __init__(self, process):
        self.process, self.kill = process, process.kill

    def join(self, timeout):
        """Wait for the end, this long at most."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout)

    @property
    def exitcode(self):
        """The exit code, or minus the signal; None while it runs."""
        return self.process.poll()


def fork(function, log, *args):
    """A process that calls a function of this module; what it says goes into a file."""
    context = multiprocessing.get_context("forkserver")
    log.parent.mkdir(parents=True, exist_ok=True)
    process = context.Process(target=_quiet, args=(function, log, *args))
    process.start()
    return process


def whole(run, limit=120.0):
    """Let a training come to its end; its outcome and the seconds that it took."""
    begin, process = time.monotonic(), run.start()
    process.join(limit)
    assert process.exitcode == 0, f"exit code {process.exitcode}: {(run.folder / 'log').read_text()[-2000:]}"
    return run.outcome(), time.monotonic() - begin


def die_at(call, number, moment):
    """Arm this process: it kills itself in the ``number``-th such call."""
    owner, name = CALLS[call]
    plain, calls = getattr(owner, name), iter(range(1, sys.maxsize))

    def armed(*args, **kwargs):
        if next(calls) != number:
            return plain(*args, **kwargs)
        if moment == "after":
            plain(*args, **kwargs)
        elif moment == "amid":
            _save_half(plain, *args, **kwargs)
        return os.kill(os.getpid(), signal.SIGKILL)

    setattr(owner, name, armed)


def _save_half(save, state, file, **kwargs):
    memory = io.BytesIO()
    save(state, memory, **kwargs)
    with open(file, "wb") if isinstance(file, str | Path) else contextlib.nullcontext(file) as out:
        out.write(memory.getvalue()[: memory.tell() // 2])
        out.flush()


def _quiet(function, log, *args):
    torch.set_num_threads(1)
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    with log.open("w") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    function(*args)


def _finetune(command, instant):
    if instant:
        die_at(*instant)
    sys.exit(main(command))


def _train(folder, best, instant):
    if instant:
        die_at(*instant)
    options = EACH_STEP | (BEST | {"eval_dataset": trainers.labelled(16)} if best else {})
    last = hf.trainer_utils.get_last_checkpoint(str(folder))
    trainer = trainers.fit(folder, trainers.bert(), trainers.labelled(), resume=last, **options)
    times = "runtime", "per_second", "flos", "memory"
    logs = [
        {k: v for k, v in line.items() if not any(word in k for word in times)}
        for line in trainer.state.log_history
        if "train_runtime" not in line
    ]
    outcome = {"weights": trainers.weights(trainer.model), "logs": logs}
    with replacing(folder / "outcome.pt") as path:
        torch.save(outcome | {"optimizer": trainers.optimizer_of(trainer).state_dict()}, path)
