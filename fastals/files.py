"""Files and folders that are whole or not there, whenever the process dies, the machine stops or the disk is full."""

import os
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """Yield a path beside ``target`` for a new file or folder, which takes the place of ``target`` when it is whole.

    After an error nothing is left of it, and ``target`` is as it was.
    """
    temporary = _beside(target, "tmp")
    remove(temporary)  # a process that was killed may have left it
    try:
        yield temporary
        settle(temporary)
        move(temporary, target)
    except BaseException:
        with suppress(OSError):
            remove(temporary)
        raise


def move(source: Path, target: Path) -> None:
    """Put a file or folder that is on the disk in the place of ``target``."""
    old = _beside(target, "old")
    remove(old)
    if target.is_dir() or (source.is_dir() and target.exists()):  # no system call replaces these
        os.replace(target, old)
    try:
        os.replace(source, target)
    except BaseException:
        if old.exists():
            os.replace(old, target)
        raise
    _sync(target.parent)
    remove(old)


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def settle(path: Path) -> None:
    """Wait until a file, or a folder with all that is in it, is on the disk."""
    if path.is_dir():
        for inner in path.iterdir():
            settle(inner)
    _sync(path)


def check_sums(path: Path) -> None:
    """Compare a file of ``torch.save`` with the checksums in it, which ``torch.load`` does not look at.

    Raises:
        ValueError: the file was damaged, or is of another kind.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except OSError:
        raise
    except Exception as error:  # zipfile has many for bytes that make no sense
        raise ValueError(f"{path.name} is no file of torch.save, or was cut short: {error}") from error
    if damaged:
        raise ValueError(f"{path.name} is damaged: the checksum of {damaged} is wrong")


def _beside(target: Path, suffix: str) -> Path:
    return target.with_name(f".{target.name}.{suffix}")


def _sync(path: Path) -> None:
    """Flush a file, or the list of files of a folder where the system can."""
    if path.is_dir() and os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
