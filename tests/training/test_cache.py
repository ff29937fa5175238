"""The feature cache: training from it equals training from the images, and an interrupted encoding is continued.

Slow: ten interpreter starts, in the four tests that encode in several processes.
"""

import json
import os
import random
import shutil
import subprocess
import sys
import tarfile
import time
from itertools import islice
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from imprompt.config import EncodeConfig, TrainConfig
from imprompt.data import feature_cache
from imprompt.data.feature_cache import CachedSample, FeatureCache, pack_samples, summarize_cache
from imprompt.data.readers import open_data
from imprompt.errors import UserError
from imprompt.mini import world
from imprompt.models import hub
from imprompt.training import encode_dataset, precompute, train_adapter
from imprompt.training.setup import DataSource, setup_training

TRAIN = TrainConfig.from_options(
    max_train_steps=4, train_batch_size=4, lr_warmup_steps=0, ema_decay=0.0, num_validation_images=3, validation_num_inference_steps=2,
    validation_steps=4, sanity_check=False, mixed_precision="float32", learning_rate=1e-3,
)  # fmt: skip


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder of twenty images, two of which are not square; a list next to it gives one a mask, and names one that does not exist."""
    folder = tmp_path_factory.mktemp("data") / "images"
    folder.mkdir()
    lines = []
    for i, subject in zip(range(20), world.iterate_subjects(), strict=False):
        scene = world.make_scene(i)
        image = world.render(subject, scene)
        if i in (3, 7):
            image = image.resize((128, 64))
        image.save(folder / f"{i}.png")
        lines.append({"target": f"images/{i}.png", "text": world.sample_caption(subject, scene, random.Random(i))})
    Image.linear_gradient("L").save(folder.parent / "mask.png")
    lines[5]["mask"] = "mask.png"
    (folder.parent / "list.jsonl").write_text("\n".join(map(json.dumps, [*lines, {"target": "nowhere.png", "text": "missing"}])))
    return folder


def encode_config(data, folder, **options):
    return EncodeConfig.from_options(data=str(data), output_dir=str(folder), mixed_precision="float32", batch_size=3, **options)


def encode(data, folder, **options):
    return list(encode_dataset(encode_config(data, folder, **options)))


def train(folder, **options):
    return list(train_adapter(TRAIN.with_options(output_dir=str(folder), **options)))


def make_sample(level=0.0, caption="", key="k", pooled=None):
    ones = torch.ones(4, 2, 2)
    embeds = torch.full((2, 4), float(len(caption)))
    return CachedSample(level * ones, ones, embeds, pooled, torch.zeros(1, 1, 8), torch.arange(6), None, caption, key)


def load_tensors(folder):
    """All tensors of a cache, by file and name."""
    return {p.name: load_file(p) for p in sorted(Path(folder).glob("[0e]*.safetensors"))}


def are_equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(t, b[file][name]) for file in a for name, t in a[file].items())


def test_training_from_the_cache_is_training_from_the_images(images, tmp_path):
    encode(images, tmp_path / "cache")
    options = {"num_validation_images": 0, "data": str(images)}
    from_images = train(tmp_path / "a", **options)
    from_cache = train(tmp_path / "b", feature_cache=str(tmp_path / "cache"), **options)
    assert [s.loss for s in from_cache] == pytest.approx([s.loss for s in from_images], rel=2e-3)
    assert [s.grad_norm for s in from_cache] == pytest.approx([s.grad_norm for s in from_images], rel=2e-2)


def test_cached_samples_are_the_outputs_of_the_encoders(images, tmp_path):
    encode(images.parent / "list.jsonl", tmp_path / "cache")
    options = {"data": str(images.parent / "list.jsonl"), "output_dir": str(tmp_path / "run"), "num_validation_images": 0}
    config = TRAIN.with_options(**options).with_defaults()
    context = setup_training(config, torch.device("cpu"))
    transform = precompute.make_transform_config(config.dataset, context.pipe, 1)
    image_source = DataSource.from_images(open_data(images.parent / "list.jsonl"), transform, context.frozen_encoders)
    cache = FeatureCache(tmp_path / "cache")
    samples = {sample.key: sample for sample in map(cache.load_sample, range(len(cache)))}
    items = [image_source.make_item(image_source.records[i], 0) for i in (0, 3, 5)]
    cached = [samples[item.key] for item in items]
    assert [sample.caption for sample in cached] == [item.caption for item in items]
    cache_source = DataSource.from_cache(cache, context.frozen_encoders, 1, config.subjects)
    a, b = image_source.make_batch(items), cache_source.make_batch(cached)
    for name in ("latent_mean", "latent_std", "image_features", "mask"):
        torch.testing.assert_close(getattr(b, name), getattr(a, name), rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(b.text.prompt_embeds, a.text.prompt_embeds, rtol=2e-3, atol=2e-3)
    assert torch.equal(a.time_ids, b.time_ids.to(a.time_ids))


def test_an_interrupted_encoding_is_continued(images, tmp_path, monkeypatch):
    monkeypatch.setattr(precompute, "RECORDS_PER_CHUNK", 4)
    encode(images, tmp_path / "complete")
    config, folder = encode_config(images, tmp_path / "parts"), tmp_path / "parts"
    progress = list(islice(encode_dataset(config), 4))
    times = {p.name: p.stat().st_mtime_ns for p in folder.glob("*.json")}
    with pytest.raises(UserError, match=r"not finished, . chunks are missing; continue with imprompt encode"):
        FeatureCache(folder)
    assert 0 < len(times) < 5 and progress[-1].total == 5
    list(encode_dataset(config))
    assert all((folder / name).stat().st_mtime_ns == at for name, at in times.items())
    assert are_equal(load_tensors(tmp_path / "complete"), load_tensors(folder))
    assert list(encode_dataset(config)) == []


@pytest.fixture
def shards(images, tmp_path):
    """Five shards of four images, as a pattern."""
    folder = tmp_path / "shards"
    folder.mkdir()
    for number in range(5):
        write_shard(folder / f"{number}.tar", {f"{i:04}.png": images / f"{i}.png" for i in range(number * 4, number * 4 + 4)})
    return f"{folder}/{{0..4}}.tar"


def write_shard(path, members):
    with tarfile.open(path, "w") as tar:
        for name, source in members.items():
            tar.add(source, name)


def assert_close(a, b):
    """The same records in the same files; values as far as another batch size changes them."""
    assert a.keys() == b.keys()
    for file, tensors in a.items():
        for name, tensor in tensors.items():
            torch.testing.assert_close(b[file][name], tensor, rtol=5e-3, atol=5e-3)


def run_cli(*arguments):
    command = [sys.executable, "-m", "imprompt", *map(str, arguments), "--json"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


def start_encoding(shards, folder, num_processes):
    return run_cli("encode", shards, folder, "--mixed-precision", "float32", "--batch-size", 3, "--num-processes", num_processes)


def read_result(process):
    out, error = process.communicate()
    assert process.returncode == 0, error
    return json.loads(out)


def test_two_processes_encode_what_one_does(shards, tmp_path):
    encode(shards, tmp_path / "one")
    assert read_result(start_encoding(shards, tmp_path / "two", 2))["records"] == 20
    assert_close(load_tensors(tmp_path / "one"), load_tensors(tmp_path / "two"))


def test_killed_with_two_processes_finished_with_three(shards, tmp_path):
    encode(shards, tmp_path / "one")
    folder = tmp_path / "cache"
    process = start_encoding(shards, folder, 2)
    while process.poll() is None and not list(folder.glob("0*.json")):
        time.sleep(0.01)
    process.kill()  # its own processes end by themselves
    process.communicate()
    times = {p.name: p.stat().st_mtime_ns for p in folder.glob("0*.json")}
    time.sleep(2.5)
    assert read_result(start_encoding(shards, folder, 3))["records"] == 20 and times
    assert all((folder / name).stat().st_mtime_ns == at for name, at in times.items())
    assert_close(load_tensors(tmp_path / "one"), load_tensors(folder))


def test_a_truncated_shard_is_encoded_again(shards, tmp_path):
    path = tmp_path / "shards" / "2.tar"
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    encode(shards, tmp_path / "cache")
    assert summarize_cache(tmp_path / "cache")["records"] < 20 and len(FeatureCache(tmp_path / "cache")) >= 16
    path.write_bytes(content)
    assert {progress.total for progress in encode(shards, tmp_path / "cache")} == {1}
    assert summarize_cache(tmp_path / "cache")["records"] == 20 and not summarize_cache(tmp_path / "cache")["unreadable"]


def test_added_records_are_noticed(images, tmp_path):
    shutil.copytree(images, tmp_path / "images")
    encode(tmp_path / "images", tmp_path / "cache")
    shutil.copy(images / "1.png", tmp_path / "images" / "00.png")
    with pytest.raises(UserError, match="was begun with dataset_fingerprint"):
        encode(tmp_path / "images", tmp_path / "cache")


def test_a_training_from_images_follows_one_from_a_cache(images, tmp_path):
    encode(images, tmp_path / "cache")
    assert len(train(tmp_path / "a", feature_cache=str(tmp_path / "cache"))) == 4
    assert len(train(tmp_path / "b", data=str(images))) == 4


def test_an_adapter_that_is_fine_tuned_decides_what_its_cache_holds(images, tmp_path):
    options = {"feature_cache": str(tmp_path / "cache"), "data": str(images), "adapter": str(hub.MINI_PATH / "adapter-plus.safetensors")}
    assert len(train(tmp_path / "run", num_validation_images=0, **options)) == 4
    assert FeatureCache(tmp_path / "cache").manifest["features"] == "patches"


def test_two_processes_train_from_what_they_encoded(images, tmp_path):
    options = {"data": images, "feature-cache": tmp_path / "cache", "max-train-steps": 2, "train-batch-size": 2, "device": "cpu"}
    options |= {"num-validation-images": 0, "num-processes": 2, "output-dir": tmp_path / "run"}
    result = read_result(run_cli("train", *(word for name, value in options.items() for word in (f"--{name}", value))))
    assert result["step"] == 2 and (tmp_path / "run" / "adapter.safetensors").exists()


def test_damaged_members_and_a_missing_shard_are_listed(images, tmp_path):
    (tmp_path / "shards").mkdir()
    for number, count in enumerate((5, 0, 5)):
        members = {f"{i:04}.png": images / f"{i}.png" for i in range(number * 5, number * 5 + count)}
        write_shard(tmp_path / "shards" / f"{number}.tar", members)
    (tmp_path / "damaged.png").write_bytes(b"no image")
    write_shard(tmp_path / "shards" / "3.tar", {"0099.png": tmp_path / "damaged.png", "0100.png": images / "1.png"})
    encode(f"{tmp_path}/shards/{{0..4}}.tar", tmp_path / "cache")
    summary = summarize_cache(tmp_path / "cache")
    assert summary["chunks"] == 5 and summary["records"] == 11
    assert set(summary["unreadable"]) == {"3.tar/0099", f"{tmp_path}/shards/4.tar"}
    assert len(FeatureCache(tmp_path / "cache")) == 11


def test_aspect_ratio_buckets_make_files_of_one_shape(images, tmp_path):
    encode(images.parent / "list.jsonl", tmp_path / "cache", aspect_ratio_bucketing=True)
    cache = FeatureCache(tmp_path / "cache")
    assert len({cache.load_sample(i).shape for i in range(20)}) == 2
    options = {"feature_cache": str(tmp_path / "cache"), "train_batch_size": 2, "num_validation_images": 6}
    assert len(train(tmp_path / "run", **options)) == 4


def test_training_fills_its_cache_first_and_validates_from_it(images, tmp_path):
    steps = train(tmp_path / "run", data=str(images), feature_cache=str(tmp_path / "cache"))
    assert steps[-1].validation.metrics["val/loss"] > 0 and summarize_cache(tmp_path / "cache")["records"] == 20
    assert {"latent_mean", "strings"} <= set(next(iter(load_tensors(tmp_path / "cache").values())))


def test_resumes_from_a_cache_to_the_bit(images, tmp_path):
    options = {"feature_cache": str(tmp_path / "cache"), "data": str(images), "num_validation_images": 0, "checkpointing_steps": 1}
    complete = [s.loss for s in train(tmp_path / "a", **options)]
    config = TRAIN.with_options(output_dir=str(tmp_path / "b"), **options)
    first = [s.loss for s in islice(train_adapter(config), 2)]
    assert first + [s.loss for s in train_adapter(config)] == complete


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "ip-adapter-plus"}, "reads patches features, and the cache in .* has pooled features"),
        ({"model": "other"}, "no base model"),
        ({"data": "elsewhere"}, "data: the cache in .* was made with"),
        ({"random_flip": True}, "random_flip: .* remove --random-flip, or encode into another folder"),
        ({"center_crop": False}, "center_crop: .* remove --no-center-crop, or encode into another folder"),
    ],
)
def test_a_cache_with_other_options_is_refused(images, tmp_path, options, message):
    encode(images, tmp_path / "cache")
    with pytest.raises(UserError, match=message):
        train(tmp_path / "run", feature_cache=str(tmp_path / "cache"), **options)


def test_a_cache_of_other_encoders_is_refused(images, tmp_path):
    encode(images, tmp_path / "cache")
    path = tmp_path / "cache" / "encoder_fingerprint.safetensors"
    fingerprint = load_file(path)
    save_file(fingerprint | {"VAE": fingerprint["VAE"] * 1.1}, path)
    with pytest.raises(UserError, match="was made with another VAE than that of mini here; encode anew"):
        train(tmp_path / "run", feature_cache=str(tmp_path / "cache"))


def test_an_encoding_is_not_continued_with_other_options(images, tmp_path):
    encode(images, tmp_path / "cache")
    with pytest.raises(UserError, match=r"was begun with random_flip.*False.*True; use the same settings or another folder"):
        encode(images, tmp_path / "cache", random_flip=True)


@pytest.mark.parametrize("damage", ["features", "chunk index", "manifest", "missing"])
def test_damage_is_named(images, tmp_path, damage):
    folder = tmp_path / "cache"
    encode(images, folder)
    if damage == "features":
        path = next(folder.glob("0*.safetensors"))
        path.write_bytes(path.read_bytes()[:500])
        with pytest.raises(UserError, match="of the cache cannot be read"):
            FeatureCache(folder).load_sample(0)
        return
    if damage == "chunk index":
        (folder / "00000.json").write_text("{")
    if damage == "manifest":
        (folder / "cache.json").write_text("[]")
    with pytest.raises(UserError, match=r"damaged|no feature cache"):
        FeatureCache(folder if damage != "missing" else tmp_path / "nowhere")


def test_embeddings_of_equal_captions_are_stored_once(tmp_path):
    captions = ["ä\udcff cat", "dog", "ä\udcff cat", ""]
    samples = [make_sample(i, text, f"k{i}", torch.full((4,), float(len(text)))) for i, text in enumerate(captions)]
    tensors = pack_samples(samples)
    assert len(tensors["prompt_embeds"]) == len(tensors["pooled_prompt_embeds"]) == 3
    writer = feature_cache.ChunkWriter(tmp_path, 0, 10)
    for sample in samples:
        writer.add(sample)
    writer.close()
    feature_cache.init_cache(tmp_path, {"chunks": 1}, {})
    loaded = [FeatureCache(tmp_path).load_sample(i) for i in range(4)]
    assert [(s.caption, s.key) for s in loaded] == [("ä\udcff cat", "k0"), ("dog", "k1"), ("ä\udcff cat", "k2"), ("", "k3")]
    assert [float(s.pooled_prompt_embeds[0]) for s in loaded] == [6, 3, 6, 0]
    assert [float(s.latent_mean[0, 0, 0]) for s in loaded] == [0, 1, 2, 3]


def test_a_cache_of_an_older_format_version_is_refused(tmp_path):
    (tmp_path / "cache.json").write_text('{"version": 1, "chunks": 1}')
    with pytest.raises(UserError, match=r"^the cache in \S+ has format version 1; expected 2: encode it anew into another folder$"):
        FeatureCache(tmp_path)


def test_features_beyond_half_precision_are_named():
    with pytest.raises(UserError, match="latent_mean are not finite in half precision"):
        pack_samples([make_sample(1e6)])


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("cache.json", b'{"version": 2, "chunks": 1000000000000}'),
        ("cache.json", b'{"version": 2, "chunks": true}'),
        ("cache.json", b'{"version": 2}'),
        ("cache.json", b"[" * 100_000),
        ("cache.json", b"\xff\xfe"),
        ("00000.json", b"{}"),
        ("00000.json", b'{"files": {"../a.safetensors": 1}, "unreadable": {}}'),
        ("00000.json", b'{"files": {"00000-0.safetensors": "x"}, "unreadable": {}}'),
        ("00000.json", b'{"files": {"00000-0.safetensors": 3}, "unreadable": {}, "subjects": {"00000-0.safetensors": [1, 2, 3]}}'),
        ("00000.json", b'{"files": {"00000-7.safetensors": 3}, "unreadable": {}}'),
        ("00000.json", b'{"files": {}, "unreadable": [1]}'),
    ],
)
def test_files_of_a_cache_that_are_not_ours_are_one_sentence(small_cache, tmp_path, name, content):
    folder = shutil.copytree(small_cache, tmp_path / "cache")
    (folder / name).write_bytes(content)
    for read in (FeatureCache, summarize_cache):
        with pytest.raises(UserError, match=rf"{name} is damaged|has format version"):
            read(folder)


@pytest.mark.parametrize("name", ["latent_std", "image_features", "prompt_embeds", "prompt_index", "time_ids", "string_offsets", "strings"])
@pytest.mark.parametrize("damage", ["missing", "shape", "values"])
def test_rows_of_a_cache_that_are_damaged_are_one_sentence(small_cache, tmp_path, name, damage):
    folder = shutil.copytree(small_cache, tmp_path / "cache")
    path = folder / "00000-0.safetensors"
    tensors = load_file(path)
    if damage == "missing":
        del tensors[name]
    elif damage == "shape":
        tensors[name] = tensors[name].flatten()[:1].clone()
    else:
        tensors[name] = torch.full_like(tensors[name], float("nan") if tensors[name].is_floating_point() else 255)
    save_file(tensors, path)
    if (name, damage) == ("time_ids", "values"):
        return  # any numbers may be sizes
    with pytest.raises(UserError, match=r"00000-0.safetensors of the cache cannot be read"):
        FeatureCache(folder).load_sample(2)


@pytest.fixture(scope="module")
def small_cache(tmp_path_factory):
    """A cache with three samples."""
    folder = tmp_path_factory.mktemp("small")
    writer = feature_cache.ChunkWriter(folder, 0, 10)
    for i in range(3):
        writer.add(make_sample(i, f"caption {i}", f"key {i}"))
    writer.close()
    feature_cache.init_cache(folder, {"chunks": 1}, {"VAE": torch.ones(1)})
    assert [FeatureCache(folder).load_sample(i).caption for i in range(3)] == ["caption 0", "caption 1", "caption 2"]
    return folder
