"""The first half minute on a GPU: versions, a fused step, and the kernel that sets the condition of a graph's loop."""

import importlib.metadata
import subprocess

import torch
from stamp import stamp

import fastals
from fastals import kernels
from fastals.graphs import cuda


def main() -> None:
    """Print the versions, then run a fused step and the condition kernel."""
    print(*stamp().items(), sep="\n")
    for name in ("pytest", "pytest-benchmark", "hypothesis", "numpy", "cuda-bindings", "peft", "accelerate"):
        try:
            print(name, importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            print(name, "is missing")
    if not torch.cuda.is_available():
        print("no CUDA device: no launch")
        return
    print(subprocess.run(["nvidia-smi"], capture_output=True, text=True, check=False).stdout)
    weight = torch.nn.Parameter(torch.ones(5000, device="cuda"))
    print("fused:", kernels.why_not_fused([weight]) or "yes")
    optimizer = fastals.ALS([{"name": "all", "params": [weight]}], fused=True)
    optimizer.step(lambda: weight.square().sum())
    print(optimizer.report)
    assert optimizer.report.loss_after < optimizer.report.loss_before
    print("condition kernel:", cuda.set_condition(torch.device("cuda", 0)))
    print("a fused step and the condition kernel work")


if __name__ == "__main__":
    main()
