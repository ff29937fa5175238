"""Any picture opens as upright 8-bit RGB, or is refused in one sentence, quickly and without filling the memory."""

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

from imprompt.config import FITS
from imprompt.errors import ImageError
from imprompt.utils.images import cut_share, fit, is_animated, open_image, sheet, squares, to_rgb

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)

SQUARE = [how for how in FITS if how != "tile"]


def photo(width=40, height=30):
    return Image.merge("RGB", [Image.effect_noise((width, height), 60 + 10 * i) for i in range(3)])


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(path: Path, width: int, height: int, pixels: bytes = b"", depth: int = 8, colour: int = 2, more: bytes = b"") -> Path:
    """A PNG by hand: its header may claim any size."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + more + chunk(b"IDAT", zlib.compress(pixels)) + chunk(b"IEND", b""))
    return path


def share(image: Image.Image, colour: tuple[int, int, int]) -> float:
    """Of the picture that has exactly this colour."""
    return float((np.asarray(image) == np.uint8(colour)).all(-1).mean())


def refusal(source) -> str:
    with pytest.raises(ImageError) as caught:
        open_image(source)
    text = str(caught.value)
    assert "\n" not in text and len(text) < 300
    return text


# ------------------------------------------------------------------------------------------------------------- refused


def test_missing_pictures_and_folders(tmp_path):
    assert "no picture at" in refusal(tmp_path / "none.png")
    assert "no picture at" in refusal(str(tmp_path))
    with pytest.raises(ImageError, match="no picture at"):
        open_image("x" * 5000 + ".png")


@pytest.mark.parametrize("source", [3, None, np.zeros((4, 4, 3), np.uint8)], ids=["int", "None", "array"])
def test_what_is_neither_a_path_nor_a_picture(source):
    assert type(source).__name__ in refusal(source)


def test_a_file_in_memory():
    content = io.BytesIO()
    Image.new("CMYK", (5, 4)).save(content, "JPEG")
    assert open_image(content.getvalue()).size == (5, 4)
    assert "in memory is not a picture" in refusal(b"bytes")


@pytest.mark.parametrize("content", [b"", b"not a picture at all", b"<svg xmlns='http://www.w3.org/2000/svg'/>", os.urandom(500)])
def test_files_that_are_no_pictures(content, tmp_path):
    path = tmp_path / "reference.png"
    path.write_bytes(content)
    assert "reference.png is not a picture" in refusal(path)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_truncated_pictures_are_called_damaged(form, tmp_path):
    path = tmp_path / f"reference.{form.lower()}"
    photo(200, 150).save(path, form)
    open_image(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert "damaged" in refusal(path) or "not a picture" in refusal(path)


def test_a_png_with_spoilt_pixels_is_called_damaged(tmp_path):
    path = tmp_path / "reference.png"
    photo(200, 150).save(path)
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 50] = bytes(50)
    path.write_bytes(data)
    assert "damaged" in refusal(path)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "PPM"])
def test_whatever_is_wrong_with_a_file_only_image_errors_leave(form, tmp_path):
    """Bytes overwritten at random: it opens or it is refused, without a warning and without another exception."""
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010E] = "a description"
    path = tmp_path / "reference"
    photo().save(path, form, **({"exif": exif} if form in ("PNG", "JPEG", "WEBP") else {}))
    data = path.read_bytes()
    chance = random.Random(form)
    for _ in range(150):
        spoilt = bytearray(data)
        for _ in range(chance.choice([1, 2, 8])):
            spoilt[chance.randrange(min(len(spoilt), chance.choice([60, 200, 10**6])))] = chance.choice([0, 1, 128, 255])
        path.write_bytes(spoilt[: chance.choice([len(spoilt), chance.randrange(len(spoilt))])])
        try:
            assert open_image(path).mode == "RGB"
        except ImageError as error:
            assert "\n" not in str(error)


@pytest.mark.parametrize(("width", "height"), [(30_000, 30_000), (10_001, 10_000), (2**31 - 1, 2**31 - 1), (2**31 - 1, 1)])
def test_enormous_pictures_are_refused_by_their_header(width, height, tmp_path):
    path = png(tmp_path / "huge.png", width, height)
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    text = refusal(path)
    assert time.monotonic() - start < 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # kilobytes
    assert "huge.png" in text and "100 million" in text


def test_decompression_bombs_are_refused(tmp_path):
    """48 kilobytes that would become 1.2 gigabytes; and a comment that would become 100 megabytes."""
    bomb = png(tmp_path / "bomb.png", 20_000, 20_000, bytes(20_000 * 2501), depth=1, colour=0)
    assert bomb.stat().st_size < 100_000
    assert "100 million" in refusal(bomb)
    comment = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(100_000_000)))
    assert "damaged" in refusal(png(tmp_path / "comment.png", 1, 1, bytes(4), more=comment))


def test_an_empty_picture_is_refused():
    with pytest.raises(ImageError, match="0 × 5 pixels is empty"):
        open_image(Image.new("RGB", (0, 5)))


# ------------------------------------------------------------------------------------------------------------ accepted


def test_a_long_strip_is_accepted_and_costs_little(tmp_path):
    path = tmp_path / "strip.png"
    Image.new("RGB", (30_000, 20), RED).save(path)
    image = open_image(path)
    assert image.size == (30_000, 20)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for how in SQUARE:
        square = fit(image, how)
        assert square.width == square.height <= 2048
        assert share(square, RED) > 0
    page = sheet([image], [photo()])
    assert share(page, RED) > 0
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000


def test_paths_strings_and_pictures_are_the_same(tmp_path):
    image = photo()
    image.save(tmp_path / "a.png")
    for source in (tmp_path / "a.png", str(tmp_path / "a.png"), image):
        assert np.array_equal(open_image(source), image)


def test_the_first_frame_of_an_animation(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, GREEN, BLUE)]
    for form in ("gif", "webp", "png"):
        path = tmp_path / f"a.{form}"
        frames[0].save(path, save_all=True, append_images=frames[1:], **({"lossless": True} if form == "webp" else {}))
        assert is_animated(path)
        assert open_image(path).getpixel((4, 4)) == RED
    photo().save(tmp_path / "still.png")
    assert not is_animated(tmp_path / "still.png") and not is_animated(photo())


def test_cmyk_jpeg(tmp_path):
    Image.new("RGB", (16, 16), RED).convert("CMYK").save(tmp_path / "a.jpg", quality=95)
    with Image.open(tmp_path / "a.jpg") as raw:
        assert raw.mode == "CMYK"
    image = open_image(tmp_path / "a.jpg")
    assert image.mode == "RGB" and np.abs(np.subtract(image.getpixel((8, 8)), RED)).max() < 10


def test_sixteen_bits_keep_white_and_middle(tmp_path):
    values = np.array([[0, 32768, 65535]], np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as raw:
        assert raw.mode.startswith("I")
    image = open_image(tmp_path / "a.png")
    assert [image.getpixel((x, 0)) for x in range(3)] == [(0, 0, 0), (128, 128, 128), WHITE]


def test_floating_point_pictures_are_scaled_to_their_brightest(tmp_path):
    Image.fromarray(np.array([[-1.0, 0.0, 2.0, 4.0, np.nan, np.inf]], np.float32)).save(tmp_path / "a.tiff")
    image = open_image(tmp_path / "a.tiff")
    assert [image.getpixel((x, 0))[0] for x in range(5)] == [0, 0, 128, 255, 0]


def test_transparency_is_laid_on_white(tmp_path):
    image = Image.new("RGBA", (3, 1), (255, 0, 0, 255))
    image.putpixel((1, 0), (0, 0, 0, 0))
    image.putpixel((2, 0), (0, 0, 255, 128))
    image.save(tmp_path / "a.png")
    opened = open_image(tmp_path / "a.png")
    assert opened.mode == "RGB"
    assert [opened.getpixel((x, 0)) for x in range(3)] == [RED, WHITE, (127, 127, 255)]


def test_palettes_with_transparency_are_laid_on_white(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([*RED, *BLUE])
    image.putdata([0, 1])
    for form in ("png", "gif"):
        image.save(tmp_path / f"a.{form}", transparency=1)
        opened = open_image(tmp_path / f"a.{form}")
        assert [opened.getpixel((x, 0)) for x in range(2)] == [RED, WHITE]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "RGBa", "CMYK", "YCbCr", "LAB", "HSV", "I", "F", "I;16"])
def test_every_mode_becomes_rgb(mode):
    assert to_rgb(Image.new(mode, (5, 4))).mode == "RGB"


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_upright(orientation, tmp_path):
    """What a viewer shows: the red corner is at the top left, whatever way the camera was held."""
    upright = Image.new("RGB", (24, 16), WHITE)
    upright.paste(RED, (0, 0, 8, 8))
    turn = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # what undoes each orientation, as PIL's transpositions
    held = upright.transpose(Image.Transpose(turn[orientation])) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    held.save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(open_image(tmp_path / "a.png"), upright)


# ------------------------------------------------------------------------------------------------------ fit and sheet


def stripes():
    """60 × 20: red, green and blue, 20 pixels each."""
    image = Image.new("RGB", (60, 20), RED)
    image.paste(GREEN, (20, 0, 40, 20))
    image.paste(BLUE, (40, 0, 60, 20))
    return image


def test_crop_takes_the_centre():
    assert np.array_equal(fit(stripes(), "crop"), Image.new("RGB", (20, 20), GREEN))
    assert cut_share(stripes()) == pytest.approx(2 / 3) and cut_share(photo(9, 9)) == 0


def test_pad_keeps_all_on_white():
    square = fit(stripes(), "pad")
    assert square.size == (60, 60)
    assert np.array_equal(square.crop((0, 20, 60, 40)), stripes())
    assert np.asarray(square)[:20].min() == np.asarray(square)[40:].min() == 255


def test_squash_distorts():
    square = fit(stripes(), "squash")
    assert square.size == (60, 60)
    assert [square.getpixel((x, y)) for x, y in ((10, 5), (30, 30), (50, 55))] == [RED, GREEN, BLUE]


@pytest.mark.parametrize("how", SQUARE)
@pytest.mark.parametrize("size", [(1, 1), (64, 64), (7, 5), (5000, 1), (1, 5000)])
def test_fitting_any_size_gives_a_square(how, size):
    square = fit(Image.new("RGB", size, RED), how)
    assert square.width == square.height >= 1 and square.mode == "RGB"
    assert share(square, RED) > 0


def test_a_square_fits_as_it_is():
    square = photo(32, 32)
    assert all(np.array_equal(square, fit(square, how)) for how in SQUARE)
    assert all(np.array_equal(square, only) for how in FITS for only in squares(square, how))


@pytest.mark.parametrize(("size", "count"), [((64, 64), 1), ((65, 64), 2), ((200, 80), 3), ((80, 200), 3), ((5000, 10), 8), ((1, 9), 8)])
def test_tiles_cover_a_picture_side_by_side(size, count):
    image = Image.fromarray((np.arange(max(size)) * 255 // max(size)).astype(np.uint8)[None].repeat(min(size), 0)).convert("RGB")
    image = image if size[0] >= size[1] else image.transpose(Image.Transpose.ROTATE_90)
    tiles = squares(image, "tile")
    assert len(tiles) == count and {tile.size for tile in tiles} == {(min(size),) * 2}
    assert tiles[0].tobytes() == image.crop((0, 0, min(size), min(size))).tobytes()
    corner = image.crop((size[0] - min(size), size[1] - min(size), *size))
    assert tiles[-1].tobytes() == corner.tobytes()


def test_an_unknown_fit_is_refused():
    with pytest.raises(ImageError, match="expected one of crop, pad, squash"):
        fit(photo(), "stretch")


@pytest.mark.parametrize(
    ("references", "results", "columns", "rows", "left"),
    [(0, 1, 1, 1, 0), (0, 4, 4, 1, 0), (1, 4, 4, 1, 1), (1, 6, 4, 2, 1), (3, 6, 4, 2, 2)],
)
def test_the_sheet_has_room_for_each_picture(references, results, columns, rows, left):
    cell, gap, rule = 40, 6, 14 if references else 0
    reference, result = Image.new("RGB", (50, 50), RED), Image.new("RGB", (50, 50), BLUE)
    page = sheet([reference] * references, [result] * results, cell=cell)
    assert page.size == ((left + columns) * (cell + gap) + gap + rule, rows * (cell + gap) + gap)
    pixels = np.asarray(page)
    assert (pixels == RED).all(-1).sum() == references * cell * cell
    assert (pixels == BLUE).all(-1).sum() == results * cell * cell
    assert ((pixels == 200).all(-1).any(0).sum() == 2) == bool(references)  # the rule between them
    if references:
        assert (pixels == RED).all(-1).any(0).nonzero()[0].max() < (pixels == BLUE).all(-1).any(0).nonzero()[0].min()


def test_small_pictures_are_enlarged_without_blur_and_shapes_kept():
    checks = Image.new("RGB", (2, 1), RED)
    checks.putpixel((1, 0), BLUE)
    page = np.asarray(sheet([], [checks], cell=40))
    assert (page == RED).all(-1).sum() == (page == BLUE).all(-1).sum() == 20 * 20
