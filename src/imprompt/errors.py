"""Errors for the person who can fix them: what was expected, what was received, and what to do next. Standard library only."""

import warnings


class UserError(ValueError):
    """An input that cannot be used, or a missing resource. The command line prints its one sentence and exits with status 2."""


class ImageError(UserError):
    """An image that cannot be read or used."""


class CheckpointError(UserError):
    """A file that is not an adapter, is damaged, or does not fit."""


class Notice(UserWarning):
    """What is ignored, dropped, reshaped or converted of an input. The command line prints it as one line, `imprompt: note: …`."""


def notify(text: str) -> None:
    """Report, in one line, what happens to an input where that is no error."""
    warnings.warn(text, Notice, stacklevel=3)


def summarize_error(error: Exception) -> str:
    """The first line of another library's error message, to be quoted in parentheses in our own message."""
    lines = str(error).strip().splitlines()
    return lines[0][:160] if lines else type(error).__name__
