"""Habits of training code that a trial has to follow exactly: several passes, shared modules, other generators."""

import random
import warnings
from collections import Counter

import numpy as np
import pytest
import torch
import transformers as hf
from helpers.audit import SEARCHES, Audit, fail_everywhere, searches
from helpers.nets import Net, labelled, visible_loss
from torch import nn
from torch.nn import functional as F  # noqa: N812

pytestmark = pytest.mark.filterwarnings("ignore:fastals")  # a unit may run uncached; what counts is that it is exact
checked_searches = pytest.mark.parametrize(
    "search",
    [*SEARCHES, {"schedule": "sweep", "cache": "check"}, {"schedule": "relay", "cache": "check"}],
    ids=lambda s: "-".join(s.values()),
)


# Passes that depend on the ones before them


def hard_examples(model, x, y, noise):
    """Samples that are still wrong come a second time, with noise."""
    scores = model(x)
    wrong = scores.detach().argmax(1) != y
    loss = F.cross_entropy(scores, y)
    return loss + F.cross_entropy(model(x[wrong] + noise[wrong]), y[wrong]) if wrong.any() else loss


def hardest_negatives(model, x, y, noise):
    """The most similar sample by a first pass is encoded again."""
    del y
    anchor, positive = (F.normalize(model(v), dim=1) for v in (x, x + noise))
    similar = (anchor @ positive.T).detach().fill_diagonal_(-2)
    negative = F.normalize(model(x[similar.argmax(1)] + 0.1), dim=1)
    return F.relu(0.3 + (anchor * negative).sum(1) - (anchor * positive).sum(1)).mean()


def pseudo_labels(model, x, y, noise):
    """What the model is sure of becomes the label of noisy copies."""
    scores = model(x)
    sure, guess = scores.detach().softmax(1).max(1)
    kept = sure > 0.5
    loss = F.cross_entropy(scores, y)
    return loss + F.cross_entropy(model(x[kept] + noise[kept]), guess[kept]) if kept.any() else loss


@pytest.mark.slow(keep=12)
@pytest.mark.parametrize("frozen", [False, True], ids=["all", "frozen front"])
@pytest.mark.parametrize("select", [hard_examples, hardest_negatives, pseudo_labels])
@checked_searches
def test_a_pass_over_what_another_pass_selects(select, search, frozen):
    model = Net(outputs=8 if select is hardest_negatives else 3)
    model.inp.requires_grad_(not frozen)
    teacher = torch.randn(8, 3)

    def losses(steps):
        for _ in range(steps):
            x, noise = torch.randn(12, 8), 0.3 * torch.randn(12, 8)
            yield lambda m, x=x, noise=noise: select(m, x, (x @ teacher).argmax(1), noise)

    Audit(model, trust=0.05, **search).train(losses(8))


@pytest.mark.slow(keep=17)
@pytest.mark.parametrize("frozen", [False, True], ids=["all", "frozen front"])
@pytest.mark.parametrize("gradient", [False, True], ids=["without gradient", "with gradient"])
@checked_searches
def test_self_conditioning(gradient, frozen, search):
    """With a probability of a half the model's own output is an input of its second pass."""
    model = Net(inputs=16, outputs=8)
    model.inp.requires_grad_(not frozen)
    twice = Counter()

    def denoise(m, clean):
        noisy = clean + torch.randn_like(clean)
        condition = torch.zeros_like(clean)
        again = bool(torch.rand(()) < 0.5)
        twice[again] += 1
        if again:
            with torch.set_grad_enabled(gradient and torch.is_grad_enabled()):
                condition = m(torch.cat([noisy, condition], -1))
        return (m(torch.cat([noisy, condition], -1)) - clean).square().mean()

    cleans = (torch.randn(16, 8) for _ in range(8))
    Audit(model, trust=0.05, **search).train(lambda m, clean=clean: denoise(m, clean) for clean in cleans)
    assert len(twice) == 2


@checked_searches
def test_a_rollout_is_fed_with_its_own_outputs(search):
    def unrolled(m, x):
        state, loss = x[:, 0], 0.0
        for target in x[:, 1:].unbind(1):
            state = m(state)
            loss = loss + (state - target).square().mean()
        return loss

    paths = (torch.randn(8, 4, 8).cumsum(1) for _ in range(5))
    Audit(Net(outputs=8), trust=0.05, **search).train(lambda m, x=x: unrolled(m, x) for x in paths)


