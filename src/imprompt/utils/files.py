"""Writing files atomically and durably, kept JSON files, locks on folders, and manifests that keep a folder to the same settings."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any

from imprompt.errors import UserError, summarize_error

try:
    import fcntl
except ImportError:  # Windows: no locks
    fcntl = None  # type: ignore[assignment]

SAME_SETTINGS_REMEDY = "continue with the settings it was begun with, or choose another --output-dir"
TEMPORARY_PREFIX = ".imprompt-"  # of the folders in which files are written before they get their names
_DISK_ERROR_PHRASES = ("I/O error", "os error", "file write failed", "unexpected pos")
_cleaned_folders: set[Path] = set()


@contextmanager
def atomic_path(path: Path | str) -> Iterator[Path]:
    """Yield a path of the same name in a hidden folder next to it; the file is moved to `path` if the block succeeds, else removed.

    So whoever looks for `*.safetensors` never finds a partial file, even after `kill -9` or a power cut; a link that has the name
    is replaced, not followed. Raises UserError where the file cannot be written, also for lack of space.
    """
    path = Path(path)
    with disk_errors_explained(path), _temporary_folder(path.parent) as folder:
        partial = folder / path.name
        yield partial
        _apply_umask(partial)
        sync_file(partial)
        partial.replace(path)
        sync_folder(path.parent)


def _apply_umask(path: Path) -> None:
    """Give a file in a temporary folder the permissions of any new file; safetensors writes its files for the owner alone."""
    example = path.parent / ".permissions"
    example.touch()
    path.chmod(example.stat().st_mode & 0o777)
    example.unlink()


def write_file(path: Path | str, content: str | bytes) -> None:
    """Write a file atomically, text as UTF-8. Raises UserError where it cannot be written."""
    with atomic_path(path) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)


def write_new_file(path: Path | str, write: Callable[[Path], object]) -> Path:
    """Write a file without replacing any: where the name is taken, the next of NAME-2, NAME-3 … is; returns the path.

    `write(partial)` writes the content. Several processes may write to one folder. Raises UserError where it cannot be written.
    """
    path = Path(path)
    with disk_errors_explained(path), _temporary_folder(path.parent) as folder:
        partial = folder / path.name
        write(partial)
        _apply_umask(partial)
        sync_file(partial)
        candidates = (path if number == 1 else path.with_stem(f"{path.stem}-{number}") for number in count(1))
        final = next(candidate for candidate in candidates if not os.path.lexists(candidate) and _move_to_free_name(partial, candidate))
        sync_folder(path.parent)
        return final


def _move_to_free_name(partial: Path, path: Path) -> bool:
    """Give a file its final name unless that has been taken in the meantime; whether it was free."""
    try:
        os.link(partial, path)
    except FileExistsError:
        return False
    except OSError:  # a file system without hard links
        try:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return False
        partial.replace(path)
    return True


@contextmanager
def disk_errors_explained(path: Path) -> Iterator[None]:
    """Within the context an error of the disk is a UserError that names the file which cannot be written."""
    try:
        yield
    except Exception as error:
        if not is_disk_error(error):
            raise
        raise UserError(
            f"cannot write {path} ({getattr(error, 'strerror', None) or summarize_error(error)}); free some space or choose another path"
        ) from error


def is_disk_error(error: Exception) -> bool:
    """Whether the disk caused an error. safetensors and torch have their own error types for it."""
    return isinstance(error, OSError) or (not isinstance(error, UserError) and any(phrase in str(error) for phrase in _DISK_ERROR_PHRASES))


def sync_file(path: Path, flags: int = os.O_RDWR) -> None:
    """Wait until the content of a file, opened with these flags, is on the disk."""
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(path: Path) -> None:
    """Wait until the names in a folder are on the disk, where the system can."""
    with suppress(OSError):
        sync_file(path, os.O_RDONLY)


def remove_path(path: Path) -> None:
    """Remove a file, a link (not what it names) or a folder; nothing where there is none, or where it cannot be removed."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


