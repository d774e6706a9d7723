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


def accesses(buffers, dtype, first, low, *, masters):
    """16-byte accesses of one thread to these buffers, the first moment and the masters of low precision added."""
    wanted = buffers + ("m" if first else "") + (masters if low else "")
    return sum(1 if dtype == "bf16" and b in "pg" else 2 for b in wanted)


def test_whole_chunks_are_read_and_written_16_bytes_at_a_time(compiled):
    chunk_kernels = [k for k in compiled if "dtype" in k]
    assert len(chunk_kernels) == 12
    for k in chunk_kernels:
        low, updates = k["dtype"] == "bf16", k["kernel"] == "advance"
        masters = {"survey": "w", "trial": "", "advance": "w"}[k["kernel"]]
        assert k["ld"] == accesses(LOADS[k["kernel"]], k["dtype"], k["first"], low, masters=masters), k
        stored = accesses(STORES[k["kernel"]], k["dtype"], k["first"] and updates, low, masters="w" if updates else "")
        assert k["st"] == stored, k


def test_nothing_spills(compiled):
    assert len(compiled) == 23
    for k in compiled:
        assert k["stack"] == k["local"] == 0, k
        assert not k["local_access"], k


def test_registers_leave_room_for_two_programs_on_a_multiprocessor_at_least(compiled):
    assert all(k["reg"] * 8 * 32 * 2 <= 65536 for k in compiled if "dtype" in k)
