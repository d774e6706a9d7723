"""Captured steps with CUDA graphs on a GPU."""

import copy
import math
import os
import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
from helpers.hf import model_and_batches
from helpers.options import CAPTURED, HARD, values
from helpers.tiny import TinyTransformer, tiny_batches

import fastals
from fastals import rng
from fastals.graphs import cuda
from fastals.graphs.graphed import WARMUP
from fastals.graphs.program import Loop, Run
from fastals.partition import blocks

pytestmark = pytest.mark.gpu


def on_gpu(model, opt, count=8):
    step = opt.graphed(lambda batch: model(**batch))
    for t, batch in enumerate(tiny_batches(count)):
        torch.manual_seed(t)
        step({k: v.cuda() for k, v in batch.items()})
    print(step.mode)
    return step


@pytest.mark.proves(claim="captured-steps")
@pytest.mark.parametrize("force_host", [False, True], ids=["while", "host"])
@pytest.mark.parametrize("options", CAPTURED, ids=values)
def test_graphs_take_the_steps_of_the_eager_path(options, force_host, monkeypatch):
    if force_host:
        monkeypatch.setattr(cuda, "runtime", None)
    options = HARD | options
    torch.manual_seed(0)
    model = TinyTransformer(depth=2).cuda()
    twin = copy.deepcopy(model)
    opt = fastals.ALS(fastals.units(model), model=model, fused=True, **options)
    eager = fastals.ALS(fastals.units(twin), model=twin, fused=True, **options)
    step = opt.graphed(lambda batch: model(**batch))
    for t, batch in enumerate(tiny_batches(200 if options == HARD | CAPTURED[0] else 20)):
        batch = {k: v.cuda() for k, v in batch.items()}
        for take in (step, lambda b: eager.step(lambda: twin(**b))):
            torch.manual_seed(100 + t)
            take(batch)
        a, b = opt.report, eager.report
        assert [(u.name, u.outcome, u.trials) for u in a.units] == [(u.name, u.outcome, u.trials) for u in b.units]
        for u, v in zip(a.units, b.units, strict=True):
            assert u.step_size == pytest.approx(v.step_size, rel=1e-3)
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            q.data.copy_(p.data)
        eager.load_state_dict(opt.state_dict())
    print(step.mode)
    assert step.mode.name == "host" if force_host else step.mode.name in ("while", "host"), step.mode


@pytest.mark.filterwarnings("ignore:TensorFloat32:UserWarning")  # the compiler's advice
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # the compiler looks at activations
@pytest.mark.filterwarnings("ignore:Please use the new API settings to control TF32:UserWarning")
@pytest.mark.parametrize("how", ["plain", "autocast", "compiled", "checkpointed", "accumulated"])
@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_hugging_face_models_are_captured_as_they_are(kind, how):
    model, batches = model_and_batches(kind)
    if how == "compiled":
        for block in blocks(model).values():
            block.compile()
    if how == "checkpointed":
        model.gradient_checkpointing_enable()

    def loss_fn(batch):
        with torch.autocast("cuda", torch.bfloat16, enabled=how == "autocast"):
            loss = model(**batch, use_cache=False).loss if kind == "llama" else model(**batch).loss
            return (loss + model(**batch).loss) / 2 if how == "accumulated" else loss

    opt = fastals.ALS(model)
    step = opt.graphed(loss_fn)
    for t in range(8):
        step(batches[t % 3])
        assert opt.report.loss_after <= opt.report.loss_before
    print(step.mode)
    assert step.mode.name != "eager", step.mode


def test_two_signatures_live_beside_each_other_and_one_survives_the_other():
    """Captured memory is not handed out: replays stay right while others allocate, and after a program has gone."""
    torch.manual_seed(0)
    model = TinyTransformer(depth=2, dropout=0.0).cuda()
    opt = fastals.ALS(fastals.units(model), model=model, fused=True)
    step = opt.graphed(lambda batch: model(**batch), max_signatures=2)
    batches = [{k: v.cuda() for k, v in next(tiny_batches(1, length=n)).items()} for n in (4, 6, 8)]
    for batch in (*batches[:2] * (WARMUP + 2), *batches[2:] * (WARMUP + 2)):  # the third drops the first
        step(batch)
    held = []
    for t in range(200):
        held = [*held[-4:], torch.randn(100_000, device="cuda").fill_(float("nan"))]
        torch.cuda.empty_cache()
        batch = batches[1 + t % 2]
        with torch.no_grad():
            expected = float(model(**batch))
        assert float(step(batch)) == pytest.approx(expected, rel=1e-5)
        assert opt.report.loss_after <= opt.report.loss_before


