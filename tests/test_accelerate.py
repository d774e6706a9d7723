"""ALS in loops of Accelerate: the numbers of a plain loop, and clear errors where the two do not go together."""

import copy
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from helpers.audit import nothing_lost
from helpers.loops import assert_same_run, batches, build, closures, loop, network
from helpers.tiny import tiny_batches
from torch.utils.data import DataLoader

accelerate = pytest.importorskip("accelerate")
from accelerate.state import AcceleratorState, GradientState  # noqa: E402


@pytest.fixture(autouse=True)
def _forgotten_accelerator():
    """Accelerate keeps its state for the length of a process."""

    def forget():
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()

    forget()
    yield
    forget()


class Prepared:
    """A model with its optimizer and schedule, prepared; ``opt`` is the optimizer that was made, as in the README."""

    def __init__(self, options=None, **accelerated):
        self.bare, self.opt, scheduler = build(**options or {})
        self.accelerator = accelerate.Accelerator(cpu=True, **accelerated)
        self.model, self.wrapped, self.scheduler = self.accelerator.prepare(self.bare, self.opt, scheduler)

    def step(self, model, opt, batch):
        """The step of the README."""
        loss = opt.step(lambda: model(**batch), backward=self.accelerator.backward)
        assert float(loss) == opt.report.loss_before

    def after(self, data=None, step=None):
        """The model and the optimizer after these mini-batches."""
        return loop(self.model, self.opt, self.scheduler, data, step or self.step)