# Temporary folders and locks


@contextmanager
def _temporary_folder(parent: Path) -> Iterator[Path]:
    """A hidden folder in `parent`, locked while it is in use; those of killed processes are removed first."""
    parent.mkdir(parents=True, exist_ok=True)
    if parent not in _cleaned_folders:
        _cleaned_folders.add(parent)
        remove_stale_folders(parent)
    folder, descriptor = _make_locked_folder(parent)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if descriptor is not None:
            os.close(descriptor)


def _make_locked_folder(parent: Path) -> tuple[Path, int | None]:
    while True:
        folder = Path(tempfile.mkdtemp(dir=parent, prefix=TEMPORARY_PREFIX))
        try:
            descriptor = try_lock(folder)
        except FileNotFoundError:
            continue  # another process took it for a stale one before it was locked
        except OSError:
            return folder, None
        if descriptor is not None and folder.is_dir():
            return folder, descriptor
        if descriptor is not None:
            os.close(descriptor)


def remove_stale_folders(parent: Path) -> None:
    """Remove the temporary folders that killed processes have left in a folder: no process holds their lock."""
    for folder in parent.glob(f"{TEMPORARY_PREFIX}*"):
        with suppress(OSError):
            descriptor = None if folder.is_symlink() else try_lock(folder)
            if descriptor is not None:
                shutil.rmtree(folder, ignore_errors=True)
                os.close(descriptor)


def try_lock(path: Path) -> int | None:
    """A descriptor that holds the lock of a file or folder until it is closed, also by a kill; None where another one holds it.

    Raises OSError where the path does not exist, or the system has no locks.
    """
    if fcntl is None:
        raise OSError("this system has no file locks")
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


class FolderLock:
    """Keeps a folder for this process, by a lock on its file `.lock`, until it is released or the process ends in any way.

    Raises UserError where another process keeps it. Without effect on systems that have no locks.
    """

    def __init__(self, folder: Path, work: str):
        self._descriptor: int | None = None
        path = folder / ".lock"
        with disk_errors_explained(path):
            path.touch()
        try:
            self._descriptor = try_lock(path)
        except OSError:
            return
        if self._descriptor is None:
            raise UserError(f"another {work} is running in {folder}; wait until it ends, or choose another --output-dir")

    def release(self) -> None:
        """Let others have the folder."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __del__(self) -> None:
        self.release()


# Folders, JSON and manifests


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


def read_json_object(path: Path, remedy: str) -> dict[str, Any]:
    """The JSON object in a file that imprompt wrote. Raises FileNotFoundError; UserError, ending with the remedy, for a damaged one."""
    try:
        content = json.loads(path.read_text("utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"expected an object, received {type(content).__name__}")
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}); make it readable") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({summarize_error(error)}); {remedy}") from error
    return content


def check_or_write_manifest(path: Path, manifest: Mapping[str, object], description: str, remedy: str = SAME_SETTINGS_REMEDY) -> None:
    """Write a JSON manifest, or raise UserError where the file exists and any of its entries differs, or it is damaged.

    `description` names what the manifest belongs to, and `remedy` ends the sentence of the error.
    """
    expected = json.loads(json.dumps(dict(manifest)))
    try:
        stored = read_json_object(path, "delete it if nothing else was begun in this folder, and run the same command again")
    except FileNotFoundError:
        write_file(path, json.dumps(expected, indent=1, ensure_ascii=False) + "\n")
        return
    for name in dict.fromkeys([*expected, *stored]):
        if expected.get(name) != stored.get(name):
            before, now = (_shorten(repr(values.get(name))) for values in (stored, expected))
            raise UserError(f"{description} was begun with {name} = {before}, and now it is {now}; {remedy}")


def _shorten(text: str, length: int = 120) -> str:
    return text if len(text) <= length else f"{text[: length - 2]} …"
