"""All readers give the same records, and tolerate damaged ones."""

import csv
import io
import json
import tarfile

import pytest
from PIL import Image

from imprompt.data.lists import ListRecords
from imprompt.data.readers import ImageFolder, MiniWorld, WebDatasetShards, open_data
from imprompt.data.records import MapRecords, ShardRecords
from imprompt.errors import UserError
from imprompt.utils.images import open_image

CAPTIONS = ["a red square", 'ein grünes Quadrat, "quer"', "two\nlines"]


@pytest.fixture
def images(tmp_path):
    """A folder of three images with caption files, one in a subfolder with a space and an umlaut; and their paths."""
    (tmp_path / "Jürgen Groß").mkdir()
    paths = [tmp_path / "a.png", tmp_path / "b.JPG", tmp_path / "Jürgen Groß" / "c.webp"]
    for i, (path, text) in enumerate(zip(paths, CAPTIONS, strict=True)):
        Image.new("RGB", (40 + i, 30), (80 * i, 10, 10)).save(path)
        path.with_suffix(".txt").write_text(text, "utf-8")
    (tmp_path / ".hidden.png").write_bytes(b"")
    (tmp_path / "notes.md").write_text("nothing")
    return tmp_path, paths


def image_sizes(records):
    return sorted(open_image(records[i].target).size for i in range(len(records)))


def test_folder(images):
    folder, _ = images
    records = open_data(folder)
    assert isinstance(records, ImageFolder) and isinstance(records, MapRecords)
    assert {records[i].key: (records[i].caption, records[i].subject) for i in range(3)} == {
        "Jürgen Groß/c.webp": (CAPTIONS[2], "Jürgen Groß"), "a.png": (CAPTIONS[0], None), "b.JPG": (CAPTIONS[1], None),
    }  # fmt: skip
    assert image_sizes(records) == [(40, 30), (41, 30), (42, 30)]


def test_json_lines(images):
    folder, paths = images
    rows = [{"target": p.relative_to(folder).as_posix(), "text": t} for p, t in zip(paths, CAPTIONS, strict=True)]
    rows[0] |= {"references": ["b.JPG", "Jürgen Groß/c.webp"], "mask": "b.JPG", "subject": 7}
    text = "\n\n".join(json.dumps(row, ensure_ascii=i == 1) for i, row in enumerate(rows))
    (folder / "list.jsonl").write_text(text, "utf-8")
    records = open_data(folder / "list.jsonl")
    assert len(records) == 3 and [records[i].caption for i in (2, 0, 1)] == [CAPTIONS[2], CAPTIONS[0], CAPTIONS[1]]
    assert records[0].subject == "7" and [open_image(r).size for r in records[0].references] == [(41, 30), (42, 30)]
    assert open_image(records[0].mask).size == (41, 30)


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_csv_with_quotes_newlines_and_column_aliases(images, suffix, encoding):
    folder, paths = images
    with (folder / f"list{suffix}").open("w", encoding=encoding, newline="") as file:
        writer = csv.writer(file, delimiter="\t" if suffix == ".tsv" else ",")
        writer.writerow(["image", "caption", "references"])
        writer.writerows([p.relative_to(folder).as_posix(), t, "a.png|b.JPG"] for p, t in zip(paths, CAPTIONS, strict=True))
    records = open_data(folder / f"list{suffix}")
    assert isinstance(records, ListRecords)
    assert [records[i].caption for i in range(3)] == CAPTIONS
    assert image_sizes(records) == [(40, 30), (41, 30), (42, 30)] and len(records[2].references) == 2


def test_parquet_with_paths_and_with_bytes(images):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    folder, paths = images
    names = [p.relative_to(folder).as_posix() for p in paths]
    parquet.write_table(pyarrow.table({"target": names, "text": CAPTIONS}), folder / "paths.parquet")
    parquet.write_table(pyarrow.table({"image": [{"bytes": p.read_bytes()} for p in paths], "text": CAPTIONS}), folder / "bytes.parquet")
    for name in ("paths", "bytes"):
        records = open_data(folder / f"{name}.parquet")
        assert [records[i].caption for i in range(3)] == CAPTIONS and image_sizes(records) == [(40, 30), (41, 30), (42, 30)]


