"""Train random set-ups in four ways and print those in which the ways differ: ``make fuzz``.

A set-up follows from its number alone, so ``--first 1234 --set-ups 1`` repeats one.
"""

import argparse
import sys
import time

import torch
from helpers.differential import STEPS, train
from helpers.random_models import set_up


def fault_of(seed: int, steps: int = STEPS) -> str:
    """What is wrong with the set-up of this number, with the set-up; empty if nothing is."""
    case = set_up(seed)
    try:
        train(case, steps)
    except Exception as error:
        return f"set-up {seed}: {' '.join(f'{type(error).__name__}: {error}'.split())[:600]}\n    {case}"
    return ""


def main() -> int:
    """Train the set-ups one after the other; 1 if there was a fault."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--set-ups", type=int, default=2000, help="how many")
    parser.add_argument("--first", type=int, default=0, help="number of the first one")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no other one after this time")
    args = parser.parse_args()
    torch.set_num_threads(1)  # the models are tiny: a second thread only waits
    until, faults, done = time.monotonic() + args.seconds, 0, 0
    for seed in range(args.first, args.first + args.set_ups):
        if time.monotonic() > until:
            break
        if fault := fault_of(seed):
            print(fault, flush=True)
            faults += 1
        done += 1
    print(f"{done} set-ups, {faults} faults")
    return int(faults > 0)


if __name__ == "__main__":
    sys.exit(main())
