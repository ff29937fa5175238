"""The workflow of `imprompt personalise`: several photographs of one subject in, pictures of it out."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from PIL import Image

from imprompt.config import PERSONAL, Personalise
from imprompt.data.loader import UNREADABLE
from imprompt.data.readers import open_data
from imprompt.data.records import Counted
from imprompt.errors import UserError, brief
from imprompt.files import atomic_path
from imprompt.generating import Drawn, draw
from imprompt.images import Picture, open_image

EMBEDDED = {"attention": "mini-subject"}  # of mini; the other ways bring the references of its plain adapter together
TRAINED = ("attention", "self-attention")

Progress = Callable[[int, int], None]


def photographs(choice: Personalise, say: Callable[[str], None]) -> tuple[list[Picture], list[Image.Image]]:
    """Those of the folder that can be opened: where they are, and opened. What cannot is said. Raises UserError where none can."""
    records = open_data(choice.folder)
    if not isinstance(records, Counted):
        raise UserError(f"expected a folder of photographs of one subject, or a list of them; received {choice.folder}")
    places, opened = list[Picture](), list[Image.Image]()
    for i in range(len(records)):
        try:
            place = records[i].target
            opened.append(open_image(place))
            places.append(place)
        except UNREADABLE as error:
            say(f"left out: {brief(error)}")
    if not opened:
        raise UserError(f"none of the {len(records)} pictures in {choice.folder} can be opened")
    return places, opened


def learn(choice: Personalise) -> Iterator[Any]:
    """Train a method that learns the subject, step by step; nothing where the same training is done already."""
    from imprompt.training import train

    if choice.method not in PERSONAL:
        return
    training = choice.training().settled()
    done, facts = Path(training.out) / "learned.json", json.loads(json.dumps(asdict(training) | {"photographs": _content(training.data)}))
    if done.is_file() and json.loads(done.read_text("utf-8")) == facts:
        return
    yield from train(replace(training, resume="never") if done.is_file() else training)  # what is there was learned otherwise
    with atomic_path(done) as partial:
        partial.write_text(json.dumps(facts, indent=1), "utf-8")


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
    if choice.method in TRAINED:
        if (choice.method not in EMBEDDED and choice.adapter is None) or adapter is None:
            raise UserError(
                f"{choice.method} has weights that are trained: name an adapter that has them with --adapter "
                f"(imprompt train --subjects 10 --combine {choice.method}), or take average"
            )
        return {"image": tuple(places), "adapter": adapter}
    return {"image": tuple(places), "adapter": adapter, "combine": choice.method}


def _content(folder: str) -> list[str]:
    """Changes when photographs come or go."""
    path = Path(folder)
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    return [f"{p.name} {p.stat().st_size}" for p in files if p.is_file()]
