"""The Trainer with a line search makes the steps of a loop around ALS, and keeps what the Trainer promises."""

import warnings

import pytest
import torch

hf = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import helpers.trainers  # noqa: E402
from helpers.tiny import assert_same  # noqa: E402
from helpers.trainers import (  # noqa: E402
    QUIET,
    bert,
    fit,
    labelled,
    llama,
    logged,
    make,
    optimizer_of,
    sequences,
    weights,
)
from torch import nn  # noqa: E402
from transformers.integrations.neftune import neftune_post_forward_hook  # noqa: E402
from transformers.trainer_pt_utils import LabelSmoother  # noqa: E402

import fastals  # noqa: E402
from fastals.integrations.transformers import LineSearch  # noqa: E402

deprecated = pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")  # its name, since 5.23
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
SAVING = {"save_strategy": "steps", "save_steps": 3}


def llama_with_dropout():
    return llama(attention_dropout=0.1)


both = pytest.mark.parametrize(
    ("model", "data"), [(bert, labelled), (llama_with_dropout, sequences)], ids=["bert", "llama"]
)


class Watch(hf.TrainerCallback):
    """Notes the generator as training starts, and the weights and the forward passes of every step."""

    def __init__(self, *, act=None):
        self.weights, self.forwards, self.act = [], [], act

    def on_train_begin(self, args, state, control, optimizer, **kwargs):
        self.generator = torch.get_rng_state()
        if self.act:
            self.act(optimizer)

    def on_step_end(self, args, state, control, model, optimizer, **kwargs):
        self.weights.append(weights(model))
        self.forwards.append(optimizer.optimizer.last_forwards)


class Rows(torch.utils.data.IterableDataset):
    """Rows whose number nobody knows."""

    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


def padded(rows):
    """A batch of rows of several lengths."""
    ids = [row["input_ids"] for row in rows]
    pad = lambda values: nn.utils.rnn.pad_sequence(values, batch_first=True)  # noqa: E731
    mask = pad([torch.ones_like(i) for i in ids])
    return {"input_ids": pad(ids), "attention_mask": mask, "labels": torch.stack([row["labels"] for row in rows])}


def loop(trainer, watch, model, loss_of=None, lr="linear", **options):
    """The trainer's batches again, in a loop around ALS: the optimizer and the losses."""
    groups = fastals.units(model.train(), options.pop("by", "block"), weight_decay=options.pop("weight_decay", 0.0))
    opt = fastals.ALS(groups, seed=QUIET["seed"], **({"max_grad_norm": 1.0} | options))
    lr = hf.get_scheduler(lr, opt, num_warmup_steps=trainer.args.warmup_steps, num_training_steps=6)
    torch.set_rng_state(watch.generator)
    losses, norms = [], []
    for batch in trainer.get_train_dataloader():
        losses.append(float(opt.step(lambda: loss_of(model, batch) if loss_of else model(**batch).loss)))  # noqa: B023
        norms.append(float(torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])))
        lr.step()
    return opt, losses, norms


def assert_same_run(trainer, model, run):
    opt, losses, norms = run
    assert_same(weights(trainer.model), weights(model))
    assert logged(trainer, "loss") == losses
    assert logged(trainer, "grad_norm") == pytest.approx(norms, rel=1e-6)
    assert optimizer_of(trainer).reports == opt.reports
    assert len(opt.reports) == trainer.state.global_step == 6


@both
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_the_steps_are_those_of_a_loop(model, data, bf16, tmp_path):
    """Same batches, masks, schedule, clipping and decay: the same weights, losses and reports, bitwise."""
    watch, own = Watch(), model()

    def autocast(model, batch):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            return model(**batch).loss.float()

    trainer = fit(
        tmp_path, model(), data(), callbacks=[watch], bf16=bf16, weight_decay=0.1, max_grad_norm=0.5,
        lr_scheduler_type="cosine", warmup_steps=2, adam_beta1=0.8, adam_beta2=0.95, adam_epsilon=1e-7,
    )  # fmt: skip
    als = {"weight_decay": 0.1, "max_grad_norm": 0.5, "betas": (0.8, 0.95), "eps": 1e-7}
    run = loop(trainer, watch, own, autocast, "cosine", **als)
    assert_same_run(trainer, own, run)
    reports = run[0].reports
    assert logged(trainer, "als/trials") == [r.trials for r in reports]
    assert logged(trainer, "als/factor") == [r.factor for r in reports]
    for i, unit in enumerate(reports[-1].units):
        assert logged(trainer, f"als/step_size/{unit.name}") == [r.units[i].step_size for r in reports]
    assert logged(trainer, "learning_rate")[1:3] == [0.5, 1.0]
    decay = {n: g["weight_decay"] for g in optimizer_of(trainer).param_groups for n in g["param_names"]}
    assert {n for n, d in decay.items() if d} == {n for n, p in own.named_parameters() if p.ndim > 1}
    assert max(logged(trainer, "als/trials")) > 1


