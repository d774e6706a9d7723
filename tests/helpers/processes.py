"""Run a function in several processes that torch.distributed connects by gloo."""

import datetime
import importlib.util
import io
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from pathlib import Path

import torch

PRELOADED = [
    "torch", "torch.distributed.fsdp", "torch.distributed.tensor.parallel", "transformers.modeling_utils",
    "transformers.trainer", "lightning", "fastals", "pytest",
]  # fmt: skip
PATIENCE = 20.0  # seconds after which a collective gives up; a test that hangs takes longer


class FailedError(Exception):
    """What a process has raised, as text."""


def together(size, function, *args, limit=60.0, patience=PATIENCE, dying=()):
    """Call ``function(rank, *args)`` in ``size`` processes; their results by rank.

    Raises:
        FailedError: a process has raised an error.
        AssertionError: they have not ended within ``limit`` seconds, or one has died that is not among ``dying``.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with tempfile.TemporaryDirectory() as folder:
        pipes, running = [], []
        for rank in range(size):
            receiving, sending = context.Pipe(duplex=False)
            where = function.__code__.co_filename, function.__name__  # pytest may know its module by another name
            named = (rank, size, f"{folder}/store", patience, sending, where, args)
            process = context.Process(target=_serve, args=named, daemon=True)
            process.start()
            sending.close()
            pipes.append(receiving)
            running.append(process)
        try:
            return [_result(rank, pipe, time.monotonic() + limit, rank in dying) for rank, pipe in enumerate(pipes)]
        finally:
            for process in running:
                process.kill()
                process.join()


def _result(rank, pipe, until, dying):
    assert pipe.poll(max(0.0, until - time.monotonic())), f"rank {rank} hangs"
    try:
        good, result = torch.load(io.BytesIO(pipe.recv_bytes()), weights_only=False)
    except EOFError:
        assert dying, f"rank {rank} has died"
        return None
    if not good:
        raise FailedError(f"rank {rank}: {result}")
    return result


def _function(path, name):
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)


def _serve(rank, size, store, patience, pipe, where, args):
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
    try:
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{store}", rank=rank, world_size=size,
            timeout=datetime.timedelta(seconds=patience),
        )  # fmt: skip
        result = True, _function(*where)(rank, *args)
    except BaseException:
        result = False, traceback.format_exc()
    file = io.BytesIO()
    torch.save(result, file)  # tensors in shared memory would go with the process
    pipe.send_bytes(file.getvalue())
    pipe.close()
    os._exit(0)
