"""Pixels as 8-bit sRGB: deep grays by their range, color profiles, transparency, orientation."""

import io
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageCms

from imprompt.errors import notify

_STRIP_PIXELS = 4_000_000  # converted at a time
_INTEGER_WHITES = (1, 255, 1023, 4095, 16_383, 65_535, 2**24 - 1, 2**31 - 1, 2**32 - 1)
_FLOAT_WHITES = (1, 255, 65_535)
_TRANSPOSITIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90,
}  # fmt: skip
_ORIENTATION, _SAMPLE_FORMAT = 0x0112, 339  # tags of EXIF and TIFF


def to_rgb(image: Image.Image, background: str = "white", *, use_profile: bool = True) -> Image.Image:
    """The image as upright 8-bit RGB: in sRGB unless `use_profile` is false, transparency composited on `background`."""
    gray_range = find_gray_range(image) if is_deep(image) else None
    converted = Image.new("RGB", image.size)
    for top, strip in _iterate_strips(image):
        strip = scale_gray(strip, gray_range) if gray_range else strip
        converted.paste(_composite(strip, background, use_profile=use_profile), (0, top))
    return orient(converted, image)


def _iterate_strips(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    """Pieces of the image from top to bottom with their offsets, so that no conversion needs much memory."""
    rows = max(1, _STRIP_PIXELS // image.width)
    for top in range(0, image.height, rows):
        yield top, image.crop((0, top, image.width, min(top + rows, image.height)))


def _composite(image: Image.Image, background: str, *, use_profile: bool) -> Image.Image:
    color, alpha = split_alpha(image)
    profile = image.info.get("icc_profile") if use_profile else None
    color = apply_profile(color, profile) if profile else color.convert("RGB")
    if alpha is None:
        return color
    on_top = Image.merge("RGBA", (*color.split(), alpha))
    return Image.alpha_composite(Image.new("RGBA", image.size, background), on_top).convert("RGB")


def split_alpha(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """The colors, in L, RGB, CMYK or another mode without alpha, and alpha, in L, where the image has any."""
    if image.has_transparency_data:
        is_gray = image.mode in ("1", "L", "LA", "La")
        image = image.convert("LA" if is_gray else "RGBA")
        return image.convert("L" if is_gray else "RGB"), image.getchannel("A")
    return (image if image.mode in ("L", "RGB", "CMYK", "LAB") else image.convert("L" if image.mode == "1" else "RGB")), None


def orient(image: Image.Image, source: Image.Image) -> Image.Image:
    """The image, turned upright by the EXIF orientation of its source."""
    try:
        transposition = _TRANSPOSITIONS.get(source.getexif().get(_ORIENTATION, 1))
    except Exception:  # Pillow's reader of EXIF data raises nearly any exception
        notify("damaged EXIF data are ignored, with the orientation that they may hold")
        return image
    return image if transposition is None else image.transpose(transposition)


# ---------------------------------------------------------------------------------------------------------- deep grays


class GrayRange(NamedTuple):
    """The values of a deep gray image that mean black and white."""

    black: float
    white: float
    is_unsigned: bool  # of 32 bits, in Pillow's signed mode


def is_deep(image: Image.Image) -> bool:
    """Whether the image is gray with 16 or 32 bits, or with floating-point values."""
    return image.mode.startswith("I") or image.mode == "F"


def is_unsigned(image: Image.Image) -> bool:
    """Whether the values of a TIFF file have 32 bits without a sign."""
    return image.mode == "I" and getattr(image, "tag_v2", {}).get(_SAMPLE_FORMAT) == (1,)


def gray_values(image: Image.Image, *, unsigned: bool = False) -> np.ndarray:
    """The values of a gray image, (height, width); what is not a number is 0."""
    values = np.asarray(image)
    return np.nan_to_num(values, posinf=0, neginf=0) if image.mode == "F" else values.view(np.uint32) if unsigned else values


def find_white(highest: float, *, is_float: bool) -> int | None:
    """The usual value for white that `highest` reaches, by a fourth at least, and does not exceed."""
    return next((white for white in (_FLOAT_WHITES if is_float else _INTEGER_WHITES) if white / 4 < highest <= white), None)


def find_gray_range(image: Image.Image) -> GrayRange:
    """The values that mean black and white in a deep gray image; a range that is not that of its data type is reported."""
    unsigned, is_float = is_unsigned(image), image.mode == "F"
    strips = (gray_values(strip, unsigned=unsigned) for _, strip in _iterate_strips(image))
    extremes = [(float(values.min()), float(values.max())) for values in strips]
    low, high = min(low for low, _ in extremes), max(high for _, high in extremes)
    if low < 0 and not is_float:
        notify("a deep gray image with values below 0: the lowest becomes black, the highest white")
        return GrayRange(low, max(high, low + 1), unsigned)
    if low < 0:
        notify("a gray image of floats below 0: they become black")
    white = find_white(high, is_float=is_float)
    if white is None and high > 0:
        notify("a deep gray image of an unusual range: the highest value becomes white")
    elif white and white != (1 if is_float else 65_535):
        notify(f"a deep gray image whose values do not exceed {white}: that is taken as white")
    return GrayRange(0.0, white or max(high, 1.0), unsigned)


def scale_gray(image: Image.Image, gray_range: GrayRange) -> Image.Image:
    """A deep gray image as L, or as LA where it declares a transparent value."""
    values = gray_values(image, unsigned=gray_range.is_unsigned)
    fraction = (values.astype(np.float64) - gray_range.black) / (gray_range.white - gray_range.black)
    scaled = Image.fromarray((np.clip(fraction, 0, 1) * 255).round().astype(np.uint8))
    if isinstance(key := image.info.get("transparency"), int):
        scaled.putalpha(Image.fromarray(np.where(values == key, 0, 255).astype(np.uint8)))
    scaled.info["icc_profile"] = image.info.get("icc_profile")
    return scaled


# ------------------------------------------------------------------------------------------------------ color profiles


def apply_profile(image: Image.Image, profile: bytes) -> Image.Image:
    """The image in sRGB. A profile that is damaged, or one for other color channels, is ignored, and that is reported."""
    try:
        transform = _build_transform(profile)
    except (ImageCms.PyCMSError, OSError, KeyError, ValueError, TypeError):
        notify("a color profile that is damaged or of an unknown kind is ignored")
        return image.convert("RGB")
    if transform is None:
        return image.convert("RGB")
    image = image.convert("RGB") if (transform.input_mode, image.mode) == ("RGB", "L") else image
    if transform.input_mode != image.mode:
        notify(f"a color profile for {transform.input_mode} is ignored in an image that is {image.mode}")
        return image.convert("RGB")
    return transform.apply(image)


@lru_cache(64)
def _build_transform(profile: bytes) -> ImageCms.ImageCmsTransform | None:
    """The conversion of a profile's colors to sRGB; None where it changes nothing."""
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    mode = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK", "Lab": "LAB"}[source.profile.xcolor_space.strip()]
    transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
    return None if _is_identity(transform, mode) else transform


def _is_identity(transform: ImageCms.ImageCmsTransform, mode: str) -> bool:
    """Whether colors of all kinds change by no more than rounding: the profile is sRGB, under whatever name."""
    if mode not in ("RGB", "L"):
        return False
    colors = np.stack(np.meshgrid(*[np.arange(0, 256, 17, dtype=np.uint8)] * 3), -1).reshape(256, 16, 3)
    probe = Image.fromarray(colors).convert(mode)
    difference = np.asarray(transform.apply(probe), int) - np.asarray(probe.convert("RGB"), int)
    return int(np.abs(difference).max()) <= 2
