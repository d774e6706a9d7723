"""The activation cache where it is easy to get wrong: what runs in between, what is shared, what must be refused."""

import copy
import io
import itertools
import pickle

import pytest
import torch
import transformers as hf
from helpers.hf import tiny_bert
from helpers.nets import Masked
from helpers.tiny import TinyTransformer, matrices_only, tiny_batches
from torch import nn

import fastals
from fastals.cache import ActivationCache
from fastals.compare import Comparison
from fastals.rng import Generators


def tiny(**options):
    model = TinyTransformer(**options).train()
    batch = next(tiny_batches(1))
    return model, lambda: model(**batch)


def step_exactly(opt, closure):
    """One step whose final loss is compared with a plain forward under the same masks, bitwise."""
    state = torch.get_rng_state()
    opt.step(closure)
    after = torch.get_rng_state()
    torch.set_rng_state(state)
    with torch.no_grad():
        assert float(closure()) == opt.report.loss_after
    torch.set_rng_state(after)


def second_step(model, closure):
    """A sweep after two exact steps, and the block forwards of the second: the first one verifies."""
    opt = fastals.ALS(model, schedule="sweep")
    step_exactly(opt, closure)
    opt.engine.cache.forwards.clear()
    step_exactly(opt, closure)
    return opt, dict(opt.engine.cache.forwards)


