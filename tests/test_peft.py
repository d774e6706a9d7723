"""The methods of PEFT on small models: units by block, losses that never rise, cached trials that are right."""

import copy
import warnings

import pytest
import torch
import transformers as hf
from torch import nn

import fastals

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")  # of SHiRA
IDS = torch.randint(1, 40, (4, 8), generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 1, 0])
SMALL = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 0}
TO = {"target_modules": ["q_proj", "v_proj"]}
BLOCKS = ("layers.0", "layers.1")
SWEEP = {"schedule": "sweep", "trust": 0.02}
METHODS = {  # the name of the configuration, and its arguments
    "lora": ("Lora", TO | {"r": 4, "lora_dropout": 0.1}),
    "rslora": ("Lora", TO | {"r": 4, "use_rslora": True}),
    "dora": ("Lora", TO | {"r": 4, "use_dora": True, "lora_dropout": 0.1}),
    "pissa": ("Lora", TO | {"r": 4, "init_lora_weights": "pissa"}),
    "olora": ("Lora", TO | {"r": 4, "init_lora_weights": "olora"}),
    "orthogonal": ("Lora", TO | {"r": 4, "init_lora_weights": "orthogonal"}),
    "lora-with-biases": ("Lora", TO | {"r": 4, "bias": "all"}),
    "adalora": ("AdaLora", TO | {"init_r": 4, "target_r": 2, "total_step": 100}),
    "ia3": ("IA3", {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}),
    "loha": ("LoHa", TO | {"r": 4}),
    "lokr": ("LoKr", TO | {"r": 4}),
    "vera": ("Vera", TO | {"r": 4}),
    "pvera": ("Pvera", TO | {"r": 4}),
    "ln-tuning": ("LNTuning", {"target_modules": ["input_layernorm", "post_attention_layernorm"]}),
    "prompt-tuning": ("PromptTuning", {"num_virtual_tokens": 3}),
    "prefix-tuning": ("PrefixTuning", {"num_virtual_tokens": 3}),
    "p-tuning": ("PromptEncoder", {"num_virtual_tokens": 3, "encoder_hidden_size": 8}),
    "adaption-prompt": ("AdaptionPrompt", {"adapter_len": 3, "adapter_layers": 2}),
    "trainable-tokens": ("TrainableTokens", {"token_indices": [3, 5, 9]}),
    "oft": ("OFT", TO | {"r": 0, "oft_block_size": 4}),
    "boft": ("BOFT", TO | {"boft_block_size": 4}),
    "hra": ("HRA", TO | {"r": 4}),
    "fourierft": ("FourierFT", TO | {"n_frequency": 16}),
    "waveft": ("WaveFT", TO | {"n_frequency": 16}),
    "vblora": ("VBLoRA", TO | {"r": 2, "num_vectors": 8, "vector_length": 8, "topk": 2}),
    "randlora": ("RandLora", TO | {"r": 4}),
    "miss": ("Miss", TO | {"r": 4}),
    "c3a": ("C3A", TO | {"block_size": 8}),
    "shira": ("Shira", TO | {"r": 2}),
    "road": ("Road", TO | {"group_size": 8}),
    "delora": ("Delora", TO | {"r": 4}),
    "hira": ("Hira", TO | {"r": 4}),
    "gralora": ("Gralora", TO | {"r": 4, "gralora_k": 2}),
    "tinylora": ("TinyLora", TO | {"u": 8}),
    "psoft": ("Psoft", TO | {"r": 4}),
    "peanut": ("Peanut", TO | {"r": 4}),
    "deft": ("Deft", TO | {"r": 4}),
    "unilora": ("UniLora", TO | {"r": 4, "theta_d_length": 64}),
    "frod": ("Frod", TO | {"progressbar": False}),
    "glora": ("Glora", TO | {"r": 4}),
    "lily": ("Lily", TO | {"r": 4}),
    "beft": ("Beft", TO),
    "adamss": ("Adamss", TO | {"r": 8, "num_subspaces": 2}),
    "osf": ("OSF", TO),
    "bert-lora": ("Lora", {"target_modules": ["query", "value"], "r": 4, "lora_dropout": 0.1}),
    "bert-ia3": ("IA3", {"target_modules": ["key", "value"], "feedforward_modules": []}),
    "bert-prefix": ("PrefixTuning", {"num_virtual_tokens": 3}),
}
UNITS = {  # where the trained parameters are not one set in each block
    "prompt-tuning": ("head",), "prefix-tuning": ("head",), "p-tuning": ("head",),  # beside the model
    "trainable-tokens": ("embeddings",),
    "tinylora": ("layers.0",), "unilora": ("layers.0",),  # one vector for all blocks
    "bert-lora": ("layer.0", "layer.1", "head"), "bert-ia3": ("layer.0", "layer.1", "head"), "bert-prefix": ("head",),
}  # fmt: skip


