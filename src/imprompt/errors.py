"""Errors for the person who can fix them: what was expected, what was received, and what to do next. Standard library only."""

import re
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


_SECRETS = (
    (re.compile(r"\bhf_\w{6,}"), "hf_…"),
    (re.compile(r"(?i)(\bbearer\s+|\btoken=)[^\s'\"&]+"), r"\1…"),
    (re.compile(r"(://)[^/\s@]+@"), r"\1…@"),  # user:password@
    (re.compile(r"(\w://[^\s?'\"]*)\?[^\s'\"]+"), r"\1?…"),  # the query of a URL may be its signature
)


def redact_secrets(text: str) -> str:
    """The text without Hugging Face tokens, passwords and queries of URLs."""
    for pattern, replacement in _SECRETS:
        text = pattern.sub(replacement, text)
    return text


def summarize_error(error: Exception) -> str:
    """The first line of another library's error message without secrets, to be quoted in parentheses in our own message."""
    lines = redact_secrets(str(error)).strip().splitlines()
    return lines[0][:160] if lines else type(error).__name__
