"""Any image opens as upright 8-bit RGB, or is refused in one sentence, quickly and without filling the memory."""

import io
import os
import random
import resource
import struct
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from imprompt.config.common import RESIZE_MODES
from imprompt.errors import ImageError, Notice
from imprompt.utils.images import (
    IMAGE_SUFFIXES,
    cropped_fraction,
    is_animated,
    make_contact_sheet,
    open_image,
    resize_to_square,
    tile_to_squares,
)
from imprompt.utils.pixels import to_rgb

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)

SINGLE_SQUARE_MODES = [mode for mode in RESIZE_MODES if mode != "tile"]


def noise_image(width=40, height=30):
    return Image.merge("RGB", [Image.effect_noise((width, height), 60 + 10 * i) for i in range(3)])


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def write_png(path: Path, width: int, height: int, pixels: bytes = b"", depth: int = 8, color: int = 2, extra_chunk: bytes = b"") -> Path:
    """A PNG whose header declares any size."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + extra_chunk + png_chunk(b"IDAT", zlib.compress(pixels)) + png_chunk(b"IEND", b""))
    return path


def color_fraction(image: Image.Image, color: tuple[int, int, int]) -> float:
    """The fraction of pixels of exactly this color."""
    return float((np.asarray(image) == np.uint8(color)).all(-1).mean())


def open_error(source) -> str:
    with pytest.raises(ImageError) as error:
        open_image(source)
    text = str(error.value)
    assert "\n" not in text and len(text) < 300
    return text


# ------------------------------------------------------------------------------------------------------------- refused


def test_missing_files_and_folders_are_refused(tmp_path):
    assert "no image at" in open_error(tmp_path / "none.png")
    assert "no image at" in open_error(str(tmp_path))
    with pytest.raises(ImageError, match="no image at"):
        open_image("x" * 5000 + ".png")


@pytest.mark.parametrize("source", [3, None, [0, 1]], ids=["int", "None", "list"])
def test_other_types_are_refused(source):
    assert type(source).__name__ in open_error(source)


def test_a_file_in_memory():
    content = io.BytesIO()
    Image.new("CMYK", (5, 4)).save(content, "JPEG")
    assert open_image(content.getvalue()).size == (5, 4)
    assert "in memory is not an image" in open_error(b"bytes")


@pytest.mark.parametrize("content", [b"", b"not an image at all", b"<svg xmlns='http://www.w3.org/2000/svg'/>", os.urandom(500)])
def test_files_of_another_kind_are_refused(content, tmp_path):
    path = tmp_path / "reference.png"
    path.write_bytes(content)
    assert "reference.png is not an image" in open_error(path)


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_truncated_images_are_reported_as_damaged(file_format, tmp_path):
    path = tmp_path / f"reference.{file_format.lower()}"
    noise_image(200, 150).save(path, file_format)
    open_image(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert "damaged" in open_error(path) or "not an image" in open_error(path)


def test_a_png_with_corrupted_pixels_is_reported_as_damaged(tmp_path):
    path = tmp_path / "reference.png"
    noise_image(200, 150).save(path)
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 50] = bytes(50)
    path.write_bytes(data)
    assert "damaged" in open_error(path)


@pytest.mark.filterwarnings("ignore::imprompt.errors.Notice")
@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "PPM"])
def test_corrupted_files_raise_nothing_but_image_errors(file_format, tmp_path):
    """Bytes overwritten at random: the file opens or is refused, without a warning and without another exception."""
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010E] = "a description"
    path = tmp_path / "reference"
    noise_image().save(path, file_format, **({"exif": exif} if file_format in ("PNG", "JPEG", "WEBP") else {}))
    data = path.read_bytes()
    rng = random.Random(file_format)
    for _ in range(150):
        corrupted = bytearray(data)
        for _ in range(rng.choice([1, 2, 8])):
            corrupted[rng.randrange(min(len(corrupted), rng.choice([60, 200, 10**6])))] = rng.choice([0, 1, 128, 255])
        path.write_bytes(corrupted[: rng.choice([len(corrupted), rng.randrange(len(corrupted))])])
        try:
            assert open_image(path).mode == "RGB"
        except ImageError as error:
            assert "\n" not in str(error)


@pytest.mark.parametrize(("width", "height"), [(30_000, 30_000), (10_001, 10_000), (2**31 - 1, 2**31 - 1), (2**31 - 1, 1)])
def test_enormous_images_are_refused_by_their_header(width, height, tmp_path):
    path = write_png(tmp_path / "huge.png", width, height)
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    text = open_error(path)
    assert time.monotonic() - start < 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # kilobytes
    assert "huge.png" in text and "100 million" in text


def test_decompression_bombs_are_refused(tmp_path):
    """48 kilobytes that would become 1.2 gigabytes; and a comment that would become 100 megabytes."""
    bomb = write_png(tmp_path / "bomb.png", 20_000, 20_000, bytes(20_000 * 2501), depth=1, color=0)
    assert bomb.stat().st_size < 100_000
    assert "100 million" in open_error(bomb)
    comment = png_chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(100_000_000)))
    assert "damaged" in open_error(write_png(tmp_path / "comment.png", 1, 1, bytes(4), extra_chunk=comment))


def test_an_empty_image_is_refused():
    with pytest.raises(ImageError, match="0 × 5 pixels is empty"):
        open_image(Image.new("RGB", (0, 5)))


@pytest.mark.parametrize("size", [(100_000_000, 1), (1, 65_536)])
def test_sides_longer_than_those_of_jpeg_are_refused(size, tmp_path):
    assert "sides of at most 65535" in open_error(write_png(tmp_path / "strip.png", *size))


@pytest.mark.parametrize("head", [b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", b"8BPS\0\1" + bytes(60), b"#define a_width 9\n"])
def test_formats_that_are_not_promised_are_not_even_tried(head, tmp_path, monkeypatch):
    """Ghostscript would be started for the first, whatever the suffix."""
    monkeypatch.setattr("subprocess.check_call", lambda *a, **b: pytest.fail("a program was started"))
    (tmp_path / "a.png").write_bytes(head)
    assert "a.png is not an image that can be read; expected PNG" in open_error(tmp_path / "a.png")


def test_files_that_may_not_be_read_or_are_enormous_are_called_that(tmp_path, monkeypatch):
    path = tmp_path / "a.webp"
    with path.open("wb") as file:
        file.truncate(2**30 + 1)
    assert "a file of 1024 MB" in open_error(path)

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("PIL.Image.open", refuse)
    noise_image().save(tmp_path / "b.png")
    assert open_error(tmp_path / "b.png") == "b.png may not be read; change its permissions"


def test_an_image_that_is_opened_lazily_and_cut_is_reported_as_damaged(tmp_path):
    noise_image(200, 150).save(tmp_path / "a.png")
    (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes()[:5000])
    with Image.open(tmp_path / "a.png") as lazy:
        assert "a.png is damaged or truncated" in open_error(lazy)
    closed = Image.open(tmp_path / "a.png")
    closed.close()
    assert "damaged" in open_error(closed)


def test_an_animation_whose_second_frame_is_damaged_opens(tmp_path):
    path = tmp_path / "a.gif"
    noise_image().save(path, save_all=True, append_images=[noise_image()])
    single = io.BytesIO()
    noise_image().save(single, "GIF")
    path.write_bytes(path.read_bytes()[: len(single.getvalue()) + 60])
    assert open_image(path).size == (40, 30) and is_animated(open_image(path))


def test_heic_is_read_with_its_package_and_named_without(tmp_path, monkeypatch):
    heif = pytest.importorskip("pillow_heif")
    path = tmp_path / "a.HEIC"
    heif.from_pillow(Image.new("RGB", (64, 48), RED)).save(path, quality=90)
    image = open_image(path)
    assert image.size == (64, 48) and np.abs(np.subtract(image.getpixel((30, 20)), RED)).max() < 12
    monkeypatch.setattr("imprompt.utils.images._available_formats", lambda: ("PNG", "JPEG"))
    assert "pip install 'imprompt[heic]'" in open_error(path) and "imprompt[heic]" in open_error(path.read_bytes())


@pytest.mark.parametrize("suffix", [s for s in IMAGE_SUFFIXES if s not in (".heic", ".heif", ".hif", ".avifs", ".pfm", ".jpc", ".j2c")])
def test_every_suffix_is_one_of_a_format_that_opens(suffix, tmp_path):
    path = tmp_path / f"a{suffix.upper()}"
    Image.new("1" if suffix == ".pbm" else "L" if suffix == ".pgm" else "RGB", (16, 12), "white").save(path)
    assert open_image(path).getpixel((3, 3)) == WHITE


# ------------------------------------------------------------------------------------------------------------ accepted


def test_a_long_strip_is_accepted_without_much_memory(tmp_path):
    path = tmp_path / "strip.png"
    Image.new("RGB", (30_000, 20), RED).save(path)
    image = open_image(path)
    assert image.size == (30_000, 20)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for mode in SINGLE_SQUARE_MODES:
        square = resize_to_square(image, mode)
        assert square.width == square.height <= 2048
        assert color_fraction(square, RED) > 0
    sheet = make_contact_sheet([image], [noise_image()])
    assert color_fraction(sheet, RED) > 0
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000


def test_paths_strings_and_images_are_the_same(tmp_path):
    image = noise_image()
    image.save(tmp_path / "a.png")
    for source in (tmp_path / "a.png", str(tmp_path / "a.png"), image):
        assert np.array_equal(open_image(source), image)


def test_the_first_frame_of_an_animation(tmp_path):
    frames = [Image.new("RGB", (8, 8), color) for color in (RED, GREEN, BLUE)]
    for suffix in ("gif", "webp", "png"):
        path = tmp_path / f"a.{suffix}"
        frames[0].save(path, save_all=True, append_images=frames[1:], **({"lossless": True} if suffix == "webp" else {}))
        assert is_animated(open_image(path))
        assert open_image(path).getpixel((4, 4)) == RED
    noise_image().save(tmp_path / "still.png")
    assert not is_animated(open_image(tmp_path / "still.png")) and not is_animated(noise_image())


def test_cmyk_jpeg(tmp_path):
    Image.new("RGB", (16, 16), RED).convert("CMYK").save(tmp_path / "a.jpg", quality=95)
    with Image.open(tmp_path / "a.jpg") as raw:
        assert raw.mode == "CMYK"
    image = open_image(tmp_path / "a.jpg")
    assert image.mode == "RGB" and np.abs(np.subtract(image.getpixel((8, 8)), RED)).max() < 10


def test_16_bit_images_keep_white_and_mid_gray(tmp_path):
    values = np.array([[0, 32768, 65535]], np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as raw:
        assert raw.mode.startswith("I")
    image = open_image(tmp_path / "a.png")
    assert [image.getpixel((x, 0)) for x in range(3)] == [(0, 0, 0), (128, 128, 128), WHITE]


def test_floating_point_images_are_scaled_to_their_brightest_pixel(tmp_path):
    Image.fromarray(np.array([[-1.0, 0.0, 2.0, 4.0, np.nan, np.inf]], np.float32)).save(tmp_path / "a.tiff")
    with pytest.warns(Notice, match="below 0|brightest|highest"):
        image = open_image(tmp_path / "a.tiff")
    assert [image.getpixel((x, 0))[0] for x in range(5)] == [0, 0, 128, 255, 0]


def test_transparency_is_composited_on_white(tmp_path):
    image = Image.new("RGBA", (3, 1), (255, 0, 0, 255))
    image.putpixel((1, 0), (0, 0, 0, 0))
    image.putpixel((2, 0), (0, 0, 255, 128))
    image.save(tmp_path / "a.png")
    opened = open_image(tmp_path / "a.png")
    assert opened.mode == "RGB"
    assert [opened.getpixel((x, 0)) for x in range(3)] == [RED, WHITE, (127, 127, 255)]


def test_palettes_with_transparency_are_composited_on_white(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([*RED, *BLUE])
    image.putdata([0, 1])
    for suffix in ("png", "gif"):
        image.save(tmp_path / f"a.{suffix}", transparency=1)
        opened = open_image(tmp_path / f"a.{suffix}")
        assert [opened.getpixel((x, 0)) for x in range(2)] == [RED, WHITE]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "RGBa", "CMYK", "YCbCr", "LAB", "HSV", "I", "F", "I;16"])
def test_every_mode_becomes_rgb(mode):
    assert to_rgb(Image.new(mode, (5, 4))).mode == "RGB"


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_exif_orientation_is_applied(orientation, tmp_path):
    """As in an image viewer, the red corner is at the top left, whatever the orientation of the camera was."""
    upright = Image.new("RGB", (24, 16), WHITE)
    upright.paste(RED, (0, 0, 8, 8))
    inverse = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # orientation → the PIL transposition that inverts it
    stored = upright.transpose(Image.Transpose(inverse[orientation])) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(open_image(tmp_path / "a.png"), upright)


# --------------------------------------------------------------------------------------------- squares and contact sheets


def striped_image():
    """60 × 20: red, green and blue, 20 pixels each."""
    image = Image.new("RGB", (60, 20), RED)
    image.paste(GREEN, (20, 0, 40, 20))
    image.paste(BLUE, (40, 0, 60, 20))
    return image


def test_crop_takes_the_center():
    assert np.array_equal(resize_to_square(striped_image(), "crop"), Image.new("RGB", (20, 20), GREEN))
    assert cropped_fraction(striped_image()) == pytest.approx(2 / 3) and cropped_fraction(noise_image(9, 9)) == 0


def test_pad_keeps_the_whole_image_on_white():
    square = resize_to_square(striped_image(), "pad")
    assert square.size == (60, 60)
    assert np.array_equal(square.crop((0, 20, 60, 40)), striped_image())
    assert np.asarray(square)[:20].min() == np.asarray(square)[40:].min() == 255


def test_squash_distorts():
    square = resize_to_square(striped_image(), "squash")
    assert square.size == (60, 60)
    assert [square.getpixel((x, y)) for x, y in ((10, 5), (30, 30), (50, 55))] == [RED, GREEN, BLUE]


@pytest.mark.parametrize("mode", SINGLE_SQUARE_MODES)
@pytest.mark.parametrize("size", [(1, 1), (64, 64), (7, 5), (5000, 1), (1, 5000)])
def test_any_size_becomes_a_square(mode, size):
    square = resize_to_square(Image.new("RGB", size, RED), mode)
    assert square.width == square.height >= 1 and square.mode == "RGB"
    assert color_fraction(square, RED) > 0


def test_a_square_is_unchanged():
    square = noise_image(32, 32)
    assert all(np.array_equal(square, resize_to_square(square, mode)) for mode in SINGLE_SQUARE_MODES)
    assert all(np.array_equal(square, tile) for mode in RESIZE_MODES for tile in tile_to_squares(square, mode))


@pytest.mark.parametrize(("size", "count"), [((64, 64), 1), ((65, 64), 2), ((200, 80), 3), ((80, 200), 3), ((5000, 10), 8), ((1, 9), 8)])
def test_tiles_cover_the_image_next_to_each_other(size, count):
    image = Image.fromarray((np.arange(max(size)) * 255 // max(size)).astype(np.uint8)[None].repeat(min(size), 0)).convert("RGB")
    image = image if size[0] >= size[1] else image.transpose(Image.Transpose.ROTATE_90)
    tiles = tile_to_squares(image, "tile")
    assert len(tiles) == count and {tile.size for tile in tiles} == {(min(size),) * 2}
    assert tiles[0].tobytes() == image.crop((0, 0, min(size), min(size))).tobytes()
    corner = image.crop((size[0] - min(size), size[1] - min(size), *size))
    assert tiles[-1].tobytes() == corner.tobytes()


def test_an_unknown_resize_mode_is_refused():
    with pytest.raises(ImageError, match="expected one of crop, pad, squash"):
        resize_to_square(noise_image(), "stretch")


@pytest.mark.parametrize(
    ("references", "images", "columns", "rows", "reference_columns"),
    [(0, 1, 1, 1, 0), (0, 4, 4, 1, 0), (1, 4, 4, 1, 1), (1, 6, 4, 2, 1), (3, 6, 4, 2, 2)],
)
def test_the_contact_sheet_has_a_cell_for_each_image(references, images, columns, rows, reference_columns):
    cell_size, gap, separator = 40, 6, 14 if references else 0
    reference, image = Image.new("RGB", (50, 50), RED), Image.new("RGB", (50, 50), BLUE)
    sheet = make_contact_sheet([reference] * references, [image] * images, cell_size=cell_size)
    assert sheet.size == ((reference_columns + columns) * (cell_size + gap) + gap + separator, rows * (cell_size + gap) + gap)
    pixels = np.asarray(sheet)
    assert (pixels == RED).all(-1).sum() == references * cell_size * cell_size
    assert (pixels == BLUE).all(-1).sum() == images * cell_size * cell_size
    assert ((pixels == 200).all(-1).any(0).sum() == 2) == bool(references)  # the line between them
    if references:
        assert (pixels == RED).all(-1).any(0).nonzero()[0].max() < (pixels == BLUE).all(-1).any(0).nonzero()[0].min()


def test_small_images_are_enlarged_without_blur_and_keep_their_aspect_ratio():
    checks = Image.new("RGB", (2, 1), RED)
    checks.putpixel((1, 0), BLUE)
    sheet = np.asarray(make_contact_sheet([], [checks], cell_size=40))
    assert (sheet == RED).all(-1).sum() == (sheet == BLUE).all(-1).sum() == 20 * 20
