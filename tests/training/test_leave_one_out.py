"""Leave-one-out training: each image is conditioned on other images of its subject, from images and from a cache; a fixed split."""

import json
import random
import shutil

import pytest
import torch
from PIL import Image

from imprompt.config import EncodeConfig, TrainConfig
from imprompt.core.aggregation import AttentionPooling, SelfAttention
from imprompt.data.feature_cache import CachedSubjects, FeatureCache
from imprompt.data.readers import MiniWorld, open_data
from imprompt.data.records import Record
from imprompt.data.subjects import SubjectDataset
from imprompt.data.transforms import TransformConfig, load_example
from imprompt.errors import ImageError, UserError
from imprompt.models import checkpoints
from imprompt.models.hub import MINI_PATH
from imprompt.models.image_prompt import load
from imprompt.models.tensor_files import read_metadata
from imprompt.training import encode_dataset, train_adapter
from imprompt.training.setup import setup_training

SMALL = {
    "train_batch_size": 2, "max_train_steps": 2, "num_validation_images": 2, "validation_num_inference_steps": 2, "sanity_check": False,
    "lr_warmup_steps": 0, "device": "cpu",
}  # fmt: skip


def make_config(folder, **options):
    return TrainConfig.from_options(output_dir=str(folder), **SMALL | options)


def train(folder, **options):
    return list(train_adapter(make_config(folder, **options)))


def read_split(folder):
    return json.loads((folder / "subjects.json").read_text("utf-8"))


def preprocess(images):
    """Pixel values that do not depend on the images."""
    return torch.zeros(len(images), 3, 8, 8)


@pytest.fixture(scope="module")
def faces(tmp_path_factory):
    """Six people with four images each, of which one is damaged, and one person with a single image."""
    folder = tmp_path_factory.mktemp("LFW")
    records = MiniWorld(24, images_per_subject=4)
    for i in range(24):
        path = folder / f"Ærø {i // 4}" / f"Ærø {i // 4}_{i % 4 + 1:04}.png"
        path.parent.mkdir(exist_ok=True)
        records[i].target.save(path)
    (folder / "Alone").mkdir()
    records[0].target.save(folder / "Alone" / "Alone_0001.png")
    (folder / "Ærø 0" / "Ærø 0_0002.png").write_bytes(b"no image")
    return folder


def test_a_folder_of_people_is_trained_on_and_the_split_is_written(faces, tmp_path):
    options = {"data": str(faces), "min_images_per_subject": 3, "aggregation": "attention", "default_caption": "a cat"}
    assert [step.index for step in train(tmp_path, **options)] == [1, 2]
    split = read_split(tmp_path)
    assert len(split["train"]) == 4 and len(split["test"]) == 2 and split["min_images_per_subject"] == 3
    assert set(split["train"]) | set(split["test"]) == {f"Ærø {n}" for n in range(6)}
    path = tmp_path / "adapter.safetensors"
    adapter, spec = checkpoints.load_adapter(path)
    assert isinstance(adapter.aggregator, AttentionPooling) and spec.aggregator == "attention"
    prompt = load(path, image_encoder=str(MINI_PATH / "image_encoder"))([Image.new("RGB", (64, 64))] * 3)
    assert prompt.key_values()[1]


def test_test_subjects_are_never_trained_on(faces, tmp_path):
    config = make_config(tmp_path, data=str(faces), min_images_per_subject=3).with_defaults()
    context = setup_training(config, torch.device("cpu"))
    split, records = read_split(tmp_path), context.loader.records
    trained = {records[i].subject for i in range(len(records))}
    assert trained == set(split["train"]) and not trained & set(split["test"])
    assert len(context.validation_set.prompts) == 2  # one image of each test subject
    assert context.validation_set.is_test_split


@pytest.mark.parametrize("change", ["seed", "person"])
def test_a_run_is_not_resumed_with_another_split(faces, tmp_path, change):
    folder = tmp_path / "run"
    options = {"data": str(shutil.copytree(faces, tmp_path / "faces")), "min_images_per_subject": 3}
    train(folder, **options)
    split = read_split(folder)
    assert train(folder, **options) == []
    if change == "person":
        shutil.copytree(tmp_path / "faces" / "Ærø 1", tmp_path / "faces" / "Ærø 9")
    message = "was started with seed = 0, and now it is 1" if change == "seed" else "was started with 24 records, and now there are 28"
    with pytest.raises(UserError, match=message):
        train(folder, **options | ({"seed": 1} if change == "seed" else {}))
    assert read_split(folder) == split


