"""When steps are captured, when captured anew, and when they run eagerly and say why."""

import pytest
import torch

pytest.importorskip("triton")
from helpers.recording import Recording, build, interpreted, recorded
from helpers.tiny import TinyTransformer, tiny_batches

import fastals
from fastals.graphs import graphed
from fastals.graphs.graphed import WARMUP, GraphMode, pad


@pytest.mark.slow
@interpreted
def test_programs_are_kept_by_signature_and_the_oldest_goes():
    log = []
    model, _, step = build(log=log, max_signatures=2, schedule="sweep")  # one tail a signature
    lengths = [next(tiny_batches(1, length=n)) for n in (4, 5, 6)]
    for batch in lengths:
        for _ in range(WARMUP + 2):
            step(batch)
    assert len(step._programs) == 2
    log.clear()
    step(lengths[2])
    step(lengths[1])
    assert "capture" not in log
    step(lengths[0])
    assert "capture" in log
    model.eval()
    step(lengths[0])
    assert step._seen != {}, "another mode is another signature"


@pytest.mark.slow
@interpreted
def test_frozen_and_moved_parameters_are_captured_anew():
    log = []
    model, _, step = build(log=log)
    batches = list(tiny_batches(WARMUP + 2))
    for batch in batches:
        step(batch)
    assert step.mode.name == "host"
    with torch.no_grad():
        model.head.weight.data = model.head.weight.data.clone()
    log.clear()
    step(batches[0])
    assert log == [], "warms up again"
    for _ in range(WARMUP):
        step(batches[0])
    assert "capture" in log


def move_a_frozen_weight(model):
    model.embed.weight.data = model.embed.weight.data.clone()


def freeze(model):
    model.head.weight.requires_grad_(False)
    model.head.weight.grad = None


def replace_a_module(model):
    model.blocks[0].dropout = torch.nn.Dropout(0.2)


def switch_a_module_to_evaluation(model):
    model.blocks[0].eval()


def move_a_buffer(model):
    model.norm.scale = model.norm.scale.clone()


@pytest.mark.slow(keep=1)
@interpreted
@pytest.mark.parametrize(
    "change", [move_a_frozen_weight, freeze, replace_a_module, switch_a_module_to_evaluation, move_a_buffer]
)
def test_what_the_graphs_hold_fast_of_the_model_is_captured_anew_where_it_changes(change):
    torch.manual_seed(0)
    model, log = TinyTransformer(depth=1), []
    model.embed.weight.requires_grad_(False)
    model.norm.register_buffer("scale", torch.ones(1))
    opt = fastals.ALS(fastals.units(model), model=model, fused=True)
    step = recorded(opt, model, lambda batch: model(**batch), log=log)
    batch = next(tiny_batches(1))
    for _ in range(WARMUP + 2):
        step(batch)
    assert "capture" in log
    change(model)
    log.clear()
    for _ in range(WARMUP):
        step(batch)
    assert log == []
    step(batch)
    assert "capture" in log


@interpreted
def test_a_batch_that_cannot_be_a_signature_runs_eagerly_and_says_why():
    class Task:
        __hash__ = None

    model, _, step = build(loss_fn=lambda b: model(b["tokens"], b["labels"]))
    for batch in tiny_batches(WARMUP + 2):
        step(batch | {"task": Task()})
    assert step.mode.name == "eager"
    assert "unhashable type: 'Task'" in step.mode.reason


@interpreted
def test_signatures_that_never_come_back_are_counted_and_forgotten(monkeypatch):
    monkeypatch.setattr(graphed, "MOST_SEEN", 3)
    model, _, step = build(loss_fn=lambda b: model(b["tokens"], b["labels"]))
    for t, batch in enumerate(tiny_batches(6)):
        step(batch | {"temperature": 0.1 * t})
    assert len(step._seen) == 3
    assert step.mode == GraphMode("eager", f"3 signatures of inputs seen, and one is captured after {WARMUP} steps")


@interpreted
def test_a_failed_capture_falls_back_with_one_warning_and_the_step_is_taken():
    fails = {"now": False}
    model, opt, step = build(loss_fn=lambda batch: work(batch))

    def work(batch):
        if fails["now"]:
            raise RuntimeError("operation not permitted when stream is capturing")
        return model(**batch)

    batches = list(tiny_batches(WARMUP + 3))
    for batch in batches[:WARMUP]:
        step(batch)

    def broken(*args, **kwargs):
        raise RuntimeError("operation not permitted when stream is capturing")

    step._make_backend = broken
    before = opt.param_groups[0]["count"]
    with pytest.warns(UserWarning, match="steps run eagerly, because the capture failed"):
        step(batches[3])
    assert opt.param_groups[0]["count"] == before + 1
    assert step.mode.name == "eager"
    assert "not permitted" in step.mode.reason
    step(batches[4])


@pytest.mark.slow(keep=1)
@interpreted
@pytest.mark.parametrize(
    ("error", "reason"),
    [(RuntimeError("no loops"), "no loops"), (AttributeError("no such node"), "AttributeError: no such node")],
)
def test_whatever_a_launch_fails_with_the_pieces_are_replayed_by_the_host(error, reason, monkeypatch):
    def fails(self, operations, flags):
        raise error

    monkeypatch.setattr(Recording, "link", fails)
    _, _, step = build()
    for batch in tiny_batches(WARMUP + 1):
        step(batch)
    assert step.mode == GraphMode("host", reason)


def test_on_a_cpu_the_call_is_the_eager_step():
    torch.manual_seed(0)
    model = TinyTransformer()
    opt = fastals.ALS(model)
    step = opt.graphed(lambda batch: model(**batch))
    if not torch.cuda.is_available():
        assert opt.graph_mode == step.mode == GraphMode("eager", "there is no CUDA device")
    losses = [float(step(b)) for b in tiny_batches(3)]
    assert losses[0] == opt.reports[0].loss_before


@interpreted
@pytest.mark.parametrize(("options", "reason"), [({"order": "random"}, "random"), ({"merge_below": 1e-3}, "merge")])
def test_steps_that_are_no_fixed_sequence_abandon_graphs(options, reason):
    _, _, step = build(**options)
    assert step.mode.name == "eager"
    assert reason in step.mode.reason
    step(next(tiny_batches(1)))


def test_padding_to_few_signatures():
    ids = torch.ones(2, 13, dtype=torch.long)
    batch = {"input_ids": ids, "attention_mask": ids, "labels": ids, "scores": torch.ones(2)}
    padded = pad(batch, 8)
    assert padded["input_ids"].shape == padded["attention_mask"].shape == (2, 16)
    assert padded["attention_mask"][:, 13:].sum() == 0
    assert (padded["labels"][:, 13:] == -100).all()
    assert padded["scores"] is batch["scores"]
    assert pad(padded, 8)["input_ids"] is padded["input_ids"]
    with pytest.raises(TypeError, match="attention_mask"):
        pad({"input_ids": ids}, 8)
