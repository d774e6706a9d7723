"""Take steps with every kernel compiled for a GPU and launched into nothing: a JSON line per launch, without a GPU.

A stand-in driver takes the place of the real one behind Triton's own code, which binds, specializes and compiles. No
kernel computes anything, so every search ends at its first look.
"""

import json
import sys

import torch
from helpers.tiny import TinyTransformer, tiny_batches
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

import fastals
from fastals import kernels
from fastals.graphs.graphed import WARMUP
from fastals.kernels import all_units


class Launcher:
    """Prints what a kernel is launched with."""

    def __init__(self, src, metadata):
        self.src, self.metadata = src, metadata

    def __call__(self, x, y, z, stream, function, packed, launch, before, after, *arguments):
        signature = self.src.signature
        assert len(arguments) == len(signature)
        constants = {k: v for k, v in zip(signature, arguments, strict=True) if signature[k] == "constexpr"}
        for (name, kind), value in zip(signature.items(), arguments, strict=True):
            assert not kind.startswith("*") or isinstance(value, torch.Tensor), name
        print(json.dumps({
            "kernel": self.src.fn.__name__, "signature": signature, "constants": constants, "grid": [x, y, z],
            "aligned": [self.src.fn.arg_names[i] for (i,) in self.src.attrs],
            "warps": self.metadata.num_warps, "fusion": self.metadata.enable_fp_fusion, "compiled": Driver.loaded,
        }))  # fmt: skip


class Driver:
    """A GPU of the given capability that loads everything and runs nothing."""

    loaded = 0
    launcher_cls = Launcher

    def __init__(self, arch):
        self.target, self.utils = GPUTarget("cuda", arch, 32), self

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_device_properties(self, device):
        return {"max_shared_mem": 99 * 1024}

    def load_binary(self, name, binary, shared, device):
        assert binary[:4] == b"\x7fELF"
        Driver.loaded += 1
        return 1, 1, 0, 0, 1024

    def unload_module(self, module):
        """Nothing to do."""


def main(arch):
    """The warm-up of all schedules, in float32 and bfloat16."""
    driver.set_active(Driver(arch))
    kernels.why_not_fused = lambda params: ""
    for dtype in (torch.float32, torch.bfloat16):
        for schedule in ("relay", "sweep", "independent", "joint", "cycle"):
            momentum = {"independent": "after", "joint": "tested"}.get(schedule, "none")
            torch.manual_seed(0)
            model = TinyTransformer(depth=2).to(dtype)
            options = {"schedule": schedule, "momentum": momentum, "max_grad_norm": 1.0, "cache": False}
            opt = fastals.ALS(fastals.units(model), model=model, fused=True, **options)
            for number, batch in enumerate(tiny_batches(WARMUP)):
                print(json.dumps({"step": number, "schedule": schedule, "dtype": str(dtype)}))
                opt.step(lambda model=model, batch=batch: model(**batch))
                if not number:
                    all_units.restore(opt.engine.partition.arena)


if __name__ == "__main__":
    main(int(sys.argv[1]))
