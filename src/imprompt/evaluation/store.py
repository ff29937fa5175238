"""The files of an evaluation: a folder for each row, a file for each chunk of prompts. Every file is complete, or does not exist.

OUT/protocol.json                      what all rows have in common, and the version of this layout
OUT/rows/NAME/row.json                 what identifies the row
OUT/rows/NAME/chunk-00012.safetensors  features and scores of the images of a chunk of prompts
OUT/rows/NAME/score.json               the metrics of all chunks
OUT/rows/NAME/images/00192-2-770.png   prompt 192, sample 2, seed 770
"""

import json
import re
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import safetensors.torch
import torch
from PIL import Image
from torch import Tensor

from imprompt.errors import UserError, summarize_error
from imprompt.utils.files import atomic_path, check_or_write_manifest, read_json_object
from imprompt.utils.images import open_image

FORMAT = 3  # version of this layout, of the manifests' keys and of the tensors' names


class ImageId(NamedTuple):
    """What identifies an image of a row."""

    prompt: int  # index of its prompt
    sample: int  # index among the images of the prompt
    seed: int


class RowStore:
    """The folder of one row."""

    def __init__(self, output_dir: Path, row_name: str):
        self.folder = output_dir / "rows" / folder_name(row_name)

    def chunk_path(self, chunk: int) -> Path:
        """The file of a chunk."""
        return self.folder / f"chunk-{chunk:05}.safetensors"

    def has_chunk(self, chunk: int) -> bool:
        """Whether a chunk is finished."""
        return self.chunk_path(chunk).is_file()

    @property
    def score_path(self) -> Path:
        """The file of the row's metrics."""
        return self.folder / "score.json"

    def write_chunk(self, chunk: int, tensors: Mapping[str, Tensor], skipped: Mapping[str, str]) -> None:
        """Store features and scores; a chunk with its final name is complete. Metrics of earlier chunks are no longer valid.

        skipped: index of a prompt that could not be evaluated → reason.
        """
        self.score_path.unlink(missing_ok=True)
        with atomic_path(self.chunk_path(chunk)) as partial:
            contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
            reasons = json.dumps(dict(skipped))
            metadata = {"skipped": reasons, "checksum": compute_checksum(contiguous, reasons)}
            safetensors.torch.save_file(contiguous, partial, metadata)

    def read_chunk(self, chunk: int) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Tensors and skipped prompts of a chunk. Raises UserError for a damaged file."""
        path = self.chunk_path(chunk)
        try:
            with safetensors.safe_open(path, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                metadata = file.metadata() or {}
            if metadata.get("checksum") != compute_checksum(tensors, metadata.get("skipped", "")):
                raise ValueError("its content does not match its checksum")
            return tensors, json.loads(metadata["skipped"])
        except PermissionError as error:
            raise UserError(f"cannot read {path} ({error.strerror}); make it readable") from error
        except Exception as error:  # a damaged header can raise nearly any exception
            raise UserError(f"{path} is damaged ({summarize_error(error)}); delete it and run the same command again") from error

    def image_path(self, image_id: ImageId) -> Path:
        """The file of an image."""
        return self.folder / "images" / f"{image_id.prompt:05}-{image_id.sample}-{image_id.seed}.png"

    def save_images(self, images: Sequence[Image.Image], image_ids: Sequence[ImageId]) -> None:
        """Save images as PNG files."""
        for image, image_id in zip(images, image_ids, strict=True):
            with atomic_path(self.image_path(image_id)) as partial:
                image.save(partial)

    def load_images(self, prompts: Iterable[int]) -> list[Image.Image | None]:
        """The first image of each of these prompts; None where the prompt was skipped."""
        paths = [next(iter(sorted((self.folder / "images").glob(f"{prompt:05}-0-*.png"))), None) for prompt in prompts]
        return [open_image(path) if path else None for path in paths]


def compute_checksum(tensors: Mapping[str, Tensor], text: str) -> str:
    """A checksum of the names, types, shapes and values of tensors, and of a text."""
    checksum = zlib.crc32(text.encode())
    for name, tensor in sorted(tensors.items()):
        checksum = zlib.crc32(f"{name} {tensor.dtype} {list(tensor.shape)}".encode(), checksum)
        checksum = zlib.crc32(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes(), checksum)
    return f"{checksum:08x}"


def folder_name(row_name: str) -> str:
    """The name of a row's folder."""
    return re.sub(r"[^\w.+]+", "-", row_name).strip("-.") or "-"


def check_or_write_protocol(output_dir: Path, protocol: Mapping[str, object]) -> None:
    """Write the protocol of an evaluation, or raise UserError where the folder holds one with another protocol or format."""
    path = output_dir / "protocol.json"
    remedy = "delete it to compare nothing, and run the same command again"
    if path.is_file() and (version := read_json_object(path, remedy).get("format", 1)) != FORMAT:
        raise UserError(
            f"{output_dir} holds an evaluation in format {version}, and this version of imprompt reads and writes format {FORMAT}; "
            "choose another --output-dir"
        )
    check_or_write_manifest(path, {"format": FORMAT, **protocol}, f"the evaluation in {output_dir}")
