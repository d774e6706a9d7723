"""The interpreter that runs the tests faster gives the results of Triton's own, to the last bit."""

import copy

import pytest
import torch

pytest.importorskip("triton")
import triton
import triton.language as tl
from helpers.interpreter import faster
from helpers.remembered import remembered
from helpers.tiny import TinyTransformer, assert_same, tiny_batches
from triton.runtime import interpreter

import fastals

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="nothing is interpreted on a GPU")


@pytest.fixture
def fast_interpreter():
    """Of these tests each says itself which interpreter runs."""


@triton.jit
def twice(x):
    return x + x


@triton.jit
def reduce_and_overflow(numbers, floats, out):
    o = tl.arange(0, 64)
    b = tl.load(numbers + o)
    tl.store(numbers + o, twice(twice(b)) * 3 - b)
    b_f = tl.load(floats + o)
    tl.store(out, tl.sum(b_f.to(tl.float64)))
    tl.store(out + 1, tl.max(b_f, axis=0))
    b_h = b_f.to(tl.float16)  # Triton 3.6 interprets no constants of bfloat16
    tl.store(out + 2, tl.sum((b_h / (b_h * b_h + 1)).to(tl.float64)))  # two of a type below float32


def kernel_results():
    torch.manual_seed(0)
    numbers = torch.randint(-(2**31), 2**31 - 1, (64,), dtype=torch.int32)
    floats, out = torch.randn(64).bfloat16(), torch.zeros(3, dtype=torch.float64)
    reduce_and_overflow[(2,)](numbers, floats, out)
    return numbers, out


def step_results(dtype, options):
    torch.manual_seed(0)
    model = TinyTransformer(depth=1).to(dtype)
    opt = fastals.ALS(fastals.units(model), model=model, fused=True, max_trials=4, **options)
    for batch in tiny_batches(3):
        opt.step(lambda: model(**batch))  # noqa: B023
    reports = [(r.loss_before, r.loss_after, [(u.outcome, u.trials) for u in r.units]) for r in opt.reports]
    return list(model.parameters()), opt.state_dict(), reports, list(vars(opt.engine.partition.arena).values())


def test_a_kernel_has_the_same_results():
    plain = kernel_results()
    with faster():
        fast = kernel_results()
    assert_same(fast, plain)
    assert_same(kernel_results(), plain)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float32, {"c": 0.5, "trust": 0.2, "schedule": "independent"}),
        (torch.bfloat16, {"c": 0.5, "trust": 0.2, "max_grad_norm": 0.1}),
        (torch.float32, {"momentum": "tested", "schedule": "joint"}),
        (torch.float32, {"direction": "sgd", "momentum": "after", "initial": "polyak"}),
    ],
    ids=str,
)
def test_steps_have_the_same_results(dtype, options):
    plain = step_results(dtype, options)
    with faster():
        fast = step_results(dtype, options)
    assert_same(fast, plain)


def test_a_remembered_launch_is_one_on_the_same_memory():
    """With another element of a gradient, a parameter or a buffer of its own, a kernel is interpreted anew."""
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    opt = fastals.ALS(model, fused=True, schedule="sweep")
    x, memory, sizes = torch.randn(4, 3), {}, []

    def step():
        with remembered(memory):
            opt.step(lambda: model(x).square().mean())
        sizes.append(len(memory))

    step()
    start = [p.detach().clone() for p in model.parameters()], copy.deepcopy(opt.state_dict())
    ends = []
    for change in (None, None, model.weight, x):
        opt.load_state_dict(copy.deepcopy(start[1]))
        with torch.no_grad():
            for p, before in zip(model.parameters(), start[0], strict=True):
                p.copy_(before)
            if change is not None:
                change[0, 0] += 1.0
        step()
        ends.append([p.detach().clone() for p in model.parameters()])
    assert_same(ends[1], ends[0])
    assert sizes[2] == sizes[1]
    assert sizes[1] < sizes[3] < sizes[4]


@pytest.mark.skipif(not triton.__version__.startswith(("3.6.", "3.9.")), reason="this Triton is interpreted as it is")
def test_fewer_modules_are_patched_and_all_patches_are_taken_back():
    plain, load = interpreter._patch_lang, tl.load
    with faster():
        assert interpreter._patch_lang is not plain
        kernel_results()
        assert tl.load is load
    assert interpreter._patch_lang is plain
    assert interpreter.interpreter_builder.options.sanitize_overflow


def test_an_unknown_version_is_left_as_it_is(monkeypatch):
    monkeypatch.setattr(triton, "__version__", "4.0.0")
    plain = interpreter._patch_lang, interpreter._get_np_dtype, interpreter.interpreter_builder.options
    with faster():
        assert (interpreter._patch_lang, interpreter._get_np_dtype, interpreter.interpreter_builder.options) == plain
