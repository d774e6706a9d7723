"""Quick and full profile, the exactness gate, timing in turn, and the stamp on every result."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from turns import Turns

from fastals.stamp import STAMP, stamp

ROOT = Path(__file__).parents[1]
ROUNDS = 5  # of every ratio: ranges of so many lie apart by chance in 1 of 126 comparisons
PASSED: set[str] = set()


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="all benchmark cases, not only the quick profile")
    parser.addoption("--gates-passed", action="store_true", help="the exactness tests have just passed on this machine")


def pytest_configure(config):
    config.addinivalue_line("markers", "full: belongs to the full profile only")
    config.addinivalue_line("markers", "gpu: needs a CUDA device")
    config.addinivalue_line("markers", "exact(node): the tests that must pass before the case is timed")
    config.addinivalue_line("markers", "exact_on_gpu(node): such tests where the case runs on a GPU")
    config.addinivalue_line("filterwarnings", "ignore:Not saving anything, no benchmarks have been run")


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


@pytest.fixture(scope="session")
def made():
    """The stamp of this session."""
    return stamp()


@pytest.fixture(autouse=True)
def stamped(request, made):
    """Write what a number needs to be believed into the benchmark's extra_info."""
    if "benchmark" in request.fixturenames:
        request.getfixturevalue("benchmark").extra_info.update(made)


@pytest.fixture(scope="session")
def verdicts():
    """Outcomes of the exactness tests of this session, by node."""
    return {}


@pytest.fixture(autouse=True)
def gate(request, verdicts):
    """Fail a case whose exactness tests fail, or of which none has run, untimed."""
    marks = [*request.node.iter_markers("exact")]
    if torch.cuda.is_available():
        marks += request.node.iter_markers("exact_on_gpu")
    nodes, passed_before = [mark.args[0] for mark in marks], request.config.getoption("--gates-passed")
    if "benchmark" in request.fixturenames:
        request.getfixturevalue("benchmark").extra_info["gates"] = "said to have passed" if passed_before else nodes
    for node in [] if passed_before else nodes:
        if node not in verdicts:
            command = [sys.executable, "-P", "-m", "pytest", "-q", "--no-header", node]
            verdicts[node] = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if verdicts[node].returncode or " passed" not in verdicts[node].stdout:
            pytest.fail(f"not timed, {node} does not pass:\n{verdicts[node].stdout[-2000:]}", pytrace=False)


@pytest.fixture
def in_turn(benchmark, device):
    """Time a reference and a candidate in turn; pytest-benchmark has the candidate's times, extra_info the ratio."""

    def run(reference, candidate, shape, against, *, batches=None, host=False):
        turns = Turns((reference, candidate), batches or shape.batches(device), ROUNDS, device, host=host)
        turns.warm_up()
        left = iter(range(turns.first, turns.first + ROUNDS))

        def reference_first():
            k = next(left)
            turns.step(0, k)
            return (1, k), {}

        benchmark.pedantic(turns.step, setup=reference_first, teardown=lambda *_: turns.count(), rounds=ROUNDS)
        benchmark.extra_info.update(against=against, **shape.conditions(), **turns.result())

    return run


def pytest_runtest_logreport(report):
    """Note the cases that have passed."""
    if report.when == "call" and report.passed:
        PASSED.add(report.nodeid)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_sessionfinish(session):
    """Store no number of a case that has failed or was interrupted."""
    benchmarks = getattr(session.config, "_benchmarksession", None)
    if benchmarks is not None:
        benchmarks.benchmarks = [b for b in benchmarks.benchmarks if b.fullname in PASSED]
    return (yield)


def pytest_terminal_summary(terminalreporter):
    """Print the ratios under pytest-benchmark's table of times."""
    session = getattr(terminalreporter.config, "_benchmarksession", None)
    for bench in session.benchmarks if session else []:
        info = {k: v for k, v in bench.extra_info.items() if k not in STAMP}
        terminalreporter.write_line(f"{bench.name}: " + ", ".join(f"{k} {v}" for k, v in info.items()))