def test_damaged_rows_of_a_list_are_skipped_and_logged(faces, tmp_path):
    rows = ["target,text,subject,references"]
    for path in sorted(faces.glob("Ærø */*.png")):
        rows.append(f"{path},a cat,{path.parent.name},")
    rows[2:2] = [",a cat,Ærø 0,", "x.png,a cat,Ærø 0,[a.png]", "y.png,a cat,,"]
    (tmp_path / "list.csv").write_text("\n".join(rows), "utf-8")
    dataset = SubjectDataset(open_data(str(tmp_path / "list.csv")), 3)
    assert list(dataset.subjects) == [f"Ærø {n}" for n in range(6)] and len(dataset.unreadable) == 2
    steps = train(tmp_path / "run", data=str(tmp_path / "list.csv"), min_images_per_subject=3)
    assert [step.index for step in steps] == [1, 2]
    log = (tmp_path / "run" / "unreadable-0.tsv").read_text("utf-8")
    assert "list.csv:2: target is empty" in log and "list.csv:3: references are not JSON" in log


def test_the_default_caption_is_that_of_images_without_one(faces):
    without = load_example(open_data(str(faces))[3], 0, TransformConfig(64, default_caption="a photo of a person"), preprocess)
    assert without.caption == "a photo of a person"
    record = Record("k", Image.new("RGB", (64, 64)), "a cat")
    assert load_example(record, 0, TransformConfig(64, default_caption="other"), preprocess).caption == "a cat"


def test_a_damaged_reference_is_skipped_where_there_are_others(faces):
    config = TransformConfig(64, num_references=9, min_distinct_references=9)
    records = map(SubjectDataset(open_data(str(faces)), 3).__getitem__, range(4))
    for record in (record for record in records if record.key.endswith(("1.png", "3.png"))):
        assert load_example(record, 0, config, preprocess).reference_pixel_values.shape[0] == 9
    with pytest.raises(ImageError):
        load_example(Record("k", Image.new("RGB", (64, 64)), references=(b"no",)), 0, config, preprocess)


def test_the_number_of_distinct_references():
    images = tuple(Image.new("RGB", (8, 8), (n, 0, 0)) for n in range(9))
    record = Record("k", images[0], references=images)

    def sample_references(seed, min_distinct):
        """The numbers of the nine references."""
        numbers = []
        config = TransformConfig(8, num_references=9, min_distinct_references=min_distinct)
        load_example(record, seed, config, lambda images: [numbers.append(image.getpixel((0, 0))[0]) for image in images])
        return numbers

    samples = [sample_references(seed, min_distinct=1) for seed in range(60)]
    assert {len(sample) for sample in samples} == {9} and {len(set(sample)) for sample in samples} == set(range(1, 10))
    assert sorted(sample_references(0, min_distinct=9)) == list(range(9))


@pytest.fixture(scope="module")
def cache_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    for _ in encode_dataset(EncodeConfig.from_options(data="mini:20x5", output_dir=str(folder), batch_size=4, device="cpu")):
        pass
    return folder


def count_distinct(features):
    return len({tuple(reference.flatten().tolist()) for reference in features})


def test_cached_samples_get_references_of_their_subject(cache_folder):
    cache = FeatureCache(cache_folder)
    subjects = CachedSubjects(cache, 5)
    assert len(subjects) == 20 and len(subjects.subjects) == 4
    assert subjects.subjects == SubjectDataset(MiniWorld(20, images_per_subject=5), 5).subjects
    for i in range(20):
        ref = subjects[i]
        sample = cache.load_with_references(ref, 7, 9, 9)
        assert sample.subject is None and sample.image_features.shape[0] == 9
        own_features = cache.load_image_features(ref.sample_index)
        assert not any(torch.equal(reference[None], own_features) for reference in sample.image_features)
        assert count_distinct(sample.image_features) == 4  # all others, some of them twice
        assert torch.equal(sample.latent_mean, cache.load_sample(ref.sample_index).latent_mean)
    a, b = (cache.load_with_references(subjects[3], 7, 9, 1).image_features for _ in range(2))
    torch.testing.assert_close(a, b, rtol=0, atol=0)
    counts = {count_distinct(cache.load_with_references(subjects[3], seed, 4, 1).image_features) for seed in range(40)}
    assert counts == {1, 2, 3, 4}


