"""`imprompt generate`."""

import json
import os
import re
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from imprompt import __version__
from imprompt.cli.console import ProgressDisplay, print_json, progress_bar, silence_third_party_logs
from imprompt.config import GenerateConfig, ImagePromptConfig, Options, PersonalizeConfig
from imprompt.config.common import all_options
from imprompt.utils.files import ensure_writable_folder, write_new_file
from imprompt.utils.image_paths import expand_images
from imprompt.utils.images import cropped_fraction, is_animated, make_contact_sheet, open_image

if TYPE_CHECKING:
    from imprompt.generation.generate import GeneratedImage


def run_generate(config: GenerateConfig, *, json: bool) -> None:
    """Generate, write each image with its settings in the metadata and a contact sheet, and print where they are."""
    start = time.monotonic()
    config = replace(config, reference=replace(config.reference, image=tuple(expand_images(config.reference.image))))
    folder = ensure_writable_folder(config.output.output_dir)
    with progress_bar(f"loading {config.pipeline.model}") as progress:
        references = open_references(config.reference, progress)
        silence_third_party_logs(loading=config.pipeline.is_mini or Path(config.pipeline.model).is_dir())
        from imprompt.generation.generate import generate_images

        def on_progress(done: int, total: int) -> None:
            progress.rename("generating")
            progress.advance(done, total)

        opened = replace(config, reference=replace(config.reference, image=tuple(references)))
        generated = generate_images(opened, on_progress=on_progress)
    paths = [save_with_metadata(folder / f"{image.seed:06d}.png", image, config) for image in generated]
    seconds = time.monotonic() - start
    images = [reference for reference in references if isinstance(reference, Image.Image)]
    contact_sheet = save_contact_sheet(folder, images, [image.image for image in generated])
    seed = config.sampling.seed
    if json:
        print_json(sheet=str(contact_sheet), images=[str(path) for path in paths], seed=seed, seconds=round(seconds, 2))
        return
    print(f"seed {seed}, {len(paths)} images in {seconds:.1f} s, loading included")
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


def save_with_metadata(path: Path, generated: "GeneratedImage", config: GenerateConfig | PersonalizeConfig, **options: str) -> Path:
    """Write an image with the options in its metadata that repeat it: those of its batch, and its own seed.

    No file is replaced, and the path says where it is.
    """
    text = PngInfo()
    if config.output.metadata != "none":
        own = {"seed": generated.seed, "num_images": 1, "batch": generated.batch, "version": __version__}
        metadata = describe_options(config, without_folders=config.output.metadata == "no-paths") | options | own
        text.add_text("imprompt", json.dumps(metadata))
    return write_new_file(path, lambda partial: generated.image.save(partial, pnginfo=text))


def describe_options(config: Options, *, without_folders: bool) -> dict[str, Any]:
    """The options as JSON values; paths are absolute, so that they hold in any folder, or without their folders."""
    convert = _remove_folders if without_folders else _make_absolute
    options = config.to_options()
    for one in all_options(type(config)):
        value = options[one.name]
        if one.field.metadata["path"] or one.name in ("control", "image_prompt"):
            options[one.name] = [convert(each) for each in value] if one.repeatable else convert(value)
    return options | {"output_dir": None}  # of the image itself


def _make_absolute(value: Any) -> Any:
    is_file = isinstance(value, str) and os.path.exists(value) and not value.startswith("mini")  # names of what is bundled
    return os.path.abspath(value) if is_file else value


def _remove_folders(value: Any) -> Any:
    """The text with every path in it cut to its file's name; names of the hub stay."""
    if not isinstance(value, str):
        return value
    parts = re.split(r"([=,:])", value)
    return "".join(os.path.basename(part) if os.path.isabs(part) or os.path.exists(part) else part for part in parts)


def save_contact_sheet(folder: Path, references: list[Image.Image], images: list[Image.Image], columns: int = 4) -> Path:
    """Write references and results on one sheet; sheets of earlier calls are kept."""
    return write_new_file(folder / "sheet.png", make_contact_sheet(references, images, columns=columns).save)
