"""Fine-tune a language model by LoRA on texts of your own, with TRL's SFTTrainer and a line search in place of a rate.

Type ``pip install 'fastals[trainer]' trl peft``, then ``python sft_lora.py --data notes.txt``. The data is a text file,
whose paragraphs are the samples, or a csv or jsonl file with a column ``text``.
"""

import argparse
from pathlib import Path

import torch
from datasets import Dataset, load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from trl import SFTConfig, SFTTrainer

from fastals.integrations.transformers import LineSearch


class SFTWithLineSearch(LineSearch, SFTTrainer):
    """SFTTrainer, each of whose steps is a line search."""


def arguments():
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--data", required=True, help="a .txt file with a blank line between texts, a .csv or a .jsonl")
    parser.add_argument("--column", default="text", help="column of a .csv or .jsonl that holds the texts")
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M", help="folder or hub id of a causal LM")
    parser.add_argument("--steps", type=int, default=60, help="number of steps")
    parser.add_argument("--batch", type=int, default=8, help="texts in a mini-batch")
    parser.add_argument("--max-length", type=int, default=128, help="longer texts are cut to this many tokens")
    parser.add_argument("--prompt", help="beginning of the sample (default: that of a held-out text)")
    parser.add_argument("--output", default="adapter", help="folder of the adapter")
    parser.add_argument("--seed", type=int, default=0, help="seed of adapter, mini-batches, dropout and the sample")
    return parser.parse_args()


def read(path, column):
    """The texts of a file."""
    kind = {".csv": "csv", ".jsonl": "json", ".txt": "text"}.get(Path(path).suffix)
    if kind is None:
        raise SystemExit(f"{path}: the data must be a .txt, .csv or .jsonl file")
    if kind == "text":
        texts = [text.strip() for text in Path(path).read_text(encoding="utf-8").split("\n\n")]
        return Dataset.from_dict({"text": [text for text in texts if text]})
    rows = load_dataset(kind, data_files=path, split="train")
    if column not in rows.column_names:
        raise SystemExit(f"{path} has no column {column!r}: choose one of {', '.join(rows.column_names)} by --column")
    return Dataset.from_dict({"text": list(rows[column])})


def main():
    args = arguments()
    set_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)  # bfloat16 would blur the losses
    texts = read(args.data, args.column).train_test_split(test_size=0.1, seed=args.seed)
    config = SFTConfig(
        args.output, max_steps=args.steps, max_length=args.max_length, per_device_train_batch_size=args.batch,
        per_device_eval_batch_size=args.batch, lr_scheduler_type="cosine", bf16=False, gradient_checkpointing=False,
        logging_steps=5, save_strategy="no", report_to="none", seed=args.seed,
    )  # fmt: skip
    lora = LoraConfig(r=8, lora_alpha=16, lora_dropout=0.05, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = SFTWithLineSearch(
        model, config, train_dataset=texts["train"], eval_dataset=texts["test"], processing_class=tokenizer,
        peft_config=lora,
    )  # fmt: skip
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    print(f"held-out loss: {before:.3f} before, {trainer.evaluate()['eval_loss']:.3f} after {args.steps} steps")
    trainer.save_model()  # AutoPeftModelForCausalLM.from_pretrained(args.output) reads it
    prompt = args.prompt or " ".join(texts["test"]["text"][0].split()[:5])
    ids = tokenizer(prompt, return_tensors="pt").to(trainer.model.device)
    sample = trainer.model.eval().generate(**ids, max_new_tokens=40, do_sample=True, top_p=0.9)
    print("a sample:", tokenizer.decode(sample[0], skip_special_tokens=True))


if __name__ == "__main__":
    main()
