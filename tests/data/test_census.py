"""`imprompt data validate`: what is in the data is counted, what is wrong is named, and it is seen in pictures."""

import json
import random
import tarfile

import pytest
from PIL import Image

from imprompt.cli import main
from imprompt.data.readers import Folder
from imprompt.data.report import SAMPLES, Census, census, look
from imprompt.mini import world


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    for i, subject in zip(range(12), world.subjects(), strict=False):
        (folder / f"who{i % 3}").mkdir(parents=True, exist_ok=True)
        where = world.scene(i)
        world.draw(subject, where).resize((700, 600 if i else 400)).save(folder / f"who{i % 3}" / f"{i}.png")
        if i > 1:
            (folder / f"who{i % 3}" / f"{i}.txt").write_text(
                world.caption(subject, where, random.Random(i)) + (" very" * 70 if i == 2 else "")
            )
    with Image.open(folder / "who1" / "4.png") as picture:
        picture.save(folder / "who1" / "4-again.png", compress_level=1)
        picture.save(folder / "who1" / "4-again.jpg", quality=95)
    (folder / "broken.jpg").write_bytes((folder / "who1" / "4-again.jpg").read_bytes()[:3000])
    return folder


def counted(data, least=512):
    return census(str(data), least, 2, lambda done, total: None)


def test_everything_is_counted(photos):
    found = counted(photos)
    assert found.figures() == {
        "records": 14, "unreadable": 1, "too small": 1, "without caption": 4, "caption over 60 words": 1, "copies": 1, "look alike": 1,
        "with references": 0, "with mask": 0, "subjects": 3, "pictures of a subject": "4 … 6, median 4",
    }  # fmt: skip
    report = found.report()
    assert report["small records"] == ["who0/0.png: 700 × 400"] and set(report["unreadable records"]) == {"broken.jpg"}
    assert [set(pair) for pair in report["copied records"]] == [{"who1/4.png", "who1/4-again.png"}]
    assert report["shorter side"] == {"under 512": 1, "under 768": 13} and report["aspect"] == {"landscape": 14}


def test_through_the_door(photos, tmp_path, capsys):
    assert main(["data", "validate", str(photos), "--out", str(tmp_path / "report"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads((tmp_path / "report" / "report.json").read_text("utf-8"))
    page = (tmp_path / "report" / "index.html").read_text("utf-8")
    assert page.count("data:image/png") == 1 and "broken.jpg" in page and "://" not in page
    with Image.open(tmp_path / "report" / "samples.png") as sheet:
        assert sheet.width > 800


def test_captions_are_text_and_not_html(photos, tmp_path):
    (photos / "who1" / "4.txt").write_text("<script>alert(1)</script>")
    assert "<script>" not in counted(photos).write(tmp_path, "<b>x").read_text("utf-8")


def test_shards_with_what_is_damaged(photos, tmp_path):
    for number in range(2):
        with tarfile.open(tmp_path / f"{number}.tar", "w") as tar:
            tar.add(photos / "who1" / "4.png", f"{number}a.png")
            tar.add(photos / "broken.jpg", f"{number}b.jpg")
    found = counted(f"{tmp_path}/{{0..2}}.tar")
    assert (found.records, found.lost, found.copied) == (2, 3, 1)
    assert set(found.unreadable) == {"0.tar/0b", "1.tar/1b", f"{tmp_path}/2.tar"}


def test_nothing_usable_is_an_error(tmp_path, capsys):
    (tmp_path / "a.png").write_bytes(b"no")
    assert main(["data", "validate", str(tmp_path), "--out", str(tmp_path / "report")]) == 2
    assert "no record of" in (said := capsys.readouterr().err) and "a.png is not a picture" in said and said.count("\n") == 1


def test_samples_are_drawn_from_everything(photos):
    seen = look(lambda: Folder(photos)[3])
    found = Census()
    for i in range(500):
        found.take(seen._replace(text=str(i), print=bytes([i % 256, i // 256])), 0)
    numbers = [int(text) for _, text in found.samples]
    assert len(set(numbers)) == SAMPLES and max(numbers) > 350 and min(numbers) < 150
