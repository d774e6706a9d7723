"""What a number needs to be believed: device, versions, commit."""

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import fastals

PACKAGES = ("torch", "triton", "transformers", "fastals", "prodigyopt", "schedulefree", "SaLSa-Optimizer")
STAMP = ("device", "driver", "threads", "cores", "python", *PACKAGES, "commit", "dirty")


def stamp() -> dict[str, Any]:
    """Stamp of a result made by the fastals that is imported; files below ``bench/results`` do not make it dirty."""
    git = ("git", "-C", str(Path(fastals.__file__).parent))
    commit = _output(*git, "rev-parse", "--short", "HEAD")
    changed = _output(*git, "status", "--porcelain", "--", ":/", ":!/bench/results")
    return {
        "device": _device(),
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{name: found for name in PACKAGES if (found := _version(name))},
        "commit": commit or "unknown",
        "dirty": bool(changed) if commit else "unknown",
    }


def _device() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except FileNotFoundError:
        return ""
