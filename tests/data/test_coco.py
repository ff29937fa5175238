"""COCO as it is unpacked: one record for each picture, with its first caption."""

import json

import pytest
from PIL import Image

from imprompt.data.coco import Coco, is_coco
from imprompt.data.records import Counted
from imprompt.errors import UserError
from imprompt.utils.images import open_image

NAMES = ["000000000139.jpg", "000000000285.jpg", "000000000632.jpg"]


def captions():
    """Captions out of order, two pictures with several and one with none; images out of order too."""
    return {
        "info": {"year": 2017},
        "images": [{"id": int(name[:-4]), "file_name": name, "width": 40, "height": 30} for name in reversed(NAMES)],
        "annotations": [
            {"id": 9, "image_id": 139, "caption": "A later caption."},
            {"id": 3, "image_id": 285, "caption": "A bear,\n eating grass. \n"},
            {"id": 2, "image_id": 139, "caption": "Ein grünes Zimmer"},
            {"id": 10, "image_id": 139, "caption": "Another"},
            {"id": 8, "image_id": 285, "caption": "A bear"},
            {"id": 1, "image_id": 777, "caption": "of a picture that is not listed"},
        ],
    }


def unpack(root, split="val2017", pictures=True, folder=None):
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    file = root / "annotations" / f"captions_{split}.json"
    file.write_text(json.dumps(captions()), "utf-8")
    if pictures:
        folder = folder or root / split
        folder.mkdir(parents=True)
        for i, name in enumerate(NAMES):
            Image.new("RGB", (40 + i, 30)).save(folder / name)
    return file


@pytest.mark.parametrize("by", ["folder", "file", "relative file"])
def test_each_picture_has_its_first_caption(tmp_path, by, monkeypatch):
    file = unpack(tmp_path / "coco")
    unpack(tmp_path / "coco", "train2017", pictures=False)  # its pictures were not downloaded
    monkeypatch.chdir(file.parent)
    records = Coco({"folder": tmp_path / "coco", "file": str(file), "relative file": file.name}[by])
    assert isinstance(records, Counted) and len(records) == 3 and records.names == NAMES
    found = [records[i] for i in range(3)]
    assert [r.key for r in found] == NAMES
    assert [r.text for r in found] == ["Ein grünes Zimmer", "A bear,\n eating grass.", ""]
    assert [open_image(r.target).size for r in found] == [(40, 30), (41, 30), (42, 30)]
    assert found[0].references == () and found[0].subject is None
    with pytest.raises(IndexError):
        records[3]


@pytest.mark.parametrize("place", ["images/val2017", "annotations/val2017"])
def test_other_places_for_the_pictures(tmp_path, place):
    file = unpack(tmp_path, folder=tmp_path / place)
    assert open_image(Coco(file)[1].target).size == open_image(Coco(tmp_path)[1].target).size == (41, 30)


def test_what_looks_like_coco(tmp_path):
    file = unpack(tmp_path / "coco", pictures=False)
    assert is_coco(file) and is_coco(tmp_path / "coco")
    (tmp_path / "list.jsonl").write_text("{}")
    for other in (tmp_path, tmp_path / "list.jsonl", tmp_path / "missing.json", tmp_path / "coco" / "annotations"):
        assert not is_coco(other)


def test_several_splits_are_named(tmp_path):
    unpack(tmp_path), unpack(tmp_path, "train2017")
    with pytest.raises(UserError, match=r"several splits; name one: .*captions_train2017\.json, .*captions_val2017\.json") as caught:
        Coco(tmp_path)
    assert "\n" not in str(caught.value)
    assert len(Coco(tmp_path / "annotations" / "captions_val2017.json")) == 3


@pytest.mark.parametrize("by_file", [True, False])
def test_missing_pictures_say_where_they_belong(tmp_path, by_file):
    file = unpack(tmp_path, pictures=False)
    with pytest.raises(UserError, match=r"no pictures.*expected them in .*val2017") as caught:
        Coco(file if by_file else tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "cannot be read as JSON"),
        ('{"images": [', "cannot be read as JSON"),
        (b"\xff\xfe\x00", "cannot be read as JSON"),
        ("[" * 100_000, "cannot be read as JSON"),
        ("[1, 2]", "holds no COCO captions"),
        ("7", "holds no COCO captions"),
        ('{"images": [{"id": 1, "file_name": "a.jpg"}]}', "holds no COCO captions"),
        (
            '{"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": [{"id": 1, "image_id": 1, "bbox": []}]}',
            "not instances_….json",
        ),
        ('{"images": [{"id": [], "file_name": "a.jpg"}], "annotations": []}', "holds no COCO captions"),
        ('{"images": [], "annotations": []}', "holds no images"),
    ],
)
def test_what_is_no_coco_is_said_in_one_sentence(tmp_path, content, said):
    file = unpack(tmp_path)
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=said) as caught:
        Coco(file)
    assert "\n" not in str(caught.value)


def test_nothing_there(tmp_path):
    with pytest.raises(UserError, match="no data at"):
        Coco(tmp_path / "annotations" / "captions_val2017.json")
    with pytest.raises(UserError, match="no COCO captions in"):
        Coco(tmp_path)
