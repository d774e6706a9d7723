"""Trainers of Hugging Face and its relatives on small models, and what they leave."""

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch
import transformers as hf
from helpers.hf import tiny_bert
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn

import fastals
from fastals.integrations.transformers import ALSTrainer

QUIET = {
    "per_device_train_batch_size": 8, "max_steps": 6, "logging_steps": 1, "save_strategy": "no", "report_to": [],
    "use_cpu": True, "disable_tqdm": True, "seed": 1,
}  # fmt: skip


def bert(**config: Any) -> hf.BertForSequenceClassification:
    """A classifier with dropout of 0.1."""
    return tiny_bert(**({"vocab_size": 30, "num_labels": 3} | config))


def llama(**config: Any) -> hf.LlamaForCausalLM:
    """A language model without dropout, except where ``config`` asks for it."""
    torch.manual_seed(0)
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    return hf.LlamaForCausalLM(hf.LlamaConfig(**(small | {"vocab_size": 64, "num_key_value_heads": 2} | config)))


def labelled(count: int = 48, *, ragged: bool = False) -> list[dict[str, torch.Tensor]]:
    """Rows whose label can be read from the first token."""
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(1, 30, (4 + i % 5 if ragged else 8,), generator=generator) for i in range(count)]
    return [{"input_ids": ids, "labels": ids[0] % 3} for ids in rows]


def sequences(count: int = 48) -> list[dict[str, torch.Tensor]]:
    """Rows of arithmetic for a language model, with as many ignored labels as the row's index says."""
    generator = torch.Generator().manual_seed(0)
    rows = [(torch.arange(10) * 3 + torch.randint(0, 60, (1,), generator=generator)) % 60 for _ in range(count)]
    return [{"input_ids": ids, "labels": ids.masked_fill(torch.arange(10) < i % 5, -100)} for i, ids in enumerate(rows)]


def tokenizer() -> hf.PreTrainedTokenizerFast:
    """One token for each of the words ``w0`` to ``w59``."""
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    words = {word: i for i, word in enumerate([*(f"w{i}" for i in range(60)), *special.values()])}
    fast = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    fast.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return hf.PreTrainedTokenizerFast(tokenizer_object=fast, model_max_length=32, **special)


def make(
    out: Any, model: nn.Module | None, data: Any, trainer: Callable = ALSTrainer,
    arguments: Callable = hf.TrainingArguments, **options: Any,
) -> hf.Trainer:  # fmt: skip
    """A trainer; options with the name of a training argument are one."""
    own = {f.name for f in fields(arguments)} & options.keys()
    args = arguments(output_dir=str(out), **(QUIET | {k: options.pop(k) for k in own}))
    return trainer(**({"model": model} if model is not None else {}), args=args, train_dataset=data, **options)


def fit(*args: Any, resume: str | None = None, **options: Any) -> hf.Trainer:
    """The trainer of :func:`make` after its training."""
    trainer = make(*args, **options)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def optimizer_of(trainer: hf.Trainer) -> fastals.ALS:
    """The optimizer inside Accelerate's."""
    return trainer.optimizer.optimizer


def logged(trainer: hf.Trainer, key: str) -> list[float]:
    """What has been logged under this key."""
    return [logs[key] for logs in trainer.state.log_history if key in logs]


def first_log(trainer: hf.Trainer) -> dict[str, float]:
    """What the first step has logged, but for the searches and the rate."""
    logs = next(logs for logs in trainer.state.log_history if "loss" in logs)
    return {k: v for k, v in logs.items() if not k.startswith("als/") and k != "learning_rate"}


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of all parameters, by name."""
    return {n: p.detach().clone() for n, p in model.named_parameters()}