def footprint(model):
    return [(dict(m.__dict__), len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]


@pytest.mark.parametrize("fails", [False, True], ids=["after a step", "after an error"])
def test_no_trace_is_left_on_the_model(fails):
    model, closure = tiny()
    before = [set(d) for d, _, _ in footprint(model)]
    opt = fastals.ALS(model)
    calls = 0

    def failing():
        nonlocal calls
        calls += 1
        if fails and calls == 4:
            raise KeyError("inside a trial")
        return closure()

    if fails:
        with pytest.raises(KeyError):
            opt.step(failing)
    else:
        opt.step(failing)
    assert [set(d) for d, _, _ in footprint(model)] == before
    assert all("forward" not in m.__dict__ for m in model.modules())
    pickle.loads(pickle.dumps(model))
    copy.deepcopy(model)
    torch.save(model, io.BytesIO())


def test_the_users_own_forward_and_hooks_stay_and_fire():
    model, closure = tiny(dropout=0.0)
    seen = []
    handle = model.blocks[1].register_forward_hook(lambda module, args, output: seen.append(1) or output * 1.5)
    plain = model.blocks[2].forward
    model.blocks[2].forward = lambda x: plain(x) * 0.5
    mine = model.blocks[2].forward
    opt = fastals.ALS(model)
    step_exactly(opt, closure)
    assert model.blocks[2].forward is mine
    assert len(seen) > 3
    assert all(opt.engine.learned.trusted.values())
    handle.remove()


@pytest.mark.parametrize("order", ["top_down", "bottom_up", "random"])
def test_accepted_units_update_what_is_replayed(order):
    model, closure = tiny(dropout=0.3)
    opt = fastals.ALS(model, schedule="sweep", order=order)
    for _ in range(5):
        step_exactly(opt, closure)
    assert all(opt.engine.learned.trusted.values())


def test_micro_batches_are_cached_in_each_pass():
    model = TinyTransformer(dropout=0.2).train()
    batches = list(tiny_batches(3))

    def closure():
        return sum(model(**b) for b in batches) / len(batches)

    opt, calls = second_step(model, closure)
    expected = {f"blocks.{i}": 3 for i in range(3)}
    for unit in opt.report.units:
        start = {"embeddings": 0, "head": 3}.get(unit.name, int(unit.name[-1]) if unit.name[-1].isdigit() else 0)
        for i in range(start, 3):
            expected[f"blocks.{i}"] += 3 * unit.trials
    assert calls == expected


def test_a_model_called_through_its_parts_only():
    model = TinyTransformer(dropout=0.2).train()
    batch = next(tiny_batches(1))

    def closure():
        x = model.embed(batch["tokens"])
        for block in model.blocks:
            x = block(x)
        return nn.functional.cross_entropy(model.head(model.norm(x).mean(1)), batch["labels"])

    opt, calls = second_step(model, closure)
    trials = {u.name: u.trials for u in opt.report.units}
    assert calls["blocks.0"] == 1 + trials["embeddings"] + trials["blocks.0"]


@pytest.mark.parametrize("where", ["closure", "step"])
def test_autocast_never_reuses_casts_of_other_weights(where):
    model, closure = tiny(dropout=0.1)
    opt = fastals.ALS(model)

    def inside():
        with torch.autocast("cpu", torch.bfloat16):
            return closure()

    for _ in range(3):
        if where == "closure":
            step_exactly(opt, inside)
            continue
        state = torch.get_rng_state()
        with torch.autocast("cpu", torch.bfloat16):
            opt.step(closure)
        after = torch.get_rng_state()
        torch.set_rng_state(state)
        with torch.no_grad():
            assert float(inside()) == opt.report.loss_after
        torch.set_rng_state(after)
    assert any(u.step_size for u in opt.report.units)
    assert all(opt.engine.learned.trusted.values())


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # the compiler looks at activations
@pytest.mark.parametrize("how", ["torch.compile(block)", "block.compile()"])
def test_compiled_blocks(how):
    model, closure = tiny(dropout=0.0)
    for i, block in enumerate(model.blocks):
        if how == "block.compile()":
            block.compile(backend="eager")
        else:
            model.blocks[i] = torch.compile(block, backend="eager")
    opt = fastals.ALS(model)
    for _ in range(2):
        step_exactly(opt, closure)
    assert all(opt.engine.learned.trusted.values())
    assert sum(opt.engine.cache.forwards.values()) < 3 * sum(u.trials + 3 for u in opt.report.units) * 2
    assert (model.blocks[0]._compiled_call_impl is not None) == (how == "block.compile()")


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # the compiler looks at activations
def test_compiled_blocks_stay_compiled():
    """The first step looks at every operation, for which compiled code steps aside; later steps run it."""
    calls = []

    def counting(graph, inputs):
        def run(*args):
            calls.append(graph)
            return graph.forward(*args)

        return run

    torch._dynamo.reset()
    model, closure = tiny(dropout=0.0)
    for block in model.blocks:
        block.compile(backend=counting)
    opt = fastals.ALS(model)
    opt.step(closure)
    calls.clear()
    step_exactly(opt, closure)
    assert len(calls) > 3
    calls.clear()
    with torch.no_grad():
        closure()
    assert len(calls) == 3


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # the compiler looks at activations
def test_a_model_compiled_as_a_whole_runs_without_the_cache():
    model, _ = tiny(dropout=0.0)
    whole = torch.compile(model, backend="eager")
    batch = next(tiny_batches(1))
    opt = fastals.ALS(whole)
    with pytest.warns(UserWarning, match="compiled the blocks as parts"):
        step_exactly(opt, lambda: whole(**batch))
    assert opt.engine.cache is None


class Overwriting(nn.Module):
    """A glue that writes into the blocks' outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Identity()) for _ in range(3))
        self.head = nn.Linear(8, 1)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
            x += 1.0
        return self.head(x).square().mean()


def test_an_output_that_is_overwritten_is_found():
    model, x = Overwriting(), torch.randn(4, 8)
    opt = fastals.ALS(model, cache="check")
    with pytest.warns(UserWarning, match=r"calls of 'blocks.0' are computed in every trial: its output is changed"):
        step_exactly(opt, lambda: model(x))
    step_exactly(opt, lambda: model(x))
    assert opt.last_forwards == 1 + opt.report.trials


class Pooled(nn.Module):
    """Blocks whose outputs a module without weights collects in a dictionary that it is given."""

    class Pooling(nn.Module):
        def forward(self, features):
            features["pooled"] = features["tokens"].mean(1)
            return features

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(3))
        self.pooling = self.Pooling()

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.pooling({"tokens": x})["pooled"].square().mean()


def test_nothing_is_said_of_a_call_that_costs_nothing():
    model, x = Pooled(), torch.randn(4, 3, 8)
    opt = fastals.ALS(model, cache="check", schedule="sweep")
    for _ in range(2):
        step_exactly(opt, lambda: model(x))
    assert opt.last_forwards < 1 + opt.report.trials


class Cheating(nn.Module):
    """A later block reads what an earlier one has left behind outside of the outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(CheatingBlock() for _ in range(3))
        self.head = nn.Linear(8, 1)

    def forward(self, x):
        CheatingBlock.left_behind = torch.zeros(())
        for block in self.blocks:
            x = block(x)
        return self.head(x).square().mean() + CheatingBlock.left_behind


class CheatingBlock(nn.Module):
    left_behind: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x):
        y = torch.tanh(self.linear(x))
        CheatingBlock.left_behind = CheatingBlock.left_behind + y.square().mean()
        return y


