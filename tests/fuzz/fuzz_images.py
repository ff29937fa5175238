"""Random mutations of small images of every format, opened in every role: an image, one sentence, and nothing else.

`python tests/fuzz/fuzz_images.py --minutes 10`; a few seconds of it are a test, test_fuzz_images.py.
"""

import argparse
import io
import random
import resource
import time
import warnings
from collections import Counter
from functools import partial

import numpy as np
from PIL import Image

from imprompt.errors import ImageError
from imprompt.utils.images import IMAGE_FORMATS, open_control_image, open_image, open_mask

ROLES = (open_image, partial(open_mask, name="the mask"), open_control_image)
MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "I;16", "I", "F")
NUMBERS = (0, 1, 127, 128, 255, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF)


def make_seeds() -> list[bytes]:
    """A small image in every mode that each format can write, still and animated, with EXIF data and a color profile."""
    pixels = np.random.default_rng(0).integers(0, 256, (12, 17, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    seeds = []
    for name in IMAGE_FORMATS:
        for mode in MODES:
            image = Image.fromarray(pixels[..., 0]).convert("I") if mode.startswith("I") else Image.fromarray(pixels)
            image = image if mode == "LAB" else image.convert(mode)
            for options in ({"exif": exif, "icc_profile": bytes(200)}, {"save_all": True, "append_images": [image.rotate(9)]}, {}):
                content = io.BytesIO()
                try:
                    image.save(content, name, **options)
                except (OSError, KeyError, ValueError, TypeError):  # the format does not write this mode
                    continue
                seeds.append(content.getvalue())
    return seeds


def mutate(data: bytes, rng: random.Random) -> bytes:
    """Bytes overwritten, inserted, removed or repeated; numbers replaced by extreme ones; the end cut off."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        at = rng.randrange(min(len(changed), rng.choice((64, 256, 10**9)))) if changed else 0
        kind = rng.randrange(6)
        if kind == 0:
            changed[at : at + 1] = bytes([rng.randrange(256)])
        elif kind == 1:
            size = rng.choice((1, 2, 4))
            number = rng.choice(NUMBERS) & (256**size - 1)
            changed[at : at + size] = number.to_bytes(size, rng.choice(("little", "big")))
        elif kind == 2:
            del changed[at : at + rng.randrange(1, 40)]
        elif kind == 3:
            changed[at:at] = changed[at : at + rng.randrange(1, 200)]
        elif kind == 4:
            changed[at:at] = rng.randbytes(rng.randrange(1, 20))
        else:
            changed[at : at + 1] = bytes(byte ^ (1 << rng.randrange(8)) for byte in changed[at : at + 1])
    return bytes(changed[: rng.choice((len(changed), len(changed), rng.randrange(len(changed) + 1)))])


def fuzz(seconds: float, seed: int = 0) -> Counter[str]:
    """How often inputs were opened and refused within this time. Raises what a loader raises except ImageError."""
    rng, seeds, outcomes, end = random.Random(seed), make_seeds(), Counter[str](), time.monotonic() + seconds
    while time.monotonic() < end:
        data = mutate(rng.choice(seeds), rng)
        for open_as in ROLES:
            start = time.monotonic()
            outcomes[check(open_as, data)] += 1
            assert time.monotonic() - start < 10, f"{data!r} took longer than 10 seconds"
    return outcomes


def check(open_as: object, data: bytes) -> str:
    """Open an input in one role. What is wrong names the input."""
    try:
        image = open_as(data)  # type: ignore[operator]
        assert image.mode in ("RGB", "L") and 0 not in image.size
        return "opened"
    except ImageError as error:
        assert "\n" not in str(error) and len(str(error)) < 400, f"{data!r}: {error}"
        return "refused"
    except Exception as error:
        raise AssertionError(f"{type(error).__name__} for {data!r}") from error


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    print(dict(fuzz(60 * arguments.minutes, arguments.seed)), f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB at most")
