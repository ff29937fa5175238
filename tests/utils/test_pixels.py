"""Colors arrive as they look: profiles are applied, deep grays scaled by their range, transparency kept in any depth."""

import io
import struct
import warnings

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageDraw
from tests.utils.test_images import png_chunk, write_png

from imprompt.errors import Notice
from imprompt.utils.images import open_control_image, open_image


def make_profile(primaries: list[tuple[float, float, float]], gamma: float = 2.2) -> bytes:
    """An ICC profile of three primaries, XYZ adapted to D50, and one gamma."""

    def xyz(values: tuple[float, ...]) -> bytes:
        return b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(v * 65536) for v in values))

    curve = b"curv\0\0\0\0" + struct.pack(">IH2x", 1, round(gamma * 256))
    text = b"made for a test"
    description = b"desc\0\0\0\0" + struct.pack(">I", len(text) + 1) + text + b"\0" * 79
    entries = [(b"desc", description.ljust(-len(description) % 4 + len(description), b"\0")), (b"wtpt", xyz((0.9642, 1, 0.8249)))]
    entries += [(name + b"XYZ", xyz(value)) for name, value in zip((b"r", b"g", b"b"), primaries, strict=True)]
    entries += [(name + b"TRC", curve) for name in (b"r", b"g", b"b")]
    table, body, offset = b"", b"", 128 + 4 + 12 * len(entries)
    for name, data in entries:
        table += name + struct.pack(">2I", offset + len(body), len(data))
        body += data
    header = struct.pack(">I4sI4s4s4s", offset + len(body), b"\0\0\0\0", 0x02100000, b"mntr", b"RGB ", b"XYZ ")
    header += struct.pack(">6H4s", 2026, 1, 1, 0, 0, 0, b"acsp") + bytes(28) + struct.pack(">3i", 63190, 65536, 54061)
    return header.ljust(128, b"\0") + struct.pack(">I", len(entries)) + table + body