def test_training_from_a_cache_of_single_references(cache_folder, tmp_path):
    options = {"feature_cache": str(cache_folder), "min_images_per_subject": 5}
    assert len(train(tmp_path, aggregation="self-attention", **options)) == 2
    path = tmp_path / "adapter.safetensors"
    assert isinstance(checkpoints.load_adapter(path)[0].aggregator, SelfAttention)
    assert len(train(tmp_path / "finetuned", adapter=str(path), **options)) == 2  # keeps the aggregator of the adapter
    assert read_metadata(tmp_path / "finetuned" / "adapter.safetensors")["aggregator"] == "self-attention"


def test_a_cache_without_subjects_is_refused(tmp_path, cache_folder):
    for path in cache_folder.glob("0*.json"):
        index = json.loads(path.read_text())
        (tmp_path / path.name).write_text(json.dumps({name: value for name, value in index.items() if name != "subjects"}))
    for path in [*cache_folder.glob("*.safetensors"), cache_folder / "cache.json"]:
        (tmp_path / path.name).symlink_to(path)
    with pytest.raises(UserError, match="no subject has 5 images: the data has 0 subjects"):
        CachedSubjects(FeatureCache(tmp_path), 5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_images_per_subject": 1}, "min_images_per_subject: expected (at least )?2"),
        ({"aggregation": "sum"}, "aggregation: expected one of"),
        ({"aggregation": "attention", "method": "simple"}, "aggregation: simple has its own"),
        ({"aggregation": "self-attention", "min_images_per_subject": 5, "num_references": 4}, "needs exactly 9 references"),
        ({"min_images_per_subject": 5, "min_distinct_references": 10}, "min_distinct_references: expected at most num_references"),
        ({"test_fraction": 1.0, "min_images_per_subject": 4}, "test_fraction"),
    ],
)
def test_contradictory_options_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        TrainConfig.from_options(**options)


def test_an_aggregation_that_does_not_fit_the_adapter_is_refused(tmp_path):
    options = {"data": "mini:20x5", "min_images_per_subject": 5}
    with pytest.raises(UserError, match="attention takes pooled features, and this adapter patch features; expected attention-tokens"):
        train(tmp_path, method="ip-adapter-plus", aggregation="attention", **options)
    with pytest.raises(UserError, match="joint needs an adapter with a resampler"):
        train(tmp_path, aggregation="joint", **options)


def test_an_unknown_aggregator_or_missing_weights_of_one_are_refused(tmp_path):
    tensors, metadata = checkpoints.read_adapter_file(MINI_PATH / "adapter.safetensors")
    checkpoints.write_tensors(tensors, tmp_path / "a.safetensors", metadata | {"aggregator": "magic"})
    with pytest.raises(UserError, match="by 'magic'; expected one of concat"):
        checkpoints.load_adapter(tmp_path / "a.safetensors")
    checkpoints.write_tensors(tensors, tmp_path / "b.safetensors", metadata | {"aggregator": "attention"})
    with pytest.raises(UserError, match=r"aggregator.* should be"):
        checkpoints.load_adapter(tmp_path / "b.safetensors")


def test_trained_aggregators_survive_a_pickle(tmp_path):
    adapter, _ = checkpoints.load_adapter(MINI_PATH / "adapter.safetensors")
    adapter.aggregator = AttentionPooling(128)
    for name in ("a.bin", "a.safetensors"):
        checkpoints.save(adapter, tmp_path / name, {"base": "mini", "aggregator": "attention"})
        loaded, spec = checkpoints.load_adapter(tmp_path / name)
        x = torch.randn(1, 5, 1, 128, generator=torch.Generator().manual_seed(random.Random(name).randrange(99)))
        torch.testing.assert_close(loaded.image_tokens(x), adapter.image_tokens(x), rtol=1e-5, atol=1e-6)
        assert spec.base_model == "mini"


def test_a_per_subject_run_is_not_resumed_with_another_subject(faces, tmp_path):
    options = {"data": str(faces / "Ærø 1"), "method": "dreambooth-lora", "class_noun": "cat", "num_class_images": 0}
    options |= {"max_train_steps": 1, "train_batch_size": 1, "num_validation_images": 0}
    other = {"data": str(faces / "Ærø 2")}
    assert len(train(tmp_path, **options)) == 1 and train(tmp_path, **options) == []
    for change in (other, {"class_noun": "dog"}):
        with pytest.raises(UserError, match=r"was started with (data|class_noun) = .*; continue with what it was started with"):
            train(tmp_path, **options | change)
    assert len(train(tmp_path, **options | other, resume_from_checkpoint="never")) == 1
