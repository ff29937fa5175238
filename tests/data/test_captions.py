"""Every image arrives with exactly its caption, or is reported: in folders, lists and shards, in every form that tools write."""

import csv
import io
import json
import os
import tarfile
import unicodedata

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from imprompt.data.captions import decode_text, find_caption, is_missing, read_caption
from imprompt.data.collection import match_caption_files
from imprompt.data.folders import ImageFolder, describe_skipped
from imprompt.data.loader import READ_ERRORS
from imprompt.data.readers import open_data
from imprompt.data.sampler import iterate_once
from imprompt.data.shards import WebDatasetShards
from imprompt.data.survey import describe_data
from imprompt.errors import UserError
from imprompt.utils.images import open_image


def encode_image(number: int) -> bytes:
    """A small image that can be recognized by its width."""
    file = io.BytesIO()
    Image.new("RGB", (number + 1, 3)).save(file, "PNG")
    return file.getvalue()


def write_tree(folder, files):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def write_tar(path, files, mode="w"):
    with tarfile.open(path, mode) as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def read_all(source):
    """The captions by the number of the image, and the number of records that were reported."""
    records, reported, captions = open_data(source), [], {}
    if isinstance(records, WebDatasetShards):
        records.on_unreadable = lambda key, reason: reported.append(key)
    for read in iterate_once(records):
        try:
            record = read()
            captions[open_image(record.target).width - 1] = record.caption
        except READ_ERRORS as error:
            reported.append(str(error))
    return captions, reported


TEXTS = st.text(st.characters(exclude_categories=("Cs", "Cc")), max_size=12).map(lambda text: f"a {text.strip()} b".strip())
CAPTIONS = st.one_of(st.none(), TEXTS)  # None: without a caption
ENCODINGS = st.sampled_from(["utf-8", "utf-8-sig", "utf-16"])
FORMS = st.sampled_from([".txt", ".TXT", ".caption", ".cap", ".json", ".png.txt", "captions/"])


def as_caption_file(stem, caption, form, encoding):
    """A caption in a file of its own, whose name and format are those of one of many tools."""
    if form == ".json":
        return {f"{stem}.json": json.dumps({"caption": [caption]}).encode(encoding)}
    name = f"captions/{stem}.txt" if form == "captions/" else stem + form
    return {name: caption.encode(encoding)}


@st.composite
def collections(draw):
    """Files of a folder or an archive, and the expected caption of each image: None where it has to be reported."""
    count, expected, files = draw(st.integers(1, 5)), {}, {}
    for number in range(count):
        caption, form = draw(CAPTIONS), draw(FORMS)
        stem = draw(st.sampled_from(["", "sub/", "v1.0 "])) + f"im{number}"
        files[f"{stem}.png"], expected[number] = encode_image(number), caption or ""
        if caption is not None and draw(st.booleans()):
            files |= as_caption_file(stem, caption, form, draw(ENCODINGS))
        elif caption is not None and draw(st.booleans()):
            files[f"{stem}.txt"], expected[number] = caption.encode() + b"\xff\xe9", None
        elif caption is not None:
            row = json.dumps({draw(st.sampled_from(["file_name", "image"])): f"{stem}.png", "text": caption})
            files["metadata.jsonl"] = files.get("metadata.jsonl", b"") + row.encode() + b"\n"
    names = draw(st.permutations(list(files)))
    return {name: files[name] for name in names}, expected


def check_captions(source, expected):
    captions, reported = read_all(source)
    assert len(captions) + len(reported) == len(expected)
    assert captions == {number: caption for number, caption in expected.items() if caption is not None}


FAST = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@FAST
@given(files=collections())
def test_each_image_of_a_folder_has_its_caption_or_is_reported(tmp_path_factory, files):
    content, expected = files
    check_captions(write_tree(tmp_path_factory.mktemp("folder"), content), expected)


@FAST
@given(files=collections(), mode=st.sampled_from(["w", "w:gz"]))
def test_each_image_of_a_shard_has_its_caption_or_is_reported(tmp_path_factory, files, mode):
    content, expected = files
    check_captions(write_tar(tmp_path_factory.mktemp("shard") / "0.tar", content, mode), expected)


