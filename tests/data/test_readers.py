"""Every reader gives the same records, whatever is wrong with some of them."""

import csv
import io
import json
import tarfile

import pytest
from PIL import Image

from imprompt.data.readers import Folder, Lines, Mini, Shards, open_data
from imprompt.data.records import Counted, Sharded
from imprompt.errors import UserError
from imprompt.utils.images import open_image

WORDS = ["a red square", 'ein grünes Quadrat, "quer"', "two\nlines"]


@pytest.fixture
def pictures(tmp_path):
    """Three pictures with captions beside them, one in a subfolder with a space and an umlaut."""
    (tmp_path / "Jürgen Groß").mkdir()
    paths = [tmp_path / "a.png", tmp_path / "b.JPG", tmp_path / "Jürgen Groß" / "c.webp"]
    for i, (path, text) in enumerate(zip(paths, WORDS, strict=True)):
        Image.new("RGB", (40 + i, 30), (80 * i, 10, 10)).save(path)
        path.with_suffix(".txt").write_text(text, "utf-8")
    (tmp_path / ".hidden.png").write_bytes(b"")
    (tmp_path / "notes.md").write_text("nothing")
    return tmp_path, paths


def sizes(records):
    return sorted(open_image(records[i].target).size for i in range(len(records)))


def test_folder(pictures):
    folder, _ = pictures
    records = open_data(folder)
    assert isinstance(records, Folder) and isinstance(records, Counted)
    assert {records[i].key: (records[i].text, records[i].subject) for i in range(3)} == {
        "Jürgen Groß/c.webp": (WORDS[2], "Jürgen Groß"), "a.png": (WORDS[0], None), "b.JPG": (WORDS[1], None),
    }  # fmt: skip
    assert sizes(records) == [(40, 30), (41, 30), (42, 30)]


def test_json_lines(pictures):
    folder, paths = pictures
    rows = [{"target": p.relative_to(folder).as_posix(), "text": t} for p, t in zip(paths, WORDS, strict=True)]
    rows[0] |= {"references": ["b.JPG", "Jürgen Groß/c.webp"], "mask": "b.JPG", "subject": 7}
    text = "\n\n".join(json.dumps(row, ensure_ascii=i == 1) for i, row in enumerate(rows))
    (folder / "list.jsonl").write_text(text, "utf-8")
    records = open_data(folder / "list.jsonl")
    assert len(records) == 3 and [records[i].text for i in (2, 0, 1)] == [WORDS[2], WORDS[0], WORDS[1]]
    assert records[0].subject == "7" and [open_image(r).size for r in records[0].references] == [(41, 30), (42, 30)]
    assert open_image(records[0].mask).size == (41, 30)


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
@pytest.mark.parametrize("mark", ["utf-8", "utf-8-sig"])
def test_csv_with_quotes_newlines_and_other_names(pictures, suffix, mark):
    folder, paths = pictures
    with (folder / f"list{suffix}").open("w", encoding=mark, newline="") as file:
        writer = csv.writer(file, delimiter="\t" if suffix == ".tsv" else ",")
        writer.writerow(["image", "caption", "references"])
        writer.writerows([p.relative_to(folder).as_posix(), t, "a.png|b.JPG"] for p, t in zip(paths, WORDS, strict=True))
    records = open_data(folder / f"list{suffix}")
    assert isinstance(records, Lines)
    assert [records[i].text for i in range(3)] == WORDS
    assert sizes(records) == [(40, 30), (41, 30), (42, 30)] and len(records[2].references) == 2


def test_parquet_with_paths_and_with_bytes(pictures):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    folder, paths = pictures
    names = [p.relative_to(folder).as_posix() for p in paths]
    parquet.write_table(pyarrow.table({"target": names, "text": WORDS}), folder / "paths.parquet")
    parquet.write_table(pyarrow.table({"image": [{"bytes": p.read_bytes()} for p in paths], "text": WORDS}), folder / "bytes.parquet")
    for name in ("paths", "bytes"):
        records = open_data(folder / f"{name}.parquet")
        assert [records[i].text for i in range(3)] == WORDS and sizes(records) == [(40, 30), (41, 30), (42, 30)]


