"""Files of tensors: safetensors and PyTorch pickles, distinguished by their content, read without running code, written atomically."""

import json
import os
import pickle
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from imprompt.errors import CheckpointError, notify
from imprompt.utils.files import atomic_path
from imprompt.utils.text import shorten

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
ADAPTER_SUFFIXES = (".safetensors", *PICKLE_SUFFIXES)
NOT_FINITE = "contains NaN or infinity: the training that wrote it diverged, or the file is damaged; use an earlier checkpoint"
Metadata = dict[str, Any]  # what imprompt writes into a file, as JSON
_METADATA_KEY = "imprompt"
_SAFETENSORS_ERRORS = (safetensors.SafetensorError, OSError, ValueError, TypeError, RuntimeError)
_OTHER_CONTENTS = {b"version https://git-lfs": "a pointer of Git LFS", b"<": "a web page", b"GGUF": "a GGUF file"}  # by their first bytes

# ------------------------------------------------------------------------------------------------------------ reading


def read_tensors(path: Path | str) -> tuple[dict[str, Tensor], Metadata]:
    """All tensors of a file unchanged, and the metadata that imprompt wrote into it. The format is that of the content, not of the suffix.

    The keys of nested mappings in a pickle are joined by dots. Pickles run no code (`weights_only`). Raises CheckpointError.
    """
    path = Path(path)
    is_pickle = _has_pickle(path)
    expected = PICKLE_SUFFIXES if is_pickle else (".safetensors",)
    contents = _read_pickle(path) if is_pickle else _read_safetensors(path)
    if path.suffix in ADAPTER_SUFFIXES and path.suffix not in expected:
        name = "PyTorch pickle" if is_pickle else "safetensors file"
        notify(f"{path.name} is read as a {name}, which it is by its content; other programs may need the suffix {expected[0]}")
    return contents


def read_metadata(path: Path | str) -> Metadata:
    """The metadata that imprompt wrote into a file. Raises CheckpointError."""
    path = Path(path)
    return _read_pickle(path)[1] if _has_pickle(path) else _parse_metadata(read_header(path).get(_METADATA_KEY, "{}"))


def read_header(path: Path | str) -> dict[str, str]:
    """The whole header of a safetensors file, whoever wrote it; empty for a pickle. Raises CheckpointError."""
    if _has_pickle(Path(path)):
        return {}
    with _open_safetensors(path) as file:
        return dict(file.metadata() or {})


def tensor_names(path: Path | str) -> list[str]:
    """The names of all tensors of a safetensors file, without reading them. Raises CheckpointError."""
    with _open_safetensors(path) as file:
        return list(file.keys())


def _has_pickle(path: Path) -> bool:
    """Whether the file begins like a pickle or torch's zip archive of one. Raises CheckpointError where it cannot be opened."""
    start = _first_bytes(path)
    return start.startswith((b"PK", b"\x80")) and start[8:9] != b"{"  # there a safetensors file of that length has its header


def _first_bytes(path: Path) -> bytes:
    if not os.path.isfile(path):  # unlike Path.is_file, it does not raise for a name too long; a pipe would block
        raise CheckpointError(f"there is no file {path}")
    try:
        with path.open("rb") as file:
            return file.read(32)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be opened ({error.strerror}); check who may read it") from error


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], Metadata]:
    with _open_safetensors(path) as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        return tensors, _parse_metadata((file.metadata() or {}).get(_METADATA_KEY, "{}"))


