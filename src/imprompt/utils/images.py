"""Images: opened safely, made square for an image encoder, arranged on contact sheets."""

import io
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import cache, partial
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

from imprompt.errors import ImageError, Notice, notify, summarize_error
from imprompt.utils.arrays import SupportsArray, array_to_image
from imprompt.utils.masks import to_mask
from imprompt.utils.pixels import to_rgb

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

MAX_SIDE = 65_535  # in pixels, as in JPEG
MAX_PIXELS = 100_000_000  # an image of 10 000 × 10 000 pixels; a larger one would need more than a gigabyte
MAX_FILE_BYTES = 2**30  # some formats are read into memory as a whole
_MAX_DECODING_BYTES = 2**30
_DECODING_BYTES = {"JPEG2000": 20, "AVIF": 14, "HEIF": 14}  # that a pixel takes while it is decoded; in the other formats 8
_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"mif1", b"msf1")
MAX_TILES = 8  # of one image
_MAX_CROPPED_SIDE = 4096  # in pixels, of a cropped image; encoders' preprocessors take 12 bytes for each
_MAX_PADDED_SIDE = 2048  # in pixels, of a padded or squashed image: encoders take 224 to 448

ImageInput = str | Path | bytes | Image.Image | SupportsArray  # bytes are the content of a file


def open_image(source: ImageInput) -> Image.Image:
    """Open a reference or training image as upright 8-bit sRGB: a path, bytes, a PIL image or an array (`utils.arrays`).

    Color profiles are applied, transparency is composited on white, deep gray scaled by its range, and the first frame of an
    animation used. Raises ImageError where the image is missing, damaged, empty, too large, or not an image.
    """
    return _open(source, to_rgb)


def open_control_image(source: ImageInput) -> Image.Image:
    """Open an image whose values are data: as `open_image`, but transparency becomes black, and color profiles are ignored."""
    image = _open(source, partial(to_rgb, background="black", use_profile=False))
    if all(low == high for low, high in image.getextrema()):  # type: ignore[misc]
        notify(f"{name_of(source, 'the control image')} has one color everywhere: it controls nothing")
    return image


def open_mask(source: ImageInput, name: str) -> Image.Image:
    """Open a mask as L, white where it applies (`utils.masks`). `name` is that of the mask in notices.

    Raises ImageError as `open_image` does, and for a label map.
    """
    return _open(source, partial(to_mask, name=name))


def name_of(source: ImageInput, default: str = "an image") -> str:
    """The name of an image's file, where it has one."""
    path = getattr(source, "filename", "") if isinstance(source, Image.Image) else source
    return os.path.basename(path) if isinstance(path, (str, Path)) and str(path) else default


def list_images(images: ImageInput | Sequence[ImageInput]) -> list[ImageInput]:
    """One image or several as a list; an array of four axes holds several."""
    if isinstance(images, SupportsArray) and len(getattr(images, "shape", ())) == 4:
        return list(images)  # type: ignore[call-overload]
    return [images] if isinstance(images, ImageInput) else list(images)


def _open(source: ImageInput, convert: Callable[[Image.Image], Image.Image]) -> Image.Image:
    """The converted image. Raises ImageError with one sentence, whatever a reader of Pillow raises."""
    if not isinstance(source, ImageInput):
        raise ImageError(f"expected an image as a path, bytes, a PIL image or an array, received {type(source).__name__}")
    if isinstance(source, (str, Path)) and not os.path.isfile(source):  # Path.is_file raises for a name too long
        raise ImageError(f"no image at {source}" + (", which is a folder" if os.path.isdir(source) else ""))
    name = "an image in memory" if isinstance(source, bytes) else name_of(source)
    try:
        with _identify(source) as image:
            _check_size(image)
            _load(image)
            converted = convert(image)
            converted.info = {} if isinstance(source, Image.Image) else {"is_animated": _is_animated(image)}
            return converted
    except Notice:  # where warnings are errors
        raise
    except ImageError as error:
        raise ImageError(f"{name}: {error}") from error
    except UnidentifiedImageError as error:
        raise ImageError(f"{name} {_explain_format(source)}") from error
    except PermissionError as error:
        raise ImageError(f"{name} may not be read; change its permissions") from error
    except Image.DecompressionBombError as error:
        limit = f"{MAX_PIXELS // 1_000_000} million pixels"
        raise ImageError(f"{name} declares an enormous size; expected at most {limit}: reduce it first") from error
    except Exception as error:  # Pillow's readers raise nearly any exception: struct.error, RuntimeError, MemoryError …
        raise ImageError(f"{name} is damaged or truncated ({summarize_error(error)}); save or download it again") from error


