"""Kills, full disks, damaged and foreign files: a run goes on bit by bit, or says what is wrong and changes nothing."""

import errno
import io
import json
import multiprocessing
import os
import random
import shutil
from contextlib import suppress
from pathlib import Path
from unittest import mock

import pytest
import torch
from helpers import deaths, films
from helpers.commands import spoken, stopped
from helpers.tiny import TinyTransformer, assert_same, tiny_batches
from helpers.trainers import bert, fit, labelled, logged, make, weights
from transformers import Trainer

import fastals
from fastals.cli.errors import UserError
from fastals.cli.runs import RunFolder
from fastals.files import move, remove, replacing
from fastals.integrations.transformers import UNFINISHED, ALSTrainer

# Each list is the deaths of one training: it goes on after each, and writes a checkpoint after each of 12 steps.
NASTY = {
    "finetune": [
        ("replace", 1, "before"),  # the folder is there under another name
        ("save", 2, "amid"),
        ("fsync", 5, "before"),
        ("replace", 2, "before"),
        ("replace", 3, "after"),
        ("save", 8, "after"),
        ("replace", 3, "after"),  # the model is there, and no summary
        ("replace", 2, "after"),  # the model is moved away for another
        ("replace", 3, "after"),  # the summary is there, and a checkpoint
    ],
    "trainer": [("save", 6, "amid"), ("replace", 2, "before"), ("fsync", 9, "before"), ("replace", 1, "after")],
}
RUNS = {"finetune": deaths.Finetune, "trainer": lambda folder: deaths.Training(folder, best=True)}


@pytest.mark.parametrize("kind", NASTY)
def test_a_training_that_is_killed_at_the_worst_instants_comes_to_the_same_end(kind, tmp_path):
    multiprocessing.get_context("forkserver").set_forkserver_preload(deaths.PRELOADED)
    for name in ("straight", "killed"):
        (tmp_path / name).mkdir()
    expected, _ = deaths.whole(RUNS[kind](tmp_path / "straight"))
    run = RUNS[kind](tmp_path / "killed")
    for instant in NASTY[kind]:
        process = run.start(instant)
        process.join(60)
        assert process.exitcode == -9, f"{instant}: {(run.folder / 'log').read_text()[-500:]}"
    assert_same(deaths.whole(run)[0], expected)


@pytest.fixture(scope="module")
def halted(tmp_path_factory):
    """A run of 4 steps that a Ctrl-C has stopped after the third, and its metrics when nothing stops it."""
    folder = tmp_path_factory.mktemp("halted")
    films.save_model(folder / "model")
    films.save_table(folder / "films.csv")
    for name, step in (("straight", None), ("run", 2)):
        stopped(films.arguments(folder / "model", folder / "films.csv", folder / name, "--steps", "4"), step)
    return folder


@pytest.fixture
def run(halted, tmp_path):
    """A copy of the stopped run."""
    return Path(shutil.copytree(halted / "run" / "runs" / "one", tmp_path / "one"))


def contents(folder):
    """Every file of a folder with its bytes."""
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(run, *words):
    """Try to resume: one line that says what is wrong and what to do, exit code 2, and nothing changed."""
    before = contents(run)
    code, _, error = spoken(["finetune", "--resume", str(run)])
    assert code == 2, error
    assert error.startswith("fastals: ")
    assert error.count("\n") == 1, error
    for word in words:
        assert word in error
    assert contents(run) == before


def goes_on(run, halted):
    """Resume: the end is that of a run that was not stopped."""
    code, _, error = spoken(["finetune", "--resume", str(run)])
    assert code == 0, error
    straight = halted / "straight" / "runs" / "one"
    assert films.lines(run) == films.lines(straight)
    assert_same(dict(films.weights(run)), dict(films.weights(straight)))


def edited(run, change):
    """Change what the checkpoint holds; its checksums are right."""
    state = torch.load(run / "checkpoint.pt", weights_only=True)
    state = change(state) or state
    torch.save(state, run / "checkpoint.pt")


