"""Images given as arrays: numpy's (height, width, channels), torch's (channels, height, width), in any usual range."""

from typing import Any, Protocol, runtime_checkable

import numpy as np
from PIL import Image

from imprompt.errors import ImageError
from imprompt.utils.pixels import find_white

_MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
_TOLERANCE = 0.1  # by which resampling may exceed a range of 0 … 1 or -1 … 1


@runtime_checkable
class SupportsArray(Protocol):
    """A numpy array, a tensor of torch, or what else numpy understands."""

    def __array__(self) -> Any: ...


def array_to_image(array: SupportsArray) -> Image.Image:
    """An array of (height, width) or with channels first or last, as 8-bit L, LA, RGB or RGBA.

    Values: bool; integers 0 … 255, or of more bits by their range; floats 0 … 1, -1 … 1 or 0 … 255. Raises ImageError for others.
    """
    values = _channels_last(to_numpy(array), channels_first=hasattr(array, "detach"))
    pixels = _to_uint8(values)
    return Image.fromarray(np.ascontiguousarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels), _MODES[pixels.shape[-1]])


def to_numpy(array: Any) -> np.ndarray:
    """A tensor or array, from whatever device and data type, without the leading axes of length 1."""
    if hasattr(array, "detach"):  # torch, which need not be imported for this
        array = array.detach().cpu()
        array = array.float() if array.is_floating_point() else array
    values = np.asarray(array)
    while values.ndim > 3 and len(values) == 1:
        values = values[0]
    return values


def _channels_last(values: np.ndarray, *, channels_first: bool) -> np.ndarray:
    """(height, width, channels). Raises ImageError where no axis can be that of the channels."""
    if values.ndim == 2:
        values = values[..., None]
    if values.ndim == 3:
        for axis in (0, -1) if channels_first else (-1, 0):
            if values.shape[axis] in _MODES and values.size:
                return np.moveaxis(values, axis, -1)
    many = "; give several images as a list" if values.ndim == 4 else ""
    raise ImageError(
        f"an array of shape {values.shape}: expected (height, width), (height, width, channels) or (channels, height, width), "
        f"with 1 to 4 channels{many}"
    )


def _to_uint8(values: np.ndarray) -> np.ndarray:
    if values.dtype == np.uint8:
        return values
    if values.dtype == bool:
        return values.astype(np.uint8) * 255
    if values.dtype.kind not in "iuf":
        raise ImageError(f"an array of {values.dtype}: expected bool, integers or floating-point numbers")
    low, high = float(values.min()), float(values.max())
    black, white = _find_range(low, high, is_float=values.dtype.kind == "f")
    fraction = (values.astype(np.float32) - black) / (white - black)
    return (np.clip(fraction, 0, 1) * 255).round().astype(np.uint8)


def _find_range(low: float, high: float, *, is_float: bool) -> tuple[float, float]:
    """The values that mean black and white. Raises ImageError for what is neither of the usual ranges."""
    if not is_float and low >= 0:
        return 0, 255 if high <= 255 else find_white(high, is_float=False) or high
    if is_float and low >= -_TOLERANCE and high <= 1 + _TOLERANCE:
        return 0, 1
    if is_float and low >= -1 - _TOLERANCE and high <= 1 + _TOLERANCE:
        return -1, 1
    if is_float and low >= -_TOLERANCE and 4 < high <= 255 + _TOLERANCE:
        return 0, 255
    raise ImageError(f"an array of values from {low:g} to {high:g}: expected 0 … 1, -1 … 1 or 0 … 255")