def add(archive, name, content):
    info = tarfile.TarInfo(name)
    info.size = len(content)
    archive.addfile(info, io.BytesIO(content))


def shard(path, count, start=0):
    """A shard as img2dataset writes it."""
    with tarfile.open(path, "w") as archive:
        for i in range(start, start + count):
            picture = io.BytesIO()
            Image.new("RGB", (32, 32), (i % 256, 0, 0)).save(picture, "JPEG")
            add(archive, f"{i:09}.jpg", picture.getvalue())
            add(archive, f"{i:09}.txt", f"picture {i}".encode())
            add(archive, f"{i:09}.json", json.dumps({"caption": f"picture {i}", "url": "https://example.org"}).encode())
    return str(path)


def test_shards_in_every_wording(tmp_path):
    shard(tmp_path / "00000.tar", 3)
    shard(tmp_path / "00001.tar", 2, start=3)
    for source in (tmp_path, tmp_path / "{00000..00001}.tar"):
        records = open_data(source)
        assert isinstance(records, Sharded) and len(records.shards) == 2
        found = [r for s in records.shards for r in records.read(s)]
        assert [r.text for r in found] == [f"picture {i}" for i in range(5)]
        assert open_image(found[0].target).size == (32, 32)


def test_damaged_shards_lose_only_what_is_damaged(tmp_path):
    good = shard(tmp_path / "0.tar", 4)
    cut = tmp_path / "1.tar"
    cut.write_bytes((tmp_path / "0.tar").read_bytes()[:6000])
    (tmp_path / "2.tar").write_bytes(b"")
    (tmp_path / "3.tar").write_bytes(b"this is no tar" * 100)
    with tarfile.open(tmp_path / "5.tar", "w") as archive:
        add(archive, "x.txt", b"a caption without a picture")
        add(archive, "y.json", b"{ damaged")
        add(archive, "y.jpg", (tmp_path / "0.tar").read_bytes()[512:900])
    lost = []
    records = Shards([good, *(str(tmp_path / f"{i}.tar") for i in (1, 2, 3, 4, 5))], lambda where, why: lost.append((where, why)))
    found = {s: [r.text for r in records.read(s)] for s in records.shards}
    assert len(found[good]) == 4
    assert 1 <= len(found[str(cut)]) < 4
    assert [found[str(tmp_path / f"{i}.tar")] for i in (2, 3, 4)] == [[], [], []]
    assert found[str(tmp_path / "5.tar")] == [""]  # opened later, and lost then
    told = " ".join(where for where, _ in lost)
    assert all(f"{name}.tar" in told for name in (1, 3, 4)) and "5.tar/x" in told


def test_mini_repeats_itself():
    a, b = Mini(100), Mini(100)
    assert a[7].text == b[7].text and a[7].target.tobytes() == b[7].target.tobytes()
    assert a[4].subject == a[7].subject != a[8].subject
    assert Mini(100, held_out=True)[0].subject != a[0].subject
    with pytest.raises(IndexError):
        a[100]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("nothing", None, "no data at"),
        ("list.jsonl", '{"picture": "a.png"}', "no column for the picture"),
        ("list.jsonl", "", "holds no records"),
        ("list.jsonl", "[1, 2]", "expected an object"),
        ("list.jsonl", "{broken", "is not JSON"),
        ("list.csv", "caption\na cat", "received caption"),
        ("list.parquet", "no parquet", "not a readable Parquet"),
        ("words.docx", "x", "is no data that can be read"),
        ("{0..3}.tar", None, "no shards"),
    ],
)
def test_what_a_newcomer_gets_wrong_is_said_in_one_sentence(tmp_path, name, content, said):
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=said) as caught:
        open_data(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_an_empty_folder_says_what_is_expected(tmp_path):
    with pytest.raises(UserError, match="no pictures in"):
        open_data(tmp_path)
