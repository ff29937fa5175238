"""Random mutations of lists, captions, archives and COCO files: every input is read, or is reported in one sentence.

    python tests/fuzz/fuzz_readers.py --minutes 10 [--seed 0] [--keep FOLDER]

Prints how many inputs were read, and every kind of traceback with an input that causes it. Exits with 1 where there is one, or where a
single input took longer than MAX_SECONDS or the process more than MAX_MEMORY.
"""

import argparse
import csv
import gzip
import io
import json
import random
import resource
import sys
import tarfile
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from imprompt.data.loader import READ_ERRORS
from imprompt.data.readers import open_data
from imprompt.data.sampler import iterate_once
from imprompt.data.shards import WebDatasetShards
from imprompt.data.survey import describe_data

MAX_SECONDS, MAX_MEMORY = 10.0, 2 * 2**30
TOKENS = [
    b'"', b"\n", b"\r", b",", b"\0", b"\xff", b"[", b"{", b"}", b"]", b"null", b"NaN", b"1e999", b"-1", b"9" * 4400, b"\xff\xfe", b"../",
    b"\xef\xbb\xbf", b"target", b"text", b".png", b"\\ud800", b"[" * 2000, b"a" * 300, b"true", b";", b"\t", b"\xed\xa0\x80", b"1.5", b"|",
]  # fmt: skip


def encode_image() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 4), "red").save(file, "PNG")
    return file.getvalue()


def make_jsonl() -> bytes:
    rows = [{"target": "a.png", "text": "a cat", "references": ["a.png"], "mask": "a.png", "subject": 7}, {"image": "a.png", "text": None}]
    return "\n".join(map(json.dumps, rows)).encode()


def make_csv() -> bytes:
    file = io.StringIO()
    rows = [["file_name", "text", "references", "subject"], ["a.png", 'a "cat",\nred', "a.png|a.png", "Tom"], ["a.png", "x", "", ""]]
    csv.writer(file).writerows(rows)
    return file.getvalue().encode()


def make_json() -> bytes:
    return json.dumps([{"image_file": "a.png", "text": ["a cat", "x"]}, {"image_file": "a.png", "text": ""}]).encode()


def make_kohya() -> bytes:
    return json.dumps({"a": {"caption": "a cat", "tags": "x"}, "/data/a.png": {"tags": "y"}}).encode()


def make_coco() -> bytes:
    images = [{"id": n, "file_name": f"{'ab'[n]}.png"} for n in range(2)]
    return json.dumps({"images": images, "annotations": [{"id": 1, "image_id": 0, "caption": "a cat"}]}).encode()


def make_tar(mode: str = "w") -> bytes:
    file, metadata = io.BytesIO(), json.dumps({"caption": ["a cat"], "subject": "Tom"}).encode()
    with tarfile.open(fileobj=file, mode=mode, format=tarfile.PAX_FORMAT) as archive:
        for name, content in (
            ("0.png", encode_image()), ("0.txt", b"a cat"), ("0.json", metadata), ("ü/1.png", encode_image()), ("metadata.csv", make_csv()),
        ):  # fmt: skip
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return file.getvalue()


def make_parquet() -> bytes:
    import pyarrow
    import pyarrow.parquet

    file, image = io.BytesIO(), {"bytes": encode_image(), "path": "a.png"}
    table = pyarrow.table({"image": [image, image], "text": ["a cat", None], "references": [["a.png"], []], "subject": [1.0, float("nan")]})
    pyarrow.parquet.write_table(table, file, row_group_size=1)
    return file.getvalue()


SEEDS: dict[str, Callable[[], bytes]] = {
    "list.jsonl": make_jsonl, "list.csv": make_csv, "list.tsv": lambda: make_csv().replace(b",", b"\t"), "data.json": make_json,
    "meta.json": make_kohya, "annotations/captions_val.json": make_coco, "0.tar": make_tar, "0.tar.gz": lambda: make_tar("w:gz"),
    "list.parquet": make_parquet, "images/metadata.jsonl": make_jsonl, "images/a.json": lambda: b'{"caption": "a cat"}',
    "images/a.txt": lambda: b"a cat",
}  # fmt: skip


