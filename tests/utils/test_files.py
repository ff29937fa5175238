"""Files are written whole or not at all, and a manifest that differs is refused."""

import pytest

from imprompt.errors import UserError
from imprompt.utils.files import atomic_path, check_or_write_manifest, write_file


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    write_file(tmp_path / "a.txt", "old")
    with pytest.raises(RuntimeError, match="stopped"), atomic_path(tmp_path / "a.txt") as partial:
        partial.write_text("new")
        raise RuntimeError("stopped")
    assert (tmp_path / "a.txt").read_text() == "old" and list(tmp_path.iterdir()) == [tmp_path / "a.txt"]


def test_a_manifest_is_written_once_and_the_same_one_accepted(tmp_path):
    path = tmp_path / "folder" / "manifest.json"
    manifest = {"seed": 0, "sizes": (64, 64), "data": "ä"}
    check_or_write_manifest(path, manifest, "the run")
    content = path.read_text("utf-8")
    check_or_write_manifest(path, {"data": "ä", "sizes": [64, 64], "seed": 0}, "the run")
    assert path.read_text("utf-8") == content and "ä" in content


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        ({"seed": 1, "data": "a"}, "the run was begun with seed = 0, and now it is 1; start anew"),
        ({"seed": 0}, "the run was begun with data = 'a', and now it is None; start anew"),
        ({"seed": 0, "data": "a", "size": 64}, "the run was begun with size = None, and now it is 64; start anew"),
    ],
)
def test_another_manifest_is_refused(tmp_path, manifest, message):
    check_or_write_manifest(tmp_path / "manifest.json", {"seed": 0, "data": "a"}, "the run")
    with pytest.raises(UserError) as error:
        check_or_write_manifest(tmp_path / "manifest.json", manifest, "the run", "start anew")
    assert str(error.value) == message
