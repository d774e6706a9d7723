"""Same answers: the fast path and the eager baseline make the same steps, trial for trial."""

import copy
import math

import pytest
import torch
from helpers.options import HARD_SWEEP
from helpers.side_by_side import STEPS, compare
from helpers.tiny import TinyTransformer, TwoHeads, tiny_batches

import fastals
from fastals.eager import EagerALS
from fastals.search import MEMORY

SCHEDULES = ["sweep", "independent", "cycle", "joint", "relay"]


@pytest.mark.slow(keep=2)
@pytest.mark.proves(claim="same-answers-for-each-schedule")
@pytest.mark.parametrize("momentum", ["none", "after", "tested"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_same_answers_for_each_schedule_and_momentum(schedule, momentum):
    seen = compare(HARD_SWEEP | {"schedule": schedule, "momentum": momentum}, resync=schedule == "cycle")
    assert "accepted" in seen.outcomes
    assert seen.rejections > 0
    assert ("kept" in seen.outcomes) == (schedule == "cycle")
    assert (seen.joint_trials > 0) == (schedule in ("independent", "joint", "relay"))


@pytest.mark.slow(keep=3)
@pytest.mark.parametrize("momentum", ["none", "after", "tested"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_same_answers_in_single_precision_with_the_defaults(schedule, momentum):
    torch.manual_seed(0)
    large = schedule == "relay"  # steps so large that rounding grows from step to step, so each is compared for itself
    compare({"schedule": schedule, "momentum": momentum}, model=TinyTransformer(depth=2), resync=large)


@pytest.mark.slow(keep=2)
@pytest.mark.filterwarnings("ignore:fastals. 20 steps in a row have not moved:UserWarning")
@pytest.mark.parametrize("reference", ["monotone", "nonmonotone", "smoothed"])
@pytest.mark.parametrize("initial", ["warm", "reset", "polyak", "random"])
def test_same_answers_for_each_first_step_and_reference(initial, reference):
    seen = compare(HARD_SWEEP | {"initial": initial, "reference": reference, "trust": 0.5, "max_trials": 6})
    assert "accepted" in seen.outcomes
    assert seen.rejections > 0


@pytest.mark.slow(keep=3)
@pytest.mark.parametrize("order", ["top_down", "bottom_up", "random"])
@pytest.mark.parametrize("schedule", ["sweep", "independent", "relay"])
def test_same_answers_for_each_order(schedule, order):
    assert (
        compare(HARD_SWEEP | {"schedule": schedule, "order": order, "initial": "random", "trust": 2.0}).rejections > 0
    )


@pytest.mark.slow(keep=3)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("every", [3, "auto"])
def test_same_answers_when_searching_rarely(every, schedule):
    seen = compare(HARD_SWEEP | {"schedule": schedule, "every": every, "momentum": "after"})
    assert seen.outcomes >= ({"accepted"} if schedule == "relay" else {"accepted", "kept"})


@pytest.mark.slow(keep=3)
@pytest.mark.parametrize("momentum", ["none", "after", "tested"])
@pytest.mark.parametrize("schedule", ["sweep", "joint", "relay"])
def test_same_answers_along_the_gradient(schedule, momentum):
    options = HARD_SWEEP | {
        "direction": "sgd",
        "schedule": schedule,
        "momentum": momentum,
        "trust": None,
        "eta_max": 2.0,
    }
    assert compare(options | {"max_trials": 5}).rejections > 0


@pytest.mark.slow(keep=4)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("momentum", ["none", "after"])
def test_same_answers_with_weight_decay_and_clipping(schedule, momentum):
    options = HARD_SWEEP | {"weight_decay": 0.1, "max_grad_norm": 0.5, "schedule": schedule, "momentum": momentum}
    assert compare(options).rejections > 0


@pytest.mark.slow(keep=5)
@pytest.mark.parametrize("every", [1, "auto"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_same_answers_while_units_merge(schedule, every):
    torch.manual_seed(0)
    model = TinyTransformer(depth=4).double()
    compare(HARD_SWEEP | {"schedule": schedule, "every": every, "merge_below": 1e-2, "trust": 0.05}, model=model)


def test_units_merge_down_to_two():
    model = TinyTransformer(depth=4)
    opt = fastals.ALS(model, merge_below=1e9)
    counts = []
    for batch in tiny_batches(6):
        opt.step(lambda: model(**batch))  # noqa: B023
        counts.append(len(opt.report.units))
        for unit in {g["unit"] for g in opt.param_groups}:
            memories = [{k: g[k] for k in MEMORY} for g in opt.param_groups if g["unit"] == unit]
            assert all(m == memories[0] for m in memories), "the groups of a unit remember alike"
    assert counts == [6, 5, 4, 3, 2, 2]


@pytest.mark.parametrize("schedule", ["sweep", "independent", "relay"])
def test_same_answers_with_gradients_already_there(schedule):
    assert compare(HARD_SWEEP | {"schedule": schedule}, backward=True).rejections > 0


def test_same_answers_in_bfloat16_with_master_weights():
    torch.manual_seed(0)
    model = TinyTransformer(depth=2, dropout=0.0).bfloat16()
    # One rounding to bfloat16 that falls the other way changes a weight by 0.4 %, so each step is compared for itself.
    seen = compare(HARD_SWEEP | {"momentum": "after", "weight_decay": 0.1}, model=model, resync=True)
    assert seen.rejections > 0


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_same_answers_where_some_parameters_have_no_gradient(schedule):
    torch.manual_seed(0)
    seen = compare(HARD_SWEEP | {"schedule": schedule, "momentum": "after"}, model=TwoHeads().double())
    assert "accepted" in seen.outcomes


@pytest.mark.proves(claim="same-answers-on-bert")
def test_same_answers_on_bert():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, num_labels=4,
        max_position_embeddings=16,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(config).double()
    assert config.hidden_dropout_prob > 0
    for layer in model.bert.encoder.layer:  # its gradient is rounding noise, which twins do not share
        layer.attention.self.key.bias.requires_grad_(False)
    batches = ({"input_ids": b["tokens"], "labels": b["labels"]} for b in tiny_batches(STEPS))
    assert compare(HARD_SWEEP | {"weight_decay": 0.01}, model=model, batches=batches).rejections > 0


def test_a_later_state_of_the_baseline_is_that_of_the_fast_path():
    """Moments and counts too, not only the steps that follow from them."""
    torch.manual_seed(0)
    model = TinyTransformer(depth=2).double()
    twin = copy.deepcopy(model)
    fast = fastals.ALS(fastals.units(model), model=model, momentum="after")
    eager = EagerALS(fastals.units(twin), momentum="after")
    for t, batch in enumerate(tiny_batches(5)):
        for opt, net in ((fast, model), (eager, twin)):
            torch.manual_seed(t)
            opt.step(lambda: net(**batch))  # noqa: B023
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert int(fast.state[a]["step"]) == eager.state[b]["step"] == 5
        for key in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(fast.state[a][key], eager.state[b][key], rtol=1e-8, atol=1e-12)
    memory = [{k: g[k] for k in ("step_size", "count", "average")} for g in fast.param_groups]
    for group, kept in zip(eager.param_groups, memory, strict=True):
        assert all(math.isclose(group[k], v, rel_tol=1e-9) for k, v in kept.items())