def write_list(folder, suffix, rows, column, encoding):
    path = folder / f"list{suffix}"
    if suffix == ".parquet":
        pyarrow = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(
            pyarrow.table({"file_name": [n for n, _ in rows], column: pyarrow.array([c for _, c in rows], pyarrow.string())}), path
        )
    elif suffix in (".csv", ".tsv"):
        with path.open("w", encoding=encoding, newline="") as file:
            writer = csv.writer(file, delimiter="\t" if suffix == ".tsv" else ",")
            writer.writerows([["file_name", f" {column.title()}"], *rows])
    elif suffix == ".jsonl":
        path.write_text("\n".join(json.dumps({"file_name": n, column: c}) for n, c in rows), encoding)
    elif suffix == ".json":
        path.write_text(json.dumps([{"file_name": n, column: c} for n, c in rows]), encoding)
    else:  # kohya's metadata
        path.write_text(json.dumps({n: {column: c} for n, c in rows}), encoding)
    return path


@FAST
@given(
    captions=st.lists(st.one_of(CAPTIONS, TEXTS.map(lambda t: f'{t}, "two"\nlines')), min_size=1, max_size=5),
    suffix=st.sampled_from([".csv", ".tsv", ".jsonl", ".json", ".parquet", "_kohya.json"]),
    column=st.sampled_from(["text", "caption", "prompt"]),
    encoding=ENCODINGS,
)
def test_each_image_of_a_list_has_its_caption_or_is_reported(tmp_path_factory, captions, suffix, column, encoding):
    folder = write_tree(tmp_path_factory.mktemp("list"), {f"{n}.png": encode_image(n) for n in range(len(captions))})
    path = write_list(folder, suffix, [(f"{n}.png", caption) for n, caption in enumerate(captions)], column, encoding)
    check_captions(path, {n: caption or "" for n, caption in enumerate(captions)})


@pytest.mark.parametrize("value", [None, float("nan"), "", " \n", "nan", "None", "\ufeff", "\u200b", [], [None], {}, {"url": "x"}, [" "]])
def test_missing_values_are_no_caption(value):
    assert find_caption(value) == "" and read_caption({"text": value}) == ("", "")


@pytest.mark.parametrize(
    ("value", "caption"),
    [
        (["", "a cat"], "a cat"), ('["a cat", "b"]', "a cat"), ('["a cat"', '["a cat"'), ({"caption": ["a cat"]}, "a cat"), (7, "7"),
        (7.0, "7"), ("a\r\ncat \u200b", "a\ncat"), ("Nan", "Nan"), (b"\xef\xbb\xbfa cat", "a cat"),
    ],
)  # fmt: skip
def test_other_forms_of_a_caption(value, caption):
    assert find_caption(value) == caption


def test_of_several_columns_the_first_name_with_a_value_counts():
    row = {"tags": "x", "prompt": "masterpiece", "Caption ": "a cat", "text": float("nan")}
    assert read_caption(row) == ("a cat", "column Caption ")
    assert is_missing({"bytes": None, "path": None}) and not is_missing({"bytes": b"x", "path": None})


def test_text_that_is_not_utf_8_is_reported_instead_of_guessed():
    assert decode_text("a cat".encode("utf-16-le"), "x") == decode_text("a cat".encode("utf-16-be"), "x") == "a cat"
    for data in ("café".encode("cp1252"), "猫の絵".encode("shift_jis"), b"a\0b c d e", b"\xff\xfea"):
        with pytest.raises(UserError, match="not text in UTF-8"):
            decode_text(data, "x.txt")


def test_labels_of_a_detector_are_no_captions(tmp_path):
    labels = b"0 0.5 0.5 0.2 0.1\n15 0.5 0.5 .2 1e-2\n"
    files = {"a.png": encode_image(0), "a.txt": labels, "b.png": encode_image(1), "b.txt": b"1 2 3"}
    captions, reported = read_all(write_tree(tmp_path, files))
    assert captions == {1: "1 2 3"} and "a.txt holds numbers" in reported[0]


def test_names_match_in_any_case_and_unicode_form():
    composed, decomposed = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    files = match_caption_files(
        [f"{decomposed}.png", "A.png", "a.png", "B.JPG"], [f"{composed}.txt", "A.txt", "a.TXT", "b.txt", "B.jpg.txt"]
    )
    assert files == {f"{decomposed}.png": [f"{composed}.txt"], "A.png": ["A.txt"], "a.png": ["a.TXT"], "B.JPG": ["B.jpg.txt", "b.txt"]}


def test_a_caption_of_another_folder_belongs_to_no_image():
    assert match_caption_files(["cat/1.png"], ["dog/1.txt", "1.txt"]) == {}