@pytest.mark.filterwarnings("ignore:fastals")
def test_a_model_that_cheats_is_found_and_runs_uncached():
    model, x = Cheating(), torch.randn(4, 8)
    opt = fastals.ALS(model)
    with pytest.warns(UserWarning, match=r"unit 'head' run without the activation cache: a cached trial gave"):
        step_exactly(opt, lambda: model(x))
    assert opt.engine.learned.trusted["head"] is False
    assert (
        opt.engine.learned.trusted["embeddings" if "embeddings" in opt.engine.learned.trusted else "blocks.0"] is True
    )
    step_exactly(opt, lambda: model(x))


def test_layerdrop_and_other_draws_between_blocks_are_replayed():
    config = hf.BartConfig(
        vocab_size=40, d_model=16, encoder_layers=4, decoder_layers=2, encoder_attention_heads=2, decoder_ffn_dim=24,
        decoder_attention_heads=2, encoder_ffn_dim=24, encoder_layerdrop=0.5, dropout=0.2, max_position_embeddings=16,
    )  # fmt: skip
    model = hf.BartForConditionalGeneration(config).train()
    ids = torch.randint(3, 40, (2, 6))
    opt = fastals.ALS(model)
    for _ in range(4):
        step_exactly(opt, lambda: model(input_ids=ids, labels=ids).loss)
    assert all(opt.engine.learned.trusted.values())


def test_masks_are_held_within_a_step_and_differ_between_steps():
    model, closure = tiny(dropout=0.5)
    opt = fastals.ALS(model, trust=1e-6)
    losses = []

    def noting():
        loss = closure()
        losses.append(loss.item())
        return loss

    starts = []
    opt.step(noting)  # the first step evaluates other weights, too
    for _ in range(3):
        losses.clear()
        opt.step(noting)
        assert max(losses) - min(losses) < 1e-3  # the weights hardly move, so equal masks mean equal losses
        starts.append(losses[0])
    assert min(abs(a - b) for a, b in itertools.pairwise(starts)) > 4e-3


def test_frozen_blocks_below_are_never_run_again():
    model, closure = tiny(dropout=0.2)
    for part in (model.embed, model.blocks[0], model.blocks[1]):
        part.requires_grad_(False)
    opt, calls = second_step(model, closure)
    assert calls["blocks.0"] == calls["blocks.1"] == 1
    assert calls["blocks.2"] == 1 + opt.report.units[0].trials


@pytest.mark.parametrize("schedule", ["joint", "relay"])
def test_joint_trials_start_at_the_lowest_trained_unit(schedule):
    model, closure = tiny(dropout=0.2)
    for part in (model.embed, model.blocks[0]):
        part.requires_grad_(False)
    opt = fastals.ALS(model, schedule=schedule)
    for _ in range(3):
        opt.step(closure)
    opt.engine.cache.forwards.clear()
    step_exactly(opt, closure)
    assert opt.report.joint_trials == 1
    assert opt.engine.cache.forwards["blocks.0"] == 1


def test_tied_weights_start_at_their_first_user():
    model, closure = tiny(classes=32)
    model.head.weight = model.embed.weight
    opt, calls = second_step(model, closure)
    trials = {u.name: u.trials for u in opt.report.units}
    assert calls["blocks.0"] == 1 + trials["embeddings"] + trials["blocks.0"]


