"""Photographs of one subject beside pictures of its class: what DreamBooth and Textual Inversion learn from. And the texts for them."""

import re
import zlib
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from imprompt.data.records import Record
from imprompt.errors import UserError
from imprompt.utils.images import Picture


class Personal:
    """Photographs of one subject, all with one text; with a prior, every second record is a picture of the class with the class's text.

    So a batch is half and half in the mean, and the loss is DreamBooth's (arXiv:2208.12242, eq. 2) but for a factor of two;
    `weight` is its λ. Within its half every picture comes up equally often. Raises UserError without photographs.
    """

    def __init__(
        self, photos: Sequence[Picture], text: str, prior: Sequence[Picture] = (), prior_text: str = "", weight: float = 1.0
    ) -> None:
        if not photos:
            raise UserError("expected at least one photograph of the subject, received none")
        self.photos, self.text, self.prior, self.prior_text, self.weight = photos, text, prior, prior_text, weight

    def contents(self) -> list[str]:
        """Of each photograph a sum that changes when it does."""
        return [f"{zlib.crc32(_bytes(photo)):08x}" for photo in self.photos]

    def __len__(self) -> int:
        return 2 * len(self.photos) * len(self.prior) if self.prior else len(self.photos)

    def __getitem__(self, i: int) -> Record:
        if not 0 <= i < len(self):
            raise IndexError(i)
        pair, of_class = divmod(i, 2) if self.prior else (i, 0)
        pictures = self.prior if of_class else self.photos
        at = pair % len(pictures)
        if of_class:
            return Record(f"class:{at}", pictures[at], self.prior_text, loss_weight=self.weight)
        return Record(f"subject:{at}", pictures[at], self.text)


def _bytes(photo: Picture) -> bytes:
    if isinstance(photo, Image.Image):
        return photo.tobytes()
    return photo if isinstance(photo, bytes) else Path(photo).read_bytes() if Path(photo).is_file() else b""


def class_text(noun: str) -> str:
    """A text for any picture of the class."""
    return f"a photo of {'an' if noun[:1].lower() in 'aeiou' else 'a'} {noun}"


def subject_text(token: str, noun: str = "") -> str:
    """A text for the subject: a rare token before the noun (DreamBooth), or a placeholder in its stead (Textual Inversion)."""
    return f"a photo of a {token} {noun}".rstrip()


def named(prompt: str, noun: str, token: str, alone: bool = False) -> str:
    """The prompt with the subject in it: "a cat on a beach" → "a sks cat on a beach"; `*` stands for token and noun.

    `alone`: the token is the whole name, as a placeholder of Textual Inversion is: "a <subject> on a beach". Only the first
    mention counts; a prompt that has the name already stays. Raises UserError where it has neither.
    """
    name = token if alone else f"{token} {noun}"
    if "*" in prompt:
        return prompt.replace("*", name, 1)
    if re.search(rf"(?<!\w){re.escape(name)}(?!\w)", prompt):
        return prompt
    mention = re.compile(rf"(?<!\w){re.escape(noun)}(?!\w)", re.IGNORECASE)
    if not noun or not mention.search(prompt):
        raise UserError(f"prompt: expected the word {noun!r}, or * where the subject should stand; received {prompt!r}")
    return mention.sub(lambda _: name, prompt, count=1)
