"""Writing files atomically, and manifests that make an interrupted run continue only with the same settings."""

import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from imprompt.errors import UserError, summarize_error

SAME_SETTINGS_REMEDY = "continue with the settings it was begun with, or choose another --output-dir"
_DISK_ERROR_PHRASES = ("I/O error", "os error", "file write failed", "unexpected pos")


@contextmanager
def atomic_path(path: Path | str) -> Iterator[Path]:
    """Yield a path of the same name in a hidden folder next to it; the file is moved to `path` if the block succeeds, else removed.

    So whoever looks for `*.safetensors` never finds a partial file, even after `kill -9`. Raises UserError where the file cannot
    be written, also for lack of space.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.", ignore_cleanup_errors=True) as folder:
            partial = Path(folder) / path.name
            yield partial
            partial.replace(path)
    except Exception as error:
        if not is_disk_error(error):
            raise
        raise UserError(
            f"cannot write {path} ({getattr(error, 'strerror', None) or summarize_error(error)}); free some space or choose another path"
        ) from error


def write_file(path: Path | str, content: str | bytes) -> None:
    """Write a file atomically, text as UTF-8. Raises UserError where it cannot be written."""
    with atomic_path(path) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)


def is_disk_error(error: Exception) -> bool:
    """Whether the disk caused an error. safetensors and torch have their own error types for it."""
    return isinstance(error, OSError) or (not isinstance(error, UserError) and any(phrase in str(error) for phrase in _DISK_ERROR_PHRASES))


def ensure_writable_folder(path: Path | str) -> Path:
    """The folder, created if it does not exist. Raises UserError before any work where nothing can be written to it."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except (OSError, ValueError) as error:
        raise UserError(f"cannot write to {path} ({getattr(error, 'strerror', error)}); choose another folder with --output-dir") from error
    return path


def check_or_write_manifest(path: Path, manifest: Mapping[str, object], description: str, remedy: str = SAME_SETTINGS_REMEDY) -> None:
    """Write a JSON manifest, or raise UserError where the file exists and any of its entries differs.

    `description` names what the manifest belongs to, and `remedy` ends the sentence of the error.
    """
    expected = json.loads(json.dumps(dict(manifest)))
    if not path.is_file():
        write_file(path, json.dumps(expected, indent=1, ensure_ascii=False) + "\n")
        return
    stored = json.loads(path.read_text("utf-8"))
    for name in dict.fromkeys([*expected, *stored]):
        if expected.get(name) != stored.get(name):
            raise UserError(f"{description} was begun with {name} = {stored.get(name)!r}, and now it is {expected.get(name)!r}; {remedy}")
