"""The processes of one run: ``torchrun --nproc-per-node 2 --no-python fastals finetune ...``.

They build the same model, and each takes its part of every mini-batch. The first one alone writes, reads the run's
folder and speaks. Errors that the user can fix, and the wish to stop, are those of all.
"""

import functools
import os
import sys
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fastals.cli.errors import UserError
from fastals.shards import connected

T = TypeVar("T")
P = ParamSpec("P")


def join() -> None:
    """Meet the other processes, if a launcher has started several.

    Raises:
        UserError: the launcher has not said where.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or connected():
        return
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    except ValueError as error:
        raise UserError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, and the processes cannot meet ({error}): start them with "
            "torchrun --nproc-per-node N --no-python fastals finetune ..."
        ) from error


def leave() -> None:
    """Part when all have come here; a process that ends with an error before would take the others with it."""
    if several():
        gathered(None)
        dist.destroy_process_group()


def size() -> int:
    """Number of processes, 1 without a launcher."""
    return dist.get_world_size() if connected() else 1


def rank() -> int:
    """The number of this process."""
    return dist.get_rank() if connected() else 0


def several() -> bool:
    """Whether there is more than one process."""
    return size() > 1


def by_first(function: Callable[P, T]) -> Callable[P, T]:
    """Decorate a function that only the first process calls: what it returns, or refuses, is the answer for all."""

    @functools.wraps(function)
    def told(*args: P.args, **kwargs: P.kwargs) -> T:
        return shared(lambda: function(*args, **kwargs))

    return told


def say(text: str, *, error: bool = False) -> None:
    """Print a line, or an error, in the first process."""
    if rank() == 0:
        print(text, file=sys.stderr if error else sys.stdout, flush=True)


def agreed(function: Callable[[], T]) -> T:
    """What the function returns here.

    Raises:
        UserError: the function has raised it in any process; all raise that of the first of these.
    """
    result, refusal = _attempt(function)
    _heed(gathered(refusal))
    return result


def shared(function: Callable[[], T]) -> T:
    """What the function returns in the first process, which alone calls it.

    Raises:
        UserError: the function has raised it there.
    """
    if not several():
        return function()
    told: list[Any] = list(_attempt(function)) if rank() == 0 else [None, None]
    dist.broadcast_object_list(told)
    _heed(told[1:])
    return told[0]


def gathered(value: Any) -> list[Any]:
    """The values of all processes, by rank."""
    if not several():
        return [value]
    values = [None] * size()
    dist.all_gather_object(values, value)
    return values


def total(number: float) -> float:
    """The sum of the processes' numbers."""
    if not several():
        return number
    summed = torch.tensor(number, dtype=torch.float64)
    dist.all_reduce(summed)
    return summed.item()


def part(rows: list[int]) -> list[int]:
    """The rows of a mini-batch that this process takes; all take as many."""
    count = len(rows) // size()
    return rows[rank() * count : (rank() + 1) * count]


def device(kind: str) -> torch.device:
    """The GPU that the launcher has given to this process, or the CPU.

    Raises:
        UserError: there are more processes than GPUs.
    """
    if kind == "cuda" and several():
        local, gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if local >= gpus:
            raise UserError(f"there are more processes than GPUs ({gpus}): start one for each GPU, or use --device cpu")
        torch.cuda.set_device(local)
    return torch.device(kind)


def wrapped(model: nn.Module) -> nn.Module:
    """The model whose gradients are averaged over the processes; the same weights lie in it."""
    return DistributedDataParallel(model) if several() else model


def _attempt(function: Callable[[], Any]) -> tuple[Any, UserError | None]:
    try:
        return function(), None
    except UserError as error:
        return None, error


def _heed(refusals: list[UserError | None]) -> None:
    for refusal in filter(None, refusals):
        raise refusal
