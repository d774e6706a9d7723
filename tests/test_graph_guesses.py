"""Captured steps whose comparisons of arguments come out otherwise than before."""

import pytest
import torch
from helpers.nets import Masked
from helpers.recording import interpreted, recorded

pytest.importorskip("triton")
import fastals
from fastals.graphs.graphed import WARMUP

pytestmark = [pytest.mark.proves(claim="captured-steps"), interpreted]


@pytest.mark.slow
@pytest.mark.parametrize("linked", [False, True], ids=["host", "while"])
def test_a_replayed_trial_that_should_have_been_computed_is_never_accepted(linked):
    """The host makes the step again without graphs; a launch rejects such trials, and the next step says so."""
    torch.manual_seed(0)
    model, x = Masked(), torch.randn(6, 4)
    opt = fastals.ALS(fastals.units(model), model=model, fused=True, order="bottom_up", trust=0.05)
    step = recorded(opt, model, lambda batch: model(batch["x"]), linked=linked)
    for _ in range(WARMUP + 1):
        step({"x": x})
    assert step.mode.name == ("while" if linked else "host")
    model.late = True  # from now on the mask depends on the first unit
    if linked:
        step({"x": x})
    with pytest.warns(UserWarning, match="captured anew"):
        step({"x": x})
    assert step.mode.name != "while"
    with torch.no_grad():
        assert opt.report.loss_after == pytest.approx(model(x).item(), rel=1e-6)
    for _ in range(WARMUP + 2):
        step({"x": x})
        with torch.no_grad():
            assert opt.report.loss_after == pytest.approx(model(x).item(), rel=1e-6)