@contextmanager
def _open_safetensors(path: Path | str) -> Iterator[safetensors.safe_open]:
    """An open safetensors file. Raises CheckpointError where it cannot be read, also while it is."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            yield file
    except _SAFETENSORS_ERRORS as error:
        raise _damaged(Path(path)) from error


def _damaged(path: Path) -> CheckpointError:
    start = _first_bytes(path)
    other = next((name for first, name in _OTHER_CONTENTS.items() if start.lstrip().startswith(first)), None)
    return CheckpointError(
        f"{path.name} is damaged or not a safetensors or PyTorch file{f', but {other}' if other else ''}; download or copy it again"
    )


def _read_pickle(path: Path) -> tuple[dict[str, Tensor], Metadata]:
    try:
        with warnings.catch_warnings(), path.open("rb") as file:  # newer versions of torch go by the suffix of a path
            warnings.simplefilter("ignore")  # torch's warnings are meant for the file's author
            content = torch.load(file, map_location="cpu", weights_only=True)
        metadata = content.pop(_METADATA_KEY, None) if isinstance(content, dict) else None
        tensors = dict(_flatten(content))
    except Exception as error:  # a damaged pickle can raise nearly any exception
        if isinstance(error, pickle.UnpicklingError):
            raise CheckpointError(
                f"{path.name} contains more than tensors and was not opened, because loading it could run code; "
                "ask its author for a .safetensors file"
            ) from error
        if _is_foreign_archive(path):
            raise CheckpointError(f"{path.name} is a zip archive and not one of PyTorch's; unpack it first") from error
        raise _damaged(path) from error
    return tensors, _parse_metadata(metadata)


def _is_foreign_archive(path: Path) -> bool:
    """Whether the file is an intact zip archive without the pickle that torch writes into its own."""
    try:
        with zipfile.ZipFile(path) as archive:
            return not any(name.endswith("data.pkl") for name in archive.namelist())
    except (OSError, ValueError, zipfile.BadZipFile, NotImplementedError):
        return False


def _flatten(node: object, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors of nested mappings and lists, with their keys and positions joined by dots."""
    if isinstance(node, (Mapping, list, tuple)):
        for key, value in node.items() if isinstance(node, Mapping) else enumerate(node):
            yield from _flatten(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(node, Tensor):
        yield prefix, node


def _parse_metadata(header: object) -> Metadata:
    """The metadata that imprompt wrote into a file; empty where another program wrote the entry."""
    try:
        metadata = json.loads(header if isinstance(header, str) else json.dumps(header))
    except (ValueError, TypeError, RecursionError):
        return {}
    return metadata if isinstance(metadata, dict) else {}


# ----------------------------------------------------------------------------------------------------------- checking


def check_shapes(tensors: Mapping[str, Tensor], expected_tensors: Mapping[str, Tensor], file_name: str, remedy: str) -> None:
    """Raise CheckpointError unless the tensors have the names and shapes of the expected ones."""
    received, expected = ({k: tuple(v.shape) for k, v in state.items()} for state in (tensors, expected_tensors))
    for key in dict.fromkeys([*expected, *received]):
        if expected.get(key) != received.get(key):
            raise CheckpointError(
                f"{file_name}: {shorten(key)} should be {expected.get(key, 'nothing')}, received {received.get(key, 'nothing')}; {remedy}"
            )


def check_weights(tensors: Mapping[str, Tensor], file_name: str) -> None:
    """Raise CheckpointError unless every tensor can be used as weights: dense, floating-point, not quantized, finite."""
    for key, tensor in tensors.items():
        if problem := _weight_problem(tensor):
            raise CheckpointError(f"{file_name}: {shorten(key)} {problem}")


def check_finite(module: nn.Module, name: str) -> None:
    """Raise CheckpointError where a floating-point tensor of a model contains NaN or infinity."""
    for key, tensor in module.state_dict().items():
        if tensor.is_floating_point() and not tensor.is_meta and not _largest_magnitude(tensor) < float("inf"):
            raise CheckpointError(f"{name}: {key} {NOT_FINITE}")


def _largest_magnitude(tensor: Tensor) -> float:
    """max |x|, which is NaN or infinity where an element is; 0 for an empty tensor."""
    if not tensor.numel():
        return 0.0
    low, high = (tensor if tensor.element_size() > 1 else tensor.float()).aminmax()
    return max(-float(low), float(high))


def _weight_problem(tensor: Tensor) -> str | None:
    """Why a tensor cannot be used as weights, as the rest of a sentence that begins with its name; None where it can."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.nbytes > tensor.untyped_storage().nbytes():
        return "is no ordinary dense tensor; save the weights again as .safetensors"
    if not tensor.is_floating_point() or tensor.element_size() == 0:
        return f"is {dtype}: quantized, and its scales are unknown here; expected float32, float16 or bfloat16 weights"
    largest = _largest_magnitude(tensor)
    if not largest < float("inf"):
        return NOT_FINITE
    if tensor.element_size() == 1 and largest == torch.finfo(tensor.dtype).max:
        return f"is {dtype} over its whole range: quantized, and its scale is unknown here; expected float32, float16 or bfloat16 weights"
    return None


# ------------------------------------------------------------------------------------------------------------ writing


def write_tensors(tensors: Mapping[str, Tensor], path: Path | str, metadata: Mapping[str, object] | None = None) -> None:
    """Write tensors in the public layout, atomically; the suffix selects the format. Raises CheckpointError for an unknown one."""
    path = Path(path)
    if path.suffix not in ADAPTER_SUFFIXES:
        raise CheckpointError(f"cannot write {path.name}: expected a name ending in {', '.join(ADAPTER_SUFFIXES)}")
    tensors = with_own_storage(tensors)
    with atomic_path(path) as partial:
        if path.suffix in PICKLE_SUFFIXES:
            nested: dict[str, Any] = {"image_proj": {}, "ip_adapter": {}}
            for key, value in tensors.items():
                group, name = key.split(".", 1)
                nested.setdefault(group, {})[name] = value
            torch.save(nested | ({_METADATA_KEY: dict(metadata)} if metadata else {}), partial)
        else:
            header = {"format": "pt"} | ({_METADATA_KEY: json.dumps(dict(metadata))} if metadata else {})
            safetensors.torch.save_file(tensors, partial, header)


def with_own_storage(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, copied where needed: a pickle would store the whole of a slice, and safetensors refuses tensors that share memory."""
    copies: dict[str, Tensor] = {}
    used_pointers = set()
    for key, value in tensors.items():
        value = value.detach().cpu().contiguous()
        storage = value.untyped_storage()
        if storage.nbytes() != value.nbytes or storage.data_ptr() in used_pointers:
            value = value.clone()
        used_pointers.add(value.untyped_storage().data_ptr())
        copies[key] = value
    return copies
