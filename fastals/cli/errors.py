"""Errors that the user can fix: one line that says what to do."""


class UserError(Exception):
    """Shown by the command line as one line, with exit code 2."""


def first_line(error: BaseException) -> str:
    """What an error says, in one line; if that ends in a colon, with the line after it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1])


def needs_extra(error: ImportError) -> UserError:
    """The error for a missing package of the extra ``finetune``."""
    return UserError(f"{error.name} is not installed: pip install 'fastals[finetune]'")