def test_a_stopped_run_goes_on(run, halted):
    goes_on(run, halted)
    assert sorted(path.name for path in run.iterdir()) == [
        "config.json", "loss.png", "metrics.jsonl", "model", "report.html", "step_sizes.png", "summary.json",
    ]  # fmt: skip


def test_a_checkpoint_of_an_older_version_goes_on(run, halted):
    """It does not say of which run it is."""
    edited(run, lambda state: {k: v for k, v in state.items() if k != "run"})
    config = json.loads((run / "config.json").read_text())
    del config["data"], config["adamw_lr"]
    (run / "config.json").write_text(json.dumps(config | {"from_the_future": 1}))
    goes_on(run, halted)


def test_a_line_of_metrics_that_was_cut_short_is_dropped(run, halted):
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "loss_be')
    goes_on(run, halted)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.5, 0.9, 0.99, 0.9999])
def test_a_truncated_checkpoint_is_refused(run, share):
    whole = (run / "checkpoint.pt").read_bytes()
    (run / "checkpoint.pt").write_bytes(whole[: int(share * len(whole))])
    refused(run, "checkpoint.pt is damaged", "to begin the run anew")


def flipped(whole, place, bit=0):
    """The bytes with one bit changed."""
    damaged = bytearray(whole)
    damaged[place] ^= 1 << bit
    return bytes(damaged)


