"""Steps under torch.compile are right, and cause no compilation that calls of the model do not cause.

tests/test_compiled.py is about the kernels.
"""

import json
import shutil
from contextlib import contextmanager

import pytest
import torch
from helpers.tiny import TinyTransformer, assert_same, tiny_batches
from torch._dynamo.testing import CompileCounterWithBackend

import fastals

WHOLE = ["optimizer of the wrapper", "optimizer of the model", "model.compile()"]
BLOCKS = ["block.compile()", "torch.compile(block)", "compile_regions"]
NO_CACHE = "compiled the blocks as parts of something larger"
pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),  # the compiler looks at them
    pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.* is deprecated:DeprecationWarning"),  # inductor's own
]


def tiny(dropout=0.1):
    torch.manual_seed(0)
    return TinyTransformer(dropout=dropout).train()


def compiled(model, how, **options):
    """The model to build the optimizer on, and the one to call."""
    if how in WHOLE[:2]:
        whole = torch.compile(model, **options)
        return (whole if how == "optimizer of the wrapper" else model), whole
    if how == "model.compile()":
        model.compile(**options)
    elif how == "compile_regions":
        model = pytest.importorskip("accelerate.utils").compile_regions(model, **options)
    for i, block in enumerate(model.blocks):
        if how == "block.compile()":
            block.compile(**options)
        elif how == "torch.compile(block)":
            model.blocks[i] = torch.compile(block, **options)
    return model, model


def train(opt, called, steps=3):
    """The reports of some steps, their forward passes, and the weights after them.

    The loss after a step is compared with a plain call, but for the first step, for which compiled code steps aside.
    """
    reports, forwards = [], []
    torch.manual_seed(1)
    for i, batch in enumerate(tiny_batches(steps)):
        state = torch.get_rng_state()
        opt.step(lambda: called(**batch))  # noqa: B023
        after = torch.get_rng_state()
        if i:
            torch.set_rng_state(state)
            with torch.set_grad_enabled(opt.engine.learned.gradients):
                assert float(called(**batch).detach()) == opt.report.loss_after
            torch.set_rng_state(after)
        reports.append(json.loads(json.dumps(opt.report.as_dict()).replace("_orig_mod.", "")))
        forwards.append(opt.last_forwards)
    assert all(any(u["step_size"] for u in r["units"]) for r in reports)
    return reports, forwards, [p.detach().clone() for p in opt.param_groups[0]["params"]]


def sweeps(model, **options):
    return fastals.ALS(model, schedule="sweep", **options)


def as_not_compiled(dropout=0.1, **options):
    """What training gives without a compiler and without the cache."""
    return train(sweeps(model := tiny(dropout), cache=False), model, **options)


@contextmanager
def warned_once(how):
    """Expect one warning that there is no cache, if there is none."""
    if how not in WHOLE:
        yield
        return
    with pytest.warns(UserWarning, match=NO_CACHE) as caught:
        yield
    assert sum(NO_CACHE in str(w.message) for w in caught) == 1


@pytest.mark.slow(keep=7)
@pytest.mark.parametrize("dropout", [0.1, 0.0])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("how", WHOLE)
def test_a_model_compiled_as_a_whole(how, backend, dropout):
    """The steps are bitwise those without a compiler; one graph is compiled with gradients and one without."""
    counter = CompileCounterWithBackend(backend)
    model, called = compiled(tiny(dropout), how, backend=counter, fullgraph=True)
    opt = sweeps(model)
    with warned_once(how):
        assert_same(train(opt, called), as_not_compiled(dropout))
    assert opt.engine.cache is None
    assert counter.frame_count == 2


@pytest.mark.parametrize("dropout", [0.1, 0.0])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("how", BLOCKS)
def test_blocks_compiled_one_by_one_are_cached(how, backend, dropout):
    """The steps are bitwise those without a compiler; the blocks are alike and share two graphs."""
    counter = CompileCounterWithBackend(backend)
    model, called = compiled(tiny(dropout), how, backend=counter, fullgraph=True)
    opt = sweeps(model)
    (reports, forwards, weights), truth = train(opt, called), as_not_compiled(dropout)
    assert_same((reports, weights), (truth[0], truth[2]))
    assert all(opt.engine.learned.trusted.values())
    assert all(f < full for f, full in zip(forwards[1:], truth[1][1:], strict=True))
    assert counter.frame_count == (8 if how == "compile_regions" else 2)  # this one compiles the other modules, too


