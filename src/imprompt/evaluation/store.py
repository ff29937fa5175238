"""Where an evaluation keeps its work: one folder for each row, one file for each chunk of prompts. Whole, or not there.

OUT/protocol.json                      what every row has in common
OUT/rows/NAME/row.json                 what this row is
OUT/rows/NAME/chunk-00012.safetensors  what was seen in the pictures of its prompts
OUT/rows/NAME/score.json               the figures that were made of all chunks
OUT/rows/NAME/pictures/00192-2-770.png prompt 192, sample 2, seed 770
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
from PIL import Image
from torch import Tensor

from imprompt.errors import UserError
from imprompt.utils.files import atomic_path, write_file


class Shelf:
    """One row's folder."""

    def __init__(self, out: Path, name: str):
        self.folder = out / "rows" / folder_of(name)

    def chunk(self, number: int) -> Path:
        return self.folder / f"chunk-{number:05}.safetensors"

    def has(self, number: int) -> bool:
        return self.chunk(number).is_file()

    @property
    def score(self) -> Path:
        return self.folder / "score.json"

    def write(self, number: int, seen: Mapping[str, Tensor], lost: Mapping[str, str]) -> None:
        """Keep what was seen; a chunk with its final name is complete. Figures of what was there before are let go."""
        self.score.unlink(missing_ok=True)
        with atomic_path(self.chunk(number)) as partial:
            safetensors.torch.save_file({k: v.contiguous() for k, v in seen.items()}, partial, {"lost": json.dumps(dict(lost))})

    def read(self, number: int) -> tuple[dict[str, Tensor], dict[str, str]]:
        """What was seen, and which prompts were lost and why."""
        try:
            with safetensors.safe_open(self.chunk(number), "pt") as file:
                return {k: file.get_tensor(k) for k in file.keys()}, json.loads((file.metadata() or {}).get("lost", "{}"))  # noqa: SIM118
        except (safetensors.SafetensorError, OSError, ValueError) as error:
            raise UserError(f"{self.chunk(number)} is damaged; delete it and run the same command again") from error

    def picture(self, prompt: int, sample: int, seed: int) -> Path:
        return self.folder / "pictures" / f"{prompt:05}-{sample}-{seed}.png"

    def keep(self, pictures: Sequence[Image.Image], places: Sequence[tuple[int, int, int]]) -> None:
        (self.folder / "pictures").mkdir(parents=True, exist_ok=True)
        for picture, place in zip(pictures, places, strict=True):
            picture.save(self.picture(*place))

    def pictures(self, prompts: Sequence[int]) -> list[Image.Image | None]:
        """The first sample of these prompts."""
        found = []
        for prompt in prompts:
            paths = sorted((self.folder / "pictures").glob(f"{prompt:05}-0-*.png"))
            found.append(Image.open(paths[0]).convert("RGB") if paths else None)
        return found


def folder_of(name: str) -> str:
    """A row's name as that of a folder."""
    return re.sub(r"[^\w.+ -]+|^\.+", "-", name)


def agree(path: Path, facts: Mapping[str, Any], what: str) -> None:
    """Write facts, or raise UserError where others stand there already."""
    wanted = json.loads(json.dumps(dict(facts)))
    if path.is_file():
        found = json.loads(path.read_text("utf-8"))
        for name in dict.fromkeys([*wanted, *found]):
            if wanted.get(name) != found.get(name):
                raise UserError(
                    f"{what} was begun with {name} = {found.get(name)!r}, and now it is {wanted.get(name)!r}; "
                    "go on with the settings it was begun with, or choose another --out"
                )
        return
    write_file(path, json.dumps(wanted, indent=1, ensure_ascii=False))
