"""Images: opened safely, made square for an image encoder, arranged on contact sheets."""

import io
import os
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from imprompt.errors import ImageError, summarize_error

# What is opened, by Pillow's name of the format, with the suffixes of its files; TGA has no signature, and is tried last.
IMAGE_FORMATS = {
    "PNG": (".png", ".apng"),
    "JPEG": (".jpg", ".jpeg", ".jfif", ".jpe"),
    "WEBP": (".webp",),
    "AVIF": (".avif", ".avifs"),
    "HEIF": (".heic", ".heif", ".hif"),  # with pillow-heif
    "GIF": (".gif",),
    "TIFF": (".tif", ".tiff"),
    "BMP": (".bmp",),
    "DIB": (".dib",),
    "JPEG2000": (".jp2", ".j2k", ".jpc", ".jpf", ".jpx", ".j2c"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm", ".pfm"),
    "TGA": (".tga",),
}
IMAGE_SUFFIXES = tuple(suffix for suffixes in IMAGE_FORMATS.values() for suffix in suffixes)

MAX_PIXELS = 100_000_000  # an image of 10 000 × 10 000 pixels; a larger one would need more than a gigabyte
MAX_TILES = 8  # of one image
_MAX_PADDED_SIDE = 2048  # in pixels, of a padded or squashed image: encoders take 224 to 448

ImageInput = str | Path | bytes | Image.Image  # bytes are the content of a file


def open_image(source: ImageInput) -> Image.Image:
    """Open an image as 8-bit RGB, rotated by its EXIF orientation.

    Transparency is composited on white, 16-bit gray is scaled, CMYK converted, and the first frame of an animation used.
    Raises ImageError where the file is missing, not an image, damaged, empty or larger than MAX_PIXELS.
    """
    if isinstance(source, Image.Image):
        return to_rgb(source)
    if isinstance(source, bytes):
        return _decode(io.BytesIO(source), "an image in memory")
    if not isinstance(source, (str, os.PathLike)):
        raise ImageError(f"expected an image as a path, bytes or a PIL image, received {type(source).__name__}")
    path = Path(source)
    if not os.path.isfile(path):  # unlike Path.is_file, it does not raise for a name too long
        raise ImageError(f"no image at {path}")
    return _decode(path, path.name)


def _decode(source: Path | io.BytesIO, name: str) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the size is checked below, and odd metadata do not matter
            with Image.open(source) as image:
                width, height = image.size
                if width * height > MAX_PIXELS:
                    raise ImageError(
                        f"{name} is {width} × {height} pixels; expected at most {MAX_PIXELS // 1_000_000} million: reduce it first"
                    )
                frames = getattr(image, "n_frames", 1)
                image.load()
                converted = to_rgb(image)
                converted.info["n_frames"] = frames
                return converted
    except UnidentifiedImageError as error:
        raise ImageError(f"{name} is not an image that can be read (PNG, JPEG, WebP, GIF, TIFF …)") from error
    except Image.DecompressionBombError as error:
        raise ImageError(
            f"{name} declares an enormous size; expected at most {MAX_PIXELS // 1_000_000} million pixels: reduce it first"
        ) from error
    except ImageError:
        raise
    except Exception as error:  # Pillow's readers raise nearly any exception: struct.error, RuntimeError, MemoryError …
        raise ImageError(f"{name} is damaged or truncated ({summarize_error(error)}); save or download it again") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """The image as 8-bit RGB, rotated by its EXIF orientation. Raises ImageError for an empty image."""
    if 0 in image.size:
        raise ImageError(f"an image of {image.width} × {image.height} pixels is empty")
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":  # white is 65535 for integers, and the largest value of a float image
        values = np.nan_to_num(np.asarray(image, dtype=np.float64), posinf=0)
        white = 65535 if image.mode.startswith("I") else max(values.max(), 1e-9)
        image = Image.fromarray((np.clip(values / white, 0, 1) * 255).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def is_animated(image: Image.Image) -> bool:
    """Whether an image that `open_image` returned has several frames in its file, of which only the first is used."""
    return image.info.get("n_frames", 1) > 1


def resize_to_square(image: Image.Image, resize_mode: str = "crop") -> Image.Image:
    """A square image: center-cropped (`crop`), padded with white (`pad`) or distorted (`squash`). Raises ImageError for another mode."""
    side = min(image.size) if resize_mode == "crop" else min(max(image.size), _MAX_PADDED_SIDE)
    if resize_mode == "crop":
        return ImageOps.fit(image, (side, side), Image.Resampling.BICUBIC)
    if resize_mode == "pad":
        resized = _resize_longest_side(image, side, Image.Resampling.BICUBIC)
        square = Image.new(image.mode, (side, side), "white")
        square.paste(resized, ((side - resized.width) // 2, (side - resized.height) // 2))
        return square
    if resize_mode == "squash":
        return image.resize((side, side), Image.Resampling.BICUBIC)
    raise ImageError(f"resize_mode: expected one of crop, pad, squash, tile; received {resize_mode!r}")


def tile_to_squares(image: Image.Image, resize_mode: str = "crop") -> list[Image.Image]:
    """The squares that an image encoder takes: one, or with `tile` as many as cover the image, overlapping evenly."""
    if resize_mode != "tile":
        return [resize_to_square(image, resize_mode)]
    side, length = min(image.size), max(image.size)
    count = min(-(-length // side), MAX_TILES)
    offsets = [round(i * (length - side) / (count - 1)) for i in range(count)] if count > 1 else [0]
    is_wide = image.width >= image.height
    return [image.crop((x, 0, x + side, side) if is_wide else (0, x, side, x + side)) for x in offsets]


def _resize_longest_side(image: Image.Image, side: int, method: Image.Resampling) -> Image.Image:
    """The image scaled so that its longer side has `side` pixels, and its shorter one at least one."""
    width, height = (max(1, round(n * side / max(image.size))) for n in image.size)
    return image.resize((width, height), method)


def cropped_fraction(image: Image.Image) -> float:
    """The fraction of the image, 0 … 1, that a center crop to a square loses."""
    return 1 - min(image.size) / max(image.size)


def make_contact_sheet(
    references: Sequence[Image.Image], images: Sequence[Image.Image], columns: int = 4, cell_size: int = 192
) -> Image.Image:
    """A contact sheet: references on the left, separated by a line from the images in rows of `columns`. cell_size: in pixels."""
    columns = max(1, min(columns, len(images)))
    rows = max(-(-len(images) // columns), 1)
    reference_columns = -(-len(references) // rows) if references else 0
    gap, separator = 6, 14 if references else 0
    width = (reference_columns + columns) * (cell_size + gap) + gap + separator
    height = rows * (cell_size + gap) + gap
    sheet = Image.new("RGB", (width, height), "white")

    def paste(image: Image.Image, column: int, row: int, shift: int) -> None:
        method = Image.Resampling.NEAREST if max(image.size) * 2 <= cell_size else Image.Resampling.LANCZOS
        resized = _resize_longest_side(image, cell_size, method)
        x = gap + column * (cell_size + gap) + shift + (cell_size - resized.width) // 2
        sheet.paste(resized, (x, gap + row * (cell_size + gap) + (cell_size - resized.height) // 2))

    for i, image in enumerate(references):
        paste(image, i // rows, i % rows, 0)
    if references:
        x = gap + reference_columns * (cell_size + gap) + separator // 2 - gap // 2
        sheet.paste((200, 200, 200), (x - 1, gap, x + 1, height - gap))
    for i, image in enumerate(images):
        paste(image, reference_columns + i % columns, i // columns, separator)
    return sheet
