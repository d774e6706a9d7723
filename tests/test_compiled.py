"""Ahead-of-time compilation for three generations of GPUs: wide accesses, no spills. Needs no GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from floor import moved_bytes

pytest.importorskip("triton")
SCRIPT = Path(__file__).with_name("compile_kernels.py")
ARCHITECTURES = [80, 90, 100]
# 8 elements a thread: two 16-byte accesses to a float32 buffer, one to a bfloat16 tensor. The branch of
# whole chunks alone is counted: the other one is masked and goes element by element.
LOADS = {"survey": "pgv", "survey_move": "pgv", "trial": "gvw", "restore": "gvw", "advance": "gv"}
STORES = {"survey": "w", "survey_move": "wp", "trial": "p", "restore": "p", "advance": "v"}


@pytest.fixture(scope="module", params=ARCHITECTURES, ids="sm_{}".format)
def compiled(request):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, SCRIPT, str(request.param), "kernels"], capture_output=True, text=True, check=False, env=env
    )
    assert not done.returncode, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def accesses(buffers, case, *, has_m, masters):
    """16-byte accesses of one thread to these buffers, the first moment and the masters of low precision added."""
    wanted = buffers + ("m" if has_m else "") + (masters if case["dtype"] != "fp32" else "")
    kept = [b for b in wanted if b != "v" or case["adam"]]
    halves = case["kernel"].startswith("survey") and case["has_m"] and (case["adam"] or case["dtype"] != "fp32")
    low, full = (0, 1) if halves else (1, 2)  # halves: 8 bytes of a bfloat16 tensor at a time
    dtypes = {"p": case["dtype"], "g": case["gradient"]}
    return sum(low if dtypes.get(b, "fp32") != "fp32" else full for b in kept)


@pytest.mark.slow(keep=1)
def test_whole_chunks_are_read_and_written_16_bytes_at_a_time(compiled):
    chunk_kernels = [k for k in compiled if k.get("aligned")]
    assert len(chunk_kernels) == 5 * 4 * 5
    for k in chunk_kernels:
        updates, surveys = k["kernel"] == "advance", k["kernel"].startswith("survey")
        if updates and not (k["adam"] or k["has_m"] or k["dtype"] != "fp32"):
            assert k["ld"] == k["st"] == 0, "plain SGD has no moments"
            continue
        masters = "w" if updates or surveys else ""
        assert k["ld"] == accesses(LOADS[k["kernel"]], k, has_m=k["has_m"], masters=masters), k
        masters = "w" if updates else ""
        assert k["st"] == accesses(STORES[k["kernel"]], k, has_m=k["has_m"] and updates, masters=masters), k


def test_nothing_spills(compiled):
    assert len(compiled) == 7 * 4 * 5 + 9 + 6 + 2 + 3 + 2 + 2  # by chunk, one each, and five with variants
    for k in compiled:
        assert k["stack"] == k["local"] == 0, k
        assert not k["local_access"], k


def test_programs_that_a_multiprocessor_holds(request, compiled):
    """Four on sm_90, for which the kernels are laid out, and three elsewhere."""
    least = 4 if "sm_90" in request.node.name else 3
    assert all(k["programs_per_multiprocessor"] >= least for k in compiled if "dtype" in k)
    assert all(k["programs_per_multiprocessor"] >= 4 for k in compiled if k["kernel"].startswith("survey"))


def test_bytes_are_those_of_the_benchmarks(compiled):
    for k in compiled:
        sizes = {{"fp32": 4}.get(k[name], 2) for name in ("dtype", "gradient") if name in k}
        if len(sizes) == 1 and k["adam"]:
            assert k["bytes_per_weight"] == moved_bytes(k["kernel"], sizes.pop(), averages=k["has_m"]), k
    found = {(k["kernel"], k["dtype"]): k["bytes_per_weight"] for k in compiled if k.get("adam") and not k["has_m"]
             and k["dtype"] == k["gradient"]}  # fmt: skip
    assert [found["survey_move", t] for t in ("fp32", "bf16")] == [20, 14]
    assert [found["advance", t] for t in ("fp32", "bf16")] == [12, 18]
