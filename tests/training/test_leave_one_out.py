"""Training by subjects: each picture after the others of its subject, from pictures and from a cache; a split that is kept."""

import json
import random
import shutil
from dataclasses import replace

import pytest
import torch
from PIL import Image

from imprompt.config import Encode, Train
from imprompt.core.aggregation import SelfAttention, SetAttention
from imprompt.data.feature_cache import Cache, Siblings
from imprompt.data.readers import Mini, open_data
from imprompt.data.records import Record
from imprompt.data.subjects import Identities
from imprompt.data.transforms import Framing, example
from imprompt.errors import ImageError, UserError
from imprompt.models import checkpoints
from imprompt.models.image_prompt import load
from imprompt.training import build, encode, train

SMALL = {"batch": 2, "steps": 2, "validation": 2, "validation_steps": 2, "preflight": False, "warmup": 0, "device": "cpu"}


@pytest.fixture(scope="module")
def faces(tmp_path_factory):
    """Six people, four photographs each; one with a single one, one photograph damaged."""
    folder = tmp_path_factory.mktemp("LFW")
    records = Mini(24, photos=4)
    for i in range(24):
        path = folder / f"Ærø {i // 4}" / f"Ærø {i // 4}_{i % 4 + 1:04}.png"
        path.parent.mkdir(exist_ok=True)
        records[i].target.save(path)
    (folder / "Alone").mkdir()
    records[0].target.save(folder / "Alone" / "Alone_0001.png")
    (folder / "Ærø 0" / "Ærø 0_0002.png").write_bytes(b"no picture")
    return folder


def test_a_tree_of_people_is_trained_on_and_the_split_is_written_down(faces, tmp_path):
    choice = Train(data=str(faces), subjects=3, combine="attention", caption="a cat", adapter=None, out=str(tmp_path), **SMALL)
    assert [step.index for step in train(choice)] == [1, 2]
    split = json.loads((tmp_path / "subjects.json").read_text("utf-8"))
    assert len(split["train"]) == 4 and len(split["test"]) == 2 and split["least"] == 3
    assert set(split["train"]) | set(split["test"]) == {f"Ærø {n}" for n in range(6)}
    adapter, spec = checkpoints.load_adapter(tmp_path / "adapter.safetensors")
    assert isinstance(adapter.aggregator, SetAttention) and spec.aggregator == "attention"
    prompt = load(tmp_path / "adapter.safetensors", encoder="src/imprompt/mini/weights/image_encoder")([Image.new("RGB", (64, 64))] * 3)
    assert prompt.key_values()[1]


def test_test_subjects_are_never_trained_on(faces, tmp_path):
    choice = Train(data=str(faces), subjects=3, out=str(tmp_path), **SMALL).settled()
    setting = build(choice, torch.device("cpu"))
    split = json.loads((tmp_path / "subjects.json").read_text("utf-8"))
    drawn = {setting.loader.records[i].subject for i in range(len(setting.loader.records))}
    assert drawn == set(split["train"]) and not drawn & set(split["test"])
    assert len(setting.examined.texts) == 2  # one picture of each test subject


@pytest.mark.parametrize("change", ["seed", "person"])
def test_a_run_is_not_continued_on_another_split(faces, tmp_path, change):
    choice = Train(data=str(shutil.copytree(faces, tmp_path / "faces")), subjects=3, out=str(tmp_path / "run"), **SMALL)
    list(train(choice))
    before = (tmp_path / "run" / "subjects.json").read_text("utf-8")
    assert list(train(choice)) == []  # the same is there
    if change == "person":
        shutil.copytree(tmp_path / "faces" / "Ærø 1", tmp_path / "faces" / "Ærø 9")
    with pytest.raises(UserError, match="begun with other subjects; use the data, --subjects, --held-out and --seed"):
        list(train(replace(choice, seed=1) if change == "seed" else choice))
    assert (tmp_path / "run" / "subjects.json").read_text("utf-8") == before


