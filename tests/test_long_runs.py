"""Nothing grows in the first steps of the long runs, which ``tests/long_runs.py`` goes on with."""

import pytest

pytest.importorskip("triton")
import long_runs
from helpers.recording import interpreted


@pytest.mark.filterwarnings("ignore:fastals. 20 steps in a row have not moved:UserWarning")  # all is learned by then
def test_nothing_grows_while_blocks_freeze_and_adapters_come_and_go():
    assert not long_runs.growth(long_runs.train(5 * 70))  # reports of the last 64 steps are kept


@pytest.mark.slow
@interpreted
def test_nothing_grows_while_captured_steps_change_their_shape():
    assert not long_runs.growth(long_runs.change_shapes(5 * 40))