def smoothed(model, batch):
    return LabelSmoother(0.1)(model(**batch), batch["labels"])


def own_loss(outputs, labels, num_items_in_batch=None):
    return nn.functional.multi_margin_loss(outputs.logits, labels)


def noisy(model, batch):
    """The loss with NEFTune's noise."""
    embedding = model.get_input_embeddings()
    embedding.neftune_noise_alpha = 5.0
    with embedding.register_forward_hook(neftune_post_forward_hook):
        return model(**batch).loss


@pytest.mark.slow(keep=4)
@pytest.mark.parametrize(
    ("data", "loss_of", "options"),
    [
        (labelled(), smoothed, {"label_smoothing_factor": 0.1}),
        (labelled(), lambda m, b: own_loss(m(**b), b["labels"]), {"compute_loss_func": own_loss}),
        (labelled(), noisy, {"neftune_noise_alpha": 5.0}),
        (labelled(45), None, {}),
        (Rows(labelled()), None, {}),
        (labelled(ragged=True), None, {"data_collator": padded}),
        (labelled(ragged=True), None, {"data_collator": padded, "train_sampling_strategy": "group_by_length"}),
        (labelled(), None, {"als": {"by": "model", "schedule": "sweep", "trust": 0.1, "max_grad_norm": None}}),
    ],
    ids=["smoothing", "loss_func", "neftune", "odd", "iterable", "ragged", "by_length", "als"],
)
@pytest.mark.filterwarnings("ignore:.*neftune.*:FutureWarning")
def test_the_ways_of_the_trainer_to_a_batch_and_to_its_loss(data, loss_of, options, tmp_path):
    watch, own = Watch(), bert()
    trainer = fit(tmp_path, bert(), data, callbacks=[watch], **options)
    assert_same_run(trainer, own, loop(trainer, watch, own, loss_of, **options.get("als", {})))


@pytest.mark.slow(keep=2)
@deprecated
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")  # a trial needs no gradient
@pytest.mark.parametrize("options", [{}, {"use_reentrant": True}, {"use_reentrant": False}], ids=str)
@both
def test_gradient_checkpointing_changes_nothing(model, data, options, tmp_path):
    plain = fit(tmp_path, model(), data())
    saving = fit(tmp_path, model(), data(), gradient_checkpointing=True, gradient_checkpointing_kwargs=options or None)
    assert saving.model.is_gradient_checkpointing
    assert_same(weights(plain.model), weights(saving.model))
    assert logged(plain, "loss") == logged(saving, "loss")


@pytest.mark.parametrize(
    ("model", "data", "scale", "tolerance"),
    [(llama, sequences(44), 1, 1e-9), (lambda: bert(**NO_DROPOUT, initializer_range=0.5), labelled(48), 4, 1e-5)],
    ids=["llama", "bert"],
)
def test_micro_batches_are_the_large_batch(model, data, scale, tolerance, tmp_path):
    """Llama's losses are means over the mini-batch, also if the last one is smaller.

    Those of BERT's micro-batches the Trainer adds up: a multiple of the loss, and so the same steps but for Adam's
    ``eps``, which keeps the biases of the keys from moving by rounding alone.
    """
    options = {"max_steps": -1, "num_train_epochs": 2, "max_grad_norm": 0, "adam_epsilon": 1e-12}
    whole = fit(tmp_path, model().double(), data, **options)
    micro = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    parts = fit(tmp_path, model().double(), data, **micro, **options)
    for name, p in whole.model.named_parameters():
        torch.testing.assert_close(parts.model.get_parameter(name), p, rtol=tolerance, atol=tolerance)
    assert logged(parts, "loss") == pytest.approx([scale * loss for loss in logged(whole, "loss")], rel=1e-6)
    assert logged(parts, "als/trials") == logged(whole, "als/trials")
    for trainer in (whole, parts):
        assert trainer.state.global_step == optimizer_of(trainer).param_groups[0]["count"] == 12