def test_a_changed_module_tree_is_verified_anew():
    model, closure = tiny()
    opt = fastals.ALS(model)
    opt.step(closure)
    first = opt.engine.cache
    model.extra = nn.Identity()
    opt.step(closure)
    assert opt.engine.cache is not first
    assert set(opt.engine.learned.trusted) == {"embeddings", "blocks.0", "blocks.1", "blocks.2", "head"}


def test_the_cache_lets_go_of_the_activations():
    model, closure = tiny()
    opt = fastals.ALS(model)
    opt.step(closure)
    assert opt.engine.cache.records == {}


def test_head_registered_first_is_still_the_head():
    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.classifier = nn.Linear(16, 4)
            self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(2))
            self.embed = nn.Linear(6, 16)

        def forward(self, x):
            x = self.embed(x)
            for block in self.blocks:
                x = block(x)
            return self.classifier(x).square().mean()

    model, x = Backwards(), torch.randn(4, 6)
    opt = fastals.ALS(model)
    step_exactly(opt, lambda: model(x))
    assert [u.name for u in opt.report.units] == ["embeddings", "blocks.0", "blocks.1", "head"]
    assert {g["name"]: g["param_names"] for g in opt.param_groups}["head"] == ["classifier.weight", "classifier.bias"]


@pytest.mark.parametrize("schedule", ["sweep", "relay"])
def test_recorded_share_counts_forwards(schedule):
    model, closure = tiny(depth=4)
    opt = fastals.ALS(model, schedule=schedule, every=1)
    opt.step(closure)
    shares = [1.0, 1.0, 0.75, 0.5, 0.25, 0.0]
    for _ in range(6 if schedule == "relay" else 1):
        opt.step(closure)
        trials = [u.trials for u in opt.report.units]
        alone = sum(k * s for k, s in zip(trials, shares, strict=True))
        assert opt.last_forwards == pytest.approx(1 + alone + opt.report.joint_trials)
        assert (opt.report.joint_trials > 0) == (schedule == "relay")


def test_a_cache_of_its_own_records_and_replays():
    model, closure = tiny(dropout=0.3)
    generators = Generators(())
    cache, start = ActivationCache(model, (), generators), generators.save()
    with cache.recording():
        recorded = closure()
    generators.restore(start)
    with torch.no_grad(), cache.replaying(Comparison("again", {}, torch.device("cpu"), wait=True)):
        assert float(closure()) == float(recorded)
    assert cache.share == 0.0


@pytest.mark.slow(keep=1)
@pytest.mark.filterwarnings("ignore:fastals")
@pytest.mark.parametrize(
    "options",
    [
        {"schedule": "sweep"}, {"schedule": "independent"}, {"schedule": "relay"},
        # every first step depends on the loss, and so on which units have moved before
        {"schedule": "sweep", "order": "random", "initial": "polyak", "polyak_c": 100.0, "trust": 0.2, "max_trials": 4},
    ],
    ids=["sweep", "independent", "relay", "random order"],
)  # fmt: skip
@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_a_loss_that_comes_to_read_inside_the_blocks_is_noticed_in_that_step(fused, options):
    """Attentions are no outputs of blocks. With them in the loss all units are compared with full forwards anew.

    Every step is that of a twin without the cache.
    """
    if fused:
        pytest.importorskip("triton")
    inside = False

    def build(*, cache):
        model = attending()

        def closure():
            out = model(**ATTENDED, output_attentions=True)
            return out.loss + (sum(a.square().sum() for a in out.attentions) if inside and out.attentions else 0.0)

        return model, closure, fastals.ALS(model, fused=fused, cache=cache, **options)

    model, closure, opt = build(cache=True)
    twin, plain, uncached = build(cache=False)

    def step():
        step_exactly(opt, closure)
        uncached.step(plain)
        assert opt.report == uncached.report
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))

    step()
    inside = True
    with pytest.warns(UserWarning, match="unit 'head' run without the activation cache"):
        step()
    step()
    inside = False
    step()  # a first trial may have been made before it was noticed
    step()
    assert opt.last_forwards < 1 + opt.report.trials + opt.report.joint_trials, "the cache is back"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:fastals")  # the first forward gives the blocks hooks, and all is verified anew