def _identify(source: ImageInput) -> AbstractContextManager[Image.Image]:
    """The image, not decoded yet; a file is closed with the context. Only the promised formats are tried."""
    if isinstance(source, Image.Image):
        return nullcontext(source)
    if not isinstance(source, (str, Path, bytes)):
        return nullcontext(array_to_image(source))
    size = len(source) if isinstance(source, bytes) else os.path.getsize(source)
    if size > MAX_FILE_BYTES:
        raise ImageError(f"a file of {size >> 20} MB; expected at most {MAX_FILE_BYTES >> 20}: reduce it first")
    return Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=_available_formats())


@cache
def _available_formats() -> tuple[str, ...]:
    """The formats of IMAGE_FORMATS that Pillow reads here."""
    with suppress(ImportError):
        from pillow_heif import register_heif_opener

        register_heif_opener()
    Image.init()
    return tuple(name for name in IMAGE_FORMATS if name in Image.OPEN)


def _check_size(image: Image.Image) -> None:
    """Raise ImageError for an image that is empty, or that would need too much memory."""
    width, height = image.size
    limit = min(MAX_PIXELS, _MAX_DECODING_BYTES // _DECODING_BYTES.get(image.format or "", 8))
    if width * height == 0:
        raise ImageError(f"an image of {width} × {height} pixels is empty")
    if width * height > limit:
        raise ImageError(f"{width} × {height} pixels; expected at most {limit // 1_000_000} million: reduce it first")
    if max(image.size) > MAX_SIDE:
        raise ImageError(f"{width} × {height} pixels; expected sides of at most {MAX_SIDE}: crop it first")


def _load(image: Image.Image) -> None:
    """Decode an image. Of colors of 16 bits, Pillow keeps the higher eight, but not of the color that is transparent."""
    is_deep_color = image.mode in ("RGB", "RGBA") and any(";16" in str(tile) for tile in getattr(image, "tile", ()))
    image.load()
    if not is_deep_color:
        return
    if isinstance(key := image.info.get("transparency"), tuple):
        image.info["transparency"] = tuple(value >> 8 for value in key)
    if all(high < 16 for _, high in image.getextrema()[:3]):  # type: ignore[misc]
        notify("a 16-bit color image is nearly black: its values do not exceed 4095 of 65535; scale them first")


def _explain_format(source: ImageInput) -> str:
    """Why no reader takes a file."""
    head = source[:12] if isinstance(source, bytes) else b""
    if isinstance(source, (str, Path)):
        with open(source, "rb") as file:
            head = file.read(12)
    if head[4:8] == b"ftyp" and head[8:] in _HEIF_BRANDS:
        return "is a HEIC image; to read it, install pillow-heif with: pip install 'imprompt[heic]'"
    return f"is not an image that can be read; expected {', '.join(name for name in IMAGE_FORMATS if name != 'DIB')}"


def _is_animated(image: Image.Image) -> bool:
    """Whether a file has further frames; those of MPO are versions of the same image. A frame that is damaged is one as well."""
    try:
        return image.format != "MPO" and bool(getattr(image, "is_animated", False))
    except Exception:  # as in `_open`
        return True


def is_animated(image: Image.Image) -> bool:
    """Whether an image that `open_image` returned has several frames in its file, of which only the first is used."""
    return bool(image.info.get("is_animated", False))


def resize_to_square(image: Image.Image, resize_mode: str = "crop") -> Image.Image:
    """A square image: center-cropped (`crop`), padded with white (`pad`) or distorted (`squash`). Raises ImageError for another mode."""
    side = min(*image.size, _MAX_CROPPED_SIDE) if resize_mode == "crop" else min(max(image.size), _MAX_PADDED_SIDE)
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
    tiles = (image.crop((x, 0, x + side, side) if is_wide else (0, x, side, x + side)) for x in offsets)
    return [resize_to_square(tile) if side > _MAX_CROPPED_SIDE else tile for tile in tiles]


def _resize_longest_side(image: Image.Image, side: int, method: Image.Resampling) -> Image.Image:
    """The image scaled so that its longer side has `side` pixels, and its shorter one at least one."""
    width, height = (max(1, round(n * side / max(image.size))) for n in image.size)
    return image.resize((width, height), method)


def differs_in_shape(size: tuple[int, int], other: tuple[int, int]) -> bool:
    """Whether two sizes, width and height, have aspect ratios that differ by more than 5 %: rounding to the sizes of a model does less."""
    ratio = (size[0] * other[1]) / (size[1] * other[0])
    return not 1 / 1.05 <= ratio <= 1.05


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
