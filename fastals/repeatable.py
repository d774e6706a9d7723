"""Look whether a closure is the same function at every call, and whether its loss reads recorded outputs alone."""

import math
import warnings

import torch
from torch import Tensor

from fastals.compare import digest, same_loss, same_outputs
from fastals.compiler import compilations
from fastals.errors import non_finite, not_repeatable
from fastals.losses import Losses

AGAIN = "f(w_t)"  # the name of an evaluation at w_t
BY_CLOSURE = "Look for code that asks torch.is_grad_enabled()"
BY_COMPILER = (
    "It did not before torch.compile had compiled it: the code compiled for use without gradients draws other random "
    "numbers, or rounds coarsely. torch._inductor.config.fallback_random = True makes inductor draw as torch does"
)


def replay_outdated(losses: Losses, loss: Tensor) -> Tensor:
    """Whether what is known of the closure no longer holds, as a 0-d bool on the loss's device; nothing waits for it.

    The closure runs with all boundary calls replayed, and its loss is compared with f(w_t) = ``loss``. The two differ
    if the loss reads more than the outputs (attentions, router logits), and if the closure is not repeatable. If the
    closure fails without these, :attr:`fastals.learned.Learned.replays` becomes False here.
    """
    no = torch.zeros_like(loss, dtype=torch.bool)
    cache, learned = losses.cache, losses.learned
    if cache is None or not cache.records or learned.gradients:
        return no
    counted, comparison = losses.forwards, losses.comparison(AGAIN, at_start=True)
    again = losses.replayed(comparison)
    unlike = (cache.missed if cache.unlike else "one in another process") if losses.processes.heard.unlike else ""
    losses.forwards, losses.unlike = counted, unlike
    if learned.gradients:  # it has just been found out
        return no
    if not isinstance(again, Tensor):
        learned.replays = False
        return no
    outdated = same_loss(again, loss, rounds=learned.rounds) != learned.replays
    if comparison.differs is not None:
        outdated = outdated | comparison.differs
    return outdated | bool(losses.unlike)


def reconsider(losses: Losses, loss: Tensor) -> None:
    """Correct what is known of the closure after :func:`replay_outdated`; waits for the device.

    Raises:
        ValueError: the closure is not repeatable; f(w_t) was ``loss``.
    """
    counted, learned = losses.forwards, losses.learned
    full = check_repeatable(losses, loss)
    if losses.unlike and not _gives_the_same_twice(losses):
        raise not_repeatable(loss, full, losses.unlike)
    if not learned.gradients:
        with losses.waiting():
            again = losses.replayed(losses.comparison(AGAIN, at_start=True))
        learned.replays = isinstance(again, Tensor) and bool(same_loss(again, full))
        learned.rounds |= not bool(same_loss(full, loss))
    losses.forwards = counted


def check_recompiled(losses: Losses, loss: Tensor) -> None:
    """Check again what has been compiled since: it may draw other dropout masks without gradients than with them.

    In a step that finds everything out, nothing that is compiled runs as such.

    Raises:
        ValueError: the closure is not repeatable; f(w_t) was ``loss``.
    """
    if losses.around.watch or not losses.processes.heard.recompiled:
        return
    counted = losses.forwards
    check_repeatable(losses, loss)
    losses.forwards, losses.learned.compilations = counted, compilations()


def check_repeatable(losses: Losses, loss: Tensor) -> Tensor:
    """The loss of another full forward at w_t; the closure may turn out to need gradients for it.

    Raises:
        ValueError: it is not f(w_t) = ``loss``, up to rounding.
    """
    if not math.isfinite(float(loss)):
        raise non_finite(float(loss))
    learned = losses.learned
    full = losses.run(note_outputs=True)
    needed = learned.gradients  # the closure takes some inside, and cannot do without
    if not bool(same_loss(full, loss, rounds=True)) and not learned.gradients:
        learned.gradients = True  # without gradients torch may take another path
        full = losses.run()
    certain = learned.gradients == needed or _gives_the_same_twice(losses)
    if not certain or not bool(same_loss(full, loss, rounds=True)):
        learned.gradients = needed
        raise not_repeatable(loss, full, _unlike_call(losses))
    if learned.gradients and not needed:
        recompiled = not losses.around.watch and losses.processes.heard.recompiled
        warnings.warn(
            f"fastals: the closure gives another loss without gradients than with them ({float(loss):.9g}), so trials "
            f"run with gradients and replay nothing. {BY_COMPILER if recompiled else BY_CLOSURE}",
            stacklevel=2,
        )
    _compare_with_records(losses)
    return full


def _compare_with_records(losses: Losses) -> None:
    """Find out whether the full forward just made has rounded otherwise than the recorded one."""
    cache, learned = losses.cache, losses.learned
    if cache is None or learned.gradients or learned.rounds or losses.unlike:
        return
    outputs = cache.outputs or {}
    calls = [(key, c) for key, c in cache.records.items() if key in outputs and not c.obstacle]
    stands = [(key, c) for key, c in calls if c.output_stands(cache.stamps)]
    rounds = any(not same_outputs(digest(call.replay_output()), outputs[key]) for key, call in stands)
    learned.rounds = losses.processes.any(rounds)[0]
    if learned.rounds:
        losses.record_again()


def _gives_the_same_twice(losses: Losses) -> bool:
    """Whether two full forwards have the same outputs and the same loss."""
    runs, outputs = [], []
    for _ in range(2):
        runs.append(losses.run(note_outputs=True))
        outputs.append((losses.cache.outputs if losses.cache is not None else None) or {})
    alike = all(same_outputs(outputs[0].get(key), output) for key, output in outputs[1].items())
    return losses.processes.all_hold(alike) and bool(same_loss(*runs))


def _unlike_call(losses: Losses) -> str:
    """The first call that is not the recorded one when the closure runs again at w_t."""
    if losses.cache is None or not losses.cache.records:
        return ""
    with losses.waiting():
        again = losses.replayed(losses.comparison(AGAIN, at_start=True))
    return losses.cache.missed if isinstance(again, Tensor) else ""