@pytest.mark.parametrize("schedule", ["sweep", "relay"])
@pytest.mark.parametrize("mode", ["while", "host", "eager"])
def test_dropout_masks_are_held_in_a_step_and_change_between_steps(mode, schedule, monkeypatch):
    """With steps too short to change a weight every first trial's loss is f(w_t), bitwise, and is accepted."""
    if mode == "host":
        monkeypatch.setattr(cuda, "runtime", None)
    torch.manual_seed(0)
    model = TinyTransformer(depth=3, dropout=0.5).cuda()
    short = {"trust": None, "eta_init": 1e-30, "eta_max": 1e-30, "eta_min": 1e-38, "schedule": schedule}
    opt = fastals.ALS(fastals.units(model), model=model, fused=True, **short)
    step = opt.graphed(lambda batch: model(**batch)) if mode != "eager" else lambda b: opt.step(lambda: model(**b))
    batch = {k: v.cuda() for k, v in next(tiny_batches(1)).items()}
    starts = []
    for _ in range(8):
        step(batch)
        report = opt.report
        assert {u.outcome for u in report.units} == {"accepted"}
        assert {u.trials for u in report.units} <= ({1} if schedule == "sweep" else {0, 1})
        assert report.joint_trials == (schedule == "relay")
        assert report.loss_after == report.loss_before
        starts.append(report.loss_before)
    assert len(set(starts)) == len(starts)
    if mode != "eager" and step.mode.name != mode:
        pytest.skip(f"steps ran in mode {step.mode.name}: {step.mode.reason}")


def cuda_backend():
    device = torch.device("cuda", torch.cuda.current_device())
    return cuda.CudaGraphs(device, torch.cuda.Stream(device), draws=False)


def linked_or_skipped(backend, operations, flags):
    try:
        return backend.link(operations, flags)
    except RuntimeError as error:
        pytest.skip(f"no loops on the device here: {error}")


def test_a_loop_on_the_device_ends_when_its_flag_says_so():
    """A thousand launches, others allocating beside them; two loops, of which the second starts from the first."""
    backend = cuda_backend()
    flags = torch.zeros(2, 3, dtype=torch.int32, device="cuda")
    counters = torch.zeros(2, dtype=torch.int32, device="cuda")

    def arm():
        counters.zero_()
        flags.fill_(1)

    def count(row, end):
        counters[row].add_(1)
        flags[row, 0].copy_(counters.sum() < end)

    actions = [arm, partial(count, 0, 7), partial(count, 1, 12)]
    with torch.cuda.stream(backend.stream):
        for action in actions:
            action()
    torch.cuda.synchronize()
    with backend.session():
        armed, first, second = map(backend.capture, actions)
    launch = linked_or_skipped(backend, [Run(armed), Loop(first, 0), Loop(second, 1)], flags)
    for t in range(1000):
        launch()
        if t % 100 == 0:
            torch.cuda.empty_cache()
            torch.full((1 << 20,), math.nan, device="cuda")
    torch.cuda.synchronize()
    assert counters.tolist() == [7, 5]


def test_a_piece_is_right_in_several_graphs_and_twice_in_one():
    """Graphs hold copies of it, with loops of their own, and are launched by turns."""
    backend = cuda_backend()
    flags = torch.zeros(1, 4, dtype=torch.int32, device="cuda")
    total, shared, own = torch.zeros(3, dtype=torch.int32, device="cuda").unbind()

    def count():
        total.add_(1)
        flags.sub_(1)

    actions = [partial(flags.fill_, 3), count, partial(shared.add_, 1), partial(own.add_, 1)]
    with torch.cuda.stream(backend.stream):
        for action in actions:
            action()
    torch.cuda.synchronize()
    with backend.session():
        arm, loop, once, other = map(backend.capture, actions)
    rest = [Run(arm), Loop(loop, 0), Run(once)]
    launches = [linked_or_skipped(backend, line, flags) for line in (rest, [Run(other), *rest], [*rest, *rest])]
    torch.cuda.synchronize()
    for counter in (total, shared, own):
        counter.zero_()
    torch.cuda.synchronize()
    for _ in range(100):
        for launch in launches:
            launch()
    torch.cuda.synchronize()
    assert (int(total), int(shared), int(own)) == (1200, 400, 100)


