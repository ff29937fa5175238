"""Shards in any order and of any make; hostile ones cost no memory and run nothing."""

import io
import json
import resource
import tarfile

import pytest
from PIL import Image

from imprompt.data.readers import open_data
from imprompt.data.shards import WebDatasetShards, is_shard
from imprompt.errors import UserError, redact_secrets, summarize_error
from imprompt.utils.compat import MAX_TAR_HEADER_BYTES


def encode_image(color="red") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), color).save(file, "PNG")
    return file.getvalue()


IMAGE = encode_image()


def write_tar(path, members, mode="w"):
    with tarfile.open(path, mode) as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def read_shard(path):
    """Captions by key, reasons by key, and what is not used."""
    problems: dict[str, str] = {}
    records = WebDatasetShards([str(path)], problems.__setitem__)
    return {record.key: record.caption for record in records.read_shard(str(path))}, problems, +records.skipped


@pytest.mark.parametrize(
    "members",
    [
        [("0.png", IMAGE), ("1.png", IMAGE), ("0.txt", b"one"), ("1.txt", b"two")],
        [("0.txt", b"one"), ("1.txt", b"two"), ("0.png", IMAGE), ("1.png", IMAGE)],
        [("images/0.png", IMAGE), ("images/1.png", IMAGE), ("captions/0.txt", b"one"), ("captions/1.txt", b"two")],
        [("./v1.0 a.png", IMAGE), ("./v1.0 b.png", IMAGE), ("./v1.0 a.CAPTION", b"one"), ("./v1.0 b.cap", b"two")],
        [("0.png", IMAGE), ("1.png", IMAGE), ("0.json", b'["one"]'), ("1.json", b'"two"')],
        [("0.png", IMAGE), ("1.png", IMAGE), ("metadata.csv", b"file_name,text\n0.png,one\n1.png,two\n")],
        [("0.jpg", IMAGE), ("0.depth.png", b""), ("0.txt", b"one"), ("1.png", IMAGE), ("1.png.txt", b"two"), ("._1.png", b"")],
    ],
)
@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_captions_of_shards_in_any_order(tmp_path, members, mode):
    captions, problems, _ = read_shard(write_tar(tmp_path / "0.tar", members, mode))
    assert sorted(captions.values()) == ["one", "two"] and not problems


def test_json_of_other_tools_is_no_traceback(tmp_path):
    contents = [b"null", b"{}", b'{"caption": NaN, "subject": NaN}', b"[" * 3000, b"{ damaged", b'{"caption": ["a", "b"], "subject": 7.0}']
    members = [(f"{n}{suffix}", data) for n, c in enumerate(contents) for suffix, data in ((".png", IMAGE), (".json", c))]
    captions, problems, _ = read_shard(write_tar(tmp_path / "0.tar", members))
    assert captions == {"0.tar/0": "", "0.tar/1": "", "0.tar/2": "", "0.tar/5": "a"}
    assert set(problems) == {"0.tar/3", "0.tar/4"} and all("is not JSON" in reason for reason in problems.values())


