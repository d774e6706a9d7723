"""Units and cache on real architectures with small random configurations, dropout on."""

import copy
from collections import Counter
from functools import partial

import pytest
import torch
from helpers import zoo
from helpers.twins import counted_leaves, counting

import fastals
from fastals.partition import blocks

pytestmark = pytest.mark.proves(claim="every-architecture")
ZOO = (
    "bert", "distilbert", "roberta", "albert", "deberta-v2", "modernbert", "gpt2", "llama", "qwen3", "gemma", "t5",
    "bart", "vit", "lora", "sequential",
)  # fmt: skip
NUMBER_OF_BLOCKS = {"albert": 1, "t5": 5, "bart": 5, "sequential": 6}


def model_and_closure(name):
    model, loss_of = zoo.build(name)
    return model, partial(loss_of, model)


@pytest.mark.parametrize("name", ZOO)
def test_units_are_embeddings_blocks_and_head_each_parameter_once(name):
    model, _ = zoo.build(name)
    groups = fastals.units(model)
    names = [n for g in groups for n in g["param_names"]]
    assert sorted(names) == sorted(n for n, p in model.named_parameters() if p.requires_grad)
    found = [g["name"] for g in groups if g["name"] not in ("embeddings", "head")]
    assert found == list(blocks(model))
    assert len(found) == NUMBER_OF_BLOCKS.get(name, 3)
    assert len(groups) == len(found) if name in ("lora", "sequential") else len(groups) > len(found)


@pytest.mark.slow(keep=10)
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "gradient-checkpointing"])
@pytest.mark.parametrize("name", ZOO)
def test_exact_trial_and_triangular_number_of_block_forwards(name, checkpointing):
    if checkpointing and name in ("sequential", "albert"):
        pytest.skip("this model has no gradient checkpointing")
    model, closure = model_and_closure(name)
    if checkpointing:
        enable = getattr(model, "activation_checkpointing_enable", None)  # transformers 5.17 has only the other
        (enable or model.gradient_checkpointing_enable)()
    opt = fastals.ALS(model, schedule="sweep", c=0.1, trust=0.01)
    opt.step(closure)  # compares a cached trial of every unit with a full forward, bitwise; a difference warns
    assert opt.engine.learned.trusted == {u.name: True for u in opt.report.units}
    leaves, forward, expected, counts = counted_leaves(model, closure.func), Counter(), Counter(), Counter()
    with counting(leaves, forward), torch.no_grad():
        closure()
    with counting(leaves, expected):
        closure().backward()
    opt.zero_grad()
    with counting(leaves, counts):
        opt.step(closure)
    order = list(blocks(model))
    for unit in opt.report.units:
        start = (
            {"embeddings": 0, "head": len(order)}.get(unit.name) if unit.name not in order else order.index(unit.name)
        )
        expected.update({block: unit.trials * forward[block] for block in order[start:]})
    assert opt.report.trials >= len(opt.report.units)
    assert counts == expected


@pytest.mark.slow(keep=5)
@pytest.mark.parametrize("name", ZOO)
def test_cached_trials_equal_full_forwards_at_moved_weights(name):
    """The loss at the end of a step, in every order and by the relay, against a plain forward."""
    model, closure = model_and_closure(name)
    sweeps = [{"schedule": "sweep", "order": order} for order in ("top_down", "bottom_up", "random")]
    for search in (*sweeps, {"schedule": "relay"}):
        opt = fastals.ALS(model, **search, trust=0.02)
        for _ in range(2):
            state = torch.get_rng_state()
            opt.step(closure)
            after = torch.get_rng_state()
            torch.set_rng_state(state)
            with torch.no_grad():
                assert closure().item() == opt.report.loss_after
            torch.set_rng_state(after)


def test_deberta_embeddings_of_relative_positions_are_no_part_of_the_head():
    model, closure = model_and_closure("deberta-v2")
    opt = fastals.ALS(model)
    assert any("rel_embeddings" in n for n in opt.param_groups[-1]["param_names"])
    opt.step(closure)
    assert [g["name"] for g in opt.param_groups][-1] == "head"
    assert not any("encoder" in n for n in opt.param_groups[-1]["param_names"])
    copied = fastals.ALS(copy.deepcopy(model))
    copied.load_state_dict(opt.state_dict())
    assert [g["param_names"] for g in copied.param_groups] == [g["param_names"] for g in opt.param_groups]
