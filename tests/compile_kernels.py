"""Compile every kernel ahead of time, without a GPU, and print what the compiler made of it: a JSON line each.

Then a line for each of the first steps of every schedule, with its launches: of the trials in it only the first of each
search is made.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from itertools import product
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastals.kernels import all_units, armijo, moments, relay, trial
from fastals.kernels.table import BLOCK, BY_CHUNK, LAUNCH, WARPS

TABLES = {"chunks": "*i32", "programs": "*i32", "places": "*i64", "constants": "*fp32", "grad_scale": "*fp32"}
FLAT = {"m": "*fp32", "v": "*fp32", "w": "*fp32"}
SCALARS = {
    "state": "*fp64", "memory": "*fp64", "rules": "*fp64", "sums": "*fp64", "history": "*fp64", "lead": "*i32",
    "rounding": "*fp64",
    "flags": "*i32", "step": "*i64", "loss": "*fp32", "counts": "*fp32", "layout": "*i64", "out": "*fp32",
    "partials": "*fp32", "parts": "*fp64", "spans": "*i32", "n_rows": "i32", "unit": "i32", "units": "i32", "n": "i32",
    "eps": "fp32", "again": "i32", "alone": "i32", "first_program": "i32", "first_unit": "i32",
}  # fmt: skip
CHUNK_KERNELS = {  # with what they are launched
    "survey": (moments.survey_kernel, moments.SURVEY),
    "survey_move": (moments.survey_kernel, moments.SURVEY),
    "trial": (trial.trial_kernel, BY_CHUNK),
    "advance": (moments.advance_kernel, BY_CHUNK),
}
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
MULTIPROCESSOR = {"registers": 65536, "threads": 2048, "programs": 32}
TENSORS = [  # dtypes of parameter and gradient, and whether they start at a multiple of 64 bytes
    ("fp32", "fp32", True), ("fp32", "bf16", True), ("bf16", "bf16", True), ("bf16", "fp32", True),
    ("fp16", "fp16", True), ("fp32", "fp32", False), ("bf16", "bf16", False),
]  # fmt: skip
CONSTANTS = {"UP": 16, "USUAL": 1, "COLUMNS": 8, "ROWS": 1024, "BLOCK": 128}
APART = ({"KEEP", "RELATIVE"}, {"ONCE", "REMEMBERED"})  # flags that are not set together
FLAGS = {
    "open_kernel": ("TESTED", "KEEP", "RELATIVE"),
    "recall_kernel": ("TESTED",),
    "aim_kernel": ("TESTED",),
    "open_together_kernel": ("REMEMBERED",),
    "judge_together_kernel": ("ONCE", "REMEMBERED"),
}


def build(kernel, types, constants, arch, options):
    """The compiled kernel; pointers are aligned to 16 bytes, as those of tensors are."""
    names = kernel.arg_names
    pointers = [i for i, n in enumerate(names) if types.get(n, "").startswith("*")]
    source = ASTSource(
        fn=kernel,
        signature={n: types.get(n, "constexpr") if n not in constants else "constexpr" for n in names},
        constexprs={(names.index(k),): v for k, v in constants.items() if k in names},
        attrs={(i,): [["tt.divisibility", 16]] for i in pointers},
    )
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def describe(compiled):
    """Registers, spills and the global accesses of 16 bytes."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    resources = {k.lower(): int(v) for k, v in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    ptx = compiled.asm["ptx"]
    wide = {op: len(re.findall(rf"{op}\.global(?:\.\w+)*\.v4\.b32", ptx)) for op in ("ld", "st")}
    return resources | wide | {"local_access": bool(re.search(r"\b(?:ld|st)\.local", ptx))}


