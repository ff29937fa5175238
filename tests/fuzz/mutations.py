"""Random changes of bytes and of safetensors headers, for the fuzz targets that read files of tensors."""

import json
import random
from collections.abc import Sequence

FRAGMENTS = (b"\xff\xfe", b"[" * 5000, b"9" * 5000, b'"', b"\0", b"-", b"}")
INTEGERS = (b"\0\0\0\0", b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f")


def mutate_bytes(content: bytes, rng: random.Random, ends: Sequence[int] = ()) -> bytes:
    """One random change of the bytes, or a few: anywhere, or as often before each of `ends`, as where headers are."""
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 8))):
        at = rng.randrange(min(len(changed), rng.choice((*ends, len(changed)))) + 1)
        kind = rng.randrange(6)
        if kind == 0 and at < len(changed):
            changed[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del changed[at:]
        elif kind == 2:
            del changed[at : at + rng.randrange(1, 9)]
        elif kind == 3:
            changed[at:at] = rng.randbytes(rng.randrange(1, 9))
        elif kind == 4:
            changed[at:at] = rng.choice(FRAGMENTS)
        else:
            changed[at : at + 4] = rng.choice(INTEGERS)
    return bytes(changed)


def split_header(content: bytes) -> tuple[object, bytes]:
    """The header of a safetensors file, and what follows it."""
    size = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def join_header(header: object, rest: bytes) -> bytes:
    """A safetensors file with a header that fits its length."""
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + rest
