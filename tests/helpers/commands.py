"""Run command lines in this process or in two, and listen to what they say."""

import io
import os
import signal
from contextlib import redirect_stderr, redirect_stdout
from unittest import mock

import torch.distributed as dist
from helpers.processes import together

from fastals.cli.experiment import Experiment
from fastals.cli.main import main


def spoken(command):
    """Exit code, output and errors of a command line."""
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as error:
        code = main(command)
    return code, out.getvalue(), error.getvalue()


def stopped(command, step):
    """The same with a Ctrl-C at the start of a step."""
    plain = Experiment.batch

    def batch(self, now):
        if now == step:
            signal.raise_signal(signal.SIGINT)
        return plain(self, now)

    with mock.patch.object(Experiment, "batch", batch):
        return spoken(command)


def one_by_one(rank, folder, commands, stops):
    """Several command lines; some get a Ctrl-C, in the second process alone. Each process has a folder to itself."""
    (folder / f"rank{rank}").mkdir(exist_ok=True)
    os.chdir(folder / f"rank{rank}")
    heard = []
    for i, command in enumerate(commands):
        if not dist.is_initialized():  # the one before has left
            dist.init_process_group("gloo", init_method=f"file://{folder}/store{i}", rank=rank, world_size=2)
        heard.append(stopped(command, stops[i]) if rank == 1 and i in stops else spoken(command))
        assert not dist.is_initialized()
    return heard


def in_two(folder, commands, stops=()):
    """What both processes say, for each command line."""
    return list(zip(*together(2, one_by_one, folder, commands, dict(stops), limit=50.0), strict=True))
