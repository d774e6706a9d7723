"""How a model is cut into units."""

import pytest
import torch
from helpers.hf import DEVICE, tiny_bert
from helpers.nets import UsedLate
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


# Weight decay


def test_a_unit_has_a_group_that_decays_and_one_that_does_not():
    model = tiny_bert()
    groups = fastals.units(model, weight_decay=0.1)
    whole = fastals.units(model)
    assert list(dict.fromkeys(g["name"] for g in groups)) == [g["name"] for g in whole]
    for group in groups:
        assert all((p.ndim > 1) == (group["weight_decay"] > 0) for p in group["params"])
    assert sorted(n for g in groups for n in g["param_names"]) == sorted(n for g in whole for n in g["param_names"])
    opt = fastals.ALS(groups)
    assert [g["unit"] for g in opt.param_groups] == [0, 0, 1, 1, 2, 2, 3, 3]
    take_step(model, opt)
    assert [u.name for u in opt.report.units] == [g["name"] for g in whole]


def take_step(model, opt):
    batch = {"input_ids": torch.arange(24).view(2, 12), "labels": torch.tensor([0, 1])}
    batch = {k: v.to(model.device) for k, v in batch.items()}
    opt.step(lambda: model.train()(**batch).loss)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"fused": True, "max_trials": 3}], ids=str)
@pytest.mark.parametrize("direction", ["adam", "sgd"])
def test_what_does_not_decay_moves_along_the_gradient_alone(options, direction):
    if options:
        pytest.importorskip("triton")
    model = tiny_bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).to(DEVICE)
    opt = fastals.ALS(fastals.units(model, weight_decay=0.5), direction=direction, **options)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    take_step(model, opt)
    steps = {u.name: u.step_size for u in opt.report.units}
    assert any(steps.values())
    for group in opt.param_groups:
        for name, p in zip(group["param_names"], group["params"], strict=True):
            d = p.grad if direction == "sgd" else p.grad / (p.grad.abs() + 1e-8)
            d = d + (0.5 * before[name] if p.ndim > 1 else 0)
            assert torch.allclose(p.detach(), before[name] - steps[group["name"]] * d, rtol=1e-4, atol=1e-7), name


@OPTIMIZERS
def test_decay_of_everything_is_the_argument_of_the_optimizer(optimizer):
    one, other = tiny_bert(), tiny_bert()
    names = [n for n, _ in other.named_parameters()]
    pairs = ((one, optimizer(one, weight_decay=0.1)),
             (other, optimizer(fastals.units(other, weight_decay=0.1, decayed=names))))  # fmt: skip
    for model, opt in pairs:
        torch.manual_seed(0)
        take_step(model, opt)
        take_step(model, opt)
    assert all(map(torch.equal, one.parameters(), other.parameters()))


def test_no_decay_leaves_one_group_for_each_unit():
    model = tiny_bert()
    assert [len(g["params"]) for g in fastals.units(model, weight_decay=0.0)] == [
        len(g["params"]) for g in fastals.units(model)
    ]


def test_a_name_that_no_parameter_has_cannot_decay():
    with pytest.raises(ValueError, match="no parameter 'weight'"):
        fastals.units(tiny_bert(), weight_decay=0.1, decayed=["weight"])


def test_a_parameter_joins_the_unit_that_uses_it_in_the_group_of_its_decay():
    x = torch.randn(6, 4)
    plain, split = UsedLate(), UsedLate()
    opts = fastals.ALS(plain), fastals.ALS(fastals.units(split, weight_decay=0.1))
    for model, opt in zip((plain, split), opts, strict=True):
        opt.step(lambda model=model: model(x))
    assert opts[0].param_groups[-1]["param_names"] == ["norm.weight", "norm.bias", "head.weight", "head.bias"]
    matrices, others = opts[1].param_groups[-2:]
    assert (matrices["name"], others["name"], others["unit"]) == ("head", "head", 3)
    assert matrices["param_names"] == ["head.weight"]
    assert sorted(others["param_names"]) == ["head.bias", "norm.bias", "norm.weight"]


def test_a_state_of_split_units_goes_on():
    model = tiny_bert().train()
    opt = fastals.ALS(fastals.units(model, weight_decay=0.1))
    take_step(model, opt)
    again = tiny_bert()
    again.load_state_dict(model.state_dict())
    other = fastals.ALS(fastals.units(again, weight_decay=0.1))
    other.load_state_dict(opt.state_dict())
    for m, o in ((model, opt), (again, other)):
        torch.manual_seed(1)
        take_step(m, o)
    assert all(map(torch.equal, model.parameters(), again.parameters()))


def test_groups_of_adamw_are_said_to_be_units():
    model = tiny_bert()
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.01},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    with pytest.warns(UserWarning, match=r"2 groups .* are 2 units .*fastals.units\(model, weight_decay=0.01\)"):
        fastals.ALS(groups, model=model)


@OPTIMIZERS
def test_split_units_of_two_models_stay_apart(optimizer):
    model = nn.ModuleDict({name: nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)) for name in "ab"})
    opt = optimizer([g for m in model.values() for g in fastals.units(m, weight_decay=0.1)])
    opt.step(lambda: sum(m(torch.ones(3, 4)).square().mean() for m in model.values()))
    assert [u.name for u in opt.report.units] == ["0", "1", "0", "1"]


def test_a_tied_weight_decays_by_any_of_its_names():
    model = nn.ModuleDict({"a": nn.Linear(4, 4, bias=False), "b": nn.Linear(4, 4, bias=False)})
    model["b"].weight = model["a"].weight
    (group,) = fastals.units(model, by="model", weight_decay=0.1, decayed=["b.weight"])
    assert (group["param_names"], group["weight_decay"]) == (["a.weight"], 0.1)