@pytest.mark.parametrize("force_host", [False, True], ids=["while", "host"])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_tails_of_a_relay_share_pieces_and_take_the_eager_steps(dropout, force_host, monkeypatch):
    """Eager masks are others, so with dropout the joint test is held against f(w_t) at steps too short to show."""
    if force_host:
        monkeypatch.setattr(cuda, "runtime", None)
    torch.manual_seed(0)
    model = TinyTransformer(depth=2, dropout=dropout).cuda()
    twin = copy.deepcopy(model)
    short = {"trust": None, "eta_init": 1e-30, "eta_max": 1e-30, "eta_min": 1e-38} if dropout else HARD
    options = short | {"schedule": "relay", "every": 2}
    opt = fastals.ALS(fastals.units(model), model=model, fused=True, **options)
    eager = fastals.ALS(fastals.units(twin), model=twin, fused=True, **options)
    step, units = opt.graphed(lambda batch: model(**batch)), len(opt.param_groups)
    for batch in tiny_batches(WARMUP + 6 * units):
        batch = {k: v.cuda() for k, v in batch.items()}
        step(batch)
        if dropout:
            assert opt.report.loss_after == opt.report.loss_before
            continue
        eager.step(lambda: twin(**batch))  # noqa: B023
        a, b = opt.report, eager.report
        assert [(u.name, u.outcome, u.trials) for u in a.units] == [(u.name, u.outcome, u.trials) for u in b.units]
        assert (a.joint_trials, a.factor) == (b.joint_trials, b.factor)
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            q.data.copy_(p.data)
        eager.load_state_dict(opt.state_dict())
    assert step.pieces == (3 * units + 5, 7 * units + 5)
    assert step.capture_seconds > 0
    if not force_host and step.mode.name != "while":
        pytest.skip(f"steps ran in mode {step.mode.name}: {step.mode.reason}")


class Attending(torch.nn.Module):
    """Two blocks of attention by torch's fused kernels, in bfloat16 under autocast."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = torch.nn.Embedding(32, 64), torch.nn.Linear(64, 4)
        self.blocks = torch.nn.ModuleList(torch.nn.Linear(64, 192) for _ in range(2))

    def forward(self, tokens, labels):
        x = self.embed(tokens)
        for block in self.blocks:
            q, k, v = block(x).unflatten(-1, (3, 2, 32)).transpose(1, 3).unbind(2)
            x = x + torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return torch.nn.functional.cross_entropy(self.head(x.mean(1)).float(), labels)


@pytest.mark.parametrize("kernel", ["FLASH_ATTENTION", "EFFICIENT_ATTENTION", "MATH"])
def test_losses_have_the_same_bits_whether_host_or_device_runs_the_loops(kernel, monkeypatch):
    """At weights that no step changes, since the backward of some kernels has no fixed order."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    seen = []
    for host in (False, True):
        if host:
            monkeypatch.setattr(cuda, "runtime", None)
        torch.manual_seed(0)
        model = Attending().cuda()

        def loss_fn(batch, model=model):
            with sdpa_kernel(getattr(SDPBackend, kernel)), torch.autocast("cuda", torch.bfloat16):
                return model(**batch)

        short = {"trust": None, "eta_init": 1e-30, "eta_max": 1e-30, "eta_min": 1e-38}
        opt = fastals.ALS(fastals.units(model), model=model, fused=True, **short)
        step = opt.graphed(loss_fn)
        for batch in tiny_batches(WARMUP + 4, length=16):
            step({k: v.cuda() for k, v in batch.items()})
        assert step.mode.name != "eager", step.mode
        seen.append([(r.loss_before, r.loss_after) for r in opt.reports])
    assert seen[0] == seen[1]