@pytest.mark.slow(keep=2)
@deprecated
@pytest.mark.parametrize(
    ("model", "data", "options"),
    [
        (bert, labelled, {}),
        (llama_with_dropout, sequences, {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4}),
        (lambda: bert().to(torch.bfloat16), labelled, {}),
        (llama_with_dropout, sequences, {"bf16": True}),
        (bert, labelled, {"als": {"c": 0.999, "max_trials": 1}, "gradient_checkpointing": True}),
        (bert, labelled, {"als": {"schedule": "sweep", "order": "random"}}),
    ],
    ids=["fp32", "accumulation", "weights_bf16", "bf16", "exhausted", "random_order"],
)
def test_resuming_amid_an_epoch_is_going_on(model, data, options, tmp_path):
    options = options | SAVING | {"max_steps": 8, "logging_steps": 2}
    straight = fit(tmp_path, model(), data(), **options)
    other = model()
    nn.init.ones_(other.get_input_embeddings().weight)
    resumed = fit(tmp_path, other, data(), resume=str(tmp_path / "checkpoint-3"), **options)
    assert_same(weights(straight.model), weights(resumed.model))
    assert_same(optimizer_of(straight).state_dict(), optimizer_of(resumed).state_dict())
    assert logged(straight, "loss")[2:] == logged(resumed, "loss")[2:]
    assert optimizer_of(straight).reports[3:] == optimizer_of(resumed).reports
    before = {u.outcome for r in optimizer_of(straight).reports[:3] for u in r.units}
    assert "exhausted" in before or "c" not in options.get("als", {})


def test_evaluation_changes_nothing_and_the_best_model_comes_back(tmp_path):
    """Without dropout, for the Trainer's loader of evaluation batches draws a seed."""
    evaluated = {"eval_strategy": "steps", "eval_steps": 2, "eval_dataset": labelled(16)}
    best = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 2, "load_best_model_at_end": True}
    stopping = hf.EarlyStoppingCallback(early_stopping_patience=1, early_stopping_threshold=10.0)
    plain, watched, stopped = watches = Watch(), Watch(), Watch()
    trainers = [
        fit(tmp_path, bert(**NO_DROPOUT), labelled(), callbacks=[watch, *further], **options)
        for watch, further, options in zip(
            watches, [[], [], [stopping]], [{}, evaluated, evaluated | best], strict=True
        )
    ]
    assert_same(plain.weights, watched.weights)
    assert plain.forwards == watched.forwards, "no step has to find out again what the cache may replay"
    assert_same(stopped.weights, plain.weights[:4])
    losses = logged(trainers[2], "eval_loss")
    assert losses == logged(trainers[1], "eval_loss")[:2]
    at = 2 * losses.index(min(losses)) + 2
    assert trainers[2].state.best_model_checkpoint == str(tmp_path / f"checkpoint-{at}")
    assert_same(weights(trainers[2].model), stopped.weights[at - 1])
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]


@pytest.fixture
def compiler(monkeypatch):
    """The arguments of a compiled model are left in the environment."""
    for name in ("BACKEND", "MODE", "USE_FULLGRAPH", "USE_DYNAMIC", "USE_REGIONAL_COMPILATION"):
        monkeypatch.setenv(f"ACCELERATE_DYNAMO_{name}", "")
        monkeypatch.delenv(f"ACCELERATE_DYNAMO_{name}")


@pytest.mark.slow(keep=1)
@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("als", [{}, {"cache": False}], ids=str)
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_model_takes_the_same_steps(backend, als, tmp_path):
    plain = fit(tmp_path, bert(), labelled(), als=als)
    compiled = make(tmp_path, bert(), labelled(), als=als, torch_compile=True, torch_compile_backend=backend)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        compiled.train()
    said = [w for w in caught if "compiled the blocks as parts of something larger" in str(w.message)]
    assert len(said) == (0 if als else 1)
    assert hasattr(compiled.model_wrapped, "_orig_mod")
    assert_same(weights(compiled.model), weights(plain.model))


def test_old_checkpoints_are_removed(tmp_path):
    fit(tmp_path, bert(), labelled(), **SAVING, save_total_limit=1)
    assert [p.name for p in tmp_path.glob("checkpoint-*")] == ["checkpoint-6"]


