"""The engine of an optimizer is built from its groups, state, model and settings, and follows them."""

import copy
import subprocess
import sys
from collections import defaultdict
from dataclasses import replace

import pytest
from helpers.tiny import TinyTransformer, assert_same, tiny_batches

import fastals


@pytest.fixture
def trained():
    """A model, its optimizer after two steps, and a function that makes another."""
    model = TinyTransformer(dropout=0.0)
    opt = fastals.ALS(model)
    batches = tiny_batches(9)

    def step():
        batch = next(batches)
        return opt.step(lambda: model(**batch))

    step(), step()
    return model, opt, step


def test_a_new_state_is_filled(trained):
    model, opt, step = trained
    opt.state = defaultdict(dict)
    step()
    assert len(opt.state_dict()["state"]) == len(list(model.parameters()))
    assert {float(s["step"]) for s in opt.state.values()} == {1.0}


def test_new_groups_are_followed(trained):
    _, opt, step = trained
    opt.param_groups = [dict(group) for group in opt.param_groups]
    for group in opt.param_groups:
        group["lr"] = 0.0
    before = [p.detach().clone() for g in opt.param_groups for p in g["params"]]
    step()
    assert [group["count"] for group in opt.param_groups] == [3] * len(opt.param_groups)
    assert_same([p.detach() for g in opt.param_groups for p in g["params"]], before)


def test_new_settings_are_followed(trained):
    _, opt, step = trained
    opt.settings = replace(opt.settings, schedule="joint")
    step()
    assert opt.report.joint_trials == 1


def test_a_hook_that_steps_when_a_state_is_loaded_steps_from_it(trained):
    model, opt, _ = trained
    saved, weights = copy.deepcopy((opt.state_dict(), model.state_dict()))
    (batch,) = tiny_batches(1)

    def step(*_):
        opt.step(lambda: model(**batch))

    opt.load_state_dict(saved)
    step()
    expected = copy.deepcopy(opt.state_dict())
    model.load_state_dict(weights)
    opt.register_load_state_dict_post_hook(step)
    opt.load_state_dict(saved)
    assert_same(opt.state_dict(), expected)


def test_the_units_of_a_part_of_the_model_belong_to_it():
    model = TinyTransformer()
    assert fastals.ALS(fastals.units(model.blocks)).model is model.blocks


def test_presets_come_with_fastals():
    code = "import fastals; print(fastals.presets.plasls()['by'])"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "block"
