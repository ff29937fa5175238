"""What is compared: something that draws one picture after each reference."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from PIL import Image


@dataclass(frozen=True)
class How:
    """The settings that every contender draws with."""

    steps: int
    guidance: float
    size: tuple[int, int]  # width and height in pixels; a pipeline that has only one size draws that
    scale: float = 1.0  # λ, where there is one


class Contender(Protocol):
    """One row of a comparison."""

    @property
    def name(self) -> str: ...
    @property
    def trainable(self) -> int | None:
        """Parameters trained to hear a picture; None where nobody can tell."""

    def draw(self, references: Sequence[Image.Image], texts: Sequence[str], seeds: Sequence[int], how: How) -> list[Image.Image]:
        """One picture for each reference, text and seed. The same seed draws the same picture."""
        ...