@pytest.mark.parametrize("schedule", ["sweep", "relay"])
def test_searches_without_a_step_and_refused_steps_leave_the_weights_bitwise(schedule):
    torch.manual_seed(0)
    model = TinyTransformer(depth=2, dropout=0.0).cuda()
    factor, shift = torch.ones((), device="cuda"), torch.zeros((), device="cuda")

    def loss_fn(batch):
        """Every evaluation is higher than the one before: no trial passes."""
        shift.add_(1.0)
        return model(**batch) * factor + shift

    opt = fastals.ALS(fastals.units(model), model=model, fused=True, max_trials=3, schedule=schedule)
    opt.engine._repeatable = True  # it is not, which the first step would refuse
    step = opt.graphed(loss_fn)
    batch = {k: v.cuda() for k, v in next(tiny_batches(1)).items()}
    weights = [p.detach().clone() for p in model.parameters()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # cached trials differ from full forwards, by the shift
        for _ in range(WARMUP + 3):
            step(batch)
    assert {u.outcome for u in opt.report.units} == {"exhausted"}
    assert {u.trials for u in opt.report.units} <= ({3} if schedule == "sweep" else {0, 3})
    assert opt.report.joint_trials == (3 if schedule == "relay" else 0)
    factor.fill_(math.nan)
    if step.mode.name == "while":
        step(batch)
        torch.cuda.synchronize()
    with pytest.raises(FloatingPointError):
        step(batch)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), weights, strict=True))


def test_pieces_captured_late_survive_programs_that_have_gone():
    """``cycle`` captures each unit's turn when it comes, between the captures and evictions of other signatures."""
    torch.manual_seed(0)
    model = TinyTransformer(depth=2, dropout=0.0).cuda()
    twin = copy.deepcopy(model)
    opt = fastals.ALS(fastals.units(model), model=model, fused=True, schedule="cycle")
    eager = fastals.ALS(fastals.units(twin), model=twin, fused=True, schedule="cycle")
    step = opt.graphed(lambda batch: model(**batch), max_signatures=2)
    batches = [{k: v.cuda() for k, v in next(tiny_batches(1, length=n)).items()} for n in (4, 6, 8)]
    order = [0] * 5 + [1] * 5 + [0, 0, 2, 2, 2, 2, 0, 1, 0, 2, 0, 1, 2, 0, 1, 2] * 2
    for k in order:
        step(batches[k])
        eager.step(lambda k=k: twin(**batches[k]))
        assert opt.report.loss_before == pytest.approx(eager.report.loss_before, rel=1e-3)
        torch.full((1 << 20,), math.nan, device="cuda")
    assert step.mode.name != "eager", step.mode


@pytest.mark.parametrize("pinned", [False, True])
def test_batches_on_the_host_are_brought_to_the_device(pinned):
    torch.manual_seed(0)
    model = TinyTransformer(depth=2, dropout=0.0).cuda()
    opt = fastals.ALS(fastals.units(model), model=model, fused=True)
    step = opt.graphed(lambda batch: model(**batch))
    for batch in tiny_batches(WARMUP + 3):
        with torch.no_grad():
            expected = float(model(**{k: v.cuda() for k, v in batch.items()}))
        loss = step({k: v.pin_memory() if pinned else v for k, v in batch.items()})
        assert float(loss) == pytest.approx(expected, rel=1e-5)
    assert step.mode.name != "eager", step.mode
    assert step.pool_bytes > 0


def test_a_loss_that_draws_on_the_host_is_not_captured():
    model = TinyTransformer(depth=1, dropout=0.0).cuda()
    opt = fastals.ALS(fastals.units(model), model=model, fused=True)
    step = opt.graphed(lambda batch: model(**batch) * (1 + float(torch.rand(()))))
    for batch in tiny_batches(WARMUP + 2):
        step({k: v.cuda() for k, v in batch.items()})
    assert step.mode.name == "eager"
    assert "random numbers on the host" in step.mode.reason


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_forward_without_gradients_has_the_masks_and_the_loss_of_one_with(dtype):
    """Trials are held against f(w_t): attention with dropout may run another kernel where no gradient is asked for."""
    import transformers

    torch.manual_seed(0)
    config = transformers.BertConfig(num_hidden_layers=2, hidden_size=128, num_attention_heads=2, intermediate_size=256)
    model = transformers.BertForSequenceClassification(config).to("cuda", dtype).train()
    ids = torch.randint(1000, 2000, (4, 64), device="cuda")
    losses = []
    for gradients in (True, False):
        torch.manual_seed(1)
        with torch.set_grad_enabled(gradients):
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
            losses.append(float(torch.nn.functional.cross_entropy(logits.float(), ids[:, 0] % 2).detach()))
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)


