"""What the processes say to each other in every reduction: that one has failed, or has to do something over again."""

from typing import NamedTuple

from fastals.compiler import TracedError
from fastals.errors import GRADIENTS_ELSEWHERE, ChangedError, PeerError, StaleRecordError, is_about_gradients
from fastals.surroundings import FirstWriteError

#: What a process says in a reduction besides its number: the sum of (rank + 1) over those that have failed, how many
#: have, how many of them have left the step, and how many have to do something over again.
SIGNALS = ("ranks", "failed", "left", "traced", "wrote", "changed", "needs_gradients", "stale")
#: What else it says of its evaluation: whether a call that ran again at w_t gave another output, whether the sequence
#: of its calls is new, and whether torch.compile has compiled something.
NOTES = ("unlike", "unseen", "recompiled")
TAG = len(SIGNALS) + len(NOTES)  # tells whether all reduce the same
LOSS = TAG + 1


class Notes(NamedTuple):
    """For each of :data:`NOTES`, whether any process has said so at the last evaluation."""

    unlike: bool = False
    unseen: bool = False
    recompiled: bool = False


def said(error: BaseException | None, rank: int, *, fatal: bool = False) -> list[float]:
    """The signals of a process of this rank, after an error or none; ``fatal`` if it leaves the step."""
    names = ("failed", "left") if fatal else (signal_of(error),)
    return [float(rank + 1) if "failed" in names else 0.0, *(float(signal in names) for signal in SIGNALS[1:])]


def signal_of(error: BaseException | None) -> str:
    """The signal that stands for an error of an evaluation; empty if there is none."""
    if error is None:
        return ""
    kinds = {TracedError: "traced", FirstWriteError: "wrote", ChangedError: "changed", StaleRecordError: "stale"}
    for kind, name in kinds.items():
        if isinstance(error, kind):
            return name
    return "needs_gradients" if is_about_gradients(error) else "failed"


def heard_as(name: str, heard: dict[str, float]) -> BaseException:
    """The error of this process where another one has given the signal."""
    if name == "failed":
        return PeerError(int(heard["ranks"]) - 1 if heard["failed"] == 1 else None)
    if name == "traced":
        return TracedError()
    if name == "wrote":
        return FirstWriteError(["a buffer in another process"], set())
    if name == "changed":
        return ChangedError()
    return StaleRecordError() if name == "stale" else RuntimeError(GRADIENTS_ELSEWHERE)
