"""Leave-one-out by subject: minimum numbers of images, a split by person, a folder like LFW's with unusual files."""

import pytest
from PIL import Image

from imprompt.data.readers import open_data
from imprompt.data.subjects import SubjectDataset, split_subjects
from imprompt.errors import UserError


@pytest.fixture
def people(tmp_path):
    """Name/Name_0001.jpg: one subject with a single image, spaces, letters beyond ASCII, a damaged file, one without a subject."""
    for name, count in (("Ana_Guevara", 4), ("Zoë Ünal", 3), ("Only One", 1), ("李娜", 3)):
        (tmp_path / name).mkdir()
        for n in range(count):
            Image.new("RGB", (20, 20), (n, 0, 0)).save(tmp_path / name / f"{name}_{n + 1:04}.jpg")
    (tmp_path / "李娜" / "李娜_0002.jpg").write_bytes(b"no image")
    Image.new("RGB", (20, 20)).save(tmp_path / "stray.jpg")
    return tmp_path


def test_the_references_of_an_image_are_the_others_of_its_subject(people):
    dataset = SubjectDataset(open_data(str(people)), min_images=3)
    assert {name: len(indices) for name, indices in dataset.subjects.items()} == {"Ana_Guevara": 4, "Zoë Ünal": 3, "李娜": 3}
    assert len(dataset) == len(dataset.names) == 10
    for i in range(len(dataset)):
        record = dataset[i]
        assert len(record.references) == (3 if record.subject == "Ana_Guevara" else 2)
        assert record.target not in record.references
        assert {path.parent for path in record.references} == {record.target.parent}


def test_subjects_can_be_selected(people):
    assert list(SubjectDataset(open_data(str(people)), 2, {"Zoë Ünal", "Only One"}).subjects) == ["Zoë Ünal"]


def test_the_split_is_by_subject_and_reproducible():
    names = [f"person {i}" for i in range(99)]
    train, test = split_subjects(names)
    assert (len(train), len(test)) == (66, 33) and not set(train) & set(test) and set(train) | set(test) == set(names)
    assert split_subjects(list(reversed(names))) == (train, test) and split_subjects(names, seed=1) != (train, test)
    assert [len(part) for part in split_subjects(["a", "b"])] == [1, 1]


def test_too_few_images_or_subjects_are_an_error(people):
    with pytest.raises(UserError, match="no subject has 9 images: the data has 4 subjects, the largest with 4"):
        SubjectDataset(open_data(str(people)), 9)
    with pytest.raises(UserError, match="at least 2 images per subject"):
        SubjectDataset(open_data(str(people)), 1)
    with pytest.raises(UserError, match="at least 2 subjects"):
        split_subjects(["alone"])
