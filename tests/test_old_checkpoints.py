"""A checkpoint of the first public state loads, and the run goes on with the same steps, bit for bit.

:mod:`helpers.checkpoints` says how the file was recorded.
"""

from pathlib import Path

import pytest
import torch
from helpers.checkpoints import CASES, batches_after, build, load, probe, take_steps
from helpers.tiny import assert_same

RECORDED = load(Path(__file__).parent / "data" / "first_checkpoint.pt.gz")


def restored(case):
    """Model and optimizer of today's code, standing at the checkpoint."""
    checkpoint = RECORDED[case]["checkpoint"]
    model, opt = build(case)
    model.load_state_dict(checkpoint["model"])
    opt.load_state_dict(checkpoint["optimizer"])
    torch.set_rng_state(checkpoint["generator"])
    return model, opt


def compare_continuation(case, model, opt):
    """Take the steps after the checkpoint and compare reports and weights with the recorded ones.

    Bitwise if this machine rounds as the recording one did, else up to rounding.
    """
    recorded = RECORDED[case]
    now, then = probe(model), recorded["checkpoint"]["probe"]
    same_bits = torch.equal(now["loss"], then["loss"]) and torch.equal(now["gradient"], then["gradient"])
    if not same_bits and case == "bfloat16":
        pytest.skip("this machine rounds bfloat16 differently, and one such rounding may change a trial's outcome")
    reports = take_steps(model, opt, batches_after())
    if same_bits:
        assert_same(
            reports, [report | {"factor": 1.0, "collectives": 0, "reduced_bytes": 0} for report in recorded["reports"]]
        )
        assert_same(dict(model.state_dict()), dict(recorded["weights"]))
    else:
        assert_same_up_to_rounding(reports, recorded["reports"])
        torch.testing.assert_close(dict(model.state_dict()), dict(recorded["weights"]), rtol=1e-4, atol=1e-5)


def assert_same_up_to_rounding(reports, recorded):
    for ours, theirs in zip(reports, recorded, strict=True):
        assert ours["loss_before"] == pytest.approx(theirs["loss_before"], rel=1e-5)
        assert ours["loss_after"] == pytest.approx(theirs["loss_after"], rel=1e-5, nan_ok=True)
        assert ours["joint_trials"] == theirs["joint_trials"]
        for a, b in zip(ours["units"], theirs["units"], strict=True):
            assert (a["name"], a["trials"], a["outcome"]) == (b["name"], b["trials"], b["outcome"])
            assert a["step_size"] == pytest.approx(b["step_size"], rel=1e-4)
            assert a["slope"] == pytest.approx(b["slope"], rel=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_every_entry_of_an_old_checkpoint_is_loaded_as_it_is(case):
    """What units have learned to remember since is as before the first step."""
    _, opt = restored(case)
    recorded = RECORDED[case]["checkpoint"]["optimizer"]
    new = {"relative_step": 0.0, "factor": 0.0, "last_search": 0, "direction_rms": 0.0, "weight_rms": 0.0}
    assert not new.keys() & recorded["param_groups"][0].keys()
    groups = [group | new for group in recorded["param_groups"]]
    assert_same(opt.state_dict(), recorded | {"param_groups": groups})


@pytest.mark.parametrize("case", CASES)
def test_a_run_continues_from_an_old_checkpoint(case):
    compare_continuation(case, *restored(case))


@pytest.mark.parametrize("case", CASES)
def test_some_recorded_trials_were_rejected(case):
    units = [u for report in RECORDED[case]["reports"] for u in report["units"]]
    assert any(u["trials"] > 1 for u in units)


@pytest.mark.parametrize(
    ("case", "entry"), [(c, e) for c in CASES for e in RECORDED[c]["checkpoint"]["optimizer"]["state"][0]]
)
def test_a_wrong_entry_of_the_state_is_noticed(case, entry):
    model, opt = restored(case)
    with torch.no_grad():
        opt.state[model.head.weight][entry].mul_(2)
    with pytest.raises(AssertionError):
        compare_continuation(case, model, opt)


@pytest.mark.parametrize("case", CASES)
def test_a_wrong_remembered_step_is_noticed(case):
    model, opt = restored(case)
    for group in opt.param_groups:
        group["step_size"] *= 0.5
    with pytest.raises(AssertionError):
        compare_continuation(case, model, opt)
