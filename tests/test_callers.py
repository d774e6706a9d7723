"""The warning about gradients that a step throws away."""

import pytest
import torch
from helpers.loops import assert_same_run, batches, build, loop, plain_step
from helpers.nets import UsedLate

import fastals


def lost(model, opt, batch):
    model(**batch).backward()
    plain_step(model, opt, batch)


def test_gradients_that_the_second_step_throws_away_are_warned_of_once():
    with pytest.warns(UserWarning, match=r"gradients have been computed.*list, or pass loss=") as caught:
        run = loop(*build(dropout=0.0), step=lost)
    assert len(caught) == 1
    assert_same_run(run, loop(*build(dropout=0.0)))


def test_gradients_that_a_step_of_another_optimizer_leaves_are_not_meant():
    (model, opt, _), (other, of_other, _) = build(), build()

    def steps(batch):
        opt.step(lambda: model(**batch) + other(**batch))
        plain_step(other, of_other, batch)

    for batch in batches():
        steps(batch)
    (model, opt, _), (other, of_other, _) = build(), build()
    steps(batch)
    model(**batch).backward()
    with pytest.warns(UserWarning, match="gradients have been computed"):
        steps(batch)


def cleared(model, opt, batch, set_to_none):
    opt.zero_grad(set_to_none=set_to_none)
    plain_step(model, opt, batch)


def looked_at(model, opt, batch):
    model(**batch).backward()
    cleared(model, opt, batch, set_to_none=True)


def evaluated(model, opt, batch):
    with torch.no_grad():
        model(**batch)
    torch.autograd.grad(model(**batch), [*model.parameters()])
    plain_step(model, opt, batch)


def passed_on(model, opt, batch):
    loss = model(**batch)
    loss.backward()
    opt.step(lambda: model(**batch), loss=loss)
    opt.zero_grad()


ORDINARY = {
    "plain": plain_step,
    "zeroed": lambda *step: cleared(*step, set_to_none=False),
    "to none": lambda *step: cleared(*step, set_to_none=True),
    "looked at": looked_at,
    "evaluated": evaluated,
    "with loss": passed_on,
}


@pytest.mark.parametrize("step", ORDINARY.values(), ids=ORDINARY)
def test_ordinary_loops_are_not_warned(step):
    loop(*build(), step=step)


def test_parameters_that_join_another_unit_are_not_mistaken_for_lost_gradients():
    model = UsedLate()
    opt = fastals.ALS(model)
    order = [n for g in opt.param_groups for n in g["param_names"]]
    for _ in range(3):
        x = torch.randn(6, 4)
        opt.step(lambda x=x: model(x))
    assert order != [n for g in opt.param_groups for n in g["param_names"]]