WIDE = make_profile([(0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457)])  # Adobe RGB
SWAPPED = make_profile([(0.3851, 0.7169, 0.0971), (0.1431, 0.0606, 0.7141), (0.4360, 0.2225, 0.0139)])  # green, blue, red
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def converted(image: Image.Image, profile: bytes) -> np.ndarray:
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    return np.asarray(ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")).astype(int)


def colors(mode: str = "RGB") -> Image.Image:
    image = Image.linear_gradient("L").resize((32, 32))
    return Image.merge("RGB", (image, image.rotate(90), Image.new("L", (32, 32), 90))).convert(mode)


@pytest.mark.parametrize("profile", [WIDE, SWAPPED], ids=["wide", "swapped"])
@pytest.mark.parametrize("file_format", ["PNG", "TIFF", "WEBP", "AVIF"])
def test_a_color_profile_is_applied(file_format, profile, tmp_path):
    options = {"WEBP": {"lossless": True}, "AVIF": {"quality": 100, "subsampling": "4:4:4"}}.get(file_format, {})
    colors().save(tmp_path / "a", file_format, icc_profile=profile, **options)
    opened = np.asarray(open_image(tmp_path / "a")).astype(int)
    assert np.abs(opened - converted(colors(), profile)).mean() < 2
    assert np.abs(opened - np.asarray(colors())).mean() > 5
    assert not open_image(tmp_path / "a").info.get("icc_profile"), "it would be applied again where the image is saved"


@pytest.mark.parametrize("mode", ["RGBA", "P", "L"])
def test_a_profile_is_applied_in_every_mode_and_alpha_stays(mode, tmp_path):
    image = colors(mode)
    if mode == "RGBA":
        image.putalpha(Image.new("L", image.size, 255))
        image.putpixel((0, 0), (9, 9, 9, 0))
    image.save(tmp_path / "a.png", icc_profile=SWAPPED)
    opened = np.asarray(open_image(tmp_path / "a.png")).astype(int)
    expected = converted(image.convert("RGB"), SWAPPED)
    assert np.abs(opened - expected)[1:].max() <= 2
    assert mode != "RGBA" or opened[0, 0].tolist() == [255, 255, 255]


def test_srgb_profiles_change_nothing_and_data_keep_their_values(tmp_path):
    colors().save(tmp_path / "a.png", icc_profile=SRGB)
    assert np.array_equal(open_image(tmp_path / "a.png"), colors())
    colors().save(tmp_path / "b.png", icc_profile=SWAPPED)
    assert np.array_equal(open_control_image(tmp_path / "b.png"), colors())


@pytest.mark.parametrize("profile", [b"damaged", SWAPPED[:200], SWAPPED.replace(b"RGB ", b"CMYK", 1)], ids=["text", "cut", "CMYK"])
def test_a_profile_that_cannot_be_used_is_reported(profile, tmp_path):
    colors().save(tmp_path / "a.png", icc_profile=profile)
    for _ in range(2):
        with pytest.warns(Notice, match="color profile"):
            assert np.array_equal(open_image(tmp_path / "a.png"), colors())


def test_a_lab_image(tmp_path):
    to_lab = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB")
    to_lab.apply(colors()).save(tmp_path / "a.tif")
    assert np.abs(np.asarray(open_image(tmp_path / "a.tif")).astype(int) - np.asarray(colors())).mean() < 4


# ---------------------------------------------------------------------------------------------------------- deep grays


@pytest.mark.parametrize(("dtype", "highest"), [("uint16", 4095), ("uint16", 1023), ("uint16", 255), ("int32", 255),
                                                ("int32", 2**31 - 1), ("float32", 255.0), ("float32", 7.5)])  # fmt: skip
def test_the_brightest_usual_value_of_a_deep_gray_image_is_white(dtype, highest, tmp_path):
    Image.fromarray(np.array([[0, highest / 2, highest]]).astype(dtype)).save(tmp_path / "a.tif")
    with pytest.warns(Notice, match="taken as white|becomes white"):
        image = open_image(tmp_path / "a.tif")
    assert np.abs(np.subtract([image.getpixel((x, 0))[0] for x in range(3)], [0, 128, 255])).max() <= 1


@pytest.mark.parametrize(
    ("dtype", "highest"), [("uint16", 65_535), ("uint16", 30_000), ("int32", 65_535), ("float32", 1.0), ("float32", 0.5)]
)
def test_the_usual_range_of_a_deep_gray_image_is_not_reported(dtype, highest, tmp_path):
    Image.fromarray(np.array([[0, highest]]).astype(dtype)).save(tmp_path / "a.tif")
    white = 1 if dtype == "float32" else 65_535
    assert open_image(tmp_path / "a.tif").getpixel((1, 0))[0] == round(highest / white * 255)


def test_values_below_zero(tmp_path):
    Image.fromarray(np.array([[-1000, 0, 3000]]).astype("int32")).save(tmp_path / "ct.tif")
    with pytest.warns(Notice, match="below 0"):
        image = open_image(tmp_path / "ct.tif")
    values = [image.getpixel((x, 0))[0] for x in range(3)]
    assert values[0] == 0 and 0 < values[1] < values[2] > 150


def test_unsigned_values_of_32_bits(tmp_path):
    data = np.array([[0, 2**31, 2**32 - 1]], np.uint32).tobytes()
    tags = [(256, 3), (257, 1), (258, 32), (259, 1), (262, 1), (273, 8 + 2 + 10 * 12 + 4), (277, 1), (278, 1), (279, len(data)), (339, 1)]
    content = b"II*\0" + struct.pack("<IH", 8, len(tags)) + b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    (tmp_path / "a.tif").write_bytes(content + bytes(4) + data)
    with pytest.warns(Notice, match="taken as white"):
        image = open_image(tmp_path / "a.tif")
    assert [image.getpixel((x, 0))[0] for x in range(3)] == [0, 128, 255]


def test_the_transparent_value_of_deep_images(tmp_path):
    gray = write_png(tmp_path / "g.png", 2, 1, b"\0" + struct.pack(">2H", 0, 40_000), 16, 0, png_chunk(b"tRNS", struct.pack(">H", 0)))
    assert [open_image(gray).getpixel((x, 0))[0] for x in range(2)] == [255, 156]
    pixels, key = struct.pack(">6H", 40_000, 300, 7, 0, 0, 65_535), png_chunk(b"tRNS", struct.pack(">3H", 40_000, 300, 7))
    color = write_png(tmp_path / "c.png", 2, 1, b"\0" + pixels, 16, 2, key)
    assert [open_image(color).getpixel((x, 0)) for x in range(2)] == [(255, 255, 255), (0, 0, 255)]


def test_colors_of_12_bits_are_reported(tmp_path):
    dark = write_png(tmp_path / "a.png", 1, 1, b"\0" + struct.pack(">3H", 4095, 2000, 0), 16, 2)
    with pytest.warns(Notice, match="nearly black"):
        open_image(dark)


def test_control_images_are_black_where_they_are_transparent(tmp_path):
    image = Image.new("RGBA", (8, 4), (0, 0, 0, 0))
    ImageDraw.Draw(image).line((0, 0, 7, 0), fill=(255, 255, 255, 255))
    image.save(tmp_path / "a.png")
    opened = open_control_image(tmp_path / "a.png")
    assert opened.getpixel((0, 0)) == (255, 255, 255) and opened.getpixel((0, 3)) == (0, 0, 0)
    with pytest.warns(Notice, match="controls nothing"):
        open_control_image(Image.new("RGBA", (8, 4), (0, 0, 0, 0)))


def test_damaged_exif_data_do_not_make_an_image_unreadable(tmp_path):
    colors().save(tmp_path / "a.png", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12\0\x03\0\0\xff\xff")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert np.array_equal(open_image(tmp_path / "a.png"), colors())
