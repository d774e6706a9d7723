"""Processes that fail in a step, at every evaluation and in every way: nobody hangs, and nothing is lost."""

import os
import signal
import time

import pytest
import torch
from helpers.parallel import KINDS, batch, parallel, tiny_llama, whole
from helpers.processes import together
from helpers.tiny import assert_same

import fastals
from fastals.errors import PeerError
from fastals.shards import local

STEPS = 4  # before the one that fails: a step that searches, with all that is known of the model known
SWEEP = {"schedule": "sweep"}


class Deliberate(Exception):  # noqa: N818
    """What a closure raises on purpose."""


def everything(opt, model):
    """Copies of all that a step may change in this process."""
    weights = [local(p.detach()).clone() for p in model.parameters()]
    buffers = [b.clone() for b in model.buffers()]
    state = [{k: local(v).clone() for k, v in opt.state[p].items()} for g in opt.param_groups for p in g["params"]]
    memory = [{k: v for k, v in g.items() if k != "params"} for g in opt.param_groups]
    return {"weights": weights, "buffers": buffers, "state": state, "memory": memory, "rng": torch.get_rng_state()}


def trained(kind, options):
    """A model after some steps, with dropout, and the closure of the next step."""
    rank = int(os.environ["RANK"])
    torch.manual_seed(0)
    model = parallel(kind, tiny_llama(attention_dropout=0.2))
    torch.manual_seed(10 + rank)
    opt = fastals.ALS(model, **options)
    part = rank // KINDS[kind][1]
    for step in range(STEPS):
        opt.step(lambda step=step: model(**batch(step, part, 3)).loss)
    return model, opt, lambda: model(**batch(STEPS, part, 3)).loss


def count_evaluations(rank, kind, options):
    """How many evaluations the step makes that is to fail."""
    _, opt, loss = trained(kind, options)
    calls = []
    opt.step(lambda: calls.append(1) or loss())
    return len(calls)


def fail_one_by_one(rank, kind, options, failing):
    """Every evaluation of the step fails in one process; then the step is made, and its outcome returned."""
    model, opt, loss = trained(kind, options)
    kept = everything(opt, model)
    for at in range(100):
        calls = []

        def closure(at=at, calls=calls):
            value = loss()
            calls.append(1)
            if rank == failing and len(calls) == at + 1:
                raise Deliberate
            return value

        try:
            opt.step(closure)
        except (Deliberate, PeerError) as error:
            refused = type(error), f"rank {failing}" in str(error)
        else:
            return at, opt.report.as_dict(), everything(opt, model)
        assert refused == ((Deliberate, False) if rank == failing else (PeerError, True))
        assert_same(everything(opt, model), kept)
    raise AssertionError("no step was made")


def disturb_one_by_one(rank, kind, options, failing, how):
    """One process is disturbed as it comes to each collective of the step; then the step is made."""
    model, opt, loss = trained(kind, options)
    kept, plain, ended = everything(opt, model), fastals.distributed.Processes._frame, []
    for at in range(100):
        calls = []

        def frame(*args, at=at, calls=calls):
            calls.append(1)
            if rank == failing and len(calls) == at + 1:
                disturb(how)
            return plain(*args)

        fastals.distributed.Processes._frame = frame
        try:
            opt.step(loss)
            return at, ended, opt.report.as_dict()["units"], everything(opt, model)
        except (Deliberate, PeerError):
            ended.append("as before")
        except KeyboardInterrupt:  # the other process has made the step if it comes after the last evaluation
            ended.append("made" if opt.param_groups[0]["count"] > STEPS else "as before")
        finally:
            fastals.distributed.Processes._frame = plain
        if ended[-1] == "made":
            return at, ended, opt.report.as_dict()["units"], everything(opt, model)
        assert_same(everything(opt, model), kept)
    raise AssertionError("no step was made")


def disturb(how):
    if how == "breaks":
        raise Deliberate
    signal.raise_signal(signal.SIGINT)