def test_a_captured_step_can_be_profiled():
    code = """
import torch, fastals
from helpers.tiny import TinyTransformer, tiny_batches
model = TinyTransformer(dropout=0.0).cuda()
step = fastals.ALS(fastals.units(model), model=model, fused=True).graphed(lambda batch: model(**batch))
batches = [{k: v.cuda() for k, v in b.items()} for b in tiny_batches(8)]
for batch in batches[:5]:
    step(batch)
with torch.profiler.profile() as profile:
    for batch in batches[5:]:
        step(batch)
    torch.cuda.synchronize()
print(step.mode.name, len(profile.events()))
"""
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    command = [sys.executable, "-P", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, env=env)
    assert not done.returncode, done.stderr[-2000:]
    assert done.stdout.split()[0] in ("while", "host")


def test_a_loss_that_waits_for_the_device_is_not_captured_and_steps_go_on():
    torch.manual_seed(0)
    model = TinyTransformer(depth=2, dropout=0.5).cuda()
    opt = fastals.ALS(fastals.units(model), model=model, fused=True)

    def loss_fn(batch):
        loss = model(**batch)
        assert math.isfinite(float(loss.detach()))
        return loss

    step = opt.graphed(loss_fn)
    batches = [{k: v.cuda() for k, v in batch.items()} for batch in tiny_batches(WARMUP + 3)]
    for batch in batches[:WARMUP]:
        step(batch)
    with pytest.warns(UserWarning, match="the capture failed"):
        step(batches[-3])
    torch.cuda.empty_cache()  # refuses while a capture is under way
    for batch in batches[-2:]:
        step(batch)
    assert step.mode.name == "eager"
    assert opt.param_groups[0]["count"] == len(batches)


def test_loops_run_on_the_device_where_bindings_and_driver_know_them():
    pytest.importorskip("cuda.bindings")
    version = cuda.checked(cuda.runtime.cudaDriverGetVersion())
    if version < cuda.OLDEST_DRIVER:
        pytest.skip(f"the driver knows CUDA {version} only")
    torch.manual_seed(0)
    model = TinyTransformer(depth=2, dropout=0.0).cuda()
    step = on_gpu(model, fastals.ALS(fastals.units(model), model=model, fused=True))
    assert step.mode.name == "while", step.mode.reason


def test_a_step_in_while_mode_does_not_wait_for_the_device():
    torch.manual_seed(0)
    model = TinyTransformer(depth=2, dropout=0.0).cuda()
    opt = fastals.ALS(fastals.units(model), model=model, fused=True)
    step = on_gpu(model, opt)
    if step.mode.name != "while":
        pytest.skip(f"no loops on the device here: {step.mode.reason}")
    batch = {k: v.cuda() for k, v in next(tiny_batches(1)).items()}
    torch.cuda.synchronize()
    asleep = torch.cuda.Event()
    torch.cuda._sleep(2_000_000_000)
    asleep.record()
    try:
        torch.cuda.set_sync_debug_mode("error")
        step(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not asleep.query(), "the step returned while the device was still busy with what came before"


def test_generators_stand_where_a_plain_forward_and_backward_leaves_them():
    torch.manual_seed(0)
    model = TinyTransformer(depth=2, dropout=0.5).cuda()
    opt = fastals.ALS(fastals.units(model), model=model, fused=True)
    step = on_gpu(model, opt)
    batch = {k: v.cuda() for k, v in next(tiny_batches(1)).items()}
    states = []
    for take in (lambda: model(**batch).backward(), lambda: step(batch)):
        torch.manual_seed(3)
        take()
        states.append(rng.get_state((0,))[1][0])
    assert torch.equal(*states)
