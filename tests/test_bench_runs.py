"""Rivals, and the runs of the convergence benchmark."""

from types import SimpleNamespace

import pytest
import records
import report
import torch


@pytest.mark.proves(claim="captured-adamw")
@pytest.mark.gpu
def test_a_captured_adamw_takes_the_steps_of_adamw():
    from rivals import RIVALS
    from shapes import bert

    models = [bert(2, 96, 4).eval().cuda() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    plain, captured = RIVALS["adamw"](models[0]), RIVALS["adamw-captured"](models[1])
    generator = torch.Generator().manual_seed(0)
    for t in range(5):
        ids = torch.randint(1000, 2000, (4, 16), generator=generator)
        batch = {"input_ids": ids.cuda(), "labels": (ids[:, 0] % 5).cuda()}
        for _ in range(3 if t == 0 else 0):  # that the captured one takes before its capture
            plain.step(batch)
        assert float(captured.step(batch)) == pytest.approx(float(plain.step(batch)), rel=1e-3)
    for p, q in zip(*(m.parameters() for m in models), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_peak_memory_is_that_of_a_process_of_its_own():
    from memory import peak_mib

    assert 50 < peak_mib("width-192", "adamw", {}, "cpu") < 5000


def capped_step(model, optimizer, inputs):
    optimizer.zero_grad()
    model(inputs).square().sum().backward()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.step()
    return [p.detach() - q for p, q in zip(model.parameters(), before, strict=True)]


def test_units_without_a_search_move_by_their_share_along_adam():
    from capped import Capped

    torch.manual_seed(0)
    models = [torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.Linear(4, 3)).double() for _ in range(2)]
    with torch.no_grad():
        models[0][1].weight.mul_(10)
    groups = [{"params": [*layer.parameters()]} for layer in models[0]]
    capped = Capped(groups, trust=0.01)
    adam = torch.optim.Adam(models[1].parameters(), lr=1.0, betas=(0.0, 0.999))
    inputs = torch.randn(5, 6, dtype=torch.float64)
    inputs[:, 2] = 0  # a column of weights without a gradient
    for lr in (1.0, 0.5):
        models[1].load_state_dict(models[0].state_dict())
        weights = [torch.cat([p.detach().flatten() for p in g["params"]]) for g in groups]
        for group in capped.param_groups:
            group["lr"] = lr
        moves, directions = capped_step(models[0], capped, inputs), capped_step(models[1], adam, inputs)
        of_model = torch.cat(weights).square().mean().sqrt()
        for k, unit in enumerate(weights):
            move, direction = (torch.cat([m.flatten() for m in ms[2 * k : 2 * k + 2]]) for ms in (moves, directions))
            length = move[move != 0].square().mean().sqrt()
            usual = min(1.0, float(direction[direction != 0].square().mean().sqrt()))
            expected = lr * 0.01 * float(max(unit.square().mean().sqrt(), of_model)) * usual
            assert float(length) == pytest.approx(expected, rel=1e-6)
            torch.testing.assert_close(move / move.norm(), direction / direction.norm(), rtol=1e-6, atol=1e-9)
        assert (moves[0][:, 2] == 0).all()


def test_units_without_a_gradient_or_a_slope_stay():
    from capped import Capped

    still, unused = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
    optimizer = Capped([{"params": [still]}, {"params": [unused]}], trust=0.1)
    still.grad = torch.zeros(2)
    optimizer.step()
    assert still.tolist() == unused.tolist() == [1.0, 1.0]


def test_averaged_weights_are_read_at_rest_only():
    from rivals import RIVALS

    model, batches = tiny_task().model(0), list(tiny_task().batches("full", 0, 3))
    rival = RIVALS["averaged"](model, decay=0.25)
    mean = [p.detach().clone() for p in model.parameters()]
    for t, batch in enumerate(batches):
        rival.step(batch)
        keep = min(0.25, (t + 2) / (t + 11))
        mean = [keep * m + (1 - keep) * p.detach() for m, p in zip(mean, model.parameters(), strict=True)]
    assert not all(torch.allclose(m, p) for m, p in zip(mean, model.parameters(), strict=True))
    rival.rest()
    for m, p in zip(mean, model.parameters(), strict=True):
        torch.testing.assert_close(p.detach(), m)


def arguments(**more):
    import methods

    defaults = {"seeds": 2, "steps": [10], "tasks": ["tweets"], "regimes": ["full"], "methods": None, "als": []}
    defaults |= {"equal_work": False, "processes": 1, "threads": 1}
    return methods, SimpleNamespace(**defaults | more)


def test_all_seeds_of_the_most_telling_methods_come_first():
    methods, asked = arguments(tasks=["tweets", "dialogues-lora"], steps=[20, 10])
    runs = methods.planned(asked)
    assert [(r.seed, r.task, r.method) for r in runs[:4]] == [
        (0, "tweets", "als"), (0, "dialogues-lora", "als"), (0, "tweets", "adamw 0.0001"),
        (0, "dialogues-lora", "adamw 0.001"),
    ]  # fmt: skip
    assert [r.steps for r in runs] == sorted((r.steps for r in runs), reverse=True)
    first, second = ([r for r in runs if r.steps == steps] for steps in (20, 10))
    assert [r._replace(steps=10) for r in first] == second
    telling = {r.method for r in second[: 2 * methods.TELLING] if r.task == "tweets"}
    assert [r.method in telling for r in second if r.task == "tweets"] == sorted(
        (r.method in telling for r in second if r.task == "tweets"), reverse=True
    )
    assert len(telling) == methods.TELLING
    for task in asked.tasks:
        how = [r.how for r in second if r.task == task]
        assert {h.options["lr"] for h in how if h.rival == "adamw"} == set(methods.rates(task))
        assert {h.options["trust"] for h in how if h.rival == "capped"} == set(methods.shares(task))
        assert sum(r.task == task and r.method == "eager" for r in second) == 1


def test_als_takes_fewer_steps_at_equal_work():
    methods, asked = arguments(methods=["als, equal work"], als=[{"trust": 2.0}], equal_work=True, seeds=1)
    runs = {r.method: r.how for r in methods.planned(asked)}
    assert list(runs) == ["als, equal work", 'als {"trust": 2.0}', 'als {"trust": 2.0}, equal work']
    assert round(240 * runs["als, equal work"].times) == round(240 * 3 / methods.COST)
    assert runs['als {"trust": 2.0}'].times == 1
    assert runs['als {"trust": 2.0}, equal work'] == methods.Method("als", {"trust": 2.0}, 3 / methods.COST)


def tiny_task():
    """Two classes of random tokens, and a BERT of one block."""
    import tasks
    import transformers

    class Tiny(tasks.Classification):
        batch = 4

        def __init__(self):
            tasks.Task.__init__(self, "cpu")
            self.train, self.held_out = list(range(20)), list(range(20, 60))
            generator = torch.Generator().manual_seed(0)
            self.ids = torch.randint(50, (60, 5), generator=generator)

        def _model(self):
            config = transformers.BertConfig(
                vocab_size=50, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
            )
            return transformers.BertForSequenceClassification(config)

        def encode(self, rows):
            return {"input_ids": self.ids[rows], "labels": (self.ids[rows, 0] < 10).long()}

    return Tiny()


def train_tiny(run):
    """The result of a run on the tiny task."""
    import convergence

    return convergence.train(tiny_task(), run)


def test_convergence_runs_store_all_that_a_page_needs_and_go_on_where_they_ended(tmp_path, monkeypatch):
    import convergence

    monkeypatch.setattr(convergence, "SHOWN", 7)
    out = tmp_path / "runs.jsonl"
    names = ["als", "als, equal work", "adamw 0.001", "capped 0.003"]
    _, asked = arguments(methods=names, seeds=1, steps=[12], out=str(out))
    assert convergence.run_all(asked, train_tiny) == 0
    runs = records.read(out).runs
    assert [r["method"] for r in runs] == names
    assert {r["threads"] for r in runs} == {1}
    searched, fewer, adamw, capped = runs
    assert [len(r["losses"]) for r in runs] == [12, round(12 * 3 / 5.2), 12, 12]
    assert {r["steps"] for r in runs} == {12}
    assert len({r["losses"][0] for r in runs}) == 1
    assert adamw["forwards"][-1] == capped["forwards"][-1] == 36
    assert {len(sizes) for sizes in searched["step_sizes"].values()} == {6}
    assert searched["trust"] > 0
    assert capped["trust"] == 0.003
    assert {"trials", "joint_trials", "rises"} <= searched.keys() & fewer.keys()
    assert all(0 <= r["balanced_accuracy"] <= 1 and "step_sizes" not in r for r in (adamw, capped))
    page = report.report([out], tmp_path / "page").read_text()
    assert "### At equal forward passes" in page
    convergence.run_all(SimpleNamespace(**vars(asked) | {"seeds": 2}), train_tiny)
    assert [(r["seed"], r["method"]) for r in records.read(out).runs] == [(s, m) for s in (0, 1) for m in names]
    assert "step_sizes" not in records.read(out).runs[-4]


@pytest.mark.slow
def test_runs_side_by_side_are_all_stored_and_one_that_fails_takes_no_other_along(tmp_path, capsys):
    import convergence
    from helpers.runs import fail_first

    out = tmp_path / "runs.jsonl"
    _, asked = arguments(methods=["als", "capped 0.003"], seeds=3, out=str(out), processes=2)
    assert convergence.run_all(asked, fail_first) == 2
    assert capsys.readouterr().out.count("RuntimeError: out of memory") == 2
    runs = records.read(out).runs
    assert sorted((r["seed"], r["method"]) for r in runs) == [(s, m) for s in (1, 2) for m in asked.methods]
    page = report.report([out], tmp_path / "page").read_text()
    assert "| als | 0.500 | 1.000 | - | 3 | 2 |" in page


def test_the_mean_over_the_classes_counts_a_rare_class_as_a_common_one():
    task = tiny_task()
    constant = torch.nn.Linear(1, 1)
    constant.forward = lambda input_ids: SimpleNamespace(logits=torch.tensor([[1.0, 0.0]]).expand(len(input_ids), 2))
    measured = task.measure(constant)
    assert measured["balanced_accuracy"] == 0.5
    assert measured["accuracy"] == pytest.approx(float((task.ids[20:, 0] >= 10).float().mean()))
