"""Files are written whole or not at all, and a manifest that differs is refused."""

import errno
import os
import subprocess
import sys
from threading import Thread

import pytest
import torch

from imprompt.errors import UserError
from imprompt.models.tensor_files import write_tensors
from imprompt.utils import files
from imprompt.utils.files import FolderLock, atomic_path, check_or_write_manifest, write_file, write_new_file


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


def test_long_values_of_a_manifest_are_shortened(tmp_path):
    check_or_write_manifest(tmp_path / "manifest.json", {"names": ["a"] * 1000}, "the run")
    with pytest.raises(UserError) as error:
        check_or_write_manifest(tmp_path / "manifest.json", {"names": []}, "the run")
    assert len(str(error.value)) < 400 and "names = ['a', 'a'" in str(error.value) and "and now it is []" in str(error.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000, b"9" * 5000])
def test_a_damaged_manifest_is_one_sentence(tmp_path, content):
    path = tmp_path / "manifest.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"manifest.json is damaged \(.+\); delete it"):
        check_or_write_manifest(path, {"a": 1}, "the run")
    assert path.read_bytes() == content


def test_a_link_is_replaced_and_not_followed(tmp_path):
    (tmp_path / "victim").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "victim")
    write_file(tmp_path / "link", "new")
    assert (tmp_path / "victim").read_text() == "old" and (tmp_path / "link").read_text() == "new"


def test_what_a_killed_process_left_is_removed_and_what_a_running_one_writes_is_not(tmp_path):
    kill = "import os, sys; from imprompt.utils.files import atomic_path; context = atomic_path(sys.argv[1]); "
    kill += "context.__enter__().write_text('half'); os.kill(os.getpid(), 9)"
    subprocess.run([sys.executable, "-c", kill, tmp_path / "a"], check=False)
    assert len(list(tmp_path.iterdir())) == 1
    with atomic_path(tmp_path / "b") as partial:
        partial.write_text("b")
        files.remove_stale_folders(tmp_path)
        assert list(tmp_path.iterdir()) == [partial.parent]
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


@pytest.mark.parametrize("has_links", [True, False])
def test_new_files_replace_none_and_are_never_partial_even_from_many_threads(tmp_path, monkeypatch, has_links):
    def no_links(source, target):
        raise OSError(errno.EPERM, "no links")

    if not has_links:
        monkeypatch.setattr(os, "link", no_links)
    written = []
    threads = [
        Thread(target=lambda n=n: written.append((write_new_file(tmp_path / "a.png", lambda path: path.write_text(str(n))), n)))
        for n in range(20)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted({"a.png"} | {f"a-{n}.png" for n in range(2, 21)})
    assert all(path.read_text() == str(n) for path, n in written) and len(written) == 20


def test_a_full_disk_is_one_sentence(tmp_path):
    def write(path):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(UserError, match=r"cannot write .*a.png \(No space left on device\); free some space"):
        write_new_file(tmp_path / "a.png", write)
    assert not list(tmp_path.iterdir())


def test_a_folder_is_locked_until_it_is_released_or_its_process_ends(tmp_path):
    lock = FolderLock(tmp_path, "training")
    with pytest.raises(UserError, match="another training is running in"):
        FolderLock(tmp_path, "training")
    lock.release()
    code = "import os, pathlib, sys; from imprompt.utils.files import FolderLock; lock = FolderLock(pathlib.Path(sys.argv[1]), 'x'); "
    subprocess.run([sys.executable, "-c", code + "os.kill(os.getpid(), 9)", tmp_path], check=False)
    FolderLock(tmp_path, "training").release()


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077, 0o002])
def test_files_have_the_permissions_of_new_files(umask, tmp_path):
    """safetensors writes for the owner alone; a group that shares a folder could not read its adapters."""
    before = os.umask(umask)
    try:
        write_file(tmp_path / "a.txt", "a")
        write_new_file(tmp_path / "b.txt", lambda path: path.write_text("b"))
        for suffix in (".safetensors", ".bin"):
            write_tensors({"image_proj.x": torch.ones(2)}, tmp_path / f"c{suffix}")
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o666 & ~umask}
    assert len(list(tmp_path.iterdir())) == 4
