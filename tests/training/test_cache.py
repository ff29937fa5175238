"""The feature cache: training from it is training from the data, and a build that was interrupted goes on."""

import json
import os
import random
import subprocess
import sys
import tarfile
import time
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from imprompt.config import Encode, Train
from imprompt.data import feature_cache as format
from imprompt.data.feature_cache import Cache, Row, contents, packed
from imprompt.data.readers import open_data
from imprompt.errors import UserError
from imprompt.mini import world
from imprompt.models import hub
from imprompt.training import encode, train
from imprompt.training import precompute as module

TRAIN = Train(
    steps=4, batch=4, warmup=0, ema=0.0, validation=3, validation_steps=2, validate_every=4, preflight=False, precision="float32", lr=1e-3
)  # fmt: skip


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Twenty pictures, two of them not square, one with a mask beside it in the list, one unreadable."""
    folder = tmp_path_factory.mktemp("photos")
    lines = []
    for i, subject in zip(range(20), world.subjects(), strict=False):
        where = world.scene(i)
        picture = world.draw(subject, where)
        if i in (3, 7):
            picture = picture.resize((128, 64))
        picture.save(folder / f"{i}.png")
        lines.append({"target": f"{i}.png", "text": world.caption(subject, where, random.Random(i))})
    Image.new("L", (64, 64), 255).save(folder / "mask.png")
    lines[5]["mask"] = "mask.png"
    (folder / "list.jsonl").write_text("\n".join(map(json.dumps, [*lines, {"target": "nowhere.png", "text": "lost"}])))
    return folder


def encoded(data, out, **choices):
    return list(encode(Encode(data=str(data), out=str(out), precision="float32", batch=3, **choices)))


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 4)


def tiny(level):
    ones = torch.ones(4, 2, 2)
    return Row(level * ones, ones, torch.ones(2, 4), None, torch.zeros(1, 1, 8), torch.arange(6), None, "", "k")


def contents_of(folder):
    return {p.name: load_file(p) for p in sorted(Path(folder).glob("[0p]*.safetensors"))}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(t, b[file][name]) for file in a for name, t in a[file].items())


def test_training_from_the_cache_is_training_from_the_data(photos, tmp_path):
    encoded(photos, tmp_path / "cache")
    settings = {"validation": 0, "data": str(photos)}
    live = list(train(replace(TRAIN, out=str(tmp_path / "a"), **settings)))
    stored = list(train(replace(TRAIN, cache=str(tmp_path / "cache"), out=str(tmp_path / "b"), **settings)))
    assert [s.loss for s in stored] == pytest.approx([s.loss for s in live], rel=2e-3)
    assert [s.norm for s in stored] == pytest.approx([s.norm for s in live], rel=2e-2)


def test_rows_are_what_the_encoders_say(photos, tmp_path):
    from imprompt.training.setup import Source, build

    encoded(photos / "list.jsonl", tmp_path / "cache")
    choice = replace(TRAIN, data=str(photos / "list.jsonl"), out=str(tmp_path / "run"), validation=0).settled()
    setting = build(choice, torch.device("cpu"))
    fresh = Source.fresh(open_data(photos / "list.jsonl"), module.framing_of(choice, setting.pipe), setting.frozen)
    cache = Cache(tmp_path / "cache")
    stored = {row.key: row for row in map(cache.row, range(len(cache)))}
    items = [fresh.make(fresh.records[i], 0) for i in (0, 3, 5)]
    rows = [stored[item.key] for item in items]
    a, b = fresh.encode(items), Source.cached(cache, setting.frozen, torch.float32, choice).encode(rows)
    assert [row.text for row in rows] == [item.text for item in items]
    for one, other in ((a.mean, b.mean), (a.std, b.std), (a.text.states, b.text.states), (a.image, b.image), (a.weight, b.weight)):
        torch.testing.assert_close(other, one, rtol=2e-3, atol=2e-3)
    assert torch.equal(a.sizes, b.sizes.to(a.sizes))


def test_an_interrupted_encoding_goes_on(photos, tmp_path, small_chunks):
    encoded(photos, tmp_path / "whole")
    choice = Encode(data=str(photos), out=str(tmp_path / "parts"), precision="float32", batch=3)
    steps = list(islice(encode(choice), 4))
    done = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "parts").glob("*.json")}
    with pytest.raises(UserError, match=r"not finished, . chunks are missing; continue with imprompt encode"):
        Cache(tmp_path / "parts")
    assert 0 < len(done) < 6 and steps[-1].total == 6  # 21 pictures, the mask among them
    list(encode(choice))
    assert all((tmp_path / "parts" / name).stat().st_mtime_ns == at for name, at in done.items())
    assert same(contents_of(tmp_path / "whole"), contents_of(tmp_path / "parts"))
    assert list(encode(choice)) == []


@pytest.fixture
def shards(photos, tmp_path):
    """Five shards of four pictures."""
    folder = tmp_path / "shards"
    folder.mkdir()
    for number in range(5):
        with tarfile.open(folder / f"{number}.tar", "w") as tar:
            for i in range(number * 4, number * 4 + 4):
                tar.add(photos / f"{i}.png", f"{i:04}.png")
    return folder


def alike(a, b):
    """The same records in the same files; values as far as batches of another size change them."""
    assert a.keys() == b.keys()
    for file, tensors in a.items():
        for name, tensor in tensors.items():
            torch.testing.assert_close(b[file][name], tensor, rtol=5e-3, atol=5e-3)


def in_processes(shards, out, processes, *more):
    command = [sys.executable, "-m", "imprompt", "encode", f"{shards}/{{0..4}}.tar", str(out), "--precision", "float32", "--batch", "3"]
    command += ["--processes", str(processes), "--json", *more]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


def test_two_processes_encode_what_one_does(shards, tmp_path):
    encoded(f"{shards}/{{0..4}}.tar", tmp_path / "one")
    run = in_processes(shards, tmp_path / "two", 2)
    out, error = run.communicate()
    assert run.returncode == 0, error
    assert json.loads(out)["records"] == 20
    alike(contents_of(tmp_path / "one"), contents_of(tmp_path / "two"))


def test_killed_with_two_processes_finished_with_three(shards, tmp_path):
    encoded(f"{shards}/{{0..4}}.tar", tmp_path / "one")
    run = in_processes(shards, tmp_path / "cache", 2)
    while run.poll() is None and not list((tmp_path / "cache").glob("0*.json")):
        time.sleep(0.01)
    run.kill()  # its processes end by themselves
    run.communicate()
    done = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "cache").glob("0*.json")}
    time.sleep(2.5)
    run = in_processes(shards, tmp_path / "cache", 3)
    out, error = run.communicate()
    assert run.returncode == 0, error
    assert json.loads(out)["records"] == 20 and done
    assert all((tmp_path / "cache" / name).stat().st_mtime_ns == at for name, at in done.items())
    alike(contents_of(tmp_path / "one"), contents_of(tmp_path / "cache"))


def test_a_shard_that_broke_is_tried_again(shards, tmp_path):
    whole = (shards / "2.tar").read_bytes()
    (shards / "2.tar").write_bytes(whole[: len(whole) // 2])
    encoded(f"{shards}/{{0..4}}.tar", tmp_path / "cache")
    assert contents(tmp_path / "cache")["records"] < 20 and len(Cache(tmp_path / "cache")) >= 16
    (shards / "2.tar").write_bytes(whole)
    assert {p.total for p in encode(Encode(data=f"{shards}/{{0..4}}.tar", out=str(tmp_path / "cache"), precision="float32"))} == {1}
    assert contents(tmp_path / "cache")["records"] == 20 and not contents(tmp_path / "cache")["lost"]


def test_records_that_come_or_go_are_noticed(photos, tmp_path):
    import shutil

    shutil.copytree(photos, tmp_path / "photos")
    encoded(tmp_path / "photos", tmp_path / "cache")
    shutil.copy(photos / "1.png", tmp_path / "photos" / "00.png")
    with pytest.raises(UserError, match="was begun with content"):
        encoded(tmp_path / "photos", tmp_path / "cache")


def test_after_a_training_from_a_cache_another_one_encodes_again(photos, tmp_path):
    encoded(photos, tmp_path / "cache")
    assert len(list(train(replace(TRAIN, cache=str(tmp_path / "cache"), out=str(tmp_path / "a"))))) == 4
    assert len(list(train(replace(TRAIN, data=str(photos), out=str(tmp_path / "b"))))) == 4


def test_tuning_an_adapter_decides_what_its_cache_holds(photos, tmp_path):
    settings = {"cache": str(tmp_path / "cache"), "data": str(photos), "adapter": str(hub.MINI / "adapter-plus.safetensors")}
    assert len(list(train(replace(TRAIN, out=str(tmp_path / "run"), validation=0, **settings)))) == 4
    assert Cache(tmp_path / "cache").about["features"] == "grid"


def test_two_processes_train_from_what_they_encoded(photos, tmp_path):
    command = [sys.executable, "-m", "imprompt", "train", "--data", str(photos), "--cache", str(tmp_path / "cache"), "--steps", "2"]
    command += ["--batch", "2", "--validation", "0", "--processes", "2", "--json", "--out", str(tmp_path / "run"), "--device", "cpu"]
    run = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout)["step"] == 2 and (tmp_path / "run" / "adapter.safetensors").exists()


def test_shards_with_damaged_members_and_a_missing_one(photos, tmp_path):
    shards = tmp_path / "shards"
    shards.mkdir()
    for number in range(3):
        with tarfile.open(shards / f"{number}.tar", "w") as tar:
            for i in range(number * 5, number * 5 + 5 if number != 1 else 5):
                tar.add(photos / f"{i}.png", f"{i:04}.png")
    with tarfile.open(shards / "3.tar", "w") as tar:
        (tmp_path / "no.png").write_bytes(b"no picture")
        tar.add(tmp_path / "no.png", "0099.png")
        tar.add(photos / "1.png", "0100.png")
    encoded(f"{shards}/{{0..4}}.tar", tmp_path / "cache")
    found = contents(tmp_path / "cache")
    assert found["chunks"] == 5 and found["records"] == 11
    assert set(found["lost"]) == {"3.tar/0099", f"{shards}/4.tar"}
    assert len(Cache(tmp_path / "cache")) == 11


def test_buckets_make_files_of_one_shape(photos, tmp_path):
    encoded(photos / "list.jsonl", tmp_path / "cache", buckets=True)
    cache = Cache(tmp_path / "cache")
    assert {cache.row(i).shape for i in range(len(cache))} == {(4, 16, 16), (4, 12, 24)} or len(
        {cache.row(i).shape for i in range(20)}
    ) == 2
    assert len(list(train(replace(TRAIN, cache=str(tmp_path / "cache"), out=str(tmp_path / "run"), batch=2, validation=6)))) == 4


def test_train_fills_its_cache_first_and_examines_from_it(photos, tmp_path):
    choice = replace(TRAIN, data=str(photos), cache=str(tmp_path / "cache"), out=str(tmp_path / "run"))
    steps = list(train(choice))
    assert steps[-1].findings.figures["validation"] > 0 and contents(tmp_path / "cache")["records"] == 21
    assert {"mean", "words"} <= set(next(iter(contents_of(tmp_path / "cache").values())))


def test_resumes_from_a_cache_to_the_bit(photos, tmp_path):
    settings = {"cache": str(tmp_path / "cache"), "data": str(photos), "validation": 0, "save_every": 1}
    whole = [s.loss for s in train(replace(TRAIN, out=str(tmp_path / "a"), **settings))]
    first = [s.loss for s in islice(train(replace(TRAIN, out=str(tmp_path / "b"), **settings)), 2)]
    assert first + [s.loss for s in train(replace(TRAIN, out=str(tmp_path / "b"), **settings))] == whole


@pytest.mark.parametrize(
    ("choices", "why"),
    [
        ({"method": "ip-adapter-plus"}, "reads grid features, and the cache in .* holds pooled ones"),
        ({"base": "other"}, "no base model"),
        ({"data": "elsewhere"}, "data: the cache in .* was made with"),
        ({"flip": True}, "flip: .* leave --flip out"),
    ],
)
def test_a_cache_for_something_else_is_named(photos, tmp_path, choices, why):
    encoded(photos, tmp_path / "cache")
    with pytest.raises(UserError, match=why):
        next(train(replace(TRAIN, cache=str(tmp_path / "cache"), out=str(tmp_path / "run"), **choices)))


def test_a_cache_of_other_encoders_is_named(photos, tmp_path):
    encoded(photos, tmp_path / "cache")
    probe = load_file(tmp_path / "cache" / "probe.safetensors")
    save_file(probe | {"VAE": probe["VAE"] * 1.1}, tmp_path / "cache" / "probe.safetensors")
    with pytest.raises(UserError, match="was made with another VAE than that of mini here; encode anew"):
        next(train(replace(TRAIN, cache=str(tmp_path / "cache"), out=str(tmp_path / "run"))))


def test_other_settings_do_not_continue_a_cache(photos, tmp_path):
    encoded(photos, tmp_path / "cache")
    with pytest.raises(UserError, match=r"was begun with flip False, not True; use the same settings or another folder"):
        encoded(photos, tmp_path / "cache", flip=True)


@pytest.mark.parametrize("damage", ["file", "sidecar", "about", "missing"])
def test_damage_is_named(photos, tmp_path, damage):
    encoded(photos, tmp_path / "cache")
    if damage == "file":
        path = next((tmp_path / "cache").glob("0*.safetensors"))
        path.write_bytes(path.read_bytes()[:500])
        with pytest.raises(UserError, match="of the cache cannot be read"):
            Cache(tmp_path / "cache").row(0)
        return
    if damage == "sidecar":
        (tmp_path / "cache" / "00000.json").write_text("{")
    if damage == "about":
        (tmp_path / "cache" / "cache.json").write_text("[]")
    with pytest.raises(UserError, match=r"damaged|no feature cache"):
        Cache(tmp_path / ("cache" if damage != "missing" else "nowhere"))


def test_pooled_text_and_equal_captions_are_kept_once(tmp_path):
    def row(i, text):
        wide = torch.full((2, 4), float(len(text)))
        return Row(
            torch.full((4, 2, 2), float(i)), torch.ones(4, 2, 2), wide, wide[0], torch.zeros(1, 1, 8), torch.arange(6), None, text, f"k{i}"
        )

    rows = [row(0, "ä\udcff cat"), row(1, "dog"), row(2, "ä\udcff cat"), row(3, "")]
    tensors = packed(rows)
    assert len(tensors["states"]) == len(tensors["pooled"]) == 3
    chunk = format.Chunk(tmp_path, 0, 10)
    for one in rows:
        chunk.add(one)
    chunk.close()
    format.begin(tmp_path, {"chunks": 1}, {})
    found = [Cache(tmp_path).row(i) for i in range(4)]
    assert [(r.text, r.key) for r in found] == [("ä\udcff cat", "k0"), ("dog", "k1"), ("ä\udcff cat", "k2"), ("", "k3")]
    assert [float(r.pooled[0]) for r in found] == [6, 3, 6, 0] and [float(r.mean[0, 0, 0]) for r in found] == [0, 1, 2, 3]


def test_what_does_not_fit_in_half_precision_is_named():
    rows = [
        Row(torch.full((4, 2, 2), 1e6), torch.ones(4, 2, 2), torch.ones(2, 4), None, torch.zeros(1, 1, 8), torch.arange(6), None, "", "k")
    ]
    with pytest.raises(UserError, match="mean are not finite in half precision"):
        packed(rows)
