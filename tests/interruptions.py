"""Disturb steps at every place, in every way and in every set-up: ``python tests/interruptions.py``, for a night.

Of the executions of a line it visits the first and the last one, with ``--all`` every one. It goes on after a fault,
prints each, and exits with 1 if there was any.
"""

import argparse
import os
import sys
import time
from collections import Counter

os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported

import torch
from helpers import interpreter
from helpers.interruptions import KINDS, SETUPS, Visits, handled, kinds_of


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--set-ups", nargs="*", default=list(SETUPS), choices=SETUPS, help="all by default")
    parser.add_argument("--kinds", nargs="*", default=list(KINDS), choices=KINDS, help="of points, all by default")
    parser.add_argument("--stride", type=int, default=1, help="visit every n-th point only")
    parser.add_argument("--all", action="store_true", help="every execution of a line")
    options = parser.parse_args()
    torch.set_num_threads(1)
    points = faults = 0
    with interpreter.faster(), handled():
        for name in options.set_ups:
            case = SETUPS[name]()
            for kind in filter(options.kinds.__contains__, kinds_of(name)):
                visited, wrong = visit(name, case, kind, options)
                points, faults = points + visited, faults + wrong
    print(f"{points} points, {faults} faults")
    return int(bool(faults))


def visit(name, case, kind, options) -> tuple[int, int]:
    """Visit the points of a kind in every way; how many visits there were, and how many faults."""
    visits, begin, ended, faults = Visits(case, kind), time.monotonic(), Counter(), 0
    numbers = visits.numbers(every=options.all)[:: options.stride]
    for action in visits.actions:
        for number in numbers:
            outcome = visits(number, action)
            ended[outcome.ended] += 1
            if outcome.fault:
                faults += 1
                print(f"{name}, {action} at point {number} ({visits.where[number]}): {outcome.fault}", flush=True)
    found = ", ".join(f"{count} {how}" for how, count in ended.items())
    seconds = time.monotonic() - begin
    print(f"{name}, {kind}: {len(visits.where)} points, visits: {found or 'none'}, {seconds:.0f} s", flush=True)
    return ended.total(), faults


if __name__ == "__main__":
    sys.exit(main())
