"""Fine-tune a classifier with Hugging Face's Trainer and a line search per layer."""
