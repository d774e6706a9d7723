"""SentenceTransformerTrainer with a line search: units, cache, and the losses with parameters of their own."""

import pytest
import torch

hf = pytest.importorskip("transformers")
st = pytest.importorskip("sentence_transformers")
pytest.importorskip("accelerate")

from datasets import Dataset, DatasetDict  # noqa: E402
from helpers.tiny import assert_same  # noqa: E402
from helpers.trainers import first_log, fit, logged, optimizer_of, tokenizer, weights  # noqa: E402
from sentence_transformers.sentence_transformer import losses, modules  # noqa: E402
from torch import nn  # noqa: E402

from fastals.integrations.transformers import LineSearch  # noqa: E402


class Searching(LineSearch, st.SentenceTransformerTrainer):
    """The trainer of README."""


def sentences(topics):
    generator = torch.Generator().manual_seed(sum(topics[:7]))
    words = lambda k: torch.randint(6 * k, 6 * k + 6, (6,), generator=generator)  # noqa: E731
    return [" ".join(f"w{w}" for w in words(k)) for k in topics]


TOPICS = [i % 10 for i in range(48)]
PAIRS = Dataset.from_dict({"anchor": sentences(TOPICS), "positive": sentences(TOPICS[::-1])[::-1]})
PAIRS_OR_NOT = Dataset.from_dict({
    "a": sentences(TOPICS), "b": sentences([k if i % 2 else 9 - k for i, k in enumerate(TOPICS)]),
    "label": [i % 2 for i in range(48)],
})  # fmt: skip
BOTH = DatasetDict({"pairs": PAIRS, "or_not": PAIRS_OR_NOT})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny BERT and its tokenizer."""
    path = tmp_path_factory.mktemp("bert")
    tokenizer().save_pretrained(path)
    torch.manual_seed(0)
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    hf.BertModel(hf.BertConfig(vocab_size=63, **small)).save_pretrained(path)
    return str(path)


def ranking(model):
    return losses.MultipleNegativesRankingLoss(model)


def softmax(model):
    torch.manual_seed(0)
    return losses.SoftmaxLoss(model, 16, 2)


class Prototypes(nn.Module):
    """A loss that has parameters and holds the model where no module is registered."""

    def __init__(self, model):
        super().__init__()
        self.models, self.prototypes = [model], nn.Linear(16, 2)

    def forward(self, features, labels):
        return nn.functional.cross_entropy(self.prototypes(self.models[0](features[0])["sentence_embedding"]), labels)


LOSSES = {
    "ranking": (ranking, PAIRS),
    "cached": (lambda m: losses.CachedMultipleNegativesRankingLoss(m, mini_batch_size=4), PAIRS),
    "matryoshka": (lambda m: losses.MatryoshkaLoss(m, ranking(m), [16, 8]), PAIRS),
    "layers": (lambda m: losses.AdaptiveLayerLoss(m, ranking(m)), PAIRS),
    "components": (lambda m: losses.GlobalOrthogonalRegularizationLoss(m), PAIRS),
    "softmax": (softmax, PAIRS_OR_NOT),
    "dict": (lambda m: {"pairs": ranking(m), "or_not": softmax(m)}, BOTH),
}


def train(out, folder, name, trainer=Searching, dropout=0.1, **options):
    """The trainer after its training, and what its losses have trained at first and at last."""
    make, data = LOSSES.get(name, (Prototypes, PAIRS_OR_NOT))
    keys = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    model = st.SentenceTransformer(
        modules=[modules.Transformer(folder, config_kwargs=keys), modules.Pooling(16)], device="cpu"
    )
    loss = make(model)
    whole = nn.ModuleList([model, *(loss.values() if isinstance(loss, dict) else [loss])])
    before = weights(whole)
    arguments = st.SentenceTransformerTrainingArguments
    trained = fit(out, model, data, trainer=trainer, arguments=arguments, loss=loss, **options)
    return trained, before, weights(whole)


@pytest.mark.slow(keep=1)
@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_falls_on_its_batch_and_trains_all_that_it_has(name, folder, tmp_path):
    """Trials are those of full forwards, bitwise, and cost less; the first step logs what AdamW's logs."""
    als = {"schedule": "sweep", "trust": 0.1}
    trainer, before, after = train(tmp_path, folder, name, als=als | {"cache": "check"})
    uncached, _, truth = train(tmp_path, folder, name, als=als | {"cache": False})
    plain, *_ = train(tmp_path, folder, name, st.SentenceTransformerTrainer)
    opt = optimizer_of(trainer)
    assert_same(after, truth)
    assert opt.reports == optimizer_of(uncached).reports
    assert all(r.loss_after < r.loss_before for r in opt.reports)
    assert [u.name.rsplit("model.", 1)[-1] for u in opt.reports[0].units][:3] == [
        "embeddings", "encoder.layer.0", "encoder.layer.1",
    ]  # fmt: skip
    assert opt.last_forwards < optimizer_of(uncached).last_forwards == 1 + opt.report.trials
    assert first_log(trainer) == pytest.approx(first_log(plain), rel=1e-5)
    still = [n for n in before if torch.equal(before[n], after[n]) and "pooler" not in n]  # which no loss uses
    assert not still
    own = {n for n in before if not n.startswith("0.")}
    assert bool(own) == (name in {"softmax", "dict"})


def test_a_loss_that_hides_the_model(folder, tmp_path):
    """Both are trained; the cache cannot see into the loss, which is said."""
    with pytest.warns(UserWarning, match="calls of 'loss0' are computed in every trial"):
        trainer, before, after = train(tmp_path, folder, "hidden", als={"schedule": "sweep", "cache": "check"})
    assert all(r.loss_after < r.loss_before for r in optimizer_of(trainer).reports)
    assert not [n for n in before if torch.equal(before[n], after[n]) and "pooler" not in n]
    assert "1.prototypes.weight" in before


def test_cached_embeddings_make_the_same_steps(folder, tmp_path):
    """The loss that computes its gradients in a hook, mini-batch by mini-batch."""
    (cached, _, after), (whole, _, truth) = (
        train(tmp_path, folder, name, dropout=0.0, als={"schedule": "sweep"}) for name in ("cached", "ranking")
    )
    assert logged(cached, "loss") == pytest.approx(logged(whole, "loss"), rel=1e-4)
    assert logged(cached, "als/trials") == logged(whole, "als/trials")
    for name, p in truth.items():
        torch.testing.assert_close(after[name], p, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("options", [{}, {"bf16": True}, {"gradient_accumulation_steps": 2}], ids=str)
def test_training_by_the_relay(options, folder, tmp_path):
    trainer, *_ = train(tmp_path, folder, "ranking", num_train_epochs=4, max_steps=-1, **options)
    loss = logged(trainer, "loss")
    assert sum(loss[-4:]) < sum(loss[:4])
    assert optimizer_of(trainer).param_groups[0]["count"] == trainer.state.global_step == len(loss)


def test_a_mapping_of_rates_is_said_to_have_no_meaning(folder, tmp_path):
    with pytest.warns(UserWarning, match="learning_rate_mapping=.* has no meaning for a line search: each unit"):
        train(tmp_path, folder, "ranking", max_steps=1, learning_rate_mapping={"encoder": 1e-3})