def test_columns_of_a_list_next_to_images_are_used(tmp_path):
    files = {f"{n}.png": encode_image(n) for n in range(4)} | {
        "metadata.csv": b"file_name,text,subject,mask,references\n0.png,a cat,Tom,2.png,1.png|3.png\n1.png,,NaN,,\n9.png,x,y,,\n",
    }
    records = open_data(write_tree(tmp_path, files))
    assert records.names == ["0.png", "1.png"]  # the others are a mask and a reference
    assert (records[0].caption, records[0].subject, records[1].caption, records[1].subject) == ("a cat", "Tom", "", None)
    assert open_image(records[0].mask).width == 3 and [open_image(r).width for r in records[0].references] == [2, 4]
    assert describe_data(records) == (
        "1 of 2 records have a caption (1 metadata.csv); not used: 2 masks and references of others, "
        "1 rows of metadata.csv without an image here"
    )


def test_metadata_with_paths_of_another_computer(tmp_path):
    rows = {f"/workspace/train/{n}.png": {"caption": f"number {n}"} for n in range(2)} | {"/workspace/val/0.png": {"caption": "wrong"}}
    folder = write_tree(tmp_path, {f"train/{n}.png": encode_image(n) for n in range(2)} | {"meta_cap.json": json.dumps(rows).encode()})
    assert read_all(folder) == ({0: "number 0", 1: "number 1"}, [])


def test_a_hub_folder_with_parquet_files(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    (tmp_path / "data").mkdir()
    for part in range(2):
        images = [{"bytes": encode_image(2 * part + n), "path": f"{n}.png"} for n in range(2)]
        table = pyarrow.table({"image": images, "text": [f"number {2 * part + n}" for n in range(2)]})
        parquet.write_table(table, tmp_path / "data" / f"train-{part:05}-of-00002.parquet", row_group_size=1)
    (tmp_path / "README.md").write_text("a card")
    assert read_all(tmp_path) == ({n: f"number {n}" for n in range(4)}, [])
    (tmp_path / "data" / "train-00000-of-00002.parquet").rename(tmp_path / "data" / "test-00000-of-00001.parquet")
    with pytest.raises(UserError, match="several splits; name one") as caught:
        open_data(tmp_path)
    pattern = next(part for part in str(caught.value).split() if "train" in part and part.endswith(".parquet"))
    assert read_all(pattern) == ({n: f"number {n}" for n in (2, 3)}, [])


def test_what_is_not_read_is_counted_by_kind(tmp_path):
    folder = write_tree(
        tmp_path / "images", {"a.png": encode_image(0), "b.psd": b"", "c.psd": b"", "d.mp4": b"", "e.txt": b"x", ".f.png": b""}
    )
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "g.png").write_bytes(encode_image(1))
    (folder / "link").symlink_to(tmp_path / "other")
    (folder / "loop").symlink_to(folder)
    (folder / "gone.png").symlink_to(folder / "missing.png")
    records = open_data(folder)
    assert records.names == ["a.png", "link/g.png"] and isinstance(records, ImageFolder)
    skipped = describe_skipped(records.skipped, 9)
    for part in ("2 .psd", "1 .mp4", "(e.txt …)", "1 hidden images", "1 links to a folder that", "1 links to nothing"):
        assert part in skipped


@pytest.mark.skipif(os.geteuid() == 0, reason="root may enter every folder")
def test_a_subfolder_that_may_not_be_entered_is_reported(tmp_path):
    folder = write_tree(tmp_path, {"a.png": encode_image(0), "private/b.png": encode_image(1)})
    (folder / "private").chmod(0)
    try:
        assert "subfolder private (Permission denied)" in describe_data(open_data(folder))
    finally:
        (folder / "private").chmod(0o700)


def test_an_archive_next_to_images_is_a_question(tmp_path):
    write_tar(write_tree(tmp_path, {"a.png": encode_image(0)}) / "0.tar", {"b.png": encode_image(1)})
    with pytest.raises(UserError, match=r"1 images and 1 archives \(0\.tar …\); name one"):
        open_data(tmp_path)
    assert read_all(tmp_path / "0.tar") == ({1: ""}, [])


def test_one_line_says_how_many_records_have_a_caption(tmp_path):
    files = {f"{n}.png": encode_image(n) for n in range(4)}
    files |= {"0.txt": b"a", "1.txt": b"\xff\xe9\x00", "2.txt": b" ", "3.caption": b"d"}
    assert describe_data(open_data(write_tree(tmp_path / "a", files))) == (
        "2 of 3 records have a caption (1 .txt, 1 .caption); of 1 more it cannot be read"
    )
    tar = write_tar(tmp_path / "0.tar", {"0.png": encode_image(0), "0.json": b'{"caption": "x"}', "1.png": encode_image(1)})
    assert describe_data(open_data(tar)) == "1 of 2 first records of the shards have a caption (1 .json)"