def undisturbed(rank, kind, options):
    model, opt, loss = trained(kind, options)
    opt.step(loss)
    return opt.report.as_dict(), everything(opt, model)


@pytest.mark.slow(keep=2)
@pytest.mark.parametrize("options", [{}, SWEEP], ids=["relay", "sweep"])
@pytest.mark.parametrize("kind", ["ddp", "fsdp", "tp"])
def test_an_error_at_any_evaluation_of_one_process_is_one_of_all(kind, options):
    refused = together(2, fail_one_by_one, kind, options, 1)
    plain = together(2, undisturbed, kind, options)
    for (count, *after), expected in zip(refused, plain, strict=True):
        assert count == refused[0][0] >= 3
        assert_same(after, list(expected))


@pytest.mark.parametrize("how", ["breaks", "ctrl-c"])
def test_a_process_may_be_disturbed_at_any_collective(how):
    """Under FSDP2 some are amid a forward, which its own collectives do not survive."""
    found = together(2, disturb_one_by_one, "ddp", {}, 1, how)
    plain = together(2, undisturbed, "ddp", {})
    for (count, ended, units, after), (report, expected) in zip(found, plain, strict=True):
        assert count == found[0][0] >= 5
        assert "as before" in ended
        assert_same(units, report["units"])
        assert_same(after, expected)


def not_finite_at_start(rank, kind):
    """The loss of one process is not finite."""
    model, opt, loss = trained(kind, {})
    kept = everything(opt, model)
    for value in (float("nan"), float("inf")):
        with pytest.raises(FloatingPointError, match="nothing moved"):
            opt.step(lambda value=value: loss() * (value if rank == 1 else 1.0))
        assert_same(everything(opt, model), kept)
    opt.step(loss)
    return opt.report.as_dict()


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_loss_that_is_not_finite_in_one_process_is_refused_by_all(kind):
    first, second = together(2, not_finite_at_start, kind)
    assert_same(first, second)


def not_finite_in_trials(rank, kind, options):
    """The trials of one process are not finite from the second one on."""
    model, opt, loss = trained(kind, options)
    calls = []

    def closure():
        calls.append(1)
        return loss() * (float("nan") if rank == 1 and len(calls) > 3 else 1.0)

    opt.step(closure)
    return opt.report.as_dict(), len(calls), whole(model)


def test_a_trial_that_is_not_finite_in_one_process_is_rejected_by_all():
    (first, calls, weights), (second, others, same) = together(2, not_finite_in_trials, "ddp", SWEEP)
    assert_same(first, second)
    assert_same(weights, same)
    assert calls == others
    assert {u["outcome"] for u in first["units"]} == {"exhausted", "accepted"}


def die(rank, kind, options, at, how):
    """One process goes at an evaluation; what the other one has left."""
    fastals.distributed.PATIENCE = 0.5
    model, opt, loss = trained(kind, options)
    kept, calls = everything(opt, model), []

    def closure():
        calls.append(1)
        if rank == 1 and len(calls) == at + 1:
            if how == "raises before the forward":
                raise Deliberate
            os.kill(os.getpid(), signal.SIGKILL)
        return loss()

    begin = time.monotonic()
    try:
        opt.step(closure)
    except Deliberate:
        return None  # and the process ends
    except Exception as error:
        assert_same(everything(opt, model), kept)
        return type(error).__name__, time.monotonic() - begin
    raise AssertionError("the step was made with a process missing")


@pytest.mark.slow(keep=1)
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_survivors_of_a_killed_process_lose_nothing(kind):
    evaluations, _ = together(2, count_evaluations, kind, {})
    assert evaluations > 3
    for at in range(evaluations):
        survivor, _ = together(2, die, kind, {}, at, "is killed", dying={1})
        assert survivor[0] in ("RuntimeError", "DistBackendError"), survivor


def test_an_error_before_a_forward_with_collectives_frees_the_others():
    for at in (0, 2):
        survivor, _ = together(2, die, "fsdp", {}, at, "raises before the forward", limit=60)
        assert survivor[0] in ("RuntimeError", "PeerError")