def shuffled():
    """A loader that draws its mini-batches from a generator of its own."""
    rows = [{k: v[0] for k, v in b.items()} for b in tiny_batches(40, size=1)]
    return DataLoader(rows, batch_size=8, shuffle=True, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_run_is_the_plain_run(wrapped):
    run = Prepared()
    step = (lambda model, _, batch: run.wrapped.step(lambda: model(**batch))) if wrapped else None
    assert_same_run(run.after(run.accelerator.prepare(shuffled()), step), loop(*build(), shuffled()))


def test_clipping_by_the_argument_is_that_of_a_plain_loop():
    clipped, free = {"max_grad_norm": 0.1}, loop(*build())
    run = Prepared(clipped).after()
    assert_same_run(run, loop(*build(**clipped)))
    assert not torch.equal(run[0].head.weight, free[0].head.weight)


def accumulated(model, opt, batch, backward):
    return opt.step(closures(model, batch), backward=backward)


def divided(model, opt, batch):
    return opt.step(closures(model, batch, divisor=4))


def test_a_list_of_micro_batches_is_divided_by_accelerate():
    run = Prepared(gradient_accumulation_steps=4)
    step = partial(accumulated, backward=run.accelerator.backward)
    assert_same_run(run.after(step=step), loop(*build(), step=divided))


@pytest.mark.parametrize("schedule", ["relay", "sweep"])
def test_a_list_of_micro_batches_is_the_whole_mini_batch(schedule):
    exact = {"dtype": torch.float64, "dropout": 0.0, "schedule": schedule}
    run = Prepared(exact, gradient_accumulation_steps=4)
    step = partial(accumulated, backward=run.accelerator.backward)
    (model, opt), (whole, plain) = run.after(step=step), loop(*build(**exact))
    for a, b in zip(model.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    assert opt.report.loss_after == pytest.approx(plain.report.loss_after, rel=1e-9)


@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
def test_a_saved_state_goes_on_to_the_last_bit(tmp_path, mixed_precision):
    first = Prepared(mixed_precision=mixed_precision)
    first.after(batches()[:3])
    first.accelerator.save_state(tmp_path)
    ended = first.after(batches()[3:])
    again = Prepared(mixed_precision=mixed_precision)
    again.after(batches()[1:2])
    again.accelerator.load_state(tmp_path)
    assert_same_run(again.after(batches()[3:]), ended)


def test_trials_in_mixed_precision_are_those_of_autocast():
    run, twin = Prepared(mixed_precision="bf16"), network()

    @torch.no_grad()
    def loss_of(batch, weights, generator, context):
        twin.load_state_dict(weights)
        with torch.random.fork_rng(), context:
            torch.set_rng_state(generator)
            return float(twin(**batch))

    for batch in batches():
        generator, before = torch.get_rng_state(), copy.deepcopy(run.bare.state_dict())
        run.after([batch])
        report, after = run.opt.report, run.bare.state_dict()
        assert report.loss_before == loss_of(batch, before, generator, run.accelerator.autocast())
        assert report.loss_after == loss_of(batch, after, generator, run.accelerator.autocast()) < report.loss_before
        assert report.loss_after != loss_of(batch, after, generator, nullcontext())


def given(model, opt, batch, backward, treat):
    """A step with gradients that were computed before it, and treated."""
    loss = model(**batch)
    backward(loss)
    treat(opt)
    opt.step(lambda: model(**batch), loss=loss)
    opt.zero_grad()


def test_slopes_are_those_of_gradients_that_accelerate_has_clipped():
    run, most = Prepared({"schedule": "sweep", "direction": "sgd"}), 0.1

    def clip(opt):
        assert run.accelerator.clip_grad_norm_(run.model.parameters(), most) > most

    run.after(step=partial(given, backward=run.accelerator.backward, treat=clip))
    for report in run.opt.reports:
        assert sum(u.slope for u in report.units) == pytest.approx(most**2, rel=1e-5)
        assert report.loss_after < report.loss_before
        assert {u.outcome for u in report.units} == {"accepted"}


SCALE = 2.0**16


def scaled_backward(scaler):
    return lambda loss: scaler.scale(loss).backward()


def test_gradients_that_a_scaler_has_scaled_are_right_once_it_has_unscaled_them():
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    step = partial(given, backward=scaled_backward(scaler), treat=lambda opt: scaler.unscale_(opt) or scaler.update())
    model, opt = loop(*build(dropout=0.0), step=step)
    plain, plain_opt = loop(*build(dropout=0.0))
    assert [r.trials for r in opt.reports] == [r.trials for r in plain_opt.reports]
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_gradients_that_are_still_scaled_are_refused(dropout):
    model, opt, _ = build(dropout=dropout)
    backward, (batch, *_) = scaled_backward(torch.amp.GradScaler("cpu", init_scale=SCALE)), batches()
    loss = model(**batch)
    backward(loss)
    with nothing_lost(opt, model, error=RuntimeError, match=r"scaler\.unscale_\(opt\)"):
        opt.step(lambda: model(**batch), loss=loss)
    with nothing_lost(opt, model, error=RuntimeError, match=r"multiplied the loss by 65536.*scaler\.unscale_\(opt\)"):
        opt.step(lambda: model(**batch), backward=backward)


def test_a_step_without_a_closure_is_refused():
    run = Prepared()
    run.accelerator.backward(run.model(**batches()[0]))
    with nothing_lost(run.opt, run.bare, error=TypeError, match="needs a closure"):
        run.wrapped.step()


def test_a_closure_of_one_mini_batch_is_refused_where_accelerate_accumulates():
    run, (batch, *_) = Prepared(gradient_accumulation_steps=4), batches()

    def closure():
        return run.model(**batch)

    for step in (
        lambda: run.opt.step(closure, backward=run.accelerator.backward),
        lambda: run.opt.step(closure),
        lambda: run.wrapped.step(closure),
    ):
        with nothing_lost(run.opt, run.bare, error=RuntimeError, match="over 4 mini-batches.*Collect 4"):
            step()
    with nothing_lost(run.opt, run.bare, error=RuntimeError, match="over 4 mini-batches.*Collect 4"):
        for _ in range(4):
            with run.accelerator.accumulate(run.model):
                run.wrapped.step(closure)
    run.opt.step([closure], backward=run.accelerator.backward)
    assert len(run.opt.reports) == 1


def test_an_accumulation_of_an_earlier_loop_refuses_nothing():
    Prepared(gradient_accumulation_steps=4)
    assert loop(*build())[1].reports
