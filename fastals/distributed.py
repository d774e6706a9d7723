"""The processes that take one decision together, by :mod:`torch.distributed`.

DDP and FSDP average the gradients of the ranks, so f is the mean of the ranks' losses. Every rank tests that mean, with
slopes and norms summed over all shards: all see the same numbers, and so make the same trials and the same moves.

Each evaluation of the closure ends with one reduction, of the loss and of a signal: whether the evaluation has failed
here, and how. A failure anywhere is a failure everywhere, and a process that fails elsewhere in a step joins the
reduction that the others come to next. So every reduction has the same length, whatever it sums. They have a
communicator of their own: those of the closure may be left halfway by a process that fails.
"""

import copy
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastals.interrupt import uninterrupted
from fastals.shards import connected, local
from fastals.signals import LOSS, NOTES, SIGNALS, TAG, Notes, heard_as, said, signal_of

PATIENCE = 5.0  # seconds that a process that has failed waits for the others to hear of it
UNLIKE = (
    "the processes do not train alike: their units, their arguments of ALS, or what they remember of earlier steps "
    "differ. Build the same model and the same optimizer in each, step the schedulers alike, and load a checkpoint "
    "everywhere. Stages of a pipeline (torch.distributed.pipelining) cannot be trained by a line search: use "
    "fully_shard or tensor parallelism. For one training in each process, pass process_group= with that process alone"
)
OUT_OF_STEP = (
    "the processes are out of step: they reduce different things. The closure, and the code around opt.step, must take "
    "the same path in every process: as many steps and micro-batches, losses of one dtype, a checkpoint loaded or a "
    "layer added in all of them. TORCH_DISTRIBUTED_DEBUG=INFO compares the optimizers in every step"
)


