"""How a model is cut into units."""

import pytest
import torch
from helpers.tiny import TinyTransformer
from torch import nn

import fastals
from fastals.eager import EagerALS


def names(groups):
    return [g["name"] for g in groups]


def test_by_block_is_the_default():
    model = TinyTransformer(depth=3)
    groups = fastals.units(model)
    assert names(groups) == ["embeddings", "blocks.0", "blocks.1", "blocks.2", "head"]
    assert groups[-1]["param_names"] == ["norm.weight", "norm.bias", "head.weight", "head.bias"]
    assert all(g["params"] == [dict(model.named_parameters())[n] for n in g["param_names"]] for g in groups)


def test_by_model_is_one_unit():
    model = TinyTransformer(depth=2)
    (group,) = fastals.units(model, by="model")
    assert len(group["params"]) == len(list(model.parameters()))


@pytest.mark.parametrize(("count", "sizes"), [(1, [4]), (2, [2, 2]), (3, [2, 1, 1]), (4, [1, 1, 1, 1])])
def test_by_count_groups_consecutive_blocks(count, sizes):
    groups = fastals.units(TinyTransformer(depth=4), by=count)
    found = [len({n.split(".")[1] for n in g["param_names"] if n.startswith("blocks.")}) for g in groups]
    assert found == sizes
    assert "embed.weight" in groups[0]["param_names"]
    assert "head.bias" in groups[-1]["param_names"]


def test_by_patterns_first_match_wins_and_the_rest_is_a_unit():
    groups = fastals.units(TinyTransformer(depth=2), by=["qkv", r"blocks\.\d+\.mlp"])
    assert names(groups) == ["qkv", r"blocks\.\d+\.mlp", "rest"]
    assert [len(g["params"]) for g in groups[:2]] == [2, 12]


def test_frozen_parameters_are_left_out():
    model = TinyTransformer(depth=2)
    model.embed.requires_grad_(False)
    assert names(fastals.units(model)) == ["blocks.0", "blocks.1", "head"]


def test_a_model_without_blocks_is_cut_at_its_children():
    model = nn.ModuleDict({"first": nn.Linear(2, 2), "second": nn.Linear(2, 2)})
    assert names(fastals.units(model)) == ["first", "second"]


@pytest.mark.parametrize(
    ("by", "message"),
    [
        (0, "must be 1 to 2"),
        (3, "must be 1 to 2"),
        (["no such name"], "no trainable parameter is matched"),
        ("layer", "by must be 'block'"),
        (True, "by must be 'block'"),
    ],
)
def test_wrong_cuts_are_refused(by, message):
    with pytest.raises(ValueError, match=message):
        fastals.units(TinyTransformer(depth=2), by=by)


def test_a_model_with_nothing_to_train_is_refused():
    with pytest.raises(ValueError, match="no trainable parameter"):
        fastals.units(TinyTransformer().requires_grad_(False))


def test_merged_units_are_searched_together_until_two_are_left():
    model = TinyTransformer(depth=3).train()
    opt = fastals.ALS(model, merge_below=1.0)
    tokens = torch.randint(32, (8, 6))
    reported = []
    for _ in range(6):
        opt.step(lambda: model(tokens, tokens[:, 0] % 4))
        reported.append([u.name for u in opt.report.units])
    assert [len(r) for r in reported] == [5, 4, 3, 2, 2, 2]
    assert sorted("+".join(reported[-1]).split("+")) == ["blocks.0", "blocks.1", "blocks.2", "embeddings", "head"]
    assert len(opt.param_groups) == 5


OPTIMIZERS = pytest.mark.parametrize("optimizer", [fastals.ALS, EagerALS])


def spectral(*, trainable):
    """A model with a complex parameter, and that parameter."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    weight = nn.Parameter(torch.ones(2, 3, dtype=torch.cfloat), requires_grad=trainable)
    model[1].register_parameter("spectrum", weight)
    return model, weight


@OPTIMIZERS
def test_complex_parameters_are_refused_at_construction(optimizer):
    model, weight = spectral(trainable=True)
    advice = r"is complex.*view_as_real.*view_as_complex in forward, or freeze it"
    for params in (model, fastals.units(model), list(model.named_parameters())):
        with pytest.raises(ValueError, match=rf"'1.spectrum' {advice}"):
            optimizer(params)
    with pytest.raises(ValueError, match=rf"'1.spectrum' {advice}"):
        optimizer(list(model.parameters()), model=model)
    with pytest.raises(ValueError, match=rf"of shape \(2, 3\) {advice}"):
        optimizer([weight])


@OPTIMIZERS
def test_a_complex_unit_is_refused_and_not_added(optimizer):
    model, weight = spectral(trainable=False)
    late = nn.Linear(2, 2).requires_grad_(False)
    model.add_module("late", late)
    opt = optimizer(model)
    weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"'1.spectrum' is complex.*view_as_real"):
        opt.add_param_group({"params": [weight], "param_names": ["1.spectrum"]})
    assert [g["name"] for g in opt.param_groups] == ["0", "1"]
    weight.requires_grad_(False)
    late.requires_grad_(True)
    opt.add_param_group({"params": list(late.parameters()), "param_names": ["late.weight", "late.bias"]})
    opt.step(lambda: model(torch.ones(4, 3)).square().mean())
    assert sorted(u.name for u in opt.report.units) == ["0", "1", "group2"]


@OPTIMIZERS
def test_frozen_complex_parameters_are_left_alone(optimizer):
    model, weight = spectral(trainable=False)
    for opt in (optimizer(model), optimizer(list(model.parameters()))):
        opt.step(lambda: (model(torch.ones(4, 3)) @ weight.abs()).square().mean())
        assert torch.equal(weight, torch.ones_like(weight))


def test_a_complex_parameter_unfrozen_in_its_unit_is_refused_by_the_step():
    model, weight = spectral(trainable=False)
    opt = fastals.ALS(list(model.parameters()))
    weight.requires_grad_(True)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match=r"complex parameter of shape \(2, 3\).*view_as_real"):
        opt.step(lambda: (model(torch.ones(4, 3)) @ weight.abs()).square().mean())
    assert all(map(torch.equal, before, model.parameters()))
