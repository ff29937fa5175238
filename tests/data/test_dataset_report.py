"""`imprompt data validate`: everything is counted, problems are listed, samples are shown."""

import json
import random
import tarfile

import pytest
from PIL import Image

from imprompt.cli import main
from imprompt.data.readers import ImageFolder
from imprompt.data.report import NUM_SAMPLES, DatasetReport, analyze_dataset, inspect_record
from imprompt.mini import world


@pytest.fixture
def image_folder(tmp_path):
    """Twelve images of three subjects, two without a caption, an exact and a near duplicate, and a truncated file."""
    folder = tmp_path / "images"
    for i, subject in zip(range(12), world.iterate_subjects(), strict=False):
        (folder / f"who{i % 3}").mkdir(parents=True, exist_ok=True)
        scene = world.make_scene(i)
        world.render(subject, scene).resize((700, 600 if i else 400)).save(folder / f"who{i % 3}" / f"{i}.png")
        if i > 1:
            caption = world.sample_caption(subject, scene, random.Random(i)) + (" very" * 70 if i == 2 else "")
            (folder / f"who{i % 3}" / f"{i}.txt").write_text(caption)
    with Image.open(folder / "who1" / "4.png") as image:
        image.save(folder / "who1" / "4-again.png", compress_level=1)
        image.save(folder / "who1" / "4-again.jpg", quality=95)
    (folder / "broken.jpg").write_bytes((folder / "who1" / "4-again.jpg").read_bytes()[:3000])
    return folder


def analyze(data, min_image_size=512):
    return analyze_dataset(str(data), min_image_size, 2, lambda done, total: None)


def test_everything_is_counted(image_folder):
    report = analyze(image_folder)
    assert report.summary() == {
        "records": 14, "unreadable": 1, "too small": 1, "with caption": 10, "without caption": 4,
        "captions from": "10 .txt", "caption over 60 words": 1, "exact duplicates": 1,
        "near duplicates": 1, "with references": 0, "with mask": 0, "subjects": 3, "images per subject": "4 … 6, median 4",
        "not used": "–",
    }  # fmt: skip
    details = report.to_dict()
    assert details["too small records"] == ["who0/0.png: 700 × 400"] and set(details["unreadable records"]) == {"broken.jpg"}
    assert [set(pair) for pair in details["duplicate records"]] == [{"who1/4.png", "who1/4-again.png"}]
    assert details["shorter side"] == {"under 512": 1, "under 768": 13} and details["aspect ratio"] == {"landscape": 14}


def test_the_command_writes_the_report(image_folder, tmp_path, capsys):
    assert main(["data", "validate", str(image_folder), "--output-dir", str(tmp_path / "report"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads((tmp_path / "report" / "report.json").read_text("utf-8"))
    page = (tmp_path / "report" / "index.html").read_text("utf-8")
    assert page.count("data:image/png") == 1 and "broken.jpg" in page and "://" not in page
    with Image.open(tmp_path / "report" / "samples.png") as sheet:
        assert sheet.width > 800


def test_captions_are_escaped_in_html(image_folder, tmp_path):
    (image_folder / "who1" / "4.txt").write_text("<script>alert(1)</script>")
    assert "<script>" not in analyze(image_folder).write(tmp_path, "<b>x").read_text("utf-8")


def test_damaged_shards_and_samples_are_counted(image_folder, tmp_path):
    for number in range(2):
        with tarfile.open(tmp_path / f"{number}.tar", "w") as tar:
            tar.add(image_folder / "who1" / "4.png", f"{number}a.png")
            tar.add(image_folder / "broken.jpg", f"{number}b.jpg")
    report = analyze(f"{tmp_path}/{{0..2}}.tar")
    assert (report.records, report.num_unreadable, report.num_exact_duplicates) == (2, 3, 1)
    assert set(report.unreadable) == {"0.tar/0b", "1.tar/1b", f"{tmp_path}/2.tar"}


def test_a_dataset_without_a_readable_record_is_an_error(tmp_path, capsys):
    (tmp_path / "a.png").write_bytes(b"no")
    assert main(["data", "validate", str(tmp_path), "--output-dir", str(tmp_path / "report")]) == 2
    message = capsys.readouterr().err
    assert "no record of" in message and "a.png is not an image" in message and message.count("\n") == 1


def test_samples_are_taken_from_the_whole_dataset(image_folder):
    stats = inspect_record(lambda: ImageFolder(image_folder)[3])
    report = DatasetReport()
    for i in range(500):
        report.update(stats._replace(caption=str(i), content_hash=bytes([i % 256, i // 256])), 0)
    numbers = [int(caption) for _, caption in report.samples]
    assert len(set(numbers)) == NUM_SAMPLES and max(numbers) > 350 and min(numbers) < 150
