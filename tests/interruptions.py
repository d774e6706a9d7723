"""Disturb steps at every place, in every way and in every set-up: ``python tests/interruptions.py``, for a night.

Of the executions of a line it visits the first and the last one, by Ctrl-C and by SIGTERM in turn, with ``--all`` every
one by both. It goes on after a fault, prints each, and exits with 1 if there was any.
"""

import argparse
import os
import sys
import time
from collections import Counter
from functools import partial
from multiprocessing import get_context

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
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes, as many as cores by default")
    options = parser.parse_args()
    torch.set_num_threads(1)
    wanted = [(name, kind) for name in options.set_ups for kind in kinds_of(name) if kind in options.kinds]
    ended, faults = Counter(), 0
    with interpreter.faster(), handled(), get_context("fork").Pool(options.workers, maxtasksperchild=1) as pool:
        for text, found, wrong in pool.imap_unordered(partial(visit, options), wanted):
            print(text, flush=True)
            ended, faults = ended + found, faults + wrong
    print(f"{ended.total()} visits, {faults} faults")
    return int(bool(faults))


def visit(options, wanted) -> tuple[str, Counter, int]:
    """Visit the points of a kind in a set-up: what there is to print, how the visits have ended, and faults."""
    name, kind = wanted
    begin = time.monotonic()
    visits = Visits(SETUPS[name](), kind)
    outcomes = visits(visits.pairs(every=options.all)[:: options.stride])
    ended = Counter(outcome.ended for outcome in outcomes.values())
    faults = [
        f"{name}, {action} at point {number} ({visits.where[number]}): {outcome.fault}"
        for (number, action), outcome in outcomes.items()
        if outcome.fault
    ]
    found = ", ".join(f"{count} {how}" for how, count in ended.items()) or "none"
    seconds = time.monotonic() - begin
    summary = f"{name}, {kind}: {len(visits.where)} points, visits: {found}, {seconds:.0f} s"
    return "\n".join([*faults, summary]), ended, len(faults)


if __name__ == "__main__":
    sys.exit(main())