def llama(**options):
    torch.manual_seed(0)
    small = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
             "num_key_value_heads": 2, "intermediate_size": 24, "pad_token_id": 0}  # fmt: skip
    return hf.LlamaForCausalLM(hf.LlamaConfig(**small | options)).train()


@pytest.mark.slow(keep=2)
@pytest.mark.parametrize("fed", ["given tokens", "own tokens", "own expectation"])
@searches
def test_decoding_with_a_key_value_cache(fed, search):
    """The cache object is passed along and grows from call to call."""

    def decode(m, ids):
        past, loss, given = hf.DynamicCache(), 0.0, {"input_ids": ids[:, :4]}
        for i in range(4, 7):
            scores = m(**given, past_key_values=past, use_cache=True).logits[:, -1]
            loss = loss + F.cross_entropy(scores, ids[:, i])
            if fed == "own expectation":
                given = {"inputs_embeds": scores.softmax(-1)[:, None] @ m.get_input_embeddings().weight}
            else:
                given = {"input_ids": (scores.argmax(-1) if fed == "own tokens" else ids[:, i])[:, None]}
        return loss

    batches = (torch.randint(1, 40, (3, 7)) for _ in range(3))
    Audit(llama(), beside=True, trust=0.05, **search).train(lambda m, ids=ids: decode(m, ids) for ids in batches)


# One module in several places


class Sharing(nn.Module):
    """A block that uses an adapter which others use too."""

    def __init__(self, shared, width=16):
        super().__init__()
        self.fc = nn.Sequential(nn.Linear(width, width), nn.Tanh())
        self.shared = shared

    def forward(self, x, use=True):
        x = x + self.fc(x)
        return x + self.shared(x) if use else x


class SharingNet(Net):
    """The blocks below the last one use the shared adapter on demand."""

    def __init__(self, adapter, depth=4):
        super().__init__(blocks=[Sharing(adapter) for _ in range(depth)])

    def forward(self, x, everywhere=True):
        x = self.inp(x)
        for block in self.blocks:
            x = block(x, everywhere or block is self.blocks[-1])
        return self.head(x)


@pytest.mark.slow(keep=15)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("trained", ["all", "the adapter", "all but the front"])
@pytest.mark.parametrize("use", ["always", "later"])
@checked_searches
def test_blocks_that_share_a_module(dtype, trained, use, search):
    """With ``later`` only the last block uses it in the first two steps, so that the first ones cannot tell."""
    adapter = nn.Sequential(nn.Linear(16, 16), nn.Tanh()) if trained == "all but the front" else nn.Linear(16, 16)
    model = SharingNet(adapter)
    if trained == "the adapter":
        model.requires_grad_(False)
        adapter.requires_grad_(True)
    elif trained == "all but the front":
        model.inp.requires_grad_(False)
    audit = Audit(model.to(dtype), trust=0.3, **search)
    for i in range(5):
        x, y = labelled(dtype=dtype)
        everywhere = use == "always" or i >= 2
        audit.step(lambda m, x=x, y=y, everywhere=everywhere: visible_loss(m, x, y, everywhere=everywhere))
    assert audit.moved


@pytest.mark.slow(keep=1)
@pytest.mark.parametrize("habit", ["hard examples", "hardest negatives", "shared module"])
def test_the_fused_path_follows_too(habit):
    pytest.importorskip("triton")
    selects = {"hard examples": hard_examples, "hardest negatives": hardest_negatives}
    model = Net(depth=2) if habit in selects else SharingNet(nn.Linear(16, 16), depth=2)
    batches = ((*labelled(12), 0.5 * torch.randn(12, 8)) for _ in range(3))
    if habit in selects:
        losses = ((lambda m, b=b: selects[habit](m, *b)) for b in batches)
    else:
        losses = ((lambda m, x=x, y=y: visible_loss(m, x, y)) for x, y, _ in batches)
    Audit(model, fused=True, trust=0.3, max_trials=3).train(losses)


@pytest.mark.parametrize("seed", range(3))
def test_a_unit_that_runs_uncached_or_stands_still_in_the_first_step(seed):
    """What a unit above has done must reach the ones below it, whatever was found out while it stood still."""
    torch.manual_seed(seed)
    model = SharingNet(nn.Sequential(nn.Linear(16, 16), nn.Tanh()))
    model.inp.requires_grad_(False)
    batches = (labelled() for _ in range(8))
    Audit(model, trust=0.3, max_trials=1).train(lambda m, x=x, y=y: visible_loss(m, x, y) for x, y in batches)