@pytest.mark.parametrize("schedule", ["sweep", "relay"])
@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_a_step_that_searches_no_unit_notices_too_that_the_loss_reads_inside_the_blocks(fused, schedule):
    if fused:
        pytest.importorskip("triton")
    model, inside = attending(), False

    def closure():
        out = model(**ATTENDED, output_attentions=True)
        return out.loss + (sum(a.square().sum() for a in out.attentions) if inside and out.attentions else 0.0)

    opt = fastals.ALS(model, fused=fused, schedule=schedule, every=2)
    for inside in (False, True, False, True):
        opt.step(closure)
        assert opt.engine.learned.replays is not inside


ATTENDED = {"input_ids": torch.arange(24).view(2, 12), "labels": torch.tensor([0, 1])}


def attending():
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return matrices_only(tiny_bert(vocab_size=30, attn_implementation="eager", **no_dropout)).train()


@pytest.mark.filterwarnings("ignore:fastals")
def test_a_loss_that_fails_on_replayed_outputs_runs_uncached():
    """Router logits are collected within the blocks, and the auxiliary loss takes the first of them."""
    torch.manual_seed(0)
    config = hf.MixtralConfig(
        vocab_size=30, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=2, num_experts_per_tok=1, output_router_logits=True,
    )  # fmt: skip
    model, ids = hf.MixtralForCausalLM(config).train(), torch.arange(24).view(2, 12)
    opt = fastals.ALS(model)
    with pytest.warns(UserWarning, match="unit 'head' run without the activation cache: IndexError"):
        step_exactly(opt, lambda: model(input_ids=ids, labels=ids).loss)
    step_exactly(opt, lambda: model(input_ids=ids, labels=ids).loss)
    assert opt.last_forwards == 1 + opt.report.trials, "what is found out about the cache is not counted"


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # the compiler looks at activations
@pytest.mark.parametrize("compiled", ["wrapped", "in place"])
def test_a_model_that_is_compiled_as_a_whole_keeps_its_units_and_counts_whole_forwards(compiled):
    model = TinyTransformer(depth=2).train()
    if compiled == "wrapped":
        plain, model = model, torch.compile(model, backend="eager")
        names = [f"_orig_mod.{n}" for n, _ in plain.named_parameters()]
    else:
        model.compile(backend="eager")
        names = [n for n, _ in model.named_parameters()]
    batch = next(tiny_batches(1))
    opt = fastals.ALS(model)
    before = [g["param_names"] for g in opt.param_groups]
    with pytest.warns(UserWarning, match="compiled the blocks as parts"):
        opt.step(lambda: model(**batch))
    assert [g["param_names"] for g in opt.param_groups] == before
    assert sorted(n for g in opt.param_groups for n in g["param_names"]) == sorted(names)
    assert len(opt.report.units) == len(before) > 1
    opt.step(lambda: model(**batch))
    assert opt.last_forwards == 1 + opt.report.trials


def test_where_the_host_does_not_wait_a_wrong_guess_makes_the_step_start_again():
    """The fused step takes the mask for equal, as it has been so far; the device says that it is not."""
    pytest.importorskip("triton")
    x, reports = torch.randn(6, 4), []
    for cache in (True, False):
        torch.manual_seed(0)
        model = Masked()
        options = {"schedule": "sweep", "order": "bottom_up", "trust": 0.05}
        opt, equal = fastals.ALS(model, fused=True, cache=cache, **options), []
        for model.late in (False, False, True, True):
            step_exactly(opt, lambda: model(x))  # noqa: B023
            reports.append(opt.report.as_dict())
            equal.append(sum(opt.engine.learned.guesses.values()))
        if cache:
            assert equal[0] == equal[1] > equal[2] == equal[3]
            assert opt.last_forwards < 1 + opt.report.trials
    assert reports[:4] == reports[4:]
