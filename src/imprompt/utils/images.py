"""Reference pictures: opened safely, fitted to an encoder's square, laid out on sheets."""

import io
import os
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from imprompt.config import FITS
from imprompt.errors import ImageError, brief

MAX_PIXELS = 100_000_000  # a 10 000 × 10 000 picture; a larger one would need more than a gigabyte
MOST_TILES = 8  # of one picture
_ENOUGH = 2048  # pixels a side of a padded or squashed picture: encoders look at 224 to 448

Picture = str | Path | bytes | Image.Image  # bytes: the content of a file


def open_image(source: Picture) -> Image.Image:
    """Open a picture as 8-bit RGB, upright.

    Transparency is laid on white, 16-bit grey is scaled, CMYK converted, and the first frame of an animation taken.
    Raises ImageError where the file is missing, no picture, damaged, empty or larger than MAX_PIXELS.
    """
    if isinstance(source, Image.Image):
        return to_rgb(source)
    if isinstance(source, bytes):
        return _decode(io.BytesIO(source), "a picture in memory")
    if not isinstance(source, (str, os.PathLike)):
        raise ImageError(f"expected a picture as a path, bytes or a PIL image, received {type(source).__name__}")
    path = Path(source)
    if not os.path.isfile(path):  # unlike Path.is_file, it does not raise for a name too long
        raise ImageError(f"no picture at {path}")
    return _decode(path, path.name)


def _decode(source: Path | io.BytesIO, name: str) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the limit below is ours, and odd metadata are no obstacle
            with Image.open(source) as image:
                width, height = image.size
                if width * height > MAX_PIXELS:
                    raise ImageError(
                        f"{name} is {width} × {height} pixels; expected at most {MAX_PIXELS // 1_000_000} million: reduce it first"
                    )
                image.load()
                return to_rgb(image)
    except UnidentifiedImageError as error:
        raise ImageError(f"{name} is not a picture that can be read (PNG, JPEG, WebP, GIF, TIFF …)") from error
    except Image.DecompressionBombError as error:
        raise ImageError(
            f"{name} claims to be enormous; expected at most {MAX_PIXELS // 1_000_000} million pixels: reduce it first"
        ) from error
    except ImageError:
        raise
    except Exception as error:  # struct.error, RuntimeError, MemoryError …: Pillow's readers raise nearly anything
        raise ImageError(f"{name} is damaged or cut off ({brief(error)}); save or download it again") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB, turned as its EXIF says."""
    if 0 in image.size:
        raise ImageError(f"a picture of {image.width} × {image.height} pixels is empty")
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":  # 16 bits and more: the brightest value of the type is white
        values = np.nan_to_num(np.asarray(image, dtype=np.float64), posinf=0)
        top = 65535 if image.mode.startswith("I") else max(values.max(), 1e-9)
        image = Image.fromarray((np.clip(values / top, 0, 1) * 255).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def is_animated(source: Picture) -> bool:
    """Whether a file holds several frames, of which only the first is used."""
    if isinstance(source, Image.Image):
        return getattr(source, "n_frames", 1) > 1
    with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
        return getattr(image, "n_frames", 1) > 1


def fit(image: Image.Image, how: str = "crop") -> Image.Image:
    """Make a picture square for the encoder: cut the longer side, pad the shorter one with white, or squash."""
    side = min(image.size) if how == "crop" else min(max(image.size), _ENOUGH)
    if how == "crop":
        return ImageOps.fit(image, (side, side), Image.Resampling.BICUBIC)
    if how == "pad":
        small = _within(image, side, Image.Resampling.BICUBIC)
        page = Image.new(image.mode, (side, side), "white")
        page.paste(small, ((side - small.width) // 2, (side - small.height) // 2))
        return page
    if how == "squash":
        return image.resize((side, side), Image.Resampling.BICUBIC)
    raise ImageError(f"unknown way to fit a reference: {how}; expected one of {', '.join(FITS)}")


def squares(image: Image.Image, how: str = "crop") -> list[Image.Image]:
    """A picture as what the encoder looks at: one square, or with `tile` as many as cover it side by side, overlapping evenly."""
    if how != "tile":
        return [fit(image, how)]
    side, length = min(image.size), max(image.size)
    count = min(-(-length // side), MOST_TILES)
    places = [round(i * (length - side) / (count - 1)) for i in range(count)] if count > 1 else [0]
    wide = image.width >= image.height
    return [image.crop((p, 0, p + side, side) if wide else (0, p, side, p + side)) for p in places]


def _within(image: Image.Image, side: int, method: Image.Resampling) -> Image.Image:
    """Scaled so that the longer side has `side` pixels, and the shorter one at least one."""
    width, height = (max(1, round(n * side / max(image.size))) for n in image.size)
    return image.resize((width, height), method)


def cut_share(image: Image.Image) -> float:
    """Share of the picture that a centre crop to a square loses."""
    return 1 - min(image.size) / max(image.size)


def sheet(references: Sequence[Image.Image], results: Sequence[Image.Image], columns: int = 4, cell: int = 192) -> Image.Image:
    """A contact sheet: the references on the left, behind a rule the results in rows of `columns`."""
    columns = max(1, min(columns, len(results)))
    rows = max(-(-len(results) // columns), 1)
    left = -(-len(references) // rows) if references else 0
    gap, rule = 6, 14 if references else 0
    width = (left + columns) * (cell + gap) + gap + rule
    height = rows * (cell + gap) + gap
    page = Image.new("RGB", (width, height), "white")

    def place(image: Image.Image, column: int, row: int, shift: int) -> None:
        method = Image.Resampling.NEAREST if max(image.size) * 2 <= cell else Image.Resampling.LANCZOS
        small = _within(image, cell, method)
        x = gap + column * (cell + gap) + shift + (cell - small.width) // 2
        page.paste(small, (x, gap + row * (cell + gap) + (cell - small.height) // 2))

    for i, image in enumerate(references):
        place(image, i // rows, i % rows, 0)
    if references:
        x = gap + left * (cell + gap) + rule // 2 - gap // 2
        page.paste((200, 200, 200), (x - 1, gap, x + 1, height - gap))
    for i, image in enumerate(results):
        place(image, left + i % columns, i // columns, rule)
    return page
