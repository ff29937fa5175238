"""`imprompt generate`."""

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from PIL.PngImagePlugin import PngInfo

from imprompt import __version__
from imprompt.cli import chosen_fields
from imprompt.cli.console import progress_bar, quiet_libraries
from imprompt.config import Generate, Personalise
from imprompt.utils.files import atomic_path, writable_folder

if TYPE_CHECKING:
    from imprompt.generation.generate import Drawn


def run(arguments: argparse.Namespace) -> None:
    """Draw, write each picture with its settings in the metadata and a contact sheet, and say where they are."""
    from imprompt.utils.images import cut_share, is_animated, open_image, sheet

    choice = chosen_fields(arguments, Generate)
    folder = writable_folder(choice.out)
    shown = [path for path in choice.image if not str(path).endswith(".safetensors")]  # an image prompt that was kept has no picture
    references = [open_image(path) for path in shown]
    quiet_libraries(loading=choice.base == "mini" or Path(choice.base).is_dir())
    with progress_bar("drawing", show=not arguments.json) as progress:
        for path, image in zip(shown, references, strict=True):
            if choice.fit == "crop" and cut_share(image) > 0.1:
                progress.say(f"{Path(path).name}: the centre square is used, {cut_share(image):.0%} is cut; --fit pad or tile keeps all")
            if is_animated(path):
                progress.say(f"{Path(path).name}: only the first frame is used")
        from imprompt.generation.generate import draw

        start = time.monotonic()
        drawn = draw(choice, progress.advance)
        seconds = time.monotonic() - start
    paths = []
    for picture in drawn:
        paths.append(keep(folder / f"{picture.seed:06d}.png", picture, choice))
    contact = folder / "sheet.png"
    with atomic_path(contact) as partial:
        sheet(references, [picture.image for picture in drawn]).save(partial)
    if arguments.json:
        print(json.dumps({"sheet": str(contact), "pictures": [str(p) for p in paths], "seed": choice.seed, "seconds": round(seconds, 2)}))
    else:
        print(f"seed {choice.seed}, {len(paths)} pictures in {seconds:.1f} s")
        print(contact)


def keep(path: Path, picture: "Drawn", choice: Generate | Personalise, **more: str) -> Path:
    """Write a picture with what repeats it in its metadata."""
    settings = PngInfo()
    settings.add_text("imprompt", json.dumps({**asdict(choice), **more, "seed": picture.seed, "count": 1, "version": __version__}))
    with atomic_path(path) as partial:
        picture.image.save(partial, pnginfo=settings)
    return path
