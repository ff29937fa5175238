"""`imprompt personalise`."""

import argparse
import json
import time
from pathlib import Path

from imprompt.cli import chosen_fields
from imprompt.cli.console import progress_bar, quiet_libraries
from imprompt.cli.generate import keep
from imprompt.config import PERSONAL, Personalise
from imprompt.utils.files import atomic_path, writable_folder


def run(arguments: argparse.Namespace) -> None:
    """Learn the subject where the method does, draw it, and say where the contact sheet is."""
    choice = chosen_fields(arguments, Personalise)
    folder = writable_folder(choice.out)
    quiet_libraries(loading=choice.base == "mini" or Path(choice.base).is_dir())
    with progress_bar("looking", show=not arguments.json) as progress:
        from imprompt.personalize import learn, photographs, pictures
        from imprompt.utils.images import sheet

        places, opened = photographs(choice, progress.say)
        progress.rename("learning")
        began = time.monotonic()
        for step in learn(choice, opened):
            progress.advance(step.index, step.steps, f"loss {step.loss:.4f}")
        learning = time.monotonic() - began
        progress.rename("drawing")
        drawn = pictures(choice, places, progress.advance)
    paths = []
    for number, (text, row) in enumerate(zip(choice.prompts(), drawn, strict=True)):
        for picture in row:
            paths.append(keep(folder / f"{number:02d}-{picture.seed:06d}.png", picture, choice, prompt=text))
    contact = folder / "sheet.png"
    with atomic_path(contact) as partial:
        sheet(opened, [picture.image for row in drawn for picture in row], columns=choice.count).save(partial)
    learned = str(folder / choice.method / "adapter.safetensors") if choice.method in PERSONAL else None
    if arguments.json:
        print(json.dumps({"sheet": str(contact), "pictures": [str(p) for p in paths], "learned": learned, "learning": round(learning, 2)}))
        return
    print(f"{len(opened)} photographs, {choice.method}: {len(paths)} pictures")
    if learned:
        print(f"learned in {learning:.0f} s: {learned}")
    print(contact)