def mutate(data: bytes, rng: random.Random) -> bytes:
    """One to five random changes: bytes flipped, removed, repeated, cut off, or tokens inserted."""
    content = bytearray(data)
    for _ in range(rng.randint(1, 5)):
        at = rng.randrange(len(content) + 1)
        length = rng.choice((1, 1, 2, 8, 64))
        match rng.randrange(6):
            case 0 if content:
                content[at % len(content)] = rng.randrange(256)
            case 1:
                del content[at : at + length]
            case 2:
                content[at:at] = content[at : at + length] * rng.choice((1, 2, 50))
            case 3:
                del content[at:]
            case _:
                content[at:at] = rng.choice(TOKENS)
    return bytes(content)


def mutate_input(name: str, seed: bytes, rng: random.Random) -> bytes:
    """A mutation; of half of the compressed archives, one of what is compressed."""
    if name.endswith(".gz") and rng.random() < 0.5:
        return gzip.compress(mutate(gzip.decompress(seed), rng), 1)
    return mutate(seed, rng)


def read_input(root: Path, name: str) -> None:
    """Read everything that a command would, except the images."""
    try:
        records = open_data(root / "images" if name.startswith("images/") else root / name)
    except READ_ERRORS as error:
        check_sentence(error)
        return
    if isinstance(records, WebDatasetShards):
        records.on_unreadable = lambda key, reason: None
    check_line(describe_data(records))
    for read in islice(iterate_once(records), 100):
        try:
            record = read()
            record.caption.encode()  # tokenizers need valid text
        except READ_ERRORS as error:
            check_sentence(error)


def check_sentence(error: Exception) -> None:
    """A UnicodeEncodeError is a ValueError, and no sentence for users."""
    if isinstance(error, UnicodeError):
        raise AssertionError(f"no sentence: {error!r}") from error


def check_line(line: str) -> None:
    assert len(line) < 5_000, "a line that fills the terminal"


class Finding(NamedTuple):
    """A fault, and the first input that causes it."""

    name: str
    data: bytes
    problem: str


def fuzz(seconds: float, seed: int = 0) -> tuple[Counter[str], dict[str, Finding]]:
    """Inputs by name, and the faults by their place."""
    rng, end = random.Random(seed), time.monotonic() + seconds
    seeds = {name: make() for name, make in SEEDS.items()}
    counts, findings = Counter[str](), dict[str, Finding]()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for sub in ("val", "images", "annotations"):
            (root / sub).mkdir()
        for path in ("a.png", "images/a.png", "images/b.png", "val/a.png"):
            (root / path).write_bytes(encode_image())
        while time.monotonic() < end:
            name = rng.choice(list(seeds))
            data = mutate_input(name, seeds[name], rng)
            (root / name).write_bytes(data)
            counts[name] += 1
            if problem := find_problem(root, name):
                findings.setdefault(problem.splitlines()[-1][:200] + problem.splitlines()[-2][:200], Finding(name, data, problem))
            if name.startswith("images/"):
                (root / name).unlink()
    return counts, findings


def find_problem(root: Path, name: str) -> str:
    """The traceback of an input, or what it costs too much of."""
    start = time.monotonic()
    try:
        read_input(root, name)
    except Exception:
        return traceback.format_exc()
    if (elapsed := time.monotonic() - start) > MAX_SECONDS:
        return f"too slow\n{elapsed:.0f} s\n"
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return f"too large\n{memory / 2**30:.1f} GiB\n" if memory > MAX_MEMORY else ""


def main() -> int:
    """Fuzz for some minutes, print a summary, and keep the inputs that cause faults."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="folder for the inputs that cause faults")
    options = parser.parse_args()
    counts, findings = fuzz(60 * options.minutes, options.seed)
    print(f"{counts.total():,} inputs:", ", ".join(f"{count:,} {name}" for name, count in counts.most_common()))
    for number, finding in enumerate(findings.values()):
        print(f"\n{finding.name}: {finding.problem}")
        if options.keep:
            options.keep.mkdir(parents=True, exist_ok=True)
            (options.keep / f"{number}-{Path(finding.name).name}").write_bytes(finding.data)
    print(f"{len(findings)} faults, {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
