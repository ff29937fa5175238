"""What is compared: something that draws a picture after one reference, or after several of one subject."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from PIL import Image


class Case(NamedTuple):
    """One prompt."""

    key: str
    text: str
    references: tuple[Image.Image, ...]  # square
    target: Image.Image  # what is drawn is compared with it: the reference itself, or another photograph of the subject
    subject: str = ""
    noun: str = ""  # what the subject is, as the text calls it


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

    def draw(self, cases: Sequence[Case], texts: Sequence[str], seeds: Sequence[int], how: How) -> list[Image.Image]:
        """One picture for each case, told this text and drawn with this seed. The same seed draws the same picture."""
        ...
