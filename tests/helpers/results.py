"""Stored results as the benchmarks write them, made up."""

import json
import os
from pathlib import Path

NAN = float("nan")
STAMP = {"device": "a cpu", "torch": "2.13.0", "commit": "abc1234", "dirty": False}
ROOT = Path(__file__).parents[2]
BENCH = ROOT / "bench"


def timing(name, seconds=1.0, quartiles=(0.9, 1.1), test="step", **info):
    stats = {"median": seconds, "q1": quartiles[0], "q3": quartiles[1]}
    info = STAMP | {"gates": "passed"} | info
    return {"fullname": f"bench/bench_step.py::test_{test}[{name}]", "stats": stats, "extra_info": info}


def ratio(name, median, low, high, **info):
    return timing(name, **{"speedup": median, "spread": [low, high], "against": "eager"} | info)


def kernel(of_roof, low, high):
    kernels = {"survey": {"gbs": 1.0, "of_roof": 0.5, "spread": [0.5, 0.5]}}
    kernels["trial"] = {"gbs": 50.0, "of_roof": of_roof, "spread": [low, high]}
    return timing("bert", test="bandwidth", kernels=kernels)


def run(method, seed=0, loss=1.0, **more):
    return {
        "task": "news", "regime": "full", "method": method, "options": {}, "seed": seed, "steps": 3, "loss": loss,
        "accuracy": 0.5, "losses": [2.0, 1.5, loss], "seconds": [1.0, 2.0, 3.0], "forwards": [3, 6, 9],
    } | STAMP | more  # fmt: skip


def shortened(method, seed=0, losses=(2.0, NAN), **more):
    """A run that diverged at its last loss."""
    spent = range(1, len(losses) + 1)
    more = {"losses": list(losses), "seconds": list(spent), "forwards": [3 * n for n in spent]} | more
    return run(method, seed, NAN, **more)


def rows(page):
    """Cells of all table rows by their first cell."""
    cells = [[c.strip() for c in line.strip("| ").split("|")] for line in page.splitlines() if line.startswith("|")]
    return {row[0]: row[1:] for row in cells}


def outside():
    """The environment without the signs of a pytest-xdist worker, in which benchmarks are disabled."""
    return {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}


def light(**more):
    """A figure of a first light."""
    return {"name": "sweep, while", "unit": "ms", "batch": 8, "predicted": 13.4, "took_s": 1.0} | more


def stored_light(tmp_path, *figures):
    path = tmp_path / "first_light.json"
    path.write_text(json.dumps({"stamp": STAMP, "figures": figures}))
    return path
