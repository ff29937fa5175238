"""Subjects: leave one out, at least so many pictures, people split and not photographs; a tree as LFW has it, odd cases too."""

import pytest
from PIL import Image

from imprompt.data.readers import open_data
from imprompt.data.subjects import Identities, split
from imprompt.errors import UserError


@pytest.fixture
def tree(tmp_path):
    """Name/Name_0001.jpg, with one picture only, spaces, letters beyond ASCII, a damaged file and a stray one."""
    for name, count in (("Ana_Guevara", 4), ("Zoë Ünal", 3), ("Only One", 1), ("李娜", 3)):
        (tmp_path / name).mkdir()
        for n in range(count):
            Image.new("RGB", (20, 20), (n, 0, 0)).save(tmp_path / name / f"{name}_{n + 1:04}.jpg")
    (tmp_path / "李娜" / "李娜_0002.jpg").write_bytes(b"no picture")
    Image.new("RGB", (20, 20)).save(tmp_path / "stray.jpg")
    return tmp_path


def test_every_picture_is_drawn_after_the_others(tree):
    found = Identities(open_data(str(tree)), least=3)
    assert {name: len(places) for name, places in found.subjects.items()} == {"Ana_Guevara": 4, "Zoë Ünal": 3, "李娜": 3}
    assert len(found) == len(found.names) == 10
    for i in range(len(found)):
        record = found[i]
        assert len(record.references) == (3 if record.subject == "Ana_Guevara" else 2)
        assert record.target not in record.references
        assert {p.parent for p in record.references} == {record.target.parent}


def test_subjects_can_be_chosen(tree):
    assert list(Identities(open_data(str(tree)), 2, {"Zoë Ünal", "Only One"}).subjects) == ["Zoë Ünal"]


def test_the_split_is_of_people_and_the_same_every_time():
    people = [f"person {i}" for i in range(99)]
    train, test = split(people)
    assert (len(train), len(test)) == (66, 33) and not set(train) & set(test) and set(train) | set(test) == set(people)
    assert split(list(reversed(people))) == (train, test) and split(people, seed=1) != (train, test)
    assert [len(part) for part in split(["a", "b"])] == [1, 1]


def test_too_few_pictures_or_people_are_said(tree):
    with pytest.raises(UserError, match="no subject has 9 pictures: the data name 4, the richest with 4"):
        Identities(open_data(str(tree)), 9)
    with pytest.raises(UserError, match="at least 2 pictures of a subject"):
        Identities(open_data(str(tree)), 1)
    with pytest.raises(UserError, match="at least 2 subjects"):
        split(["alone"])
