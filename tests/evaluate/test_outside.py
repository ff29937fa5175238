"""Other people's pipelines: each of the real classes, tiny and random, draws under our protocol; a bad source gets one sentence."""

import csv
import json
import shutil
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from diffusers import ControlNetModel, DiffusionPipeline, KandinskyPriorPipeline, pipelines
from PIL import Image

from imprompt.cli import main
from imprompt.config import Evaluate
from imprompt.errors import UserError
from imprompt.evaluation import external as outside
from imprompt.evaluation.system import Case, How
from imprompt.evaluation.systems import load_contender


def cases(*references):
    return [Case("", "", (picture,), picture) for picture in references]


HOW = How(steps=2, guidance=3.0, size=(32, 32))

# Builders of a source's places, and whether the pipeline hears the text.
SOURCES = {
    "image variation": ((tiny.image_variation,), False),
    "stable unclip": ((tiny.stable_unclip,), True),
    "karlo": ((tiny.karlo,), False),
    "kandinsky 2.1": ((tiny.kandinsky_prior, tiny.kandinsky), True),
    "kandinsky 2.2": ((tiny.kandinsky_prior_22, tiny.kandinsky_22), False),
    "versatile": ((tiny.versatile,), False),
    "versatile, published": ((tiny.versatile_whole,), False),
    "blip": ((tiny.blip,), True),
    "shuffle": ((tiny.stable_diffusion, tiny.control), True),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("outside")


@pytest.fixture(scope="module")
def source_of(place):
    @cache
    def build(builder) -> Path:
        torch.manual_seed(0)
        builder(place / builder.__name__)
        return place / builder.__name__

    return lambda what: "+".join(str(build(builder)) for builder in SOURCES[what][0])


@pytest.fixture(scope="module")
def contender_of(source_of):
    return cache(lambda what: outside.load_outside(source_of(what), "cpu", torch.float32))


@pytest.fixture(params=SOURCES)
def what(request) -> str:
    return request.param


def noise(seed: int, size: tuple[int, int] = (40, 36)) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(values)


RED, NOISE = Image.new("RGB", (36, 36), (220, 30, 40)), noise(0)


def difference(a: Image.Image, b: Image.Image) -> float:
    """The largest, in 256ths."""
    return np.abs(np.asarray(a, dtype=float) - np.asarray(b, dtype=float)).max()


def test_every_kind_is_tried_here(source_of):
    assert {outside._classes(source_of(what)) for what in SOURCES} == set(outside.KINDS)


def test_seed_and_reference_make_the_picture(what, contender_of):
    contender = contender_of(what)
    first, other, later = contender.draw(cases(RED, NOISE, RED), ["a fish"] * 3, [1, 1, 2], HOW)
    assert first.size == (32, 32) and first.mode == "RGB"
    assert difference(first, other) > 2, "the reference is not heard"
    assert difference(first, later) > 2, "the seed is not heard"
    assert difference(first, contender.draw(cases(RED), ["a fish"], [1], HOW)[0]) <= 2, "it matters what is drawn beside it"


def test_order_does_not_matter(what, contender_of):
    contender = contender_of(what)
    a, b = contender.draw(cases(RED, NOISE), ["a fish", ""], [1, 2], HOW)
    d, c = contender.draw(cases(NOISE, RED), ["", "a fish"], [2, 1], HOW)
    assert difference(a, c) <= 2 and difference(b, d) <= 2


def test_text_is_heard_where_there_is_an_ear(what, contender_of):
    a, b = contender_of(what).draw(cases(RED, RED), ["a red fish", "a small house at night"], [1, 1], HOW)
    assert (difference(a, b) > 1) == SOURCES[what][1]


def test_other_sizes_and_no_guidance(what, contender_of):
    [picture] = contender_of(what).draw(cases(noise(1, (50, 30)).convert("L")), [""], [1], How(2, 1.0, (44, 28)))
    assert picture.size == (44, 28) and picture.mode == "RGB"


def test_name_and_trained_parameters(what, contender_of):
    contender = contender_of(what)
    assert contender.name == "+".join(builder.__name__ for builder in SOURCES[what][0])
    assert isinstance(contender.trainable, int) and contender.trainable > 10_000
    everything = sum(
        p.numel() for part in contender.pipes[-1].components.values() if hasattr(part, "parameters") for p in part.parameters()
    )
    assert contender.trainable < everything


def test_frozen_parts_do_not_count(contender_of):
    shuffle, blip = contender_of("shuffle"), contender_of("blip")
    assert shuffle.trainable == sum(p.numel() for p in shuffle.pipes[0].controlnet.parameters())
    [pipe] = blip.pipes
    parts = [pipe.unet, pipe.text_encoder, pipe.qformer]
    assert blip.trainable == sum(p.numel() for part in parts for p in part.parameters()) - pipe.qformer.visual_encoder.num_parameters()


def test_kandinsky_hears_what_interpolate_gives(source_of, contender_of):
    """The decoder gets the embeddings that diffusers' own way gives, for which the prior's diffusion runs in vain."""
    whole = KandinskyPriorPipeline.from_pretrained(source_of("kandinsky 2.1").split("+")[0])
    whole.set_progress_bar_config(disable=True)
    theirs = whole.interpolate([NOISE], [1.0])
    with torch.no_grad():
        ours = outside.kandinsky(*contender_of("kandinsky 2.1").pipes, outside.Asked([NOISE], [""], [], HOW))
    assert torch.allclose(ours["image_embeds"], theirs.image_embeds, atol=1e-6)
    assert torch.allclose(ours["negative_image_embeds"], theirs.negative_image_embeds, atol=1e-6)


def test_blip_reads_forwards(contender_of):
    """The causal mask arrives: a later word does not change what stands before it."""
    encoder = contender_of("blip").pipes[0].text_encoder
    ids = torch.arange(1, 13)[None]
    changed = ids.clone()
    changed[0, 8] = 40
    with torch.no_grad():
        before, after = (encoder(input_ids=tokens, ctx_embeddings=None)[0] for tokens in (ids, changed))
    assert torch.allclose(before[:, :8], after[:, :8], atol=1e-6)
    assert not torch.allclose(before[:, 8:], after[:, 8:], atol=1e-3)


def test_scale_weighs_the_controlnet(contender_of):
    deaf = How(2, 3.0, (32, 32), scale=0.0)
    a, b = contender_of("shuffle").draw(cases(RED, NOISE), ["", ""], [1, 1], deaf)
    assert difference(a, b) <= 1


def test_content_shuffle():
    """Colours stay, places do not; the generator says which."""
    picture = outside._pixels(noise(3, (48, 40)))
    once, again, other = (outside.shuffled(picture, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert once.shape == picture.shape and torch.equal(once, again) and not torch.allclose(once, other, atol=0.1)
    assert not torch.allclose(once, picture, atol=0.1) and once.min() >= 0 and once.max() <= 1
    flat = outside._pixels(RED)
    assert torch.allclose(outside.shuffled(flat, torch.Generator()), flat, atol=1e-6)


def test_diffusers_is_left_as_it_was(source_of):
    before = {room: hasattr(pipelines, room) for room in ("unclip", "blip_diffusion")}
    outside.load_outside(source_of("karlo"), "cpu", torch.float32)
    assert before == {room: hasattr(pipelines, room) for room in before}


def test_it_is_a_row_of_an_evaluation_on_coco(source_of, tmp_path, capsys):
    coco, out = tmp_path / "coco", tmp_path / "out"
    (coco / "annotations").mkdir(parents=True)
    (coco / "val2017").mkdir()
    listed = [{"id": i, "file_name": f"{i:012}.jpg", "width": 40, "height": 36} for i in range(1, 6)]
    for image in listed:
        noise(image["id"]).save(coco / "val2017" / image["file_name"])
    said = [{"id": i, "image_id": i, "caption": f"picture {i}"} for i in range(1, 6)]
    (coco / "annotations" / "captions_val2017.json").write_text(json.dumps({"images": listed, "annotations": said}))
    words = ["evaluate", "--adapter", "mini", "--data", str(coco), "--against", source_of("image variation"), "--samples", "1"]
    assert main([*words, "--steps", "2", "--limit", "4", "--out", str(out)]) == 0
    rows = {row["row"]: row for row in csv.DictReader((out / "table.csv").read_text().splitlines())}
    assert list(rows) == ["copy", "text", "mini", "image_variation"] and {row["pictures"] for row in rows.values()} == {"4"}
    assert all(float(rows["image_variation"][column]) < float(rows["copy"][column]) for column in ("CLIP-I", "likeness"))
    assert "image_variation" in capsys.readouterr().out


# --------------------------------------------------------------------------------------------------------- what is a source


def test_sources_are_told_from_everything_else(what, source_of):
    assert outside.is_outside(source_of(what))


@pytest.mark.parametrize(
    "name",
    ["", "mini", "mini-plus", "adapter.safetensors", "runs/adapter.safetensors", "./none", "h94/IP-Adapter/models/x.bin"],
)
def test_the_hub_is_not_asked_about_files(name, monkeypatch):
    asked = []
    monkeypatch.setattr(DiffusionPipeline, "load_config", lambda place: asked.append(place))
    assert not outside.is_outside(name) and not asked


def test_a_hub_id_can_be_nothing_else(monkeypatch):
    assert outside.is_outside("somebody/something") and outside.is_outside("somebody/prior+somebody/decoder")
    monkeypatch.setattr(DiffusionPipeline, "load_config", lambda place: {"_class_name": "KandinskyPipeline"})
    with pytest.raises(UserError, match=r"somebody/decoder is a KandinskyPipeline; expected one of .*KandinskyPriorPipeline"):
        load_contender("somebody/decoder", Evaluate().settled())


def test_a_hub_that_cannot_be_asked_is_said(monkeypatch):
    def nobody(place):
        raise OSError("offline mode is enabled")

    monkeypatch.setattr(DiffusionPipeline, "load_config", nobody)
    monkeypatch.setattr(ControlNetModel, "load_config", nobody)
    with pytest.raises(UserError, match=r"no pipeline at somebody/something: expected a folder .* or a hub id; .*offline mode is enabled"):
        load_contender("somebody/something", Evaluate().settled())


# -------------------------------------------------------------------------------------------------------------- bad sources


def cut(path: Path) -> None:
    weights = next(path.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])


def unpooled(folder: Path) -> None:
    shutil.rmtree(folder)
    tiny.control(folder, pooled=False)


# The source that is copied, the place in it that is spoilt, how, and what is said.
SPOILT = {
    "a damaged index": ("image variation", 0, lambda f: (f / "model_index.json").write_text("{ no JSON"), "no pipeline at"),
    "an index without a class": ("image variation", 0, lambda f: (f / "model_index.json").write_text("{}"), "no pipeline at"),
    "an index that is a list": ("image variation", 0, lambda f: (f / "model_index.json").write_text("[]"), "no pipeline at"),
    "a damaged UNet": ("image variation", 0, lambda f: cut(f / "unet"), "the StableDiffusionImageVariationPipeline at"),
    "a damaged image encoder": ("stable unclip", 0, lambda f: cut(f / "image_encoder"), "the StableUnCLIPImg2ImgPipeline at"),
    "no image encoder": ("versatile", 0, lambda f: shutil.rmtree(f / "image_encoder"), "VersatileDiffusionImageVariationPipeline at"),
    "a damaged prior": ("kandinsky 2.1", 0, lambda f: cut(f / "image_encoder"), "the KandinskyPriorPipeline at"),
    "a damaged decoder": ("kandinsky 2.1", 1, lambda f: cut(f / "movq"), "the KandinskyPipeline at"),
    "a damaged ControlNet": ("shuffle", 1, cut, "the ControlNetModel at"),
    "a ControlNet that keeps places": ("shuffle", 1, unpooled, "expected one with global_pool_conditions"),
}


def refusal(source: str) -> str:
    with pytest.raises(UserError) as caught:
        outside.load_outside(source, "cpu", torch.float32)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("why", SPOILT)
def test_a_spoilt_source_gets_one_sentence(why, source_of, tmp_path):
    what, which, spoil, said = SPOILT[why]
    copies = [Path(shutil.copytree(part, tmp_path / Path(part).name)) for part in source_of(what).split("+")]
    spoil(copies[which])
    assert said in refusal("+".join(map(str, copies)))


def test_what_is_no_source_gets_one_sentence(source_of, tmp_path):
    prior, decoder = source_of("kandinsky 2.1").split("+")
    base, _ = source_of("shuffle").split("+")
    offline = refusal("nobody/nothing")
    assert "no pipeline at nobody/nothing: expected" in offline and "model_index.json" in offline
    assert "no pipeline at" in refusal(str(tmp_path)) and "no pipeline at" in refusal(str(tmp_path / "none"))
    assert "is a StableDiffusionPipeline; expected one of StableDiffusionImageVariationPipeline, " in refusal(base)
    assert "is a KandinskyPriorPipeline; expected one of" in refusal(prior)
    assert "is a KandinskyPipeline+KandinskyPriorPipeline; expected one of" in refusal(f"{decoder}+{prior}")


def test_settings_that_a_pipeline_refuses(source_of, contender_of):
    with pytest.raises(UserError, match="steps: expected at least 2 with UnCLIPImageVariationPipeline, received 1"):
        contender_of("karlo").draw(cases(RED), [""], [1], How(1, 3.0, (32, 32)))
    with pytest.raises(UserError, match="fewer steps"):
        contender_of("image variation").draw(cases(RED), [""], [1], How(1001, 3.0, (32, 32)))


def test_half_precision(what, source_of):
    """PyTorch does not resize smoothly in it on CPUs, which Karlo wants, and NumPy has no bfloat16 for BLIP-Diffusion's pictures."""
    contender = outside.load_outside(source_of(what), "cpu", torch.bfloat16)
    if what in ("karlo", "blip"):
        with pytest.raises(UserError, match="try float32"):
            contender.draw(cases(RED), ["a fish"], [1], HOW)
    else:
        [picture] = contender.draw(cases(RED), ["a fish"], [1], HOW)
        assert picture.size == (32, 32)