def test_flipped_bits_are_found_or_change_nothing(run):
    """Most bits of the file are in numbers, which ``torch.load`` takes as they come."""
    chance, whole, found = random.Random(0), (run / "checkpoint.pt").read_bytes(), 0
    expected = torch.load(run / "checkpoint.pt", weights_only=True)
    for _ in range(100):
        (run / "checkpoint.pt").write_bytes(flipped(whole, chance.randrange(len(whole)), chance.randrange(8)))
        try:
            state = RunFolder(run).load_checkpoint({})
        except UserError:
            found += 1
        else:
            assert_same(state, expected)
    assert found > 60
    (run / "checkpoint.pt").write_bytes(flipped(whole, len(whole) // 2))
    refused(run, "checkpoint.pt is damaged", "checksum")


class Harmful:
    """Pickled, this is a call that leaves a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_a_checkpoint_with_code_in_it_is_refused_and_not_run(run, tmp_path):
    edited(run, lambda state: state | {"seconds": Harmful(tmp_path / "was_run")})
    (tmp_path / "was_run").unlink(missing_ok=True)
    refused(run, "checkpoint.pt is damaged")
    assert not (tmp_path / "was_run").exists()


def first(values):
    return values[next(iter(values))]


def changed(values, name, value):
    values[name] = value


FOREIGN = {
    "no dict": lambda s: [s],
    "no step": lambda s: s.pop("step") and None,
    "no model": lambda s: s.pop("model") and None,
    "no weight": lambda s: s["model"].pop("classifier.weight") is None,
    "no moments": lambda s: first(s["optimizer"]["state"]).pop("exp_avg_sq") is None,
    "no state": lambda s: s["optimizer"].pop("state") and None,
    "no constant": lambda s: s["optimizer"]["param_groups"][0].pop("c") and None,
    "a text for a step": lambda s: changed(s, "step", "3"),
    "a text for a dict": lambda s: changed(s, "scheduler", "none"),
    "a text for a moment": lambda s: changed(first(s["optimizer"]["state"]), "exp_avg_sq", "none"),
    "a text for a constant": lambda s: changed(s["optimizer"]["param_groups"][0], "c", "none"),
    "a text for the state": lambda s: changed(s["optimizer"], "state", "none"),
    "beyond the end": lambda s: changed(s, "step", 5),
    "before the start": lambda s: changed(s, "step", -1),
    "another step": lambda s: changed(s, "step", 2),
    "NaN in a weight": lambda s: changed(s["model"], "classifier.bias", torch.full((2,), float("nan"))),
    "NaN in a moment": lambda s: first(s["optimizer"]["state"])["exp_avg_sq"].fill_(float("nan")) is None,
    "NaN in a memory": lambda s: changed(s["optimizer"]["param_groups"][0], "step_size", float("nan")),
    "NaN in a constant": lambda s: changed(s["optimizer"]["param_groups"][0], "trust", float("nan")),
    "another dtype": lambda s: changed(s["model"], "classifier.bias", s["model"]["classifier.bias"].double()),
    "another shape": lambda s: changed(s["model"], "classifier.bias", torch.zeros(3)),
    "moments of another shape": lambda s: changed(first(s["optimizer"]["state"]), "exp_avg_sq", torch.zeros(7)),
    "other units": lambda s: s["optimizer"]["param_groups"].pop() and None,
    "another seed": lambda s: changed(s["run"], "seed", 1),
    "another optimizer": lambda s: changed(s["run"], "optimizer", "adamw"),
    "no random state": lambda s: changed(s, "rng", [(torch.zeros(3, dtype=torch.uint8), {})]),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_a_foreign_or_tampered_checkpoint_is_refused(run, case):
    edited(run, FOREIGN[case])
    refused(run, "checkpoint.pt is damaged or of another run", "put back a copy of it")


def test_a_checkpoint_of_another_model_is_refused(run, halted, tmp_path):
    films.save_model(tmp_path / "model", intermediate_size=64)
    shutil.copy(halted / "films.csv", tmp_path)
    stopped(films.arguments(tmp_path / "model", tmp_path / "films.csv", tmp_path, "--steps", "4"), 2)
    shutil.copy(tmp_path / "runs" / "one" / "checkpoint.pt", run)
    refused(run, "checkpoint.pt is damaged or of another run")


def cut(path):
    path.write_bytes(path.read_bytes()[:40])


def emptied(path):
    path.write_bytes(b"")


def binary(path):
    path.write_bytes(bytes(range(256)))


def a_folder(path):
    path.unlink()
    path.mkdir()


def deep(path):
    path.write_text("[" * 100_000)


@pytest.mark.parametrize("name", ["checkpoint.pt", "config.json", "metrics.jsonl", "summary.json"])
@pytest.mark.parametrize("damage", [cut, emptied, binary, a_folder, deep])
def test_a_damaged_file_is_refused(run, name, damage):
    path = run / name
    path.touch()
    damage(path)
    refused(run, name, "put back a copy")


@pytest.mark.parametrize("name", ["checkpoint.pt", "config.json", "metrics.jsonl"])
def test_a_file_that_may_not_be_read_is_refused(run, name, monkeypatch):
    plain = io.open

    def guarded(file, *args, **kwargs):
        if str(file) == str(run / name):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(file))
        return plain(file, *args, **kwargs)

    before = contents(run)
    monkeypatch.setattr(io, "open", guarded)
    code, _, error = spoken(["finetune", "--resume", str(run)])
    monkeypatch.undo()
    assert (code, error.count("\n")) == (2, 1), error
    assert f"{name} cannot be read (Permission denied)" in error
    assert contents(run) == before


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"steps": "many"}, "steps is 'many'"),
        ({"batch_size": 0}, "--batch-size must be at least 1"),
        ({"compare": 1}, "compare is 1"),
        ({"options": [["c"]]}, "damaged"),
        ({"options": [["model", "x"]]}, "unknown option"),
        ({"optimizer": "../../adamw"}, "optimizer is none of"),
        ({"precision": "fp8"}, "precision is none of"),
        ({"seed": 1}, "it was saved with seed=0"),
        ({"data": "1234"}, "has changed since the run began"),
    ],
    ids=str,
)
def test_a_tampered_configuration_is_refused(run, change, word):
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | change))
    refused(run, word)


@pytest.mark.parametrize(
    ("lines", "word"),
    [
        (lambda lines: lines[:2], "the lines of 2 steps of 3"),
        (lambda lines: [lines[0], lines[2], lines[1]], "line 2 is of step 3"),
        (lambda lines: [lines[0], lines[1][:30], lines[2]], "line 2"),
        (lambda lines: [lines[0], "{}", lines[2]], "line 2: 'step is missing'"),
        (lambda lines: [lines[0], "\x00" * 50, lines[2]], "line 2"),
    ],
    ids=["fewer", "another order", "cut", "empty", "zeros"],
)
def test_tampered_metrics_are_refused(run, lines, word):
    path = run / "metrics.jsonl"
    path.write_text("".join(f"{line}\n" for line in lines(path.read_text().splitlines())))
    refused(run, "metrics.jsonl is damaged", word)


def test_other_data_is_refused(run, halted):
    table = halted / "films.csv"
    before = table.read_text()
    table.write_text(before.replace("plot", "score", 1))
    try:
        refused(run, "has changed since the run began")
    finally:
        table.write_text(before)


def test_a_report_of_damaged_files_is_refused(run, halted, tmp_path):
    finished = Path(shutil.copytree(halted / "straight" / "runs" / "one", tmp_path / "finished"))
    summary = json.loads((finished / "summary.json").read_text())
    for name, text in (
        ("summary.json", '{"steps": 4}'),
        ("summary.json", json.dumps(summary | {"trials": "many"})),
        ("summary.json", json.dumps(summary | {"versions": "all"})),
        ("metrics.jsonl", '{"step": 1}\n'),
        ("config.json", '{"steps": "many"}'),
    ):
        before = (finished / name).read_text()
        (finished / name).write_text(text)
        code, _, error = spoken(["report", str(finished), "--output", str(tmp_path / "pictures")])
        assert (code, error.count("\n")) == (2, 1)
        assert f"{name} is damaged" in error
        assert not (tmp_path / "pictures" / "report.html").exists()
        (finished / name).write_text(before)


@pytest.mark.parametrize("parts", [["there"], ["there", "below"]])
def test_an_output_that_is_a_file_is_refused(halted, tmp_path, parts):
    (tmp_path / "there").write_text("")
    command = films.arguments(halted / "model", halted / "films.csv", tmp_path, "--steps", "1")
    command[command.index("--output") + 1] = str(tmp_path.joinpath(*parts))
    code, _, error = spoken(command)
    assert (code, error.count("\n")) == (2, 1), error
    assert "choose another --output" in error


def full(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class FullFile(io.BytesIO):
    """A file that takes a kilobyte."""

    def write(self, data):
        return full() if self.tell() + len(data) > 1024 else super().write(data)


def full_for_bytes(path, mode="r", *args, **kwargs):
    return FullFile() if "b" in mode else io.open(path, mode, *args, **kwargs)  # noqa: UP020


def full_for_lines(path, mode="r", *args, **kwargs):
    """The disk has room for a part of the line."""
    if mode == "a":
        path.write_text(path.read_text() + '{"step": 4, "loss_b')
        full()
    return io.open(path, mode, *args, **kwargs)  # noqa: UP020


FULL = {  # what meets the full disk, in a run that goes on after its third step and writes a checkpoint at its end
    "metrics that are kept": (Path, "write_text", full),
    "metrics of a step": (Path, "open", full_for_lines),
    "checkpoint": (Path, "open", full_for_bytes),
    "its flush": (os, "fsync", full),
    "its name": (os, "replace", full),
}


@pytest.mark.parametrize("case", FULL)
def test_a_full_disk_ends_a_run_that_goes_on_when_there_is_room(run, halted, case):
    before = (run / "checkpoint.pt").read_bytes()
    with mock.patch.object(*FULL[case]):
        code, _, error = stopped(["finetune", "--resume", str(run)], 3)
    assert (code, error.count("\n")) == (2, 1), error
    assert "No space left on device" in error
    assert f"fastals finetune --resume {run}" in error
    assert (run / "checkpoint.pt").read_bytes() == before
    assert not list(run.glob(".*"))
    goes_on(run, halted)


def test_a_full_disk_at_the_end_leaves_no_half_model(run, halted):
    with mock.patch("transformers.PreTrainedModel.save_pretrained", full):
        code, _, error = spoken(["finetune", "--resume", str(run)])
    assert (code, error.count("\n")) == (2, 1), error
    assert "model cannot be written (No space left on device)" in error
    assert not (run / "model").exists()
    goes_on(run, halted)


def test_a_full_disk_leaves_the_last_checkpoint_of_a_trainer(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2}
    straight = fit(tmp_path / "straight", bert(), labelled(), **options)
    plain, calls = torch.save, []

    def filling(*args, **kwargs):
        calls.append(1)
        return full() if len(calls) > 6 else plain(*args, **kwargs)

    broken = tmp_path / "broken"
    with mock.patch.object(torch, "save", filling), pytest.raises(OSError, match="No space left"):
        fit(broken, bert(), labelled(), **options)
    assert [path.name for path in broken.iterdir()] == ["checkpoint-2"]
    resumed = fit(broken, bert(), labelled(), resume=True, **options)
    assert_same(weights(straight.model), weights(resumed.model))


class Pushing(ALSTrainer):
    """Sees what would be pushed to the hub."""

    def _push_from_checkpoint(self, checkpoint_folder):
        self.pushed = [*getattr(self, "pushed", []), (Path(checkpoint_folder), sorted(os.listdir(checkpoint_folder)))]


def test_checkpoints_of_a_trainer_are_those_of_transformers(tmp_path):
    """The same files in the same places, when they are pushed too; states name the best one by its place."""
    options = {"eval_strategy": "steps", "eval_steps": 1, "eval_dataset": labelled(16), "load_best_model_at_end": True}
    trainer = make(tmp_path, bert(), labelled(), trainer=Pushing, save_strategy="steps", save_steps=1, **options)
    trainer.args.push_to_hub = True
    trainer.train()
    plain = fit(tmp_path / "plain", bert(), labelled(), trainer=Trainer, save_strategy="steps", save_steps=1)
    wanted = sorted(os.listdir(f"{plain.args.output_dir}/checkpoint-6"))
    places = [tmp_path / f"checkpoint-{step}" for step in range(1, 7)]
    assert trainer.pushed == [(place, wanted) for place in places]
    assert sorted(tmp_path.iterdir()) == sorted([*places, tmp_path / "plain"])
    losses = logged(trainer, "eval_loss")
    for step, place in enumerate(places, start=1):
        best = json.loads((place / "trainer_state.json").read_text())["best_model_checkpoint"]
        assert best == str(places[losses.index(min(losses[:step]))])
    assert trainer.state.best_model_checkpoint == best


def test_a_second_training_takes_the_place_of_checkpoints_that_are_there(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 3}
    fit(tmp_path, bert(), labelled(), **options)
    (tmp_path / "checkpoint-3" / "optimizer.pt").write_text("damaged")
    (tmp_path / UNFINISHED).mkdir()
    (tmp_path / UNFINISHED / "checkpoint-3").write_text("of a kill")
    fit(tmp_path, bert(), labelled(), **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-3", "checkpoint-6"]
    torch.load(tmp_path / "checkpoint-3" / "optimizer.pt", weights_only=True)


def test_a_checkpoint_that_is_removed_at_the_end_vanishes_as_a_whole(tmp_path):
    """The best one alone is to stay, which is the first; the training stops while the last one is being removed."""
    options = deaths.BEST | {"eval_dataset": labelled(16), "greater_is_better": True}
    options |= {"save_strategy": "steps", "save_steps": 1, "metric_for_best_model": "eval_loss"}

    def stopping(path, **_):
        states = list(Path(path).rglob("trainer_state.json"))
        if states and json.loads(states[0].read_text())["global_step"] == 6:
            states[0].unlink()
            raise SystemExit
        return plain(path)

    plain = shutil.rmtree
    with mock.patch.object(shutil, "rmtree", stopping), pytest.raises(SystemExit):
        fit(tmp_path, bert(), labelled(), **options)
    resumed = fit(tmp_path, bert(), labelled(), resume=True, **options)
    assert_same(weights(fit(tmp_path / "straight", bert(), labelled(), **options).model), weights(resumed.model))


@pytest.mark.parametrize("damage", [lambda whole: whole[:-1], lambda whole: b"", lambda whole: flipped(whole, -9000)])
def test_a_damaged_checkpoint_of_a_trainer_is_refused(tmp_path, damage):
    fit(tmp_path, bert(), labelled(), save_strategy="steps", save_steps=3)
    path = tmp_path / "checkpoint-6" / "optimizer.pt"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"go back to an earlier one: optimizer\.pt is"):
        fit(tmp_path, bert(), labelled(), resume=True)
    fit(tmp_path, bert(), labelled(), resume=str(tmp_path / "checkpoint-3"))


@pytest.mark.parametrize("kind", ["file", "folder"])
@pytest.mark.parametrize("before", ["nothing", "file", "folder"])
def test_what_is_replaced_is_old_or_new(tmp_path, kind, before):
    target = tmp_path / "target"

    def put(path, what, text):
        if what == "folder":
            path.mkdir()
            path = path / "inside"
        if what != "nothing":
            path.write_text(text)

    put(target, before, "old")
    old = contents(tmp_path)
    with suppress(KeyboardInterrupt), replacing(target) as path:
        put(path, kind, "new")
        raise KeyboardInterrupt
    assert contents(tmp_path) == old
    with replacing(target) as path:
        put(path, kind, "new")
    assert list(contents(tmp_path).values()) == [b"new"]
    with pytest.raises(FileNotFoundError):
        move(tmp_path / "nowhere", target)
    assert list(contents(tmp_path).values()) == [b"new"]
    remove(target)
    remove(target)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs the names of open files")
def test_bytes_are_on_the_disk_before_their_name_is(tmp_path, monkeypatch):
    """Which no kill of a process can show."""
    done, sync, rename = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (done.append(Path(os.readlink(f"/proc/self/fd/{fd}"))), sync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (done.append("rename"), rename(a, b)))
    with replacing(tmp_path / "file") as path:
        path.write_text("new")
    with replacing(tmp_path / "folder") as folder:
        folder.mkdir()
        (folder / "inside").write_text("new")
    assert done == [path, "rename", tmp_path, folder / "inside", folder, "rename", tmp_path]


def optimized(**options):
    torch.manual_seed(0)
    model = TinyTransformer(depth=2, width=6)
    opt = fastals.ALS(model, **options)
    for batch in tiny_batches(2):
        opt.step(lambda: model(**batch))  # noqa: B023
    return opt


BROKEN = {
    "another optimizer": (lambda s: s["param_groups"][0].pop("backtrack"), "saved by another optimizer"),
    "no groups": (lambda s: s.pop("param_groups"), "no list .param_groups"),
    "text": (lambda s: changed(first(s["state"]), "exp_avg_sq", "x"), "no tensor of real numbers .exp_avg_sq"),
    "NaN": (lambda s: first(s["state"])["exp_avg_sq"].view(-1)[0].fill_(float("nan")), "is damaged"),
    "constant": (lambda s: changed(s["param_groups"][0], "c", 2.0), "c must be between 0 and 1"),
    "memory": (lambda s: changed(s["param_groups"][1], "factor", float("inf")), "factor must be 0 or more"),
    "memory of text": (lambda s: changed(s["param_groups"][1], "factor", "x"), "factor must be 0 or more"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_damaged_state_is_refused_and_changes_nothing(case):
    damage, message = BROKEN[case]
    opt = optimized()
    before, state = opt.state_dict(), optimized(trust=0.1).state_dict()
    damage(state)
    with pytest.raises(ValueError, match=message):
        opt.load_state_dict(state)
    assert_same(opt.state_dict(), before)