def programs_per_multiprocessor(registers, warps):
    """How many programs a multiprocessor holds at once; registers are given out by the 8."""
    threads = 32 * warps
    of_registers = MULTIPROCESSOR["registers"] // (-(-registers // 8) * 8 * threads)
    return min(of_registers, MULTIPROCESSOR["threads"] // threads, MULTIPROCESSOR["programs"])


def bytes_per_weight(kernel, dtype, gradient, *, has_m, adam):
    """Bytes that the kernel must move in the common case: no parameter was written since the last step.

    A trial goes along the averaged direction if there is one.
    """
    p, g, v, m, low = BYTES[dtype], BYTES[gradient], 4 * adam, 4 * has_m, dtype != "fp32"
    survey = g + p + v + m + 4  # the snapshot is written, or the master read
    return {
        "survey": survey,
        "survey_move": survey + p,
        "trial": g + v + m + 4 + p,
        "restore": 4 + p,
        "advance": g * (adam or has_m or low) + 2 * v + 2 * m + 8 * low,
    }[kernel]


def chunk_kernels(arch):
    """A case per kernel that goes through chunks, pair of dtypes and direction; a restore is a trial without a step."""
    for (dtype, gradient, aligned), has_m, adam in product(TENSORS, (False, True), (True, False)):
        constants = {
            "ADAM": adam, "HAS_M": has_m, "LOW": dtype != "fp32", "ALIGNED": aligned, "THREADS": 32 * WARPS,
            "PIECE": moments.PIECE, "BLOCK": BLOCK,
        }  # fmt: skip
        types = SCALARS | TABLES | FLAT | {"p_base": f"*{dtype}", "g_base": f"*{gradient}"}
        for name, (kernel, options) in CHUNK_KERNELS.items():
            signature = {n: t for n, t in types.items() if n in kernel.arg_names}
            moving = {"MOVE_TOO": name == "survey_move"}
            resources = describe(build(kernel, signature, constants | moving, arch, options))
            resources["programs_per_multiprocessor"] = programs_per_multiprocessor(resources["reg"], WARPS)
            case = {"dtype": dtype, "gradient": gradient, "aligned": aligned, "has_m": has_m, "adam": adam}
            for row in (name, "restore") if name == "trial" else (name,):
                moved = bytes_per_weight(row, dtype, gradient, has_m=has_m, adam=adam)
                yield {"kernel": row, **case, **resources, "bytes_per_weight": moved}


def main(arch):
    """Print a line per kernel and variant."""
    for case in chunk_kernels(arch):
        print(json.dumps(case))
    programs = [k for m in (armijo, all_units, relay) for k in vars(m).values()]
    scalar = [k for k in programs if isinstance(k, triton.JITFunction) and k.__name__.endswith("_kernel")]
    for kernel in [*scalar, moments.constants_kernel, moments.reduce_kernel, moments.add_parts_kernel]:
        types = {n: SCALARS[n] for n in kernel.arg_names if n in SCALARS}
        names = FLAGS.get(kernel.__name__, ())
        for flags in product((False, True), repeat=len(names)):
            chosen = {name for name, flag in zip(names, flags, strict=True) if flag}
            if any(pair <= chosen for pair in APART):
                continue
            constants = CONSTANTS | dict(zip(names, flags, strict=True))
            warps = 1 if kernel in scalar else WARPS if kernel is moments.reduce_kernel else 4
            resources = describe(build(kernel, types, constants, arch, LAUNCH | {"num_warps": warps}))
            print(json.dumps({"kernel": kernel.__name__, "flags": flags, **resources}))


def launches(lines):
    """Launches of every kernel in each step, from the lines of ``launch_kernels.py``."""
    step, counted = {}, Counter()
    for line in [*lines, {}]:
        if "kernel" in line:
            counted[line["kernel"].removesuffix("_kernel")] += 1
            continue
        if step:
            yield step | {"launches": counted.total(), "of": dict(counted)}
        step, counted = line, Counter()


def launched(arch):
    """The lines of ``launch_kernels.py``."""
    command = [sys.executable, "-P", Path(__file__).with_name("launch_kernels.py"), str(arch)]
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    return map(
        json.loads, subprocess.run(command, capture_output=True, text=True, check=True, env=env).stdout.splitlines()
    )


if __name__ == "__main__":
    main(int(sys.argv[1]))
    if "kernels" not in sys.argv[2:]:
        for step in launches(launched(int(sys.argv[1]))):
            print(json.dumps(step))
