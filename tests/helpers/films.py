"""A tiny classifier of films, its texts, and the command line that trains it."""

import json

import torch
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

WORDS = ["good", "bad", "film", "plot", "actor", "very", "not", "the", "a", "and"]


def save_model(folder, **config):
    """A two-block BERT and a word-level tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {w: i for i, w in enumerate(["[PAD]", "[UNK]", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)
    torch.manual_seed(0)
    small = {"vocab_size": 12, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    small |= {"intermediate_size": 32, "max_position_embeddings": 32}
    BertForSequenceClassification(BertConfig(**small | config)).save_pretrained(folder)


def save_table(path):
    """A csv file with two separable classes."""
    rows = [f"the film and the {WORDS[i % 7]} very {'good' if i % 2 else 'bad'},{i % 2}" for i in range(60)]
    path.write_text("\n".join(["text,label", *rows]) + "\n")


def arguments(model, table, tmp_path, *more):
    return [
        "finetune", "--model", str(model), "--dataset", str(table), "--batch-size", "4", "--max-length", "8",
        "--output", str(tmp_path / "runs"), "--name", "one", "--device", "cpu", *more,
    ]  # fmt: skip


def lines(folder):
    read = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    counts = "collectives", "reduced_bytes"  # a resumed run finds everything out once more
    return [{k: v for k, v in line.items() if k not in counts} for line in read]


def load(folder):
    """The weights in a model's folder."""
    return BertForSequenceClassification.from_pretrained(folder).state_dict()


def weights(folder):
    """Those of the model that a run has saved."""
    return load(folder / "model")