def test_bad_rows_of_a_list_are_left_out_and_named(faces, tmp_path):
    rows = ["target,text,subject,references"]
    for path in sorted(faces.glob("Ærø */*.png")):
        rows.append(f"{path},a cat,{path.parent.name},")
    rows[2:2] = [",a cat,Ærø 0,", "x.png,a cat,Ærø 0,[a.png", "y.png,a cat,,"]
    (tmp_path / "list.csv").write_text("\n".join(rows), "utf-8")
    found = Identities(open_data(str(tmp_path / "list.csv")), 3)
    assert list(found.subjects) == [f"Ærø {n}" for n in range(6)] and len(found.lost) == 2
    choice = Train(data=str(tmp_path / "list.csv"), subjects=3, out=str(tmp_path / "run"), **SMALL)
    assert [step.index for step in train(choice)] == [1, 2]
    named = (tmp_path / "run" / "unreadable-0.tsv").read_text("utf-8")
    assert "list.csv:2: target is empty" in named and "list.csv:3: references are not JSON" in named


def test_captions_are_given_to_pictures_without_one(faces):
    made = example(
        open_data(str(faces))[3], 0, Framing(64, caption="a photo of a person"), lambda images: torch.zeros(len(images), 3, 8, 8)
    )
    assert made.text == "a photo of a person"
    kept = example(
        Record("k", Image.new("RGB", (64, 64)), "a cat"), 0, Framing(64, caption="other"), lambda i: torch.zeros(len(i), 3, 8, 8)
    )
    assert kept.text == "a cat"


def test_a_damaged_reference_is_left_out_where_there_are_others(faces):
    framing = Framing(64, references=9, fewest=9)
    for record in (r for r in map(Identities(open_data(str(faces)), 3).__getitem__, range(4)) if r.key.endswith(("1.png", "3.png"))):
        assert example(record, 0, framing, lambda images: torch.zeros(len(images), 3, 8, 8)).references.shape[0] == 9
    with pytest.raises(ImageError):
        example(Record("k", Image.new("RGB", (64, 64)), references=(b"no",)), 0, framing, lambda i: torch.zeros(len(i), 3, 8, 8))


def test_how_many_references_differ():
    pictures = tuple(Image.new("RGB", (8, 8), (n, 0, 0)) for n in range(9))
    record, counts = Record("k", pictures[0], references=pictures), set()
    for seed in range(60):
        seen: list[int] = []
        example(record, seed, Framing(8, references=9, fewest=1), lambda i, s=seen: [s.append(p.getpixel((0, 0))[0]) for p in i])
        counts.add(len(set(seen)))
        assert len(seen) == 9
    assert counts == set(range(1, 10))
    seen = []
    example(record, 0, Framing(8, references=9, fewest=9), lambda i: [seen.append(p.getpixel((0, 0))[0]) for p in i])
    assert sorted(seen) == list(range(9))


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    for _ in encode(Encode(data="mini:20x5", out=str(folder), batch=4, device="cpu")):
        pass
    return folder


def test_a_cache_is_put_together_by_subject(cache):
    rows = Siblings(Cache(cache), 5)
    assert len(rows) == 20 and len(rows.subjects) == 4
    assert rows.subjects == {name: places for name, places in Identities(Mini(20, photos=5), 5).subjects.items()}
    for i in range(20):
        stored = rows[i]
        row = rows.records.after(stored, 7, 9, 9)
        assert row.subject is None and row.image.shape[0] == 9
        own = rows.records.image(stored.at)
        assert not any(torch.equal(part[None], own) for part in row.image)
        assert len({tuple(part.flatten().tolist()) for part in row.image}) == 4  # all others, some of them twice
        assert torch.equal(row.mean, rows.records.row(stored.at).mean)
    torch.testing.assert_close(rows.records.after(rows[3], 7, 9, 1).image, rows.records.after(rows[3], 7, 9, 1).image, rtol=0, atol=0)
    counts = {len({tuple(p.flatten().tolist()) for p in rows.records.after(rows[3], seed, 4, 1).image}) for seed in range(40)}
    assert counts == {1, 2, 3, 4}


