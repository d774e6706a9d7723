"""Models of common shapes with random weights, and mini-batches for them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

CLASSES = 5
# Arguments of ALS for a sweep in which most first trials pass, although the weights are random.
ACCEPTING = {"schedule": "sweep", "trust": 1e-3}
# Arguments of ALS for a sweep in which every trial fails: no decrease reaches 0.999999 of the slope over such a step.
REJECTING = {"schedule": "sweep", "c": 0.999999, "trust": 0.2, "initial": "reset"}


@dataclass(frozen=True)
class Shape:
    """A model and the size of its mini-batches."""

    build: Callable[[], nn.Module]
    batch: int
    length: int = 0  # tokens; 0 for images
    dtype: torch.dtype = torch.float32

    def model(self, device: str) -> nn.Module:
        """The model in training mode; on one device its weights are always the same."""
        torch.manual_seed(0)
        with torch.device(device):
            return self.build().train().to(self.dtype)

    def conditions(self) -> dict[str, Any]:
        """Size and type of the mini-batch, for the result of a timing."""
        return {"batch": self.batch, "length": self.length, "dtype": str(self.dtype).removeprefix("torch.")}

    def batches(self, device: str) -> Iterator[dict[str, Tensor]]:
        """Endless mini-batches, always the same."""
        generator = torch.Generator().manual_seed(1)
        while True:
            labels = torch.randint(CLASSES, (self.batch,), generator=generator).to(device)
            if self.length:
                ids = torch.randint(1000, 2000, (self.batch, self.length), generator=generator)
                mask = torch.ones_like(ids)
                mask[0, -1] = 0  # some padding, as real texts have, so that attention is always masked
                yield {"input_ids": ids.to(device), "attention_mask": mask.to(device), "labels": labels}
            else:
                pixels = torch.randn(self.batch, 3, 224, 224, generator=generator)
                yield {"pixel_values": pixels.to(device), "labels": labels}


def bert(depth: int, width: int, heads: int = 12) -> nn.Module:
    """A BERT classifier."""
    config = hf.BertConfig(
        num_hidden_layers=depth, hidden_size=width, intermediate_size=4 * width, num_attention_heads=heads,
        num_labels=CLASSES, max_position_embeddings=2048,
    )  # fmt: skip
    return hf.BertForSequenceClassification(config)


def narrow(depth: int) -> nn.Module:
    """A BERT with cheap blocks, for the scaling with depth."""
    return bert(depth, 128, 4)


def gpt2() -> nn.Module:
    """GPT-2 small."""
    return hf.GPT2ForSequenceClassification(hf.GPT2Config(num_labels=CLASSES, pad_token_id=0))


def llama() -> nn.Module:
    """A Llama-style decoder of the width of GPT-2: RMS norms, rotary positions, gated MLP, grouped queries."""
    config = hf.LlamaConfig(
        vocab_size=32000, hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=12,
        num_key_value_heads=4, num_labels=CLASSES, pad_token_id=0,
    )  # fmt: skip
    return hf.LlamaForSequenceClassification(config)


def vit() -> nn.Module:
    """ViT-Base on 224 x 224."""
    return hf.ViTForImageClassification(hf.ViTConfig(num_labels=CLASSES))


def lora() -> nn.Module:
    """BERT-base with LoRA adapters of rank 8."""
    from peft import LoraConfig, TaskType, get_peft_model

    return get_peft_model(bert(12, 768), LoraConfig(task_type=TaskType.SEQ_CLS, r=8, target_modules=["query", "value"]))


MINILM = Shape(lambda: bert(6, 384), 8, 128)
SHAPES: dict[str, Shape] = {
    "minilm": MINILM,
    "bert-base": Shape(lambda: bert(12, 768), 4, 128),
    **{f"depth-{n}": Shape(lambda n=n: narrow(n), 8, 64) for n in (6, 12, 24, 48)},
    **{f"width-{n}": Shape(lambda n=n: bert(6, n), 8, 64) for n in (192, 384, 768)},
    **{f"batch-{n}": replace(MINILM, batch=n) for n in (4, 16, 64, 128)},
    **{f"length-{n}": replace(MINILM, batch=2048 // n, length=n) for n in (64, 256, 1024, 2048)},
    "gpt2": Shape(gpt2, 4, 128),
    "llama": Shape(llama, 4, 128),
    "vit": Shape(vit, 4),
    "lora": Shape(lora, 4, 128),
}