def test_a_plateau_lowers_lr(tmp_path):
    trainer = fit(
        tmp_path, bert(), labelled(), eval_strategy="steps", eval_steps=1, eval_dataset=labelled(8),
        lr_scheduler_type="reduce_lr_on_plateau", metric_for_best_model="eval_loss",
        lr_scheduler_kwargs={"patience": 0, "factor": 0.5, "threshold": 10.0, "threshold_mode": "abs"},
    )  # fmt: skip
    assert logged(trainer, "learning_rate") == [1.0, 1.0, 0.5, 0.25, 0.125, 0.0625]


def test_a_second_training_goes_on_and_a_new_model_gets_a_new_optimizer(tmp_path):
    trainer = make(tmp_path, bert(), labelled(), logging_steps=3)
    trainer.train()
    opt, first = optimizer_of(trainer), logged(trainer, "loss")
    trainer.train()
    assert optimizer_of(trainer) is opt
    assert opt.param_groups[0]["count"] == 12
    assert logged(trainer, "loss")[-1] < first[0]
    assert logged(trainer, "learning_rate") == [pytest.approx(2 / 3), pytest.approx(1 / 6)], "annealed anew"
    assert logged(trainer, "als/trials") == [
        sum(r.trials for r in opt.reports[i : i + 3]) / 3 for i in (6, 9)
    ]  # the log is the last training's

    trainer = make(tmp_path, None, labelled(), model_init=lambda: bert())
    trainer.train()
    models, losses, opt = trainer.model, logged(trainer, "loss"), optimizer_of(trainer)
    trainer.train()
    assert trainer.model is not models
    assert optimizer_of(trainer) is not opt
    assert logged(trainer, "loss") == losses


def test_an_interrupted_accumulation_is_forgotten(tmp_path):
    class Interrupt(hf.TrainerCallback):
        done = False

        def on_substep_end(self, *args, **kwargs):
            if not self.done:
                self.done = True
                raise KeyboardInterrupt

    trainer = make(
        tmp_path, bert(), labelled(), callbacks=[Interrupt()], gradient_accumulation_steps=2,
        per_device_train_batch_size=4,
    )  # fmt: skip
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.train()
    assert logged(trainer, "loss")[0] == pytest.approx(2 * 1.1, rel=0.1), "three micro-batches have a loss of 3.3"


def test_a_smaller_batch_is_found(tmp_path):
    sizes = []

    def crowded(outputs, labels, num_items_in_batch=None):
        sizes.append(len(labels))
        if len(labels) > 4:
            raise RuntimeError("CUDA out of memory.")
        return nn.functional.cross_entropy(outputs.logits, labels)

    trainer = fit(
        tmp_path, bert(), labelled(), auto_find_batch_size=True, compute_loss_func=crowded,
        per_device_train_batch_size=5, gradient_accumulation_steps=2, max_steps=3,
    )  # fmt: skip
    assert sizes[0] == 5
    assert set(sizes[1:]) == {4}
    assert trainer.state.global_step == optimizer_of(trainer).param_groups[0]["count"] == 3


def test_a_method_that_the_user_has_put_on_an_instance_stays(tmp_path):
    trainer, calls = make(tmp_path, bert(), labelled()), []
    plain = trainer.accelerator.backward
    trainer.accelerator.backward = lambda loss, **more: (calls.append(loss), plain(loss, **more))
    trainer.train()
    assert len(calls) == trainer.state.global_step > 1


def test_a_loss_that_is_not_finite_moves_nothing(tmp_path):
    watch = Watch()

    def loss(outputs, labels, num_items_in_batch=None):
        return nn.functional.cross_entropy(outputs.logits, labels) * (float("nan") if len(watch.weights) == 2 else 1)

    trainer = make(tmp_path, bert(), labelled(), compute_loss_func=loss, callbacks=[watch])
    with pytest.warns(UserWarning, match="step 3: .*nan") as caught:
        trainer.train()
    assert len(caught) == 1
    assert_same(watch.weights[2], watch.weights[1])
    moved = [not torch.equal(a["classifier.weight"], b["classifier.weight"]) for a, b in zip(
        watch.weights, watch.weights[1:], strict=False)]  # fmt: skip
    assert moved == [True, False, True, True, True]
    assert logged(trainer, "loss")[2] == 0.0, "the Trainer's own way to log it"
    assert [round(x) for x in logged(trainer, "loss")] == [1, 1, 0, 1, 1, 1]
    assert len(logged(trainer, "als/trials")) == 5
    assert optimizer_of(trainer).param_groups[0]["count"] == 5