def llama():
    config = hf.LlamaConfig(**SMALL, num_key_value_heads=2, intermediate_size=48, attention_dropout=0.1)
    torch.manual_seed(0)
    return hf.LlamaForCausalLM(config)


def bert():
    torch.manual_seed(0)
    return hf.BertForSequenceClassification(hf.BertConfig(**SMALL, intermediate_size=48))


def adapted(config, base=llama, **options):
    """A small model with the adapter, in training mode."""
    task = "CAUSAL_LM" if base is llama else "SEQ_CLS"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PEFT
        make = getattr(peft, f"{config}Config")
        return peft.get_peft_model(base(), make(task_type=task, **options)).train()


def build(method):
    config, options = METHODS[method]
    return adapted(config, bert if method.startswith("bert") else llama, **options)


def lora(**options):
    return adapted("Lora", **(TO | {"r": 4, "lora_dropout": 0.1} | options))


def loss_of(model):
    return model(input_ids=IDS, labels=LABELS if model.config.model_type == "bert" else IDS).loss


def step(model, opt, t, closure=loss_of):
    """One step, judged by a plain forward with the same masks: the loss is the one reported, and has not risen."""
    torch.manual_seed(t)
    opt.step(lambda: closure(model))
    torch.manual_seed(t)
    with torch.no_grad():
        assert float(closure(model)) == opt.report.loss_after <= opt.report.loss_before
    return opt.report


