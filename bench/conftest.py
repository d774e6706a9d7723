"""Quick and full profile, the exactness gates, timing in turn, and the stamp on every result."""

import subprocess
import sys
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from stamp import STAMP, stamp
from turns import Turns

ROOT = Path(__file__).parents[1]
ROUNDS = 5  # of every ratio: ranges of so many lie apart by chance in 1 of 126 comparisons
PASSED: set[str] = set()
GATE_SECONDS = 120  # that the tests of one claim may take
GATES: dict[str, str] = {}  # the outcome of each claim: "passed", "failed", "timed out" or "not run"
BAD = {"failed": "", "timed out": " timed out"}  # what follows the name of a claim


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="all benchmark cases, not only the quick profile")
    parser.addoption(
        "--gates",
        default="run",
        metavar="run|not-run|FILE,FILE",
        help="run the exactness tests, or not, or read what a run of them has written with --junit-xml",
    )


def pytest_configure(config):
    config.addinivalue_line("markers", "full: belongs to the full profile only")
    config.addinivalue_line("markers", "gpu: needs a CUDA device")
    config.addinivalue_line("markers", "exact(claim): tests that prove it show the answers of the case to be exact")
    config.addinivalue_line("markers", "exact_on_gpu(claim): the same, if the case runs on a GPU")
    config.addinivalue_line("filterwarnings", "ignore:Not saving anything, no benchmarks have been run")


def pytest_collection_modifyitems(config, items):
    for item in items:
        if "full" in item.keywords and not config.getoption("--full"):
            item.add_marker(pytest.mark.skip(reason="not in the quick profile; run with --full"))
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device; none is here"))


def pytest_benchmark_update_machine_info(config, machine_info):
    """Keep host name and kernel out of published results; the stamp has the conditions that matter."""
    for key in ("node", "release"):
        machine_info.pop(key, None)
    machine_info["cpu"] = {k: v for k, v in machine_info["cpu"].items() if k in ("brand_raw", "count", "arch")}


@pytest.fixture
def device():
    """Device that the models are timed on."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="session")
def conditions():
    """The stamp of this session."""
    return stamp()


@pytest.fixture(autouse=True)
def stamped(request, conditions):
    """Write the stamp into the benchmark's extra_info."""
    if "benchmark" in request.fixturenames:
        request.getfixturevalue("benchmark").extra_info.update(conditions)


@pytest.fixture(autouse=True)
def gate(request):
    """Stamp the case with the outcome of its exactness tests; it is timed all the same."""
    if "benchmark" not in request.fixturenames:
        return
    marks = [*request.node.iter_markers("exact")]
    if torch.cuda.is_available():
        marks += request.node.iter_markers("exact_on_gpu")
    claims = [mark.args[0] for mark in marks]
    for claim in claims:
        if claim not in GATES:
            GATES[claim] = verdict(claim, request.config.getoption("--gates"))
    gates = "passed" if claims and all(GATES[claim] == "passed" for claim in claims) else "not run"
    if failed := failures(claims):
        gates = "failed " + ", ".join(failed)
    request.getfixturevalue("benchmark").extra_info["gates"] = gates


def verdict(claim: str, gates: str) -> str:
    """The outcome of the tests that prove a claim; ``gates`` is the option."""
    if gates == "run":
        return run_tests(claim)
    if gates == "not-run":
        return "not run"
    outcomes = {outcome for proved, outcome in read_outcomes(gates) if proved in (claim, None)}
    named = {"failed": "failed", "passed": "passed", "not collected": "failed"}
    return next((text for outcome, text in named.items() if outcome in outcomes), "not run")


def run_tests(claim: str) -> str:
    """The outcome of the tests that prove a claim, in a process of their own."""
    select = ["tests", "-m", f"proves(claim={claim!r})"]
    command = [sys.executable, "-P", "-m", "pytest", "-q", "--no-header", *select]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=GATE_SECONDS)
    except subprocess.TimeoutExpired:
        return "timed out"
    if done.returncode == pytest.ExitCode.NO_TESTS_COLLECTED:
        raise LookupError(f"no test proves {claim!r}")
    if done.returncode == pytest.ExitCode.OK and " passed" in done.stdout:
        return "passed"
    print(done.stdout[-2000:], done.stderr[-2000:])
    return "not run" if done.returncode in (pytest.ExitCode.OK, pytest.ExitCode.USAGE_ERROR) else "failed"


@cache
def read_outcomes(files: str) -> list[tuple[str | None, str]]:
    """Claims in JUnit files, each with the outcome of one test that proves it.

    A test file that could not be collected names no claim: it has None, since any claim may be proved in it. No test
    counts as run if its JUnit file cannot be read. A file of an interrupted run has a case without a name; it does not
    tell which tests were still to come, so none in it counts as passed.
    """
    outcomes: list[tuple[str | None, str]] = []
    for file in files.split(","):
        try:
            cases = list(ElementTree.parse(file).iter("testcase"))
        except (OSError, ElementTree.ParseError):
            continue
        interrupted = any(not case.get("name") for case in cases)
        for case in cases:
            outcome = outcome_of(case)
            if outcome == "not collected":
                outcomes.append((None, outcome))
            elif outcome == "failed" or (outcome == "passed" and not interrupted):
                claims = case.iterfind("properties/property[@name='proves']")
                outcomes += [(claim.get("value"), outcome) for claim in claims]
    return outcomes


def outcome_of(case: ElementTree.Element) -> str:
    """Of one case of a JUnit file: "passed", "failed", "skipped" or "not collected"."""
    tags = {child.tag for child in case}
    if any(error.get("message") == "collection failure" for error in case.iterfind("error")):
        return "not collected"
    return "failed" if tags & {"failure", "error"} else "skipped" if "skipped" in tags else "passed"


def failures(claims: Iterable[str]) -> list[str]:
    """The claims of which tests have failed."""
    return [claim + BAD[GATES[claim]] for claim in claims if GATES[claim] in BAD]


@pytest.fixture
def in_turn(benchmark, device):
    """Time a reference and a candidate in turn: pytest-benchmark gets the candidate's times, extra_info the ratio."""

    def run(reference, candidate, shape, against, *, batches=None, host=False):
        turns = Turns((reference, candidate), batches or shape.batches(device), ROUNDS, device, host=host)
        turns.warm_up()
        left = iter(range(turns.first, turns.first + ROUNDS))

        def reference_first():
            k = next(left)
            if k > turns.first:
                turns.count()  # the round before
            turns.step(0, k)
            return (1, k), {}

        benchmark.pedantic(turns.step, setup=reference_first, rounds=ROUNDS)
        turns.count()
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
    """Print the ratios under pytest-benchmark's table of times, and which exactness tests have failed."""
    session = getattr(terminalreporter.config, "_benchmarksession", None)
    for bench in session.benchmarks if session else []:
        info = {k: v for k, v in bench.extra_info.items() if k not in STAMP}
        terminalreporter.write_line(f"{bench.name}: " + ", ".join(f"{k} {v}" for k, v in info.items()))
    if failed := failures(GATES):
        terminalreporter.write_line(f"gates failed: {', '.join(failed)}")
    if not_run := [claim for claim, outcome in GATES.items() if outcome == "not run"]:
        terminalreporter.write_line(f"gates not run: {', '.join(not_run)}")
