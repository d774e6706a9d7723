"""Small Hugging Face models."""

from collections.abc import Iterator

import torch
import transformers as hf

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def tiny_bert(**config: object) -> hf.BertForSequenceClassification:
    """A classifier with two blocks, width 16 and fresh weights of seed 0."""
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    torch.manual_seed(0)
    return hf.BertForSequenceClassification(hf.BertConfig(**(small | config)))


def model_and_batches(kind: str) -> tuple[hf.PreTrainedModel, list[dict]]:
    """BERT for classification or Llama as a language model, in training mode, and three batches with padding."""
    small = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
    if kind == "bert":
        model = tiny_bert(**small, vocab_size=100)
    else:
        torch.manual_seed(0)
        config = hf.LlamaConfig(**small, num_key_value_heads=2, vocab_size=100, pad_token_id=0)
        model = hf.LlamaForCausalLM(config)
    return model.to(DEVICE).train(), list(padded_batches(classify=kind == "bert"))


def padded_batches(*, classify: bool) -> Iterator[dict]:
    """Three batches; the first sequence of each is padded."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        ids = torch.randint(1, 100, (4, 16), generator=generator)
        mask = torch.ones_like(ids)
        mask[0, 10:] = 0
        labels = ids[:, 0] % 2 if classify else ids
        yield {"input_ids": ids.to(DEVICE), "attention_mask": mask.to(DEVICE), "labels": labels.to(DEVICE)}
