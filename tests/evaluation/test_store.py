"""The files of an evaluation: what is cut or not ours is one sentence, or is computed again; formulas are quoted in tables."""

import pytest
import torch
from PIL import Image

from imprompt.errors import UserError
from imprompt.evaluation import report
from imprompt.evaluation.identity import IdentityGallery, load_or_build_gallery
from imprompt.evaluation.scoring import RowScore
from imprompt.evaluation.store import ImageId, RowStore, check_or_write_protocol
from imprompt.utils.statistics import Interval


@pytest.fixture
def store(tmp_path):
    """A row with one chunk."""
    store = RowStore(tmp_path, "row")
    store.write_chunk(0, {"features": torch.arange(6.0).reshape(2, 3), "seed": torch.tensor([1, 2])}, {"3": "größer"})
    return store


def test_a_chunk_is_read_as_it_was_written(store):
    tensors, skipped = store.read_chunk(0)
    assert tensors["features"].tolist() == [[0, 1, 2], [3, 4, 5]] and skipped == {"3": "größer"}
    store.write_chunk(1, {}, {"4": "x"})
    assert store.read_chunk(1) == ({}, {"4": "x"})


def test_every_flipped_bit_of_a_chunk_is_noticed(store):
    path = store.chunk_path(0)
    content = path.read_bytes()
    for position in range(len(content)):
        damaged = bytearray(content)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        try:
            tensors, skipped = store.read_chunk(0)
        except UserError as error:
            assert "is damaged" in str(error) and "delete it and run the same command again" in str(error)
        else:  # a space of the header, or the name of its format
            assert tensors["features"].tolist() == [[0, 1, 2], [3, 4, 5]] and skipped == {"3": "größer"}
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="is damaged"):
        store.read_chunk(0)


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff", b"[" * 100_000, b'{"format": 3'])
def test_a_damaged_protocol_is_one_sentence(tmp_path, content):
    (tmp_path / "protocol.json").write_bytes(content)
    with pytest.raises(UserError, match=r"protocol.json is damaged"):
        check_or_write_protocol(tmp_path, {"a": 1})


def test_images_do_not_follow_links(store, tmp_path):
    path = store.image_path(ImageId(0, 0, 0))
    path.parent.mkdir()
    (tmp_path / "victim").write_text("mine")
    path.symlink_to(tmp_path / "victim")
    store.save_images([Image.new("RGB", (8, 8))], [ImageId(0, 0, 0)])
    assert (tmp_path / "victim").read_text() == "mine" and not path.is_symlink()


@pytest.mark.parametrize(
    "change",
    [
        {"metrics": 3}, {"metrics": {"CLIP-I": [1, 2]}}, {"metrics": {"CLIP-I": ["a", 1, 2]}}, {"metrics": {"unknown": [1, 2, 3]}},
        {"name": 3}, {"num_images": "3"}, {"more": 1}, {"scale": None}, {"metrics": None},
    ],
)  # fmt: skip
def test_a_damaged_score_is_named(tmp_path, change):
    fields = {"name": "row", "num_images": 2, "num_prompts": 2, "num_skipped": 0, "metrics": {"CLIP-I": [0.5, 0.4, 0.6]}}
    score = RowScore("row", 2, 2, 0, metrics={"CLIP-I": Interval(0.5, 0.4, 0.6)})
    assert report.parse_score(fields, tmp_path / "score.json") == score
    with pytest.raises(UserError, match=r"score.json is damaged"):
        report.parse_score(fields | change, tmp_path / "score.json")


def test_a_gallery_that_cannot_be_read_is_built_again(tmp_path, monkeypatch):
    class EvalSet:
        fingerprint, subjects = "f", ("a",)

    class Encoder:
        name = "mini"

    built = []
    gallery = IdentityGallery(torch.ones(1, 4), torch.tensor([True]))
    monkeypatch.setattr("imprompt.evaluation.identity.build_gallery", lambda encoder, eval_set: built.append(1) or gallery)
    path = tmp_path / "gallery.safetensors"
    load_or_build_gallery(path, Encoder, EvalSet)
    assert load_or_build_gallery(path, Encoder, EvalSet).centroids.tolist() == [[1, 1, 1, 1]] and len(built) == 1
    content = path.read_bytes()
    for damaged in (content[:-3], b"", content[:-6] + b"\0\0\0\0" + content[-2:]):
        path.write_bytes(damaged)
        load_or_build_gallery(path, Encoder, EvalSet)
    assert len(built) == 4


@pytest.mark.parametrize(("name", "cell"), [("=1+1", "'=1+1"), ("@SUM(A1)", "'@SUM(A1)"), ("+1", "'+1"), ("-1", "'-1"), ("a=b", "a=b")])
def test_names_that_begin_like_a_formula_are_quoted_in_tables(name, cell):
    assert report.scores_to_csv([RowScore(name, 2, 2, 0)]).splitlines()[1].startswith(f"{cell},")
