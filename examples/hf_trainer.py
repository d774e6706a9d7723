"""Fine-tune a text classifier: ``python hf_trainer.py MODEL DATA.csv``, columns ``text`` and ``label`` (0, 1 ...)."""

import sys

from datasets import load_dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer, TrainingArguments

from fastals.integrations.transformers import ALSTrainer

name, csv = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(name)
rows = load_dataset("csv", data_files=csv)["train"]
data = rows.map(lambda row: tokenizer(row["text"], truncation=True, max_length=128))
model = AutoModelForSequenceClassification.from_pretrained(name, num_labels=max(data["label"]) + 1)
arguments = TrainingArguments("classifier", num_train_epochs=1, lr_scheduler_type="cosine", logging_steps=5)
trainer = ALSTrainer(model, arguments, train_dataset=data, processing_class=tokenizer)
trainer.train()
trainer.save_model()
