"""Ahead-of-time compilation for three generations of GPUs: wide accesses, no spills. Needs no GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
SCRIPT = Path(__file__).with_name("compile_kernels.py")
ARCHITECTURES = [80, 90, 100]
# 8 elements a thread: two 16-byte accesses to a float32 buffer, one to a bfloat16 tensor. The branch of
# whole chunks alone is counted: the other one is masked and goes element by element.
LOADS = {"survey": "pgv", "trial": "gvw", "advance": "gv"}
STORES = {"survey": "w", "trial": "p", "advance": "v"}


@pytest.fixture(scope="module", params=ARCHITECTURES, ids="sm_{}".format)
def compiled(request):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, SCRIPT, str(request.param)], capture_output=True, text=True, check=False, env=env
    )
    assert not done.returncode, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def accesses(buffers, case, *, has_m, masters):
    """16-byte accesses of one thread to these buffers, the first moment and the masters of low precision added."""
    wanted = buffers + ("m" if has_m else "") + (masters if case["dtype"] != "fp32" else "")
    kept = [b for b in wanted if b != "v" or case["adam"]]
    dtypes = {"p": case["dtype"], "g": case["gradient"]}
    return sum(1 if dtypes.get(b, "fp32") != "fp32" else 2 for b in kept)


def test_whole_chunks_are_read_and_written_16_bytes_at_a_time(compiled):
    chunk_kernels = [k for k in compiled if k.get("aligned")]
    assert len(chunk_kernels) == 5 * 4 * 3
    for k in chunk_kernels:
        updates = k["kernel"] == "advance"
        if updates and not (k["adam"] or k["has_m"] or k["dtype"] != "fp32"):
            assert k["ld"] == k["st"] == 0, "plain SGD has no moments"
            continue
        masters = {"survey": "w", "trial": "", "advance": "w"}[k["kernel"]]
        assert k["ld"] == accesses(LOADS[k["kernel"]], k, has_m=k["has_m"], masters=masters), k
        masters = "w" if updates else ""
        assert k["st"] == accesses(STORES[k["kernel"]], k, has_m=k["has_m"] and updates, masters=masters), k


def test_nothing_spills(compiled):
    assert len(compiled) == 7 * 4 * 3 + 12 + 7 + 2 + 1  # by chunk, scalar, and three with variants
    for k in compiled:
        assert k["stack"] == k["local"] == 0, k
        assert not k["local_access"], k


def test_registers_leave_room_for_two_programs_on_a_multiprocessor_at_least(compiled):
    assert all(k["reg"] * 8 * 32 * 2 <= 65536 for k in compiled if "dtype" in k)
