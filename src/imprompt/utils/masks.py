"""Masks of any make as gray, white where something applies: black and white, 0 and 1, alpha, one color, deep grays."""

import numpy as np
from PIL import Image

from imprompt.errors import ImageError, notify
from imprompt.utils.pixels import find_white, gray_values, is_deep, is_unsigned, orient, split_alpha

_MAX_PIXELS = 4_000_000  # of a mask; a larger one is reduced
_EXPECTED = "expected a mask, white where it applies and black elsewhere"
_NOISE = 8  # of a lossy format, out of 255
_LOSSY = ("JPEG", "MPO")
_COLOR = 48  # the channels of a color differ by this, out of 255


def to_mask(image: Image.Image, name: str = "the mask") -> Image.Image:
    """The mask, L. How one that is not black and white is understood is reported; so is one that is all black or all white.

    Raises ImageError for an image that holds several labels or colors.
    """
    unsigned, is_lossy = is_unsigned(image), image.format in _LOSSY
    reduced = _reduce(image)
    if is_deep(reduced):
        mask = _scale_values(_deep_values(reduced, unsigned), name)
    else:
        color, alpha = split_alpha(reduced)
        mask = (
            _mask_of_color(color, name, is_lossy=is_lossy) if alpha is None or _is_constant(alpha) else _mask_of_alpha(color, alpha, name)
        )
        mask = mask if alpha is None or alpha.getextrema() != (0, 0) else Image.new("L", mask.size)
    _report_uniform(mask, name)
    return orient(mask, image)


def _reduce(image: Image.Image) -> Image.Image:
    ratio = (_MAX_PIXELS / (image.width * image.height)) ** 0.5
    if ratio >= 1:
        return image
    return image.resize((max(1, round(image.width * ratio)), max(1, round(image.height * ratio))), Image.Resampling.NEAREST)


def _is_constant(channel: Image.Image) -> bool:
    low, high = channel.getextrema()
    return low == high


def _report_uniform(mask: Image.Image, name: str) -> None:
    if mask.getextrema() == (0, 0):
        notify(f"{name} is black everywhere: it applies nowhere")
    elif mask.getextrema() == (255, 255):
        notify(f"{name} is white everywhere: it applies everywhere")


# ---------------------------------------------------------------------------------------------------------------- gray


def _deep_values(image: Image.Image, unsigned: bool) -> np.ndarray:
    values = gray_values(image, unsigned=unsigned)
    key = image.info.get("transparency")
    return np.where(values == key, 0, values) if isinstance(key, int) else values


def _scale_values(values: np.ndarray, name: str, *, is_lossy: bool = False) -> Image.Image:
    """Gray of any depth with the highest value, or the usual value for white, as white. Raises ImageError for a label map."""
    high = float(values.max())
    if high <= (_NOISE if is_lossy else 0):
        return Image.new("L", values.shape[::-1])
    if not is_lossy:
        _refuse_labels(values)
    white = find_white(high, is_float=values.dtype.kind == "f")
    if white is None:
        notify(f"{name} holds values up to {high:g}, which are taken as white")
        white = high  # type: ignore[assignment]
    elif high < 0.9 * white:
        notify(f"{name} reaches {high:g} of {white} at its brightest: it applies by {high / white:.0%} there")
    return Image.fromarray((np.clip(values / white, 0, 1) * 255).round().astype(np.uint8))  # type: ignore[operator]


def _refuse_labels(values: np.ndarray) -> None:
    """Raise ImageError for a few small integers, with 255 possibly as the value of no label; larger ones are gray then."""
    levels = np.unique(values)
    labels, largest = levels[(levels > 0) & (levels != 255)], 64 if levels[-1] == 255 else 200
    if 1 < len(labels) <= 64 and labels[-1] < largest and np.array_equal(labels, labels.round()):
        raise ImageError(f"{len(labels)} gray values up to {labels[-1]:g}, as in a label map; {_EXPECTED}")


# --------------------------------------------------------------------------------------------------------------- color


def _mask_of_color(color: Image.Image, name: str, *, is_lossy: bool) -> Image.Image:
    """A mask without alpha: gray, or one color on black, whose pixels count by their brightest channel."""
    if color.mode == "L":
        return _scale_values(np.asarray(color), name, is_lossy=is_lossy)
    pixels = np.asarray(color.convert("RGB"))
    brightest = pixels.max(-1)
    is_colored = brightest - pixels.min(-1) > _COLOR
    if is_colored.mean() < 0.001:
        return _scale_values(np.asarray(color.convert("L")), name, is_lossy=is_lossy)
    bright = pixels[brightest > 64].astype(np.float32)
    hues = bright / bright.max(-1, keepdims=True)
    if (np.abs(hues - np.median(hues, 0)).max(-1) > 0.25).mean() > 0.02:
        raise ImageError(f"several colors, as in a label map; {_EXPECTED}")
    notify(f"{name} is colored: it applies where it is not black")
    return Image.fromarray((np.clip(brightest / brightest.max(), 0, 1) * 255).round().astype(np.uint8))


def _mask_of_alpha(color: Image.Image, alpha: Image.Image, name: str) -> Image.Image:
    """A mask in which transparency varies: of black and white on transparent, of one color on transparent, or a hole in an image."""
    pixels, opaque = np.asarray(color.convert("RGB")), np.asarray(alpha) > 127
    visible = pixels[opaque].astype(np.int16)
    if not len(visible) or (np.abs(visible - np.median(visible, 0)).max(-1) <= 24).mean() > 0.98:
        if len(visible) and np.median(visible, 0).max() < 64:
            notify(f"{name} is black on transparent: it applies where it is opaque")
        return alpha
    if ((visible <= 16).all(-1) | (visible >= 239).all(-1)).mean() > 0.95:
        return Image.composite(color.convert("L"), Image.new("L", color.size), alpha)
    notify(f"{name} is an image with transparency: it applies where that is transparent")
    return alpha.point(lambda value: 255 - value)
