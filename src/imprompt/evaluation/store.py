"""The files of an evaluation: a folder for each row, a file for each chunk of prompts. Every file is complete, or does not exist.

OUT/protocol.json                      what all rows have in common, and the version of this layout
OUT/rows/NAME/row.json                 what identifies the row
OUT/rows/NAME/chunk-00012.safetensors  features and scores of the images of a chunk of prompts
OUT/rows/NAME/score.json               the metrics of all chunks
OUT/rows/NAME/images/00192-2-770.png   prompt 192, sample 2, seed 770
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import safetensors.torch
from PIL import Image
from torch import Tensor

from imprompt.errors import UserError
from imprompt.utils.files import atomic_path, check_or_write_manifest

FORMAT = 2  # version of this layout, of the manifests' keys and of the tensors' names


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
            safetensors.torch.save_file(contiguous, partial, {"skipped": json.dumps(dict(skipped))})

    def read_chunk(self, chunk: int) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Tensors and skipped prompts of a chunk. Raises UserError for a damaged file."""
        path = self.chunk_path(chunk)
        try:
            with safetensors.safe_open(path, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                return tensors, json.loads((file.metadata() or {}).get("skipped", "{}"))
        except (safetensors.SafetensorError, OSError, ValueError) as error:
            raise UserError(f"{path} is damaged; delete it and run the same command again") from error

    def image_path(self, image_id: ImageId) -> Path:
        """The file of an image."""
        return self.folder / "images" / f"{image_id.prompt:05}-{image_id.sample}-{image_id.seed}.png"

    def save_images(self, images: Sequence[Image.Image], image_ids: Sequence[ImageId]) -> None:
        """Save images as PNG files."""
        (self.folder / "images").mkdir(parents=True, exist_ok=True)
        for image, image_id in zip(images, image_ids, strict=True):
            image.save(self.image_path(image_id))

    def load_images(self, prompts: Iterable[int]) -> list[Image.Image | None]:
        """The first image of each of these prompts; None where the prompt was skipped."""
        paths = [next(iter(sorted((self.folder / "images").glob(f"{prompt:05}-0-*.png"))), None) for prompt in prompts]
        return [Image.open(path).convert("RGB") if path else None for path in paths]


def folder_name(row_name: str) -> str:
    """The name of a row's folder."""
    return re.sub(r"[^\w.+]+", "-", row_name).strip("-.") or "-"


def check_or_write_protocol(output_dir: Path, protocol: Mapping[str, object]) -> None:
    """Write the protocol of an evaluation, or raise UserError where the folder holds one with another protocol or format."""
    path = output_dir / "protocol.json"
    if path.is_file() and (version := json.loads(path.read_text("utf-8")).get("format", 1)) != FORMAT:
        raise UserError(
            f"{output_dir} holds an evaluation in format {version}, and this version of imprompt reads and writes format {FORMAT}; "
            "choose another --output-dir"
        )
    check_or_write_manifest(path, {"format": FORMAT, **protocol}, f"the evaluation in {output_dir}")
