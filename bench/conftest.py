"""Quick and full profile, the exactness gate, timing in turn, and the stamp on every result."""

import math
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fastals.stamp import STAMP, stamp

ROOT = Path(__file__).parents[1]


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="all benchmark cases, not only the quick profile")


def pytest_configure(config):
    config.addinivalue_line("markers", "full: belongs to the full profile only")
    config.addinivalue_line("markers", "gpu: needs a CUDA device")
    config.addinivalue_line("markers", "exact(node): the tests that must pass before the case is timed")


def pytest_collection_modifyitems(config, items):
    for item in items:
        if "full" in item.keywords and not config.getoption("--full"):
            item.add_marker(pytest.mark.skip(reason="not in the quick profile; run with --full"))
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device; none is here"))


def pytest_benchmark_update_machine_info(config, machine_info):
    """Keep host name and kernel out of results that are published; what a number needs is in its stamp."""
    for key in ("node", "release"):
        machine_info.pop(key, None)
    machine_info["cpu"] = {k: v for k, v in machine_info["cpu"].items() if k in ("brand_raw", "count", "arch")}


@pytest.fixture
def device():
    """Where the models are timed."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def stamped(request):
    """Write what a number needs to be believed into the benchmark's extra_info."""
    if "benchmark" in request.fixturenames:
        request.getfixturevalue("benchmark").extra_info.update(stamp(ROOT))


@pytest.fixture(scope="session")
def verdicts():
    """Outcomes of the exactness tests of this session, by node."""
    return {}


@pytest.fixture(autouse=True)
def gate(request, verdicts):
    """Fail a case whose exactness tests fail, untimed."""
    for mark in request.node.iter_markers("exact"):
        node = mark.args[0]
        if node not in verdicts:
            command = [sys.executable, "-P", "-m", "pytest", "-q", "--no-header", node]
            verdicts[node] = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if verdicts[node].returncode:
            pytest.fail(f"not timed, {node} does not pass:\n{verdicts[node].stdout[-2000:]}", pytrace=False)


@pytest.fixture
def in_turn(benchmark, device):
    """Time two rivals A B A B on the same batches under the same masks; the ratio goes into extra_info.

    ``limit`` is the ratio of their forward passes; ``check`` is called after every pair.
    """

    def run(reference, candidate, batches, against, rounds=5, check=lambda: None):
        pair, seconds = (reference, candidate), ([], [])
        first = max(rival.first_steps for rival in pair)  # out of the clock: allocation, verification, capture
        batches = [next(batches) for _ in range(first + rounds)]

        def timed(i, k):
            torch.manual_seed(2)
            seconds[i].append(_seconds(pair[i], batches[k], device))

        for k in range(first):
            timed(0, k)
            timed(1, k)
        work = [rival.forwards for rival in pair]
        left = iter(range(first, first + rounds))

        def other():
            check()
            k = next(left)
            timed(0, k)
            return (1, k), {}

        benchmark.pedantic(timed, setup=other, rounds=rounds)
        check()
        work = [rival.forwards - before for rival, before in zip(pair, work, strict=True)]
        ratios = [a / b for a, b in zip(seconds[0][first:], seconds[1][first:], strict=True)]
        benchmark.extra_info.update(
            against=against, speedup=round(statistics.median(ratios), 3),
            spread=[round(min(ratios), 3), round(max(ratios), 3)],
        )  # fmt: skip
        if all(map(math.isfinite, work)):  # a captured step does not say how many it made
            benchmark.extra_info["limit"] = round(work[0] / work[1], 3)

    return run


def _seconds(rival, batch, device):
    if device == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    rival.step(batch)
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def pytest_terminal_summary(terminalreporter):
    """Print the ratios under pytest-benchmark's table of times."""
    session = getattr(terminalreporter.config, "_benchmarksession", None)
    for bench in session.benchmarks if session else []:
        info = {k: v for k, v in bench.extra_info.items() if k not in STAMP}
        terminalreporter.write_line(f"{bench.name}: " + ", ".join(f"{k} {v}" for k, v in info.items()))