def add_file(archive, name, content):
    info = tarfile.TarInfo(name)
    info.size = len(content)
    archive.addfile(info, io.BytesIO(content))


def write_shard(path, count, start=0):
    """A shard as img2dataset writes it."""
    with tarfile.open(path, "w") as archive:
        for i in range(start, start + count):
            jpeg = io.BytesIO()
            Image.new("RGB", (32, 32), (i % 256, 0, 0)).save(jpeg, "JPEG")
            add_file(archive, f"{i:09}.jpg", jpeg.getvalue())
            add_file(archive, f"{i:09}.txt", f"image {i}".encode())
            add_file(archive, f"{i:09}.json", json.dumps({"caption": f"image {i}", "url": "https://example.org"}).encode())
    return str(path)


def test_shards_by_folder_and_by_pattern(tmp_path):
    write_shard(tmp_path / "00000.tar", 3)
    write_shard(tmp_path / "00001.tar", 2, start=3)
    for source in (tmp_path, tmp_path / "{00000..00001}.tar"):
        records = open_data(source)
        assert isinstance(records, ShardRecords) and len(records.shards) == 2
        read = [r for s in records.shards for r in records.read_shard(s)]
        assert [r.caption for r in read] == [f"image {i}" for i in range(5)]
        assert open_image(read[0].target).size == (32, 32)


def test_of_damaged_shards_only_the_damaged_part_is_skipped(tmp_path):
    good = write_shard(tmp_path / "0.tar", 4)
    truncated = tmp_path / "1.tar"
    truncated.write_bytes((tmp_path / "0.tar").read_bytes()[:6000])
    (tmp_path / "2.tar").write_bytes(b"")
    (tmp_path / "3.tar").write_bytes(b"this is no tar" * 100)
    with tarfile.open(tmp_path / "5.tar", "w") as archive:
        add_file(archive, "x.txt", b"a caption without an image")
        add_file(archive, "y.json", b"{ damaged")
        add_file(archive, "y.jpg", (tmp_path / "0.tar").read_bytes()[512:900])
    unreadable = []
    shards = [good, *(str(tmp_path / f"{i}.tar") for i in (1, 2, 3, 4, 5))]
    records = WebDatasetShards(shards, lambda key, reason: unreadable.append(key))
    captions = {s: [r.caption for r in records.read_shard(s)] for s in records.shards}
    assert len(captions[good]) == 4
    assert 1 <= len(captions[str(truncated)]) < 4
    assert [captions[str(tmp_path / f"{i}.tar")] for i in (2, 3, 4)] == [[], [], []]
    assert captions[str(tmp_path / "5.tar")] == []  # the caption of its only image is damaged
    reported = " ".join(unreadable)
    assert all(f"{name}.tar" in reported for name in (1, 3, 4)) and "5.tar/x" in reported and "5.tar/y" in reported


def test_mini_is_reproducible():
    a, b = MiniWorld(100), MiniWorld(100)
    assert a[7].caption == b[7].caption and a[7].target.tobytes() == b[7].target.tobytes()
    assert a[4].subject == a[7].subject != a[8].subject
    assert MiniWorld(100, held_out=True)[0].subject != a[0].subject
    with pytest.raises(IndexError):
        a[100]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("nothing", None, "no data at"),
        ("list.jsonl", '{"img": "a.png"}', "no image column"),
        ("list.jsonl", "", "holds no records"),
        ("list.jsonl", "[1, 2]", "expected an object"),
        ("list.jsonl", "{broken", "is not JSON"),
        ("list.csv", "caption\na cat", "received caption"),
        ("list.parquet", "no parquet", "not a readable Parquet"),
        ("words.docx", "x", "is no data that can be read"),
        ("{0..3}.tar", None, "no shards"),
    ],
)
def test_unusable_data_is_explained_in_one_sentence(tmp_path, name, content, message):
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        open_data(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_an_empty_folder_is_explained(tmp_path):
    with pytest.raises(UserError, match="no images in"):
        open_data(tmp_path)