class Processes:
    """All processes that train one model; everything is as it is if there is one.

    Args:
        group: the processes, all by default.

    Attributes:
        collectives, reduced_bytes: number of reductions in the step under way, and bytes that this process has put into
            them.
        heard: the notes of all processes at the last evaluation.
        waits: whether the host waits for the outcome of every reduction; not while a step is recorded.
        over: whether a process fails where others do not, so that nothing of the step can be tried again.
        left: whether one has left the step between two reductions.
        apart: whether an error has found the processes in different places since this was set to False.
    """

    def __init__(self, group: Any = None) -> None:
        if group is not None and not (dist.is_available() and isinstance(group, dist.ProcessGroup)):
            raise TypeError(
                f"process_group must be what torch.distributed.new_group has returned, not {group!r}; "
                "leave it out for all processes"
            )
        self.given = group
        self.collectives = self.reduced_bytes = 0
        self.heard = Notes()
        self._own: Any = None  # the communicator
        self._world: Any = None  # for which it was made
        self._device, self._length = torch.device("cpu"), 0
        self._broken = self.over = self.left = self._watching = self._made = False
        self.waits, self.apart = True, False
        self._raised: BaseException | None = None  # the error of the last reduction, which all processes have

    def __deepcopy__(self, memo: dict[int, Any]) -> "Processes":
        return Processes(self.given)

    def __reduce__(self) -> tuple[Any, tuple]:
        return Processes, ()  # a group means nothing in another program

    @property
    def size(self) -> int:
        """Number of processes, 1 without torch.distributed."""
        return dist.get_world_size(self.given) if connected() else 1

    @property
    def several(self) -> bool:
        """Whether there is more than one process."""
        return self.size > 1

    def counts(self) -> tuple[int, int]:
        """Reductions of the step under way, and bytes."""
        return self.collectives, self.reduced_bytes

    def meet(self, device: torch.device, numbers: int, digest: Callable[[], int]) -> None:
        """Begin a step: every process reduces this many numbers at most, and has the same digest of all that decides.

        Digests are compared in the first step, and in every step if torch's debug level asks for it
        (``TORCH_DISTRIBUTED_DEBUG=INFO``).

        Raises:
            RuntimeError: the processes differ in it.
        """
        self.collectives, self.reduced_bytes, self._made = 0, 0, False
        length = LOSS + max(numbers, 3)
        if self._own is None or self._world is not dist.group.WORLD:
            self._open(device)
        if not self._length:
            self._compare(digest())
        elif (self._length != length or dist.get_debug_level() != dist.DebugLevel.OFF) and not self.same(digest()):
            raise self._common(RuntimeError(UNLIKE))
        self._length = length

    def _open(self, device: torch.device) -> None:
        """Make the communicator; all processes come here in their first step."""
        ranks = None if self.given is None else dist.get_process_group_ranks(self.given)
        self._own = dist.new_group(ranks, timeout=_timeout(device), use_local_synchronization=ranks is not None)
        self._world, self._device, self._length = dist.group.WORLD, device, 0
        self._broken = False

    def _compare(self, digest: int) -> None:
        both = torch.tensor([digest, -digest], dtype=torch.float64, device=self._device)
        self._all_reduce(both, dist.ReduceOp.MAX)
        most, least = both.tolist()
        if most != -least:
            raise self._common(RuntimeError(UNLIKE))

    def mean(
        self,
        loss: Tensor,
        error: BaseException | None = None,
        notes: Sequence[bool] = (False,) * len(NOTES),
        kind: str = "",
    ) -> Tensor:
        """The mean of the processes' losses, as all of them see it; ``error`` is why this one has none.

        ``kind`` says what is evaluated, which must be the same in all.

        Raises:
            PeerError: another process has failed. ``error`` is raised itself, and errors by which an evaluation is to
                be made again come wherever one process has them.
        """
        if error is not None and (error is self._raised or not self.several):
            raise error
        if not self.several:
            self.heard = Notes(*notes)
            return loss.detach()
        found = self._reduced(f"loss {kind} {loss.dtype}" if error is None else "", [], loss, error, notes)
        self.heard = Notes(*map(bool, found[len(SIGNALS) : TAG]))
        return torch.tensor(found[LOSS] / self.size, dtype=torch.float64, device=loss.device).to(loss.dtype)

    def total(self, numbers: Sequence[float], kind: str = "sums") -> list[float]:
        """Sums over all processes."""
        if not self.several:
            return list(numbers)
        return self._reduced(kind, numbers)[LOSS : LOSS + len(numbers)]

    def add_up(self, numbers: Tensor) -> None:
        """Sum a tensor over all processes, where it lies."""
        if not self.several:
            return
        if not self.waits:
            self._submit(numbers)
            return
        frame = self._frame("sums", [])
        frame[LOSS : LOSS + numbers.numel()] = numbers.reshape(-1)
        tag = frame[TAG].clone()
        with uninterrupted():
            self._all_reduce(frame)
            self._check(frame.tolist(), tag)
        numbers.copy_(frame[LOSS : LOSS + numbers.numel()].view_as(numbers))

    def recorded_mean(self, loss: Tensor, doubt: Tensor | None) -> tuple[Tensor, Tensor]:
        """The mean of the losses, and whether any process doubts it, without a wait of the host."""
        both = torch.zeros(2, dtype=torch.float64, device=self._device)
        both[0] = loss.detach()
        if doubt is not None:
            both[1] = doubt
        self._submit(both)
        return (both[0] / self.size).to(loss.dtype), both[1] > 0

    def recording(self) -> "Processes":
        """The same processes while a step is recorded, and in its replays."""
        other = copy.copy(self)
        other.waits = False
        return other

    def any(self, *facts: bool) -> tuple[bool, ...]:
        """For every fact, whether it holds in any process."""
        return tuple(bool(found) for found in self.total([float(fact) for fact in facts], "facts"))

    def all_hold(self, fact: bool) -> bool:
        """Whether the fact holds in every process."""
        return not self.any(not fact)[0]

    def same(self, digest: int) -> bool:
        """Whether all processes have the same digest."""
        return not self.several or self.all_hold(self.total([digest], "digest")[0] == self.size * digest)

    def agree(self, error: BaseException | None = None) -> None:
        """Wait until every process is ready; ``error`` is why this one is not.

        Raises:
            PeerError: another one is not. ``error`` is raised itself.
        """
        if error is not None and (error is self._raised or not self.several):
            raise error
        if self.several:
            self._reduced("ready", [], error=error)

    def note_made(self) -> None:
        """The step is made here as in all processes: an interrupt that was held back comes after it."""
        self._made = True

    def _reduced(
        self,
        kind: str,
        numbers: Sequence[float],
        loss: Tensor | None = None,
        error: BaseException | None = None,
        notes: Sequence[bool] = (False,) * len(NOTES),
    ) -> list[float]:
        frame = self._frame(kind, numbers, error, notes)
        tag = frame[TAG].clone()
        if loss is not None:
            frame[LOSS] = local(loss.detach())
        with uninterrupted():  # the others have made it too, and what it tells must be known before a Ctrl-C is
            if error is not None and signal_of(error) == "failed":
                if not self._posted(frame):
                    self.over = True
                    raise self._common(error)
            else:
                self._all_reduce(frame)
            found = frame.tolist()
            self._check(found, tag, error)
        return found

    def _frame(
        self,
        kind: str,
        numbers: Sequence[float],
        error: BaseException | None = None,
        notes: Sequence[bool] = (False,) * len(NOTES),
    ) -> Tensor:
        """What this process puts into a reduction."""
        tag = float(zlib.crc32(kind.encode()) >> 8)
        frame = [*said(error, dist.get_rank()), *notes, tag, *numbers]
        return torch.tensor(frame + [0.0] * (self._length - len(frame)), dtype=torch.float64).to(self._device)

    def _check(self, found: Sequence[float], tag: Tensor, error: BaseException | None = None) -> None:
        """Heed the signals of the others, and see whether they have reduced the same."""
        self._heed(dict(zip(SIGNALS, found, strict=False)), error)
        if found[TAG] != self.size * float(tag):
            raise RuntimeError(OUT_OF_STEP)

    def _heed(self, heard: dict[str, float], error: BaseException | None) -> None:
        """Raise what all processes raise after these signals, the first one that any of them has given."""
        name = next((signal for signal in SIGNALS[1:] if heard[signal]), "")
        self.left = heard["left"] > 0
        self.over |= self.left or 0 < heard["failed"] < self.size
        if name:
            raise self._common(error if error is not None and signal_of(error) == name else heard_as(name, heard))

    def _common(self, error: BaseException) -> BaseException:
        """The error, noted as one that all processes have."""
        self._raised = error
        return error

    def _all_reduce(self, frame: Tensor, op: Any = dist.ReduceOp.SUM) -> None:
        """Sum in place.

        Raises:
            RuntimeError: a process has died, or has not come within the timeout of its process group.
        """
        self._raised = None
        if self._broken:
            raise RuntimeError("an earlier reduction of this process has failed: end the program and start it anew")
        try:
            self._submit(frame, op)
        except Exception as error:
            self._broken = True
            raise RuntimeError(
                "a reduction with the other processes has failed: one of them has died, or did not come within the "
                "timeout of the process group. The step was refused, and nothing has moved here"
            ) from error

    def _submit(self, numbers: Tensor, op: Any = dist.ReduceOp.SUM, *, wait: bool = True) -> Any:
        self.collectives += 1
        self.reduced_bytes += numbers.nbytes
        return dist.all_reduce(numbers, op, group=self._own, async_op=not wait)

    def leaves(self, error: BaseException) -> bool:
        """Whether an error has to leave the step: some process has left it, or does not know of the error."""
        return self.several and (self.over or error is not self._raised)

    @contextmanager
    def failing_together(self) -> Iterator[None]:
        """If an error leaves the ``with`` block that the others have not heard of, tell them."""
        if self._watching:
            yield
            return
        self._watching, self._made = True, False
        try:
            yield
        except BaseException as error:
            known = error is self._raised or isinstance(error, FloatingPointError)
            self.apart |= self.several and (self.left or not known)
            if error is not self._raised and not self._made and self._length and self.several and not self._broken:
                with uninterrupted():
                    self._tell(error)
            raise
        finally:
            self._raised, self.over, self.left, self._watching = None, False, False, False  # its frames hold tensors

    def _tell(self, error: BaseException) -> None:
        """Join the reduction that the others come to next."""
        signals = said(error, dist.get_rank(), fatal=True)
        frame = torch.tensor(signals + [0.0] * (self._length - len(signals)), dtype=torch.float64)
        self._posted(frame.to(self._device))

    def _posted(self, frame: Tensor) -> bool:
        """Join a reduction, and wait a little for the others, who may be stuck where this process is missing.

        They hear of it even if they come later.
        """
        try:
            work = self._submit(frame, wait=False)
            until = time.monotonic() + PATIENCE
            while not work.is_completed() and time.monotonic() < until:
                time.sleep(0.002)
            if work.is_completed():
                work.wait()
                return True
        except Exception:  # they have died
            self._broken = True
        return False


def _timeout(device: torch.device) -> Any:
    """The timeout of the default group; a new one does not inherit it."""
    backend = getattr(dist.group.WORLD, "_get_backend", lambda _: None)(device)
    return getattr(getattr(backend, "options", None), "_timeout", None)
