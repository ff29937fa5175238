"""COCO captions: one record for each image, with its first caption."""

import json

import pytest
from PIL import Image

from imprompt.data.coco import CocoCaptions, is_coco, is_coco_content
from imprompt.data.records import MapRecords
from imprompt.errors import UserError
from imprompt.utils.images import open_image

NAMES = ["000000000139.jpg", "000000000285.jpg", "000000000632.jpg"]


def make_captions():
    """Unordered images and captions: two images with several captions and one without."""
    return {
        "info": {"year": 2017},
        "images": [{"id": int(name[:-4]), "file_name": name, "width": 40, "height": 30} for name in reversed(NAMES)],
        "annotations": [
            {"id": 9, "image_id": 139, "caption": "A later caption."},
            {"id": 3, "image_id": 285, "caption": "A bear,\n eating grass. \n"},
            {"id": 2, "image_id": 139, "caption": "Ein grünes Zimmer"},
            {"id": 10, "image_id": 139, "caption": "Another"},
            {"id": 8, "image_id": 285, "caption": "A bear"},
            {"id": 1, "image_id": 777, "caption": "of an image that is not listed"},
        ],
    }


def write_coco(root, split="val2017", *, with_images=True, folder=None):
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    file = root / "annotations" / f"captions_{split}.json"
    file.write_text(json.dumps(make_captions()), "utf-8")
    if with_images:
        folder = folder or root / split
        folder.mkdir(parents=True)
        for i, name in enumerate(NAMES):
            Image.new("RGB", (40 + i, 30)).save(folder / name)
    return file


@pytest.mark.parametrize("source", ["folder", "file", "relative file"])
def test_each_image_has_its_first_caption(tmp_path, source, monkeypatch):
    file = write_coco(tmp_path / "coco")
    write_coco(tmp_path / "coco", "train2017", with_images=False)  # its images were not downloaded
    monkeypatch.chdir(file.parent)
    records = CocoCaptions({"folder": tmp_path / "coco", "file": str(file), "relative file": file.name}[source])
    assert isinstance(records, MapRecords) and len(records) == 3 and records.names == NAMES
    first_three = [records[i] for i in range(3)]
    assert [r.key for r in first_three] == NAMES
    assert [r.caption for r in first_three] == ["Ein grünes Zimmer", "A bear,\n eating grass.", ""]
    assert [open_image(r.target).size for r in first_three] == [(40, 30), (41, 30), (42, 30)]
    assert first_three[0].references == () and first_three[0].subject is None
    with pytest.raises(IndexError):
        records[3]


@pytest.mark.parametrize("folder", ["images/val2017", "annotations/val2017"])
def test_other_image_folders(tmp_path, folder):
    file = write_coco(tmp_path, folder=tmp_path / folder)
    assert open_image(CocoCaptions(file)[1].target).size == open_image(CocoCaptions(tmp_path)[1].target).size == (41, 30)


def test_coco_is_detected(tmp_path):
    file = write_coco(tmp_path / "coco", with_images=False)
    assert is_coco(tmp_path / "coco") and is_coco_content(json.loads(file.read_text("utf-8")))
    (tmp_path / "list.jsonl").write_text("{}")
    assert not is_coco_content([]) and not is_coco_content({"a.png": "a caption"})
    for other in (file, tmp_path, tmp_path / "list.jsonl", tmp_path / "missing.json", tmp_path / "coco" / "annotations"):
        assert not is_coco(other)


def test_several_splits_are_listed(tmp_path):
    write_coco(tmp_path), write_coco(tmp_path, "train2017")
    with pytest.raises(UserError, match=r"several splits; name one: .*captions_train2017\.json, .*captions_val2017\.json") as caught:
        CocoCaptions(tmp_path)
    assert "\n" not in str(caught.value)
    assert len(CocoCaptions(tmp_path / "annotations" / "captions_val2017.json")) == 3


@pytest.mark.parametrize("by_file", [True, False])
def test_missing_images_are_explained(tmp_path, by_file):
    file = write_coco(tmp_path, with_images=False)
    with pytest.raises(UserError, match=r"no images.*expected them in .*val2017") as caught:
        CocoCaptions(file if by_file else tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
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
        ('{"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": [{"id": 1, "image_id": {}, "caption": "x"}]}', "no COCO captions"),
    ],
)
def test_a_file_without_captions_is_explained_in_one_sentence(tmp_path, content, message):
    file = write_coco(tmp_path)
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message) as caught:
        CocoCaptions(file)
    assert "\n" not in str(caught.value)


def test_missing_captions_are_explained(tmp_path):
    with pytest.raises(UserError, match="no data at"):
        CocoCaptions(tmp_path / "annotations" / "captions_val2017.json")
    with pytest.raises(UserError, match="no COCO captions in"):
        CocoCaptions(tmp_path)
