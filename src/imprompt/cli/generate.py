"""`imprompt generate`."""

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from imprompt import __version__
from imprompt.cli.console import ProgressDisplay, progress_bar, silence_third_party_logs
from imprompt.config import GenerateConfig, ImagePromptConfig, Options
from imprompt.utils.files import ensure_writable_folder, write_new_file
from imprompt.utils.images import cropped_fraction, is_animated, make_contact_sheet, open_image

if TYPE_CHECKING:
    from imprompt.generation.generate import GeneratedImage


def run_generate(config: GenerateConfig, *, json: bool) -> None:
    """Generate, write each image with its settings in the metadata and a contact sheet, and print where they are."""
    folder = ensure_writable_folder(config.output.output_dir)
    with progress_bar("generating", show=not json) as progress:
        references = open_references(config.reference, progress)
        silence_third_party_logs(loading=config.pipeline.is_mini or Path(config.pipeline.model).is_dir())
        from imprompt.generation.generate import generate_images

        start = time.monotonic()
        opened = replace(config, reference=replace(config.reference, image=tuple(references)))
        generated = generate_images(opened, on_progress=progress.advance)
        seconds = time.monotonic() - start
    paths = [save_with_metadata(folder / f"{image.seed:06d}.png", image, config) for image in generated]
    images = [reference for reference in references if isinstance(reference, Image.Image)]
    contact_sheet = save_contact_sheet(folder, images, [image.image for image in generated])
    seed = config.sampling.seed
    if json:
        print_json(sheet=str(contact_sheet), images=[str(path) for path in paths], seed=seed, seconds=round(seconds, 2))
        return
    print(f"seed {seed}, {len(paths)} images in {seconds:.1f} s")
    print(contact_sheet)


def open_references(config: ImagePromptConfig, progress: ProgressDisplay) -> list[Image.Image | str]:
    """Each reference image, opened once; a file of saved embeddings stays a path. What is lost of an image is reported."""
    references: list[Image.Image | str] = []
    for path in config.image:
        if str(path).endswith(".safetensors"):
            references.append(path)
            continue
        references.append(image := open_image(path))
        if config.resize_mode == "crop" and cropped_fraction(image) > 0.1:
            lost = f"{cropped_fraction(image):.0%} is cropped"
            progress.log(f"{Path(path).name}: the center square is used, {lost}; --resize-mode pad or tile keeps all")
        if is_animated(image):
            progress.log(f"{Path(path).name}: only the first frame is used")
    return references


def save_with_metadata(path: Path, generated: "GeneratedImage", config: Options, **options: str) -> Path:
    """Write an image with the options that repeat it in its metadata; no file is replaced, and the path says where it is."""
    settings = PngInfo()
    metadata = config.to_options() | options | {"seed": generated.seed, "num_images": 1, "version": __version__}
    settings.add_text("imprompt", json.dumps(metadata))
    return write_new_file(path, lambda partial: generated.image.save(partial, pnginfo=settings))


def save_contact_sheet(folder: Path, references: list[Image.Image], images: list[Image.Image], columns: int = 4) -> Path:
    """Write references and results on one sheet; sheets of earlier calls are kept."""
    return write_new_file(folder / "sheet.png", make_contact_sheet(references, images, columns=columns).save)


def print_json(**result: object) -> None:
    """The result of a command, for a program. Characters that a terminal would obey are escaped as JSON does."""
    text = json.dumps(result, ensure_ascii=False)
    print("".join(c if c.isprintable() else json.dumps(c)[1:-1].replace("\x7f", r"\u007f") for c in text))