def test_links_duplicates_and_orphans_are_reported(tmp_path):
    path = write_tar(tmp_path / "0.tar", [("0.png", IMAGE), ("0.png", IMAGE), ("9.txt", b"x"), ("a.npz", b""), ("../../x.png", IMAGE)])
    with tarfile.open(path, "a") as archive:
        link = tarfile.TarInfo("l.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    captions, problems, skipped = read_shard(path)
    assert set(captions) == {"0.tar/0", "0.tar/../../x"} and skipped == {".npz": 1}
    assert set(problems) == {"0.tar/0.png", "0.tar/l.png", "0.tar/9.txt"}


def test_an_image_whose_caption_is_cut_off_is_reported(tmp_path):
    path = write_tar(tmp_path / "0.tar", [("0.png", IMAGE), ("0.txt", b"one"), ("1.png", IMAGE), ("1.txt", b"two")])
    path.write_bytes(path.read_bytes()[: 512 * 7])  # header and content of each: 1.txt is cut off
    captions, problems, _ = read_shard(path)
    assert captions == {"0.tar/0": "one"} and "0.tar/1" in problems


def memory_in_use():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # MiB, at its peak


def test_bombs_are_reported_before_they_are_decoded(tmp_path):
    class Zeros(io.RawIOBase):
        def read(self, size=-1):
            return b"\0" * size

    before = memory_in_use()
    with tarfile.open(tmp_path / "0.tar.gz", "w:gz", compresslevel=1) as archive:
        info = tarfile.TarInfo("bomb.png")
        info.size = 300 * 2**20
        archive.addfile(info, Zeros())
        info = tarfile.TarInfo("0.png")
        info.size = len(IMAGE)
        archive.addfile(info, io.BytesIO(IMAGE))
    sparse = tarfile.TarInfo("sparse.png")
    sparse.size, sparse.pax_headers = 0, {"GNU.sparse.major": "0", "GNU.sparse.map": "0,0", "GNU.sparse.size": str(5 * 10**9)}
    with tarfile.open(tmp_path / "1.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        archive.addfile(sparse)
    for name in ("0.tar.gz", "1.tar"):
        _, problems, _ = read_shard(tmp_path / name)
        assert any("MiB; expected at most 256" in reason for reason in problems.values()), problems
    assert memory_in_use() - before < 100


def test_a_header_that_fills_the_memory_is_refused(tmp_path):
    with tarfile.open(tmp_path / "0.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        info = tarfile.TarInfo("0.png")
        info.pax_headers = {"comment": "x" * (MAX_TAR_HEADER_BYTES + 1)}
        archive.addfile(info)
    assert "a header of" in read_shard(tmp_path / "0.tar")[1][str(tmp_path / "0.tar")]


def test_what_is_a_shard():
    assert all(map(is_shard, ["a.tar", "x/{0..9}.TAR", "a.tar.gz", "a.tgz", "https://x.org/a.tar?download=true"]))
    assert not any(map(is_shard, ["my.targets.jsonl", "a.tar.jsonl", "tar", "https://x.org/a.zip?x=.tar"]))


def test_commands_run_only_where_they_are_allowed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_tar(tmp_path / "x.tar", [("0.png", IMAGE)])
    with pytest.raises(UserError, match="IMPROMPT_ALLOW_PIPE=1"):
        open_data("pipe:touch PWNED #.tar")
    folder = tmp_path / "pipe:touch PWNED;#"
    folder.mkdir()
    write_tar(folder / "a.tar", [("0.png", IMAGE)])
    records = open_data("pipe:touch PWNED;#")  # a folder of this name
    assert len(list(records.read_shard(records.shards[0]))) == 1 and not (tmp_path / "PWNED").exists()
    monkeypatch.setenv("IMPROMPT_ALLOW_PIPE", "1")
    records = open_data("pipe:cat x.tar")
    assert len(list(records.read_shard(records.shards[0]))) == 1
    for command in ("pipe:cat x.tar; exit 3", "pipe:exit 3"):  # webdataset drops the last block where it already knows the status
        problems = []
        records = WebDatasetShards([command], lambda key, reason, problems=problems: problems.append(reason))
        assert len(list(records.read_shard(command))) <= 1 and "exit 3" in problems[0]


@pytest.mark.parametrize(
    ("text", "secret"),
    [
        ("curl -H Authorization:Bearer hf_abcdefghij https://x", "hf_abcdefghij"), ("https://user:secret@x.org/a.tar", "secret"),
        ("https://x.org/a.tar?X-Amz-Signature=secret", "secret"), ("token=secret&x", "secret"), ("Bearer secret'", "secret"),
    ],
)  # fmt: skip
def test_secrets_are_in_no_message(text, secret):
    assert secret not in redact_secrets(text) and secret not in summarize_error(ValueError(text))
    assert redact_secrets("a photo of x/y.tar, token 5") == "a photo of x/y.tar, token 5"


def test_a_shard_of_the_hub_that_is_refused_does_not_show_the_token(monkeypatch, tmp_path, capsys):
    from huggingface_hub import HfFileSystem

    from imprompt.cli import main

    def refuse(self, url, *args, **options):
        raise OSError(f"401 for {url} with Authorization:Bearer hf_secretsecret")

    monkeypatch.setattr(HfFileSystem, "open", refuse)
    monkeypatch.setenv("HF_TOKEN", "hf_secretsecret")
    assert main(["data", "validate", "hf://datasets/x/y/a.tar", "--output-dir", str(tmp_path)]) == 2
    message = capsys.readouterr().err
    assert "cannot be read from the hub" in message and message.count("\n") == 1
    for text in (message, *(path.read_text("utf-8") for path in tmp_path.glob("*.*") if path.suffix in (".json", ".html"))):
        assert "secretsecret" not in text


def test_subjects_and_captions_of_img2dataset(tmp_path):
    metadata = json.dumps({"caption": "from json", "subject": "Tom", "url": "x"}).encode()
    path = write_tar(tmp_path / "0.tar", [("0.jpg", IMAGE), ("0.txt", b"from txt"), ("0.json", metadata)])
    record = next(iter(WebDatasetShards([str(path)]).read_shard(str(path))))
    assert (record.caption, record.caption_source, record.subject) == ("from txt", ".txt", "Tom")


def test_a_header_with_a_length_that_is_no_length_is_reported(tmp_path):
    write_tar(tmp_path / "0.tar", [("0.png", IMAGE)])
    with tarfile.open(tmp_path / "1.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        info = tarfile.TarInfo("1.png")
        info.size, info.pax_headers = len(IMAGE), {"comment": "x" * 40}
        archive.addfile(info, io.BytesIO(IMAGE))
    content = bytearray((tmp_path / "1.tar").read_bytes())
    start = content.index(b"52 comment=")
    content[start : start + 30] = b"9" * 20 + b" comment=x"
    (tmp_path / "1.tar").write_bytes(content)
    captions, problems, _ = read_shard(tmp_path / "1.tar")
    assert not captions and len(problems) == 1