def test_trainable_tokens_of_tied_embeddings():
    """The adapter of PEFT is used in the embeddings and in the head; for two steps it waits."""
    peft = pytest.importorskip("peft")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(
            llama(num_hidden_layers=3, tie_word_embeddings=True),
            peft.LoraConfig(
                r=2, target_modules="all-linear", exclude_modules=["lm_head"], trainable_token_indices=[3, 5, 7, 8, 9],
                task_type="CAUSAL_LM",
            ),
        ).train()  # fmt: skip
    audit = Audit(model, trust=0.05)
    tokens = next(g for g in audit.opt.param_groups if any("token" in n for n in g["param_names"]))
    for i in range(6):
        tokens["lr"] = 0.0 if i < 2 else 1.0
        ids = torch.randint(3, 14, (3, 8))
        audit.step(lambda m, ids=ids: m(input_ids=ids, labels=ids).loss)
    assert any(u.step_size for u in audit.opt.report.units if u.name == tokens["name"])


# Random numbers that are not torch's


class NumpyDropPath(nn.Module):
    """A block that NumPy skips now and then."""

    def __init__(self, width=16):
        super().__init__()
        self.fc = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))

    def forward(self, x):
        return x if np.random.rand() < 0.3 else x + self.fc(x)


def drop_path_and_everything():
    """NumPy skips blocks, Python shuffles features between the blocks, torch drops some."""

    class Drawing(Net):
        def forward(self, x):
            x = self.inp(x)
            for block in self.blocks:
                shift = random.randrange(16)
                x = F.dropout(block(x).roll(shift, -1), 0.2, self.training)
            return self.head(x)

    return Drawing(blocks=[NumpyDropPath() for _ in range(4)]), classify


def drop_path():
    return Net(blocks=[NumpyDropPath() for _ in range(4)]), classify


def classify():
    x, y = labelled()
    return lambda m: F.cross_entropy(m(x), y)


def musicgen():
    """Python's generator drops layers of the decoder."""
    config = hf.MusicgenDecoderConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=4, num_attention_heads=2, ffn_dim=24, layerdrop=0.3,
        num_codebooks=2, dropout=0.0, attention_dropout=0.0, activation_dropout=0.0, pad_token_id=20, bos_token_id=20,
        max_position_embeddings=64,
    )  # fmt: skip

    def batch():
        ids = torch.randint(20, (4, 8))
        labels = ids.view(2, 2, 8).transpose(1, 2)
        return lambda m: m(input_ids=ids, labels=labels).loss

    return hf.MusicgenForCausalLM(config).train(), batch


def wav2vec2(layerdrop=0.0):
    """NumPy masks time steps of the encoder's input."""
    config = hf.Wav2Vec2Config(
        vocab_size=12, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=24,
        conv_dim=(8, 8), conv_stride=(4, 4), conv_kernel=(8, 8), num_feat_extract_layers=2, mask_time_length=5,
        num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, layerdrop=layerdrop, ctc_loss_reduction="mean",
        ctc_zero_infinity=True, hidden_dropout=0.0, attention_dropout=0.0, activation_dropout=0.0,
        feat_proj_dropout=0.0, final_dropout=0.0,
    )  # fmt: skip
    model = hf.Wav2Vec2ForCTC(config).train()
    model.freeze_feature_encoder()

    def batch():
        wave, labels = torch.randn(3, 400), torch.randint(1, 12, (3, 3))
        return lambda m: m(wave, labels=labels).loss

    return model, batch


def wav2vec2_with_layerdrop():
    return wav2vec2(layerdrop=0.3)


DRAWING = [drop_path, drop_path_and_everything, musicgen, wav2vec2, wav2vec2_with_layerdrop]


@pytest.mark.slow(keep=7)
@pytest.mark.parametrize("make", DRAWING)
@pytest.mark.parametrize("schedule", ["sweep", "independent", "joint", "relay"])
def test_draws_from_numpy_and_python_are_held(make, schedule):
    random.seed(0)
    np.random.seed(0)
    model, batch = make()
    Audit(model, trust=0.05, schedule=schedule).train(batch() for _ in range(4))


def test_all_generators_stand_as_before_after_an_error():
    random.seed(0)
    np.random.seed(0)
    model, batch = drop_path_and_everything()
    audit = Audit(model)
    for _ in range(2):
        fail_everywhere(audit.opt, batch(), model)
