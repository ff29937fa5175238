"""The files of a run state: nested values with tensors as safetensors and JSON, which run no code when read, and their checksums.

state/step-N/state.json          format version, step, and the checksum of every other file; written last
state/step-N/run.safetensors     weights, optimizers, moving average and counters
state/step-N/rank-R.safetensors  of process R: position in the data, random generators, its part of a sharded optimizer
"""

import json
import re
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from imprompt.errors import UserError, summarize_error
from imprompt.models.tensor_files import with_own_storage
from imprompt.utils.files import read_json_object, sync_file, sync_folder, write_file

STATE_VERSION = 3  # 1 and 2 were written by Accelerate, in formats that could run code
SEAL = "state.json"
_ROOT = "state"  # name of the value in a file's metadata, and of its tensors


def write_state_file(path: Path, value: object) -> None:
    """Write None, booleans, numbers, strings and tensors, nested in lists, tuples and dictionaries."""
    tensors: dict[str, Tensor] = {}
    tree = json.dumps(_to_tree(value, _ROOT, tensors))
    save_file(with_own_storage(tensors), path, {_ROOT: tree})
    sync_file(path)


def read_state_file(path: Path) -> Any:
    """What `write_state_file` wrote; tensors are on the CPU. Raises various errors for a damaged file."""
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return _from_tree(json.loads(file.metadata()[_ROOT]), tensors)


def _to_tree(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """JSON in which each container has its type; tensors are collected by name."""
    if isinstance(value, Tensor):
        tensors[name] = value.detach().cpu().contiguous()
        return {"tensor": name}
    if isinstance(value, Mapping):
        return {"dict": [[key, _to_tree(item, f"{name}.{key}", tensors)] for key, item in value.items()]}
    if isinstance(value, (list, tuple)):
        items = [_to_tree(item, f"{name}.{number}", tensors) for number, item in enumerate(value)]
        return {"tuple" if isinstance(value, tuple) else "list": items}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"{name}: a {type(value).__name__} cannot be saved")


def _from_tree(tree: Any, tensors: Mapping[str, Tensor]) -> Any:
    if not isinstance(tree, dict):
        return tree
    ((kind, content),) = tree.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: _from_tree(item, tensors) for key, item in content}
    return {"list": list, "tuple": tuple}[kind](_from_tree(item, tensors) for item in content)


# Folders of states


def list_checkpoints(folder: Path) -> list[Path]:
    """The states of the run in a folder, the newest last. What has another name than `step-N` is no state."""
    steps = {path: match for path in (folder / "state").glob("step-*") if (match := re.fullmatch(r"step-(\d{1,18})", path.name))}
    return sorted((path for path in steps if path.is_dir()), key=lambda path: int(steps[path][1]))


def seal_state(folder: Path, step: int) -> None:
    """Mark a folder as a complete state: the checksums of its files are written last."""
    checksums = {path.name: compute_checksum(path) for path in sorted(folder.iterdir())}
    seal = {"version": STATE_VERSION, "step": step, "checksums": checksums}
    write_file(folder / SEAL, json.dumps(seal, indent=1) + "\n")
    sync_folder(folder)


def check_seal(folder: Path) -> None:
    """Raise UserError, saying what is wrong, where a state is damaged."""
    try:
        seal = read_json_object(folder / SEAL, "")
    except FileNotFoundError as error:
        raise UserError(f"{SEAL} is missing") from error
    checksums = seal.get("checksums")
    if f"step-{seal.get('step')}" != folder.name or not isinstance(checksums, dict) or not checksums:
        raise UserError(f"{SEAL} is damaged")
    for name, checksum in checksums.items():
        try:
            damaged = Path(name).name != name or compute_checksum(folder / name) != checksum
        except (OSError, ValueError) as error:
            raise UserError(f"{name}: {getattr(error, 'strerror', None) or summarize_error(error)}") from error
        if damaged:
            raise UserError(f"{name} is damaged")


def compute_checksum(path: Path) -> int:
    """The CRC-32 of a file."""
    checksum = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            checksum = zlib.crc32(block, checksum)
    return checksum


def find_resumable_state(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest intact state in a run's folder, if there is any state, and notices about newer ones that are damaged.

    Raises UserError where all of them are damaged, or the newest was written by another version of imprompt.
    """
    states, notices = list_checkpoints(folder), list[str]()
    for path in reversed(states):
        check_state_version(folder, path)
        try:
            check_seal(path)
        except UserError as error:
            notices.append(f"the state {path.name} cannot be read ({error}); continuing from the one before")
        else:
            return path, notices
    if states:
        reason = notices[0].partition("; continuing")[0]
        raise UserError(
            f"the run in {folder} cannot be continued: {reason}, and there is no other; start anew with --resume-from-checkpoint never"
        )
    return None, []


def check_state_version(folder: Path, path: Path) -> None:
    """Raise UserError where a state has another format than this version of imprompt writes."""
    try:
        version = read_json_object(path / SEAL, "").get("version")
    except FileNotFoundError:
        version = 2 if (path / "data-0.pt").is_file() else STATE_VERSION
    except UserError:
        return  # what is damaged is reported where it is read whole
    if version != STATE_VERSION:
        raise UserError(
            f"the run in {folder} was written by another version of imprompt (state {version}, expected {STATE_VERSION}); "
            "use another --output-dir, or --resume-from-checkpoint never to replace it"
        )
