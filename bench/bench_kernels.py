"""The fused kernels on a GPU: bandwidth over the copy bandwidth of the same run, and the update phase as a whole.

Bytes are those that a kernel must move, :func:`floor.moved_bytes`. The update phase of one search is survey, first
trial, one retry, advance and the scalar kernels, with all parameters as one unit. It is compared with the eager
sequence (deep copy, moments by ``torch._foreach``, dot products read by ``.item()``, two trials) and, without the
retry, with ``torch.optim.AdamW(fused=True).step()``. Times of a ratio are taken in turn. Not timed: forward, backward,
compilation, building of tables (the look for moved tensors has its own case). Caches are flushed between calls.

Without a GPU every case is skipped; ``TRITON_INTERPRET=1`` runs the smallest one on the CPU, to see that it works.
"""

import copy
import os
import statistics
import time
from functools import partial

import pytest
import torch

pytest.importorskip("triton")
import triton
from floor import moved_bytes

import fastals
from fastals.buffers import Gradients
from fastals.kernels import all_units, armijo, relay
from fastals.kernels.arena import STATE
from fastals.kernels.moments import advance, survey
from fastals.kernels.trial import trial

pytestmark = [pytest.mark.exact("fused-kernels"), pytest.mark.exact("fused-optimizer")]
ROUNDS = 5
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available() and not INTERPRETED, reason="bandwidth is measured on a CUDA device; none is here"
)


def bert_base():
    block = [(768, 768)] * 4 + [(768,)] * 9 + [(3072, 768), (3072,), (768, 3072)]
    return [(30522, 768), (512, 768), (2, 768), (768,), (768,)] + block * 12 + [(768, 768), (768,), (5, 768), (5,)]


def llama_1b():
    block = [(2048, 2048), (512, 2048), (512, 2048), (2048, 2048), (8192, 2048), (8192, 2048), (2048, 8192)]
    return [(128256, 2048)] + (block + [(2048,)] * 2) * 16 + [(2048,)]


def lora():
    return [(8, 4096), (4096, 8)] * 2 * 32


def smallest():
    return [(65, 33), (2048,), (7,)]


SHAPES = {f.__name__: f for f in (smallest, bert_base, llama_1b, lora)}
only_interpreted = pytest.mark.skipif(not INTERPRETED, reason="replaces the others if kernels are interpreted")
CASES = [
    pytest.param(name, dtype, marks=only_interpreted if name == "smallest" else pytest.mark.gpu)
    for name in SHAPES
    for dtype in ("float32", "bfloat16")
]


def parameters(shape, dtype):
    generator = torch.Generator(DEVICE).manual_seed(0)
    params = []
    for size in SHAPES[shape]():
        p = torch.nn.Parameter(torch.randn(size, device=DEVICE, generator=generator).to(dtype))
        p.grad = torch.randn(size, device=DEVICE, generator=generator).to(dtype)
        params.append(p)
    return params


def device_of(params, averages):
    opt = fastals.ALS(params, momentum="after" if averages else "none", fused=True)
    device = opt.engine.partition
    device.refresh_rules("0")
    device.refresh_table(Gradients(u for u in device.units if u.find_active()))
    all_units.begin(device.arena, torch.ones((), device=DEVICE))
    survey(device.table, device.arena)
    armijo.open_search(device.arena, 0, tested=False)
    return device


def milliseconds(function):
    """Median time of one call."""
    if DEVICE == "cuda":
        return triton.testing.do_bench(function, warmup=10, rep=40, return_mode="median")
    begin = time.perf_counter()
    function()
    return 1e3 * (time.perf_counter() - begin)


def in_turn(reference, candidate):
    """Milliseconds of both, A B A B, one of each per round."""
    return zip(*((milliseconds(reference), milliseconds(candidate)) for _ in range(ROUNDS)), strict=True)


def of_pairs(a, b):
    """Median, lowest and highest ratio of the rounds."""
    ratios = [x / y for x, y in zip(a, b, strict=True)]
    return [round(f(ratios), 3) for f in (statistics.median, min, max)]


def copied():
    """A function that copies on the device, and the bytes that one call reads and writes."""
    source = torch.randn(2**28 if DEVICE == "cuda" else 2**16, device=DEVICE)
    target = torch.empty_like(source)
    return lambda: target.copy_(source), 2 * source.numel() * 4


surveying_move = partial(survey, move=True)


@pytest.mark.parametrize("averages", [False, True], ids=["plain", "averaged"])
@pytest.mark.parametrize(("shape", "dtype"), CASES)
def test_bandwidth(benchmark, shape, dtype, averages):
    params = parameters(shape, getattr(torch, dtype))
    device = device_of(params, averages)
    table, arena = device.table, device.arena
    arena.state[0, STATE.index("averaged")] = float(averages)
    arena.state[0, STATE.index("at")] = float("nan")  # the trial always writes
    n = sum(p.numel() for p in params)
    copy_once, copy_bytes = copied()
    benchmark.pedantic(finished(lambda: trial(table, arena)), rounds=ROUNDS, warmup_rounds=1)
    kernels = {}
    run = {"survey": survey, "survey_move": surveying_move, "trial": trial, "advance": advance, "restore": trial}
    for name, kernel in run.items():
        if name == "restore":
            arena.state[0, STATE.index("move")] = 0.0
        arena.state[0, STATE.index("at")] = float("nan")  # the trial always writes
        copies, times = in_turn(copy_once, lambda kernel=kernel: kernel(table, arena))
        moved = moved_bytes(name, params[0].itemsize, averages) * n
        of_roof = of_pairs([t / copy_bytes for t in copies], [t / moved for t in times])
        gbs = moved / statistics.median(times) / 1e6
        kernels[name] = {"gbs": round(gbs, 4), "of_roof": of_roof[0], "spread": of_roof[1:]}
    copy_gbs = copy_bytes / statistics.median(copies) / 1e6
    benchmark.extra_info.update(kernels=kernels, copy_gbs=round(copy_gbs, 1), parameters=n)


