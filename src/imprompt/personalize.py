"""The workflow of `imprompt personalise`: several photographs of one subject in, pictures of it out."""

import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from PIL import Image

from imprompt.config import PERSONAL, Personalise
from imprompt.data.dreambooth import named
from imprompt.data.loader import UNREADABLE
from imprompt.data.readers import open_data
from imprompt.data.records import Counted
from imprompt.errors import UserError, brief
from imprompt.generation.generate import Drawn, draw, staged
from imprompt.models import checkpoints, hub
from imprompt.utils.files import atomic_path, writable_folder, write_file
from imprompt.utils.images import Picture, open_image

EMBEDDED = {  # of mini; the other ways bring the references of its plain adapter together
    "attention": "mini-subject", "average-tokens": "mini-plus", "max-tokens": "mini-plus", "joint": "mini-plus",
}  # fmt: skip
TRAINED = {"attention": ("attention-tokens", "attention"), "self-attention": ("self-attention",)}  # what the adapter has to have

Progress = Callable[[int, int], None]


def photographs(choice: Personalise, say: Callable[[str], None]) -> tuple[list[Picture], list[Image.Image]]:
    """Those of the folder that can be opened: where they are, and opened. What cannot is said. Raises UserError where none can.

    What was drawn into a folder inside it before is not taken for photographs. Where they are of several subjects, it is said.
    """
    records = open_data(choice.folder)
    if not isinstance(records, Counted):
        raise UserError(f"expected a folder of photographs of one subject, or a list of them; received {choice.folder}")
    own = Path(choice.out).resolve()
    if own in (Path(choice.folder).resolve(), *Path(choice.folder).resolve().parents):
        raise UserError(f"out: expected another folder than that of the photographs, received {choice.out}")
    places, opened, subjects = list[Picture](), list[Image.Image](), set[str]()
    for i in range(len(records)):
        try:
            record = records[i]
            place = record.target
            if isinstance(place, (str, Path)) and _drawn_by_us(Path(place).resolve(), own, Path(choice.folder).resolve()):
                continue
            opened.append(open_image(place))
            places.append(place)
            subjects.add(record.subject or "")
        except UNREADABLE as error:
            say(f"left out: {brief(error)}")
    if not opened:
        raise UserError(f"none of the {len(records)} pictures in {choice.folder} can be opened")
    if len(subjects) > 1:
        names = ", ".join(sorted(subjects)[:3]) + (" …" if len(subjects) > 3 else "")
        say(f"photographs of {len(subjects)} subjects are taken for one ({names}); name one folder if they are not")
    return places, opened


def _drawn_by_us(place: Path, own: Path, folder: Path) -> bool:
    """Whether a picture lies where this run draws, or where an earlier one has drawn or learned, inside the folder."""
    inside = [parent for parent in place.parents if folder in parent.parents]
    return own in place.parents or any((parent / mark).is_file() for parent in inside for mark in ("sheet.png", "learning.json"))


def learn(choice: Personalise, opened: Sequence[Image.Image]) -> Iterator[Any]:
    """Train a method that learns the subject from these photographs, step by step; nothing where the same training is done already.

    OUT/METHOD/learning.json says what is being learned, learned.json what was: only the same is continued.
    """
    from imprompt.training import train

    if choice.method not in PERSONAL:
        return
    training = choice.training().settled()
    for text in choice.prompts():  # before anything is learned
        named(text, choice.noun, training.token, alone=choice.method == "inversion")
    staged(choice.drawn(""))  # whatever cannot be drawn is said now
    folder = writable_folder(training.out)
    facts = json.loads(json.dumps(asdict(training) | {"photographs": [_content(image) for image in opened]}))
    begun, done = folder / "learning.json", folder / "learned.json"
    if _said(done) == facts and (folder / "adapter.safetensors").is_file():
        return
    done.unlink(missing_ok=True)
    resume = "auto" if _said(begun) == facts else "never"  # what is there may be another subject's
    write_file(begun, json.dumps(facts, indent=1))
    shown = writable_folder(str(folder / "photographs"))
    for path in shown.glob("*.png"):
        path.unlink()
    for number, image in enumerate(opened):
        with atomic_path(shown / f"{number:03}.png") as partial:
            image.save(partial, "PNG")
    yield from train(replace(training, resume=resume, data=str(shown)))
    write_file(done, json.dumps(facts, indent=1))


def pictures(choice: Personalise, places: Sequence[Picture], progress: Progress = lambda done, total: None) -> list[list[Drawn]]:
    """What is drawn, prompt by prompt."""
    found = []
    for number, text in enumerate(choice.prompts()):

        def step(done: int, total: int, before: int = number) -> None:
            progress(before * total + done, len(choice.prompts()) * total)

        found.append(draw(choice.drawn(text, **how(choice, places)), step))
    return found


def how(choice: Personalise, places: Sequence[Picture]) -> dict[str, Any]:
    """What the drawing is told of the subject."""
    if choice.method in PERSONAL:
        return {"adapter": str(Path(choice.out) / choice.method / "adapter.safetensors")}
    mini = choice.base == "mini"
    adapter = choice.adapter or (EMBEDDED.get(choice.method, "mini") if mini else None)
    if choice.method not in TRAINED:
        return {"image": tuple(places), "adapter": adapter, "combine": choice.method}
    if (choice.method not in EMBEDDED and choice.adapter is None) or adapter is None:
        raise UserError(
            f"{choice.method} has weights that are trained: name an adapter that has them with --adapter "
            f"(imprompt train --subjects 10 --combine {TRAINED[choice.method][0]}), or take average"
        )
    path = hub.find_adapter(adapter)[0]
    own = checkpoints.recognise(*checkpoints.read(path)).aggregator
    if own not in TRAINED[choice.method]:
        raise UserError(f"{adapter} brings photographs together by {own}; expected one trained with {choice.method}, or --method {own}")
    return {"image": tuple(places), "adapter": adapter}


def _content(image: Image.Image) -> str:
    """Changes when a photograph does."""
    return f"{image.width}x{image.height} {zlib.crc32(image.tobytes()):08x}"


def _said(path: Path) -> Any:
    """What stands in a file of facts; None where there is none, or it was cut off."""
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return None
