"""Presets set a paper's values, whatever the defaults are, and train."""

import inspect

import pytest
import torch
from helpers.tiny import TinyTransformer, tiny_batches

import fastals
from fastals.presets import PRESETS, sls


def build(name, model):
    preset = PRESETS[name]()
    return fastals.ALS(fastals.units(model, by=preset.pop("by")), model=model, **preset)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_says_where_its_values_come_from(name):
    assert "arXiv" in inspect.getdoc(PRESETS[name])


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("plasls", {"c": 0.1, "backtrack": 0.9, "growth": 2 ** (1 / 500), "betas": (0.9, 0.999), "eta_init": 0.1}),
        ("adamsls", {"c": 0.1, "backtrack": 0.9, "growth": 2 ** (1 / 500), "reference": "monotone"}),
        ("salsa", {"c": 0.5, "backtrack": 0.9, "reference": "smoothed", "smoothing": 0.99}),
        ("ponos", {"c": 0.5, "backtrack": 0.5, "polyak_c": 0.1, "nonmonotone_weight": 1.0, "eta_max": 10.0}),
        ("sls", {"c": 0.1, "backtrack": 0.9, "growth": 2 ** (1 / 500), "eta_init": 1.0, "eta_max": 10.0}),
    ],
)
def test_published_values_reach_every_group(name, values):
    opt = build(name, TinyTransformer())
    for group in opt.param_groups:
        assert {k: group[k] for k in values} == values
        assert group["trust"] is None, "no paper caps the relative change"
        assert group["weight_decay"] == 0


#: All that a preset leaves to the defaults, as it was before the default schedule was the relay.
UNTOUCHED = {
    "plasls": {"schedule": "cycle", "every": 1, "c": 0.1, "growth": 2 ** (1 / 500), "max_trials": 250},
    "adamsls": {"schedule": "sweep", "every": 1, "c": 0.1, "growth": 2 ** (1 / 500), "max_trials": 250},
    "salsa": {"schedule": "sweep", "every": "auto", "c": 0.5, "growth": 2 ** (1 / 500), "max_trials": 250},
    "ponos": {"schedule": "sweep", "every": 1, "c": 0.5, "growth": 1.3, "max_trials": 100},
    "sls": {"schedule": "sweep", "every": 1, "c": 0.1, "growth": 2 ** (1 / 500), "max_trials": 250},
}


@pytest.mark.parametrize("name", PRESETS)
def test_the_defaults_of_the_relay_are_not_those_of_a_preset(name):
    opt = build(name, TinyTransformer())
    made = {"schedule": opt.settings.schedule, "every": opt.settings.every}
    for group in opt.param_groups:
        constants = {k: group[k] for k in UNTOUCHED[name] if k not in made}
        assert made | constants == UNTOUCHED[name]
        assert (group["trust"], group["eta_min"]) == (None, 1e-6 if name == "ponos" else 1e-10)
    assert opt.settings.order == "top_down"


def test_units_schedule_and_directions_of_the_presets():
    found = {n: (build(n, TinyTransformer(depth=2)), PRESETS[n]()["by"]) for n in PRESETS}
    assert {n: len(opt.param_groups) for n, (opt, _) in found.items()} == {
        "plasls": 4, "adamsls": 1, "salsa": 1, "ponos": 1, "sls": 1,
    }  # fmt: skip
    settings = {n: opt.settings for n, (opt, _) in found.items()}
    assert settings["plasls"].schedule == "cycle"
    assert settings["salsa"].every == "auto"
    assert {n for n, s in settings.items() if s.direction == "sgd"} == {"ponos", "sls"}
    assert {n for n, s in settings.items() if s.momentum == "after"} == {"plasls", "adamsls", "salsa"}


def test_the_growth_of_sls_follows_the_epoch():
    assert sls(batches_per_epoch=10)["growth"] ** 10 == pytest.approx(2)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_trains(name):
    torch.manual_seed(0)
    model = TinyTransformer(dropout=0.0)
    opt = build(name, model)
    batches = list(tiny_batches(4)) * 30
    losses = [float(opt.step(lambda: model(**batch))) for batch in batches]  # noqa: B023
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4])