def trained(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def decisions(report):
    return report.loss_before, report.loss_after, report.joint_trials, [(u.trials, u.step_size) for u in report.units]


@pytest.mark.slow(keep=12)
@pytest.mark.parametrize("method", METHODS)
def test_losses_fall_and_every_unit_moves(method):
    """By the relay, every cached trial compared with a full forward."""
    model = build(method)
    opt, before = fastals.ALS(model, cache="check", every=1), trained(model)
    names = [group["name"] for group in opt.param_groups]
    assert all(name.endswith(unit) for name, unit in zip(names, UNITS.get(method, BLOCKS), strict=True)), names
    reports = [step(model, opt, t) for t in range(4)]
    assert [u.name for u in reports[-1].units] == names
    assert {u.outcome for u in reports[-1].units} == {"accepted"}
    after = trained(model)
    for group in opt.param_groups:
        moved = [n for n in group["param_names"] if not torch.equal(before[n], after[n])]
        assert moved, f"{group['name']} has not moved"
    assert all(report.loss_after < report.loss_before for report in reports)


@pytest.mark.slow(keep=12)
@pytest.mark.parametrize("method", METHODS)
def test_cached_trials_decide_as_full_forwards_and_cost_the_blocks_above(method):
    plain, cached = build(method), build(method)
    slow, fast = fastals.ALS(plain, cache=False, **SWEEP), fastals.ALS(cached, **SWEEP)
    for t in range(3):
        ours, theirs = step(cached, fast, t), step(plain, slow, t)
        assert decisions(ours) == decisions(theirs)
        if t:  # the first step makes more forwards, for its checks
            k = [u.trials for u in ours.units]
            assert slow.last_forwards == 1 + sum(k)
            assert fast.last_forwards == 1 + sum(k * share for k, share in zip(k, shares(method), strict=True))
    for a, b in zip(plain.parameters(), cached.parameters(), strict=True):
        assert torch.equal(a, b)


def shares(method):
    """Of the blocks, the share that a trial of each unit computes."""
    above = {"layers.0": 1, "layers.1": 0.5, "layer.0": 1, "layer.1": 0.5, "embeddings": 1, "head": 0}
    units = UNITS.get(method, BLOCKS)
    return [1] if units == ("head",) else [above[unit] for unit in units]


# Weights that start at zero


def only_b():
    model = lora()
    for name, p in model.named_parameters():
        p.requires_grad_("lora_B" in name)
    return model


def zero_head():
    model = bert().train().requires_grad_(False)
    for p in model.classifier.requires_grad_().parameters():
        nn.init.zeros_(p)
    return model


FROM_ZERO = {"only lora_B": only_b, "zero head": zero_head, "oft": lambda: build("oft")}


@pytest.mark.parametrize("schedule", ["relay", "sweep"])
@pytest.mark.parametrize("make", FROM_ZERO.values(), ids=FROM_ZERO)
def test_weights_that_are_all_zero_learn(make, schedule):
    model = make()
    assert not any(p.any() for p in trained(model).values())
    opt = fastals.ALS(model, schedule=schedule)
    reports = [step(model, opt, t) for t in range(6)]
    assert all(u.step_size > 0 for u in reports[0].units)
    assert all(p.any() for p in trained(model).values())
    torch.manual_seed(0)
    assert float(loss_of(model).detach()) < reports[0].loss_before


# Two adapters


def with_two(**options):
    model = lora(**options)
    model.add_adapter("other", peft.LoraConfig(task_type="CAUSAL_LM", r=4, **TO))
    return model


def of_adapter(model, name):
    return {n: p.detach().clone() for n, p in model.named_parameters() if f".{name}." in n}


def assert_equal(a, b):
    assert a.keys() == b.keys()
    assert all(torch.equal(a[n], b[n]) for n in a)


def test_an_optimizer_for_each_of_two_adapters_moves_its_own():
    """Switched after every step; the decisions are those without the cache."""
    models, optimizers = [with_two() for _ in range(2)], []
    for model, how in zip(models, (True, False), strict=True):
        mine = {}
        for name in ("default", "other"):
            model.set_adapter(name)
            mine[name] = fastals.ALS(model, cache=how, every=1)
        optimizers.append(mine)
    for t in range(8):
        name, idle = ("default", "other")[:: 1 if t % 2 else -1]
        seen = []
        for model, mine in zip(models, optimizers, strict=True):
            model.set_adapter(name)
            before, own = of_adapter(model, idle), of_adapter(model, name)
            seen.append(decisions(step(model, mine[name], t)))
            assert_equal(of_adapter(model, idle), before)
            assert not all(torch.equal(own[n], p) for n, p in of_adapter(model, name).items())
        assert seen[0] == seen[1]


def test_an_optimizer_refuses_a_step_while_another_adapter_is_trained():
    model = with_two()
    opt, before = fastals.ALS(model), of_adapter(model, "other")
    step(model, opt, 0)
    model.set_adapter("other")
    with pytest.raises(ValueError, match="trainable parameters are in no unit"):
        opt.step(lambda: loss_of(model))
    assert_equal(of_adapter(model, "other"), before)
    model.set_adapter("default")
    assert step(model, opt, 1).factor > 0


def test_one_optimizer_of_two_adapters_moves_those_that_are_active():
    """Both are handed over; an adapter that is switched off has no gradient and stays, bitwise."""
    model, plain = with_two(), with_two()
    optimizers = []
    for m, cache in ((model, "check"), (plain, False)):
        m.base_model.set_adapter(["default", "other"])
        optimizers.append(fastals.ALS(m, cache=cache, every=1))
    turns = [["default", "other"], ["default"], ["other"], ["other"], ["default"], ["default", "other"]]
    for t, active in enumerate(turns):
        before, seen = {name: of_adapter(model, name) for name in turns[0]}, []
        for m, opt in zip((model, plain), optimizers, strict=True):
            m.base_model.set_adapter(active)
            seen.append(decisions(step(m, opt, t)))
        assert seen[0] == seen[1]
        for name, weights in before.items():
            moved = not all(torch.equal(weights[n], p) for n, p in of_adapter(model, name).items())
            assert moved == (name in active)


def test_a_reference_without_the_adapter_within_the_closure():
    """As in preference losses: the same blocks run with and without the adapter in one evaluation."""

    def closure(model):
        out = model(input_ids=IDS).logits
        with torch.no_grad(), model.disable_adapter():
            reference = model(input_ids=IDS).logits
        drift = (out - reference).square().mean()
        return nn.functional.cross_entropy(out.flatten(0, 1), IDS.flatten()) + drift

    model, plain = lora(), lora()
    fast, slow = fastals.ALS(model, cache="check", **SWEEP), fastals.ALS(plain, cache=False, **SWEEP)
    for t in range(4):
        assert decisions(step(model, fast, t, closure)) == decisions(step(plain, slow, t, closure))
    assert fast.last_forwards < slow.last_forwards


# After training


@pytest.mark.parametrize("method", ["lora", "dora", "ia3", "loha", "lokr", "oft", "hra", "vera", "fourierft"])
def test_the_merged_model_computes_what_the_trained_one_does(method):
    model = build(method)
    opt = fastals.ALS(model)
    with torch.no_grad():
        start = model.eval()(input_ids=IDS).logits
    model.train()
    for t in range(4):
        step(model, opt, t)
    with torch.no_grad():
        expected = model.eval()(input_ids=IDS).logits
        merged = copy.deepcopy(model).merge_and_unload()(input_ids=IDS).logits
    torch.testing.assert_close(merged, expected, rtol=1e-4, atol=1e-5)
    assert float((expected - start).abs().max()) > 1e-3


@pytest.mark.parametrize("method", ["lora", "dora", "adalora", "ia3", "prefix-tuning", "oft", "vblora", "bert-lora"])
def test_saved_adapters_reload_bitwise(method, tmp_path):
    model = build(method)
    opt = fastals.ALS(model)
    for t in range(3):
        step(model, opt, t)
    model.save_pretrained(tmp_path)
    base = bert() if method.startswith("bert") else llama()
    again = peft.PeftModel.from_pretrained(base, tmp_path)
    moved, loaded = trained(model), dict(again.named_parameters())
    assert_equal({n: loaded[n] for n in moved}, moved)
    with torch.no_grad():
        assert torch.equal(again.eval()(input_ids=IDS).logits, model.eval()(input_ids=IDS).logits)
