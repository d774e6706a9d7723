"""A hundred random set-ups, the same in every run, each trained in four ways; ``make fuzz`` trains many more."""

import pytest
from fuzz import fault_of

TOGETHER = 10  # set-ups of one test


@pytest.mark.parametrize("first", range(0, 100, TOGETHER))
def test_all_ways_of_training_agree(first):
    faults = [fault for seed in range(first, first + TOGETHER) if (fault := fault_of(seed, steps=2))]
    assert not faults, "\n".join(faults)
