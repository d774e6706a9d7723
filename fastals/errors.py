"""Errors that a closure can cause, and that steps raise by themselves."""

from torch import Tensor

NO_CLOSURE = (
    "ALS.step needs a closure that evaluates the loss of this mini-batch: "
    "opt.step(lambda: model(**batch).loss), or opt.step(closure, loss=loss) after loss.backward(). With Accelerate: "
    "opt.step(closure, backward=accelerator.backward) on the optimizer that you made, not on the one that prepare has "
    "returned. In Hugging Face's Trainer: fastals.integrations.transformers.ALSTrainer in place of Trainer"
)

NO_GRADIENT = "the closure's loss has no gradient: evaluate it without no_grad and without .detach()"

#: The error of a process whose closure would do with gradients, as another one says that it does.
GRADIENTS_ELSEWHERE = "the closure has failed in another process with an error about gradients, which is printed there"


class StaleRecordError(BaseException):
    """The evaluation has replayed what it should have computed; no closure catches it."""


class ChangedError(BaseException):
    """What is known of the modules no longer holds in some process, and all begin the step again."""


class BackwardError(RuntimeError):
    """The closure called backward in a trial."""

    def __init__(self) -> None:
        super().__init__("the closure called backward in a trial: let it return the loss only")


def is_about_gradients(error: BaseException) -> bool:
    """Whether an evaluation without gradients may have failed for want of them."""
    return isinstance(error, RuntimeError) and not isinstance(error, BackwardError | PeerError) and "grad" in str(error)


class PeerError(RuntimeError):
    """Another process has failed in this step, so that it was refused in all of them."""

    def __init__(self, rank: int | None) -> None:
        who = "other processes have" if rank is None else f"the process of rank {rank} has"
        super().__init__(
            f"{who} failed in this step, by an error that is printed there. The step was refused in every process, and "
            "nothing has moved"
        )


class OutdatedError(Exception):
    """A flag of the device says that what is known of the activation cache no longer holds."""


def non_finite(loss: float, processes: int = 1) -> FloatingPointError:
    """The error for a loss that is not finite at the start of a step; that of a mean if there are several processes."""
    mean = f", the mean over {processes} processes," if processes > 1 else ""
    return FloatingPointError(
        f"the loss at the current weights{mean} is {loss}: the step was refused and nothing moved. Look at "
        "this mini-batch and at the weights (a padded row without labels, an overflow in half precision)"
    )


class CheckError(RuntimeError):
    """With ``cache="check"``, a cached trial is not what a full forward gives."""

    def __init__(self, unit: str, difference: str) -> None:
        super().__init__(f"cache='check' has found a wrong trial of unit {unit!r}: {difference}")


def not_repeatable(first: Tensor, again: Tensor, unlike: str) -> ValueError:
    """The error for a closure that is not a function of the weights; ``unlike`` is the first call that differs."""
    a, b = float(first), float(again)
    returned = f"returned {a:.9g} and then {b:.9g}" if a != b else f"returned {a:.9g} twice, by other activations,"
    where = f" The first call that differs is that of {unlike}." if unlike else ""
    return ValueError(
        f"the closure {returned} for the same weights, but it must be the same function at every call of a step."
        f"{where} Usual causes: it takes a new batch at each call (take it before opt.step), it draws random numbers "
        "from a generator of its own (the global ones of torch, NumPy and Python are held), it carries a state over "
        "from call to call (a recurrent state, a counter, a cache), or a fast path of evaluation mode computes "
        "something else without gradients (model.train())"
    )
