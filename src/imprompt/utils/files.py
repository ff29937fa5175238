"""Writing files so that a reader never meets half of one."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from imprompt.errors import UserError, brief

_DISK = ("I/O error", "os error", "file write failed", "unexpected pos")


@contextmanager
def atomic_path(path: Path | str) -> Iterator[Path]:
    """Yield a path of the same name in a hidden folder beside it; move it there when the block succeeds, remove it when it does not.

    So whoever looks for `*.safetensors` never finds half of one, even after `kill -9`. Raises UserError where nothing can be
    written there, or no longer.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.", ignore_cleanup_errors=True) as folder:
            partial = Path(folder) / path.name
            yield partial
            partial.replace(path)
    except Exception as error:
        if not write_failed(error):
            raise
        raise UserError(
            f"cannot write {path} ({getattr(error, 'strerror', None) or brief(error)}); make room or choose another place"
        ) from error


def write_file(path: Path | str, content: str | bytes) -> None:
    """A whole file, text as UTF-8. Raises UserError where nothing can be written there."""
    with atomic_path(path) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)


def write_failed(error: Exception) -> bool:
    """Whether the disk is what failed. safetensors and torch have error types of their own for it."""
    return isinstance(error, OSError) or (not isinstance(error, UserError) and any(sign in str(error) for sign in _DISK))


def writable_folder(path: Path | str) -> Path:
    """The folder, made if need be. Raises UserError before any work where nothing can be written to it."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except (OSError, ValueError) as error:
        raise UserError(f"cannot write to {path} ({getattr(error, 'strerror', error)}); choose another folder with --out") from error
    return path