@pytest.mark.parametrize("how", WHOLE + BLOCKS)
@torch._dynamo.config.patch(error_on_recompile=False)
def test_a_model_that_is_compiled_already_is_not_compiled_again(how):
    """It was called before the first step and is called between steps, for training and for evaluation."""
    model, called = compiled(tiny(), how, backend="eager")
    batch = next(tiny_batches(1))

    def call_in_every_way():
        for training in (False, True):
            called.train(training)
            called(**batch).detach()
            with torch.no_grad():
                called(**batch)

    call_in_every_way()
    torch._dynamo.config.error_on_recompile = True
    opt = sweeps(model)
    with warned_once(how):
        train(opt, called)
    for training in (False, True):
        call_in_every_way()
        called.train(training)
        train(opt, called)


@pytest.mark.parametrize("hooks", [False, True])
@pytest.mark.parametrize("how", ["optimizer of the model", "model.compile()"])
def test_a_model_that_is_compiled_between_steps(how, hooks):
    """The compiler meets the stand-ins for the forwards, compiles nothing of them, and the step starts again."""
    model, truth, counter = tiny(), tiny(), CompileCounterWithBackend("eager")
    opt, slow = sweeps(model), sweeps(truth, cache=False)
    for block in model.blocks if hooks else ():
        block.register_forward_hook(lambda module, args, output: output)
    assert_same(train(opt, model)[0], train(slow, truth)[0])
    whole = compiled(model, how, backend=counter, fullgraph=True)[1]
    with warned_once(how):
        assert_same(train(opt, whole), train(slow, truth))
    assert counter.frame_count == 2


def test_training_and_evaluation_mode_are_warned_of_once():
    how, counter = "optimizer of the model", CompileCounterWithBackend("eager")
    model, whole = compiled(tiny(), how, backend=counter)
    truth = tiny()
    opt, slow = sweeps(model), sweeps(truth, cache=False)

    def train_in_both_modes():
        for training in (True, False, True):
            whole.train(training)
            truth.train(training)
            assert_same(train(opt, whole), train(slow, truth))

    with warned_once(how):
        train_in_both_modes()
    assert counter.frame_count == 4


@pytest.mark.parametrize("how", ["optimizer of the model", "block.compile()"])
def test_nothing_is_left_on_the_modules(how):
    model, called = compiled(tiny(), how, backend="eager")
    before = [dict(m.__dict__) for m in model.modules()]
    with warned_once(how):
        train(sweeps(model), called)
    assert [dict(m.__dict__) for m in model.modules()] == before


def with_other_masks(graph, inputs):
    """A compiler whose code draws a random number more if it was compiled for use without gradients."""
    if torch.is_grad_enabled():
        return graph.forward

    def run(*args):
        torch.rand(1)
        return graph.forward(*args)

    return run


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("how", ["optimizer of the wrapper", "optimizer of the model", "block.compile()"])
def test_trials_run_with_gradients_if_the_compiler_draws_other_masks_without(how, warm):
    model, called = compiled(tiny(), how, backend=with_other_masks)
    if warm:
        for enabled in (True, False):
            with torch.set_grad_enabled(enabled):
                called(**next(tiny_batches(1)))
    opt = sweeps(model)
    with warned_once(how), pytest.warns(UserWarning, match="It did not before torch.compile") as caught:
        reports, _, weights = train(opt, called)
    assert_same((reports, weights), as_not_compiled()[::2])
    assert sum("run with gradients" in str(w.message) for w in caught) == 1
    assert opt.engine.learned.gradients


def test_without_a_compiler_the_closure_is_to_blame():
    model = tiny(0.0)
    batch = next(tiny_batches(1))
    with pytest.warns(UserWarning, match="Look for code that asks"):
        fastals.ALS(model).step(lambda: model(**batch) * (1 if torch.is_grad_enabled() else 2))


@pytest.mark.skipif(not shutil.which("g++"), reason="inductor needs g++")
@pytest.mark.parametrize("how", ["optimizer of the model", "block.compile()"])
def test_inductor(how):
    """It rounds otherwise than torch and has masks of its own, so that the steps are compared with its own."""
    outcomes = []
    for cache in (True, False):
        model, called = compiled(tiny(), how)
        with warned_once(how if cache else ""):
            outcomes.append(train(sweeps(model, cache=cache), called))
    (reports, forwards, weights), truth = outcomes
    assert_same((reports, weights), truth[::2])
    assert (forwards[-1] < truth[1][-1]) == (how == "block.compile()")
