"""Peak memory of a rival's first two steps, in MiB: allocated bytes on a GPU, resident set of a new process on a CPU.

python bench/memory.py minilm als '{"trust": 0.001}'
"""

import gc
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from rivals import RIVALS
from shapes import SHAPES


def peak_mib(shape: str, kind: str, options: dict[str, Any], device: str) -> int:
    """Peak, less the memory in use before the model was built."""
    if device == "cuda":
        return _allocated(shape, kind, options)
    command = [sys.executable, __file__, shape, kind, json.dumps(options)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout.splitlines()[-1])


def _allocated(shape: str, kind: str, options: dict[str, Any]) -> int:
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    _two_steps(shape, kind, options, "cuda")
    return (torch.cuda.max_memory_allocated() - held) // 2**20


def _two_steps(shape: str, kind: str, options: dict[str, Any], device: str) -> None:
    rival, batches = RIVALS[kind](SHAPES[shape].model(device), **options), SHAPES[shape].batches(device)
    for _ in range(2):
        rival.step(next(batches))


def _resident(field: str) -> int:
    """Resident memory in MiB: ``VmRSS`` now, ``VmHWM`` at the peak (ru_maxrss would start at the parent's size)."""
    return int(Path("/proc/self/status").read_text().split(f"{field}:")[1].split()[0]) // 1024


if __name__ == "__main__":
    imports = _resident("VmRSS")
    _two_steps(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), "cpu")
    print(_resident("VmHWM") - imports)