@pytest.mark.filterwarnings("ignore:.*Profiler clears events:UserWarning")  # of torch 2.11
def test_hooks_callbacks_and_the_profiler_see_a_step_once(tmp_path):
    seen = []

    class Steps(hf.TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
            seen.append(("before", sum(p.grad.abs().sum() for p in model.parameters()) > 0))

        def on_optimizer_step(self, *args, **kwargs):
            seen.append(("after", True))

    def hook(optimizer):
        optimizer.optimizer.register_step_post_hook(lambda *_: seen.append(("hook", True)))

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        fit(tmp_path, bert(num_hidden_layers=1), labelled(), max_steps=2, callbacks=[Steps(), Watch(act=hook)])
    assert seen == [("hook", True), ("before", True), ("after", True)] * 2
    steps = [e for e in profiler.key_averages() if e.key.startswith("Optimizer.step")]
    assert [e.count for e in steps] == [2]


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"optim": "adafactor"}, ValueError, "makes its own optimizer"),
        ({"optim": "adamw_torch_8bit"}, ValueError, "makes its own optimizer"),
        ({"optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 1.0})}, ValueError, "makes its own optimizer"),
        ({"fp16": True}, ValueError, "fp16=True scales the gradients"),
        ({"als": {"learning_rate": 1e-3}}, TypeError, "no argument 'learning_rate': there are .*by.*schedule"),
        ({"als": {"model": None}}, TypeError, "no argument 'model'"),
        ({"als": "relay"}, TypeError, "als='relay': pass the arguments"),
        ({"als": {"c": 5}}, ValueError, "c must be between 0 and 1"),
    ],
    ids=lambda x: str(next(iter(x))) if isinstance(x, dict) else None,
)
def test_what_a_line_search_cannot_do_is_refused(options, error, match, tmp_path):
    with pytest.raises(error, match=match):
        make(tmp_path, bert(), labelled(), **options)


def test_the_mixin_comes_first():
    with pytest.raises(TypeError, match=r"class Wrong\(LineSearch, Trainer\)"):
        type("Wrong", (hf.Trainer, LineSearch), {})


def test_a_step_of_several_losses_is_refused(tmp_path):
    class Twice(hf.Trainer):
        def training_step(self, *args):
            return super().training_step(*args) + super().training_step(*args)

    searching = type("Searching", (LineSearch, Twice), {})
    with pytest.raises(RuntimeError, match=r"Searching.training_step has differentiated 2"):
        fit(tmp_path, bert(), labelled(), trainer=searching)


def test_other_optimizers_and_schedulers_are_refused(tmp_path):
    model = bert()
    other = torch.optim.SGD(model.parameters(), lr=1.0)
    lr = torch.optim.lr_scheduler.ConstantLR(other)
    for given in [(other, None), (fastals.ALS(model), None), (other, lr), (None, lr)]:
        with pytest.raises(ValueError, match="makes its own optimizer"):
            make(tmp_path, model, labelled(), optimizers=given)


def test_arguments_without_a_meaning_are_said_once(tmp_path):
    with pytest.warns(UserWarning, match="learning_rate=0.001 has no meaning") as caught:
        trainer = fit(tmp_path, bert(), labelled(), learning_rate=1e-3, max_steps=2)
    assert [w.filename for w in caught] == [helpers.trainers.__file__], "it is said to whoever makes the trainer"
    assert logged(trainer, "learning_rate")[0] == 1.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make(tmp_path, bert(), labelled(), learning_rate=5e-5)


def test_the_logs_reach_tensorboard(tmp_path, monkeypatch):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator").EventAccumulator
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    trainer = fit(tmp_path, bert(), labelled(), report_to="tensorboard")
    events = accumulator(str(tmp_path / "events"))
    events.Reload()
    steps = [f"als/step_size/{u.name}" for u in optimizer_of(trainer).report.units]
    for name in ["loss", "als/trials", "als/factor", *steps]:
        scalars = events.Scalars(f"train/{name}")
        assert [s.step for s in scalars] == [1, 2, 3, 4, 5, 6]
        assert [s.value for s in scalars] == pytest.approx(logged(trainer, name), rel=1e-6)


def test_the_logs_reach_trackio(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # which it reads when it is imported
    trackio = pytest.importorskip("trackio")
    trainer = fit(tmp_path, bert(), labelled(), report_to="trackio", project="searches", run_name="one")
    rows = trackio.sqlite_storage.SQLiteStorage.get_logs("searches", "one")
    for name in ("loss", "als/trials", "als/step_size/embeddings"):
        assert [row[f"train/{name}"] for row in rows if f"train/{name}" in row] == logged(trainer, name)
