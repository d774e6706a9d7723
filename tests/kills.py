"""Kill trainings at random instants, go on from their last checkpoints, and compare with trainings left alone.

    python tests/kills.py --kills 100 --seed 0

Half of the kills come at a random time, half amid the writing of files. A training is killed one to four times.
Prints every fault; the exit code is 1 if there was one.
"""

import argparse
import itertools
import multiprocessing
import os
import random
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])  # for the processes
os.environ["PYTHONWARNINGS"] = "ignore:resource_tracker"  # the killed do not clean up

from helpers import deaths  # noqa: E402
from helpers.tiny import assert_same  # noqa: E402

KINDS = {
    "finetune": deaths.Finetune,
    "trainer": deaths.Training,
    "trainer, the best model": lambda folder: deaths.Training(folder, best=True),
    "finetune by the shell": lambda folder: deaths.Finetune(folder, shell=True),
}
CALLS = ["save", "save", "save", "fsync", "replace"]
MOMENTS = {"save": ["before", "amid", "amid", "amid"], "fsync": ["before", "after"], "replace": ["before", "after"]}
OFTEN = {"save": 12, "fsync": 40, "replace": 14}  # calls that most trainings make
TURNS = ["finetune", "trainer", "trainer, the best model"] * 5 + ["finetune by the shell"]


def kill_once(run, seconds, chance):
    """Start a training and kill it; False if it has come to its end before."""
    amid = chance.random() < 0.5 and not getattr(run, "shell", False)
    call = chance.choice(CALLS)
    number = chance.randint(1, OFTEN[call] // chance.choice([1, 3]))  # a training that goes on makes fewer
    instant = call, number, chance.choice(MOMENTS[call])
    process = run.start(instant if amid else None)
    process.join(120.0 if amid else chance.uniform(0.0, seconds))
    if process.exitcode is None:
        process.kill()
        process.join(30.0)
    if process.exitcode in (0, -9):
        return process.exitcode == -9
    raise AssertionError(f"exit code {process.exitcode}: {(run.folder / 'log').read_text()[-2000:]}")


def fault_of(run, expected, seconds, most, chance):
    """Kill a training several times and let it end: the number of kills, and what was wrong."""
    kills = 0
    try:
        while kills < most and kill_once(run, seconds, chance):
            kills += 1
        assert_same(deaths.whole(run)[0], expected)
    except Exception as error:
        return kills, f"{type(error).__name__}: {error}"
    return kills, ""


def main():
    """Play until there were as many kills as asked for."""
    parser = argparse.ArgumentParser(description="kill trainings and compare what they come to")
    parser.add_argument("--kills", type=int, default=100, help="how many")
    parser.add_argument("--seed", type=int, default=0, help="seed of the instants")
    given = parser.parse_args()
    multiprocessing.get_context("forkserver").set_forkserver_preload(deaths.PRELOADED)
    chance, kills, faults, straight, begin = random.Random(given.seed), 0, 0, {}, time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        deaths.fork(len, Path(folder) / "log", "").join()  # the imports belong to no training's time
        for number, kind in enumerate(itertools.cycle(TURNS)):
            if kills >= given.kills:
                break
            if kind not in straight:
                straight[kind] = deaths.whole(_at(KINDS[kind], folder, f"straight {kind}"))
            run, most = _at(KINDS[kind], folder, str(number)), min(given.kills - kills, chance.randint(1, 4))
            more, fault = fault_of(run, *straight[kind], most, chance)
            kills, faults = kills + more, faults + bool(fault)
            if fault:
                print(f"training {number} ({kind}), after {more} kills: {fault}", flush=True)
    print(f"{kills} kills, {faults} faults ({time.monotonic() - begin:.0f} s)")
    return 1 if faults else 0


def _at(kind, folder, name):
    path = Path(folder) / name
    path.mkdir()
    return kind(path)


if __name__ == "__main__":
    sys.exit(main())