def test_training_from_a_cache_of_single_pictures(cache, tmp_path):
    choice = Train(cache=str(cache), subjects=5, combine="self-attention", out=str(tmp_path), **SMALL)
    assert len(list(train(choice))) == 2
    adapter, _ = checkpoints.load_adapter(tmp_path / "adapter.safetensors")
    assert isinstance(adapter.aggregator, SelfAttention)
    again = Train(adapter=str(tmp_path / "adapter.safetensors"), cache=str(cache), subjects=5, out=str(tmp_path / "more"), **SMALL)
    assert len(list(train(again))) == 2  # goes on as it was trained
    assert checkpoints.about(tmp_path / "more" / "adapter.safetensors")["aggregator"] == "self-attention"


def test_a_cache_without_subjects_says_so(tmp_path, cache):
    for sidecar in cache.glob("0*.json"):
        copy = tmp_path / sidecar.name
        copy.write_text(json.dumps({k: v for k, v in json.loads(sidecar.read_text()).items() if k != "subjects"}))
    for path in [*cache.glob("*.safetensors"), cache / "cache.json"]:
        (tmp_path / path.name).symlink_to(path)
    with pytest.raises(UserError, match="no subject has 5 pictures: the data name 0"):
        Siblings(Cache(tmp_path), 5)


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"subjects": 1}, "at least 2 pictures"),
        ({"combine": "sum"}, "combine: expected one of"),
        ({"combine": "attention", "method": "simple"}, "simple has a way of its own"),
        ({"combine": "self-attention", "subjects": 5, "references": 4}, "reads nine"),
        ({"subjects": 5, "fewest": 10}, "fewest: expected at most as many as references"),
        ({"held_out": 1.0, "subjects": 4}, "held_out"),
    ],
)
def test_mistakes_are_said(wrong, match):
    with pytest.raises(UserError, match=match):
        Train(**wrong)


def test_ways_that_do_not_fit_are_said(tmp_path):
    with pytest.raises(UserError, match="attention reads pooled embeddings, and this adapter a grid; take attention-tokens"):
        next(train(Train(data="mini:20x5", method="ip-adapter-plus", combine="attention", subjects=5, out=str(tmp_path), **SMALL)))
    with pytest.raises(UserError, match="joint lays the references' patches before a resampler"):
        next(train(Train(data="mini:20x5", combine="joint", subjects=5, out=str(tmp_path), **SMALL)))


def test_an_aggregator_of_a_file_that_is_unknown_or_missing_is_said(tmp_path):
    tensors, about = checkpoints.read("src/imprompt/mini/weights/adapter.safetensors")
    checkpoints.write(tensors, tmp_path / "a.safetensors", about | {"aggregator": "magic"})
    with pytest.raises(UserError, match="by 'magic'; expected one of concat"):
        checkpoints.load_adapter(tmp_path / "a.safetensors")
    checkpoints.write(tensors, tmp_path / "b.safetensors", about | {"aggregator": "attention"})
    with pytest.raises(UserError, match=r"aggregator.* should be"):
        checkpoints.load_adapter(tmp_path / "b.safetensors")


def test_trained_aggregators_survive_a_pickle(tmp_path):
    adapter, _ = checkpoints.load_adapter("src/imprompt/mini/weights/adapter.safetensors")
    adapter.aggregator = SetAttention(128)
    about = {"base": "mini", "aggregator": "attention"}
    for name in ("a.bin", "a.safetensors"):
        checkpoints.save(adapter, tmp_path / name, about)
        back, spec = checkpoints.load_adapter(tmp_path / name)
        x = torch.randn(1, 5, 1, 128, generator=torch.Generator().manual_seed(random.Random(name).randrange(99)))
        torch.testing.assert_close(back.tokens(x), adapter.tokens(x), rtol=1e-5, atol=1e-6)
        assert spec.base == "mini"


def test_a_subject_that_was_learned_is_not_another_ones(faces, tmp_path):
    one, other = (str(faces / f"Ærø {n}") for n in (1, 2))
    choice = Train(data=one, method="dreambooth-lora", noun="cat", prior=0, steps=1, batch=1, device="cpu", out=str(tmp_path))
    assert len(list(train(choice))) == 1 and list(train(choice)) == []
    for change in ({"data": other}, {"noun": "dog"}):
        with pytest.raises(UserError, match="use the photographs, --noun and --token that it was begun with"):
            list(train(replace(choice, **change)))
    assert len(list(train(replace(choice, data=other, resume="never")))) == 1
