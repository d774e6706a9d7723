"""Seeds, poisoned memory, visible skips, and files of results, for all tests."""

import json
import os
import random
import sys
from collections import defaultdict
from importlib.util import find_spec

import pytest
import torch
from helpers import interpreter

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported: its kernels run on the CPU, slowly


def pytest_addoption(parser):
    parser.addoption("--only", choices=["quick", "slow"], help="leave out what is marked as slow, or all else")


def pytest_configure(config):
    torch.set_num_threads(1)  # the models are tiny: a second thread only waits
    config.addinivalue_line("markers", "gpu: needs a CUDA device")
    config.addinivalue_line("markers", "slow(keep=0): too slow for every day, but for so many of its parameter sets")
    config.addinivalue_line("markers", "proves(claim): a test of a claim that benchmark cases name")


def pytest_collection_modifyitems(config, items):
    for item in items:
        item.user_properties += [("proves", mark.kwargs["claim"]) for mark in item.iter_markers("proves")]
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device; none is here"))
    if only := config.getoption("--only"):
        slow = set(slow_ones(items))
        config.hook.pytest_deselected(items=[item for item in items if (item in slow) == (only == "quick")])
        items[:] = [item for item in items if (item in slow) == (only == "slow")]


def slow_ones(items):
    """The tests that are too slow for every day; of each function the same parameter sets stay, drawn at random."""
    sets = defaultdict(list)
    for item in items:
        if "slow" in item.keywords:
            sets[item.nodeid.partition("[")[0]].append(item)
    for name, members in sets.items():
        kept = members[0].get_closest_marker("slow").kwargs.get("keep", 0)
        chosen = random.Random(name).sample(members, min(kept, len(members)))
        yield from (item for item in members if item not in chosen)


@pytest.fixture(autouse=True)
def fast_interpreter():
    """The same results as by Triton's own interpreter, which test_interpreter.py compares, in less time."""
    if torch.cuda.is_available() or not find_spec("triton"):
        yield
        return
    with interpreter.faster():
        yield


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def nothing_compiled():
    """Every test begins as in a process that has compiled nothing, which steps would check again."""
    counters = getattr(sys.modules.get("torch._dynamo.utils"), "counters", None)
    if counters:
        torch._dynamo.reset()
        counters.clear()


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """Unwritten memory reads as NaN, so that a result that depends on it fails."""
    plain_empty, plain_like = torch.empty, torch.empty_like

    def poison(tensor):
        if not tensor.is_floating_point() or tensor.device.type == "meta":
            return tensor
        with torch.no_grad():  # torch 2.11 checkpoints with an empty leaf that requires a gradient
            return tensor.fill_(float("nan"))

    monkeypatch.setattr(torch, "empty", lambda *a, **k: poison(plain_empty(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: poison(plain_like(*a, **k)))


@pytest.fixture
def store(tmp_path):
    """A function that writes stored results into a file, whose kind its name tells."""

    def write(name, records):
        path = tmp_path / name
        lines = "".join(json.dumps(r) + "\n" for r in records)
        path.write_text(lines if name.endswith("l") else json.dumps({"benchmarks": records}))
        return str(path)

    return write
