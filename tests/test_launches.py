"""Triton's own binding and compilation of every launch in real steps, without a GPU: a stand-in driver runs nothing."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
FOLDER = Path(__file__).parent
LOW = {"torch.float32": "fp32", "torch.bfloat16": "bf16"}


@pytest.fixture(scope="module")
def known():
    """Types and kernels that are compiled ahead of time."""
    spec = importlib.util.spec_from_file_location("compile_kernels", FOLDER / "compile_kernels.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def lines():
    """What the steps print: a line for each, then one for each of its launches."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(FOLDER)}
    command = [sys.executable, "-P", "-W", "ignore::DeprecationWarning", FOLDER / "launch_kernels.py", "90"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    assert not done.returncode, done.stderr[-2000:]
    return list(map(json.loads, done.stdout.splitlines()))


@pytest.fixture(scope="module")
def launched(lines):
    """By launch: what the kernel was bound to, the dtype of the model, and the number of the step."""
    launches, step = [], {}
    for line in lines:
        if "kernel" in line:
            launches.append(line | step)
        else:
            step = line
    return launches


def test_kernels_are_launched_with_the_types_that_they_are_compiled_for_ahead_of_time(known, launched):
    types = known.SCALARS | known.TABLES | known.FLAT
    for launch in launched:
        tensor = f"*{LOW[launch['dtype']]}"
        wanted = types | {"p_base": tensor, "g_base": tensor, "loss": tensor}
        for name, kind in launch["signature"].items():
            assert kind == wanted.get(name, "constexpr"), (launch["kernel"], name)
        assert launch["fusion"] is True
        assert all(1 <= n <= limit for n, limit in zip(launch["grid"], (2**31 - 1, 65535, 65535), strict=True))


def test_every_kernel_is_launched(known, launched):
    everything = {
        name for m in (known.armijo, known.all_units, known.relay, known.moments, known.trial) for name in vars(m)
    }
    assert {launch["kernel"] for launch in launched} == {name for name in everything if name.endswith("_kernel")}


def test_no_number_that_changes_from_launch_to_launch_is_compiled_in(launched):
    for launch in launched:
        scalars = {n for n, kind in launch["signature"].items() if kind != "constexpr" and not kind.startswith("*")}
        assert not scalars & set(launch["aligned"]), launch


def test_nothing_is_compiled_after_the_second_step(launched):
    """The warm-up of a captured step has three: a kernel that is loaded within a capture may wait for the device."""
    first = {}
    for launch in launched:
        variant = json.dumps([launch[k] for k in ("kernel", "signature", "constants", "aligned", "warps")])
        first.setdefault(variant, launch["step"])
    assert max(first.values()) <= 1
    assert launched[-1]["compiled"] == len(first)


def test_launches_of_a_step(known, lines):
    """One a phase, however many parameters there are; a unit that is searched alone is measured before."""
    steps = {(s["schedule"], s["step"]): s["of"] for s in known.launches(lines) if s["dtype"] == "torch.float32"}
    measured = dict.fromkeys(("constants", "survey", "reduce", "add_parts"), 1)
    phases = ("begin", "recall", "aim", "open_together", "judge_together", "advance", "remember")
    moved = dict.fromkeys(phases, 1)
    assert steps["relay", 1] == moved | measured | {"trial": 2}
    alone = {"open": 1, "judge": 1, "put_back": 1}
    assert steps["relay", 2] == moved | dict.fromkeys(measured, 2) | alone | {"trial": 4}
