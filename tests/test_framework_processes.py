"""The Trainer, Accelerate and Lightning in two processes: the steps of one process that has the data of both."""

from importlib.util import find_spec
from itertools import pairwise

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from helpers import frameworks
from helpers.frameworks import classifier, in_two, language_model, outcome, padded
from helpers.loops import STEPS, build, loop
from helpers.parallel import decisions, whole
from helpers.tiny import assert_same
from helpers.trainers import bert, fit, labelled

import fastals

TWICE = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, "max_steps": 4}
OWN = {"average_tokens_across_devices": False}  # without it the Trainer adds up the losses of BERT's processes
CLIPPED = {"weight_decay": 0.1, "max_grad_norm": 0.5}


def assert_same_training(found, wanted):
    """The weights up to rounding, the same trials and outcomes, and the same steps and losses up to rounding."""
    for name, value in wanted[0].items():
        torch.testing.assert_close(found[0][name], value, rtol=0, atol=1e-9)
    for ours, theirs in zip(found[1], wanted[1], strict=True):
        assert [unit[:3] for unit in ours[0]] == [unit[:3] for unit in theirs[0]]
        assert [unit[3] for unit in ours[0]] == pytest.approx([unit[3] for unit in theirs[0]], rel=1e-6)
        assert ours[1] == theirs[1]
        assert ours[2:] == pytest.approx(theirs[2:], rel=1e-6)


@pytest.mark.slow(keep=1)
@pytest.mark.parametrize(
    ("model", "data", "options"),
    [
        (language_model, padded, CLIPPED),
        (classifier, labelled, OWN),
        (language_model, padded, CLIPPED | {"fsdp": True}),
    ],
    ids=["llama", "bert", "llama_fsdp2"],
)
def test_two_processes_of_a_trainer_are_one_of_twice_the_batch(model, data, options, tmp_path):
    """Also where rows have different numbers of tokens: f is the mean over all of them."""
    (first, reductions), (second, _) = in_two(frameworks.trained, tmp_path, model, data, TWICE | options)
    assert_same(first, second)
    alone = {k: v for k, v in options.items() if k != "fsdp"}
    wanted = outcome(fit(tmp_path, model(), data(), **TWICE | alone | {"per_device_train_batch_size": 4}))
    assert_same_training(first, wanted)
    assert len(first[1]) == 4
    for ours, theirs in zip(first[2], wanted[2], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    assert reductions == (0 if "fsdp" in options else 4), "the gradients of a step are reduced once"


def test_the_loss_is_the_one_that_the_trainer_differentiates(tmp_path):
    """Whether it averages over the tokens of all processes, or over those of each."""
    options = [TWICE | {"max_steps": 1, "average_tokens_across_devices": average} for average in (True, False)]
    for (ours, theirs), (own, their_own) in in_two(frameworks.first_logs, tmp_path, language_model, padded, options):
        assert {"loss", "grad_norm"} <= ours.keys()
        assert ours == pytest.approx(theirs, rel=1e-6)
        assert own == pytest.approx(their_own, rel=1e-6)
        assert ours["grad_norm"] != pytest.approx(own["grad_norm"], rel=1e-3)


@pytest.mark.slow(keep=1)
@pytest.mark.parametrize("options", [{}, {"fsdp": True}], ids=["ddp", "fsdp2"])
def test_resuming_is_going_on(options, tmp_path):
    model, data = (language_model, padded) if options else (bert, labelled)
    for straight, resumed in in_two(frameworks.resumed, tmp_path, model, data, TWICE | options):
        assert_same(straight[0], resumed[0])
        assert straight[1][2:] == resumed[1]
        assert straight[2][:-1] == resumed[2][:-1]


def test_a_loss_that_is_not_finite_in_one_process_moves_nothing_in_any(tmp_path):
    (first, said, steps), (second, also_said, _) = in_two(frameworks.poisoned, tmp_path)
    assert_same(first, second)
    assert said == also_said
    assert [message.split(":")[0] for message in said] == ["step 2", "step 4"]
    moved = [not torch.equal(a["classifier.weight"], b["classifier.weight"]) for a, b in pairwise(first)]
    assert moved == [False, True, False, True, True]
    assert steps == 4


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_padding_in_one_process_alone(kind):
    """Transformers makes no mask for a mini-batch without padding, so that calls have other arguments there."""
    first, second = in_two(frameworks.masked, kind)
    assert_same(first, second)
    model = language_model()
    opt = fastals.ALS(model)
    for _ in range(3):
        opt.step([lambda b=b: model(**b).loss / 2 for b in map(frameworks.one_sided, range(2))])
    assert_same_training(first, (whole(model), [decisions(r) for r in opt.reports]))


def test_data_that_end_in_one_process_end_the_training_in_all(tmp_path):
    first, second = in_two(frameworks.broken, tmp_path)
    assert second == "OSError: the disk is full of holes"
    assert any(noticed in first for noticed in ("has died", "closed", "reset by peer")), first  # by torch or by us


def test_fsdp1_is_refused(tmp_path):
    for error in in_two(frameworks.refused, tmp_path, {"fsdp": True, "fsdp_config": {"version": 1}}):
        assert "FSDP1" in error
        assert "fsdp_config={'version': 2}" in error


@pytest.fixture(scope="module")
def alone():
    """The plain loop in one process: weights and decisions."""
    model, opt = loop(*build(torch.float64, dropout=0.0))
    return whole(model), [decisions(r) for r in opt.reports]


@pytest.mark.parametrize("micro_batches", [1, 4])
@pytest.mark.parametrize("sharded", [False, True], ids=["ddp", "fsdp2"])
def test_two_processes_of_accelerate_are_one_with_the_whole_mini_batch(sharded, micro_batches, alone):
    first, second = in_two(frameworks.accelerated, sharded, micro_batches)
    assert_same(first[:2], second[:2])
    assert_same_training(first, alone)
    assert first[2] == (0 if sharded else STEPS), "the gradients of a step are reduced once"


lightning = pytest.mark.skipif(not find_spec("lightning"), reason="lightning is not installed")


@lightning
@pytest.mark.parametrize("how", ["one", "micro"])
def test_two_processes_of_lightning_are_one_with_the_whole_mini_batch(how, alone):
    first, second = in_two(frameworks.lightened, how)
    assert_same(first[:2], second[:2])
    assert_same_training(first, alone)
    assert first[2] == STEPS, "the gradients of a step are reduced once"
    assert first[3] == first[1][-1][3] == second[3]


@lightning
def test_the_plain_backward_is_refused_in_lightning():
    for error in in_two(frameworks.lightened, "plain"):
        assert "gradients differ between the processes" in error
        assert "backward=self.manual_backward" in error