@pytest.mark.parametrize(("shape", "dtype"), CASES)
def test_update_phase_of_a_remembered_step(benchmark, shape, dtype):
    """A step known beforehand, accepted at once, against a step of AdamW: 32 bytes a weight against 28 in float32."""
    params = parameters(shape, getattr(torch, dtype))
    device = device_of(params, averages=False)
    table, arena = device.table, device.arena
    arena.memory[0] = 1e-3  # relative step, its scale, and the rest
    start, better = (torch.full((), x, device=DEVICE) for x in (1.0, -1e9))

    def fused():
        all_units.begin(arena, start)
        relay.recall(arena, 0, tested=False)
        survey(table, arena, averaged=False, move=True)
        relay.aim(arena, tested=False)
        all_units.open_together(arena, 0, remembered=True)
        trial(table, arena)
        all_units.judge_together(arena, 0, better, once=False, remembered=True)
        trial(table, arena)
        advance(table, arena)
        all_units.remember(arena)

    benchmark.pedantic(finished(fused), rounds=ROUNDS, warmup_rounds=1)
    references, times = in_turn(adamw(params), fused)
    speedup, *spread = of_pairs(references, times)
    benchmark.extra_info.update(
        against="adamw", speedup=speedup, spread=spread, reference_ms=round(statistics.median(references), 4),
        fused_ms=round(statistics.median(times), 4),
    )  # fmt: skip


@pytest.mark.parametrize("momentum", ["none", "tested"])
@pytest.mark.parametrize("against", ["eager", "adamw"])
@pytest.mark.parametrize(("shape", "dtype"), CASES)
def test_update_phase(benchmark, shape, dtype, against, momentum):
    """Against the eager sequence, both with one retry; against a step of AdamW, without a retry."""
    tested = momentum == "tested"
    if tested and against == "eager":
        pytest.skip("the eager sequence goes along the gradient's direction")
    params = parameters(shape, getattr(torch, dtype))
    device = device_of(params, averages=tested)
    table, arena = device.table, device.arena
    start, worse, better = (torch.full((), x, device=DEVICE) for x in (1.0, 2.0, -1e9))
    losses = (worse, better) if against == "eager" else (better,)

    def fused():
        all_units.begin(arena, start)
        survey(table, arena, averaged=tested)
        armijo.open_search(arena, 0, tested=tested)
        for loss in losses:
            trial(table, arena, 0)
            armijo.judge(arena, 0, loss)
        trial(table, arena, 0)
        advance(table, arena)
        all_units.remember(arena)

    reference = eager_sequence(params) if against == "eager" else adamw(params)
    benchmark.pedantic(finished(fused), rounds=ROUNDS, warmup_rounds=1)
    references, times = in_turn(reference, fused)
    speedup, *spread = of_pairs(references, times)
    benchmark.extra_info.update(
        against=against, speedup=speedup, spread=spread, reference_ms=round(statistics.median(references), 4),
        fused_ms=round(statistics.median(times), 4),
    )  # fmt: skip


def finished(function):
    """The function, followed by a wait for the device."""

    def run():
        function()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    return run


def adamw(params):
    """The step of torch's fused AdamW, after a first one that allocates its state."""
    step = torch.optim.AdamW(params, fused=DEVICE == "cuda").step
    step()
    return step


def eager_sequence(params):
    """The passes of a plain line search over the same tensors: copies, moments, slope, two trials."""
    squares = [torch.zeros_like(p, dtype=torch.float32) for p in params]

    @torch.no_grad()
    def run():
        old = copy.deepcopy([p.detach() for p in params])
        grads = [p.grad.float() for p in params]
        torch._foreach_mul_(squares, 0.999)
        torch._foreach_addcmul_(squares, grads, grads, value=1e-3)
        scale = torch._foreach_sqrt(squares)
        torch._foreach_add_(scale, 1e-8)
        directions = torch._foreach_div(grads, scale)
        slope = sum(torch.dot(g.flatten(), d.flatten()) for g, d in zip(grads, directions, strict=True)).item()
        for eta in (1e-9 * abs(slope) + 1e-9, 5e-10):
            moved = torch._foreach_sub([w.float() for w in old], torch._foreach_mul(directions, eta))
            torch._foreach_copy_([p.detach() for p in params], moved)

    return run


@needs_gpu
def test_roofs(benchmark):
    """The peak rates of the device: a copy, and a bfloat16 matrix product."""
    size = 8192 if DEVICE == "cuda" else 64
    a, b = (torch.randn(size, size, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    copy_once, copy_bytes = copied()
    benchmark.pedantic(finished(copy_once), rounds=ROUNDS)
    copies, products = in_turn(copy_once, lambda: a @ b)
    benchmark.extra_info.update(
        copy_roof_gbs=round(copy_bytes / statistics.median(copies) / 1e6, 1),
        matmul_roof_tflops=round(2 * size**3 / statistics.median(products) / 1e9, 4),
    )


@needs_gpu
def test_look_for_moved_tensors(benchmark):
    """Host time to check whether any tensor has moved since the last step: 200 parameters, 200 gradients."""
    params = [torch.nn.Parameter(torch.ones(4, device=DEVICE)) for _ in range(200)]
    for p in params:
        p.grad = torch.ones_like(p)
    table = device_of(params, averages=False).table
    gradients = [p.grad for p in params]
    assert not table.moved(params, gradients)
    benchmark(table.moved, params, gradients)
    benchmark.extra_info.update(microseconds=round(benchmark.stats["median"] * 1e6, 1), tensors=400)
