"""External pipelines: every class, tiny and with random weights, as a system of an evaluation; unusable sources get one sentence."""

import csv
import json
import shutil
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import tiny_pipelines as tiny
import torch
from diffusers import ControlNetModel, DiffusionPipeline, KandinskyPriorPipeline, pipelines
from PIL import Image

from imprompt.cli import main
from imprompt.config import EvaluateConfig
from imprompt.errors import UserError
from imprompt.evaluation import external
from imprompt.evaluation.samples import EvalSample, SamplingParams
from imprompt.evaluation.systems import SystemLoader


def make_samples(*references):
    return [EvalSample("", "", (image,), image) for image in references]


PARAMS = SamplingParams(num_inference_steps=2, guidance_scale=3.0, size=(32, 32))

# Functions that save a source's pipelines, and whether it is conditioned on text.
SOURCES = {
    "image variation": ((tiny.save_image_variation,), False),
    "stable unclip": ((tiny.save_stable_unclip,), True),
    "karlo": ((tiny.save_karlo,), False),
    "kandinsky 2.1": ((tiny.save_kandinsky_prior, tiny.save_kandinsky), True),
    "kandinsky 2.2": ((tiny.save_kandinsky_prior_22, tiny.save_kandinsky_22), False),
    "versatile": ((tiny.save_versatile,), False),
    "versatile, published": ((tiny.save_published_versatile,), False),
    "blip": ((tiny.save_blip,), True),
    "shuffle": ((tiny.save_stable_diffusion, tiny.save_controlnet), True),
}


def folder_name(save):
    return save.__name__.removeprefix("save_")


@pytest.fixture(scope="module")
def find_source(tmp_path_factory):
    """A function of a key of SOURCES: the folders of its pipelines, joined by +."""
    folder = tmp_path_factory.mktemp("external")

    @cache
    def save_once(save) -> Path:
        torch.manual_seed(0)
        save(folder / folder_name(save))
        return folder / folder_name(save)

    return lambda name: "+".join(str(save_once(save)) for save in SOURCES[name][0])


@pytest.fixture(scope="module")
def load_pipeline(find_source):
    """A function of a key of SOURCES: its system, loaded once."""
    return cache(lambda name: external.load_external(find_source(name), "cpu", torch.float32))


@pytest.fixture(params=SOURCES)
def name(request) -> str:
    return request.param


def make_noise(seed: int, size: tuple[int, int] = (40, 36)) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(values)


RED, NOISE = Image.new("RGB", (36, 36), (220, 30, 40)), make_noise(0)


def max_difference(a: Image.Image, b: Image.Image) -> float:
    """Of 255."""
    return np.abs(np.asarray(a, dtype=float) - np.asarray(b, dtype=float)).max()


def test_every_pipeline_class_is_tested(find_source):
    assert {external._class_names(find_source(name)) for name in SOURCES} == set(external.EXTERNAL_PIPELINES)


def test_the_image_depends_on_reference_and_seed(name, load_pipeline):
    system = load_pipeline(name)
    first, other, later = system.generate(make_samples(RED, NOISE, RED), ["a fish"] * 3, [1, 1, 2], PARAMS)
    assert first.size == (32, 32) and first.mode == "RGB"
    assert max_difference(first, other) > 2, "the reference has no effect"
    assert max_difference(first, later) > 2, "the seed has no effect"
    assert max_difference(first, system.generate(make_samples(RED), ["a fish"], [1], PARAMS)[0]) <= 2, (
        "other images of the batch have an effect"
    )


def test_order_does_not_matter(name, load_pipeline):
    system = load_pipeline(name)
    a, b = system.generate(make_samples(RED, NOISE), ["a fish", ""], [1, 2], PARAMS)
    d, c = system.generate(make_samples(NOISE, RED), ["", "a fish"], [2, 1], PARAMS)
    assert max_difference(a, c) <= 2 and max_difference(b, d) <= 2


def test_the_prompt_has_an_effect_where_the_pipeline_uses_it(name, load_pipeline):
    a, b = load_pipeline(name).generate(make_samples(RED, RED), ["a red fish", "a small house at night"], [1, 1], PARAMS)
    assert (max_difference(a, b) > 1) == SOURCES[name][1]


def test_other_sizes_and_no_guidance(name, load_pipeline):
    [image] = load_pipeline(name).generate(make_samples(make_noise(1, (50, 30)).convert("L")), [""], [1], SamplingParams(2, 1.0, (44, 28)))
    assert image.size == (44, 28) and image.mode == "RGB"


def test_name_and_trainable_params(name, load_pipeline):
    system = load_pipeline(name)
    assert system.name == "+".join(folder_name(save) for save in SOURCES[name][0])
    assert isinstance(system.trainable_params, int) and system.trainable_params > 10_000
    all_params = sum(p.numel() for part in system.pipes[-1].components.values() if hasattr(part, "parameters") for p in part.parameters())
    assert system.trainable_params < all_params


def test_frozen_modules_are_not_counted(load_pipeline):
    shuffle, blip = load_pipeline("shuffle"), load_pipeline("blip")
    assert shuffle.trainable_params == sum(p.numel() for p in shuffle.pipes[0].controlnet.parameters())
    [pipe] = blip.pipes
    modules = [pipe.unet, pipe.text_encoder, pipe.qformer]
    assert (
        blip.trainable_params
        == sum(p.numel() for module in modules for p in module.parameters()) - pipe.qformer.visual_encoder.num_parameters()
    )


def test_kandinsky_gets_the_embeddings_of_interpolate(find_source, load_pipeline):
    """Diffusers computes the same embeddings for the decoder, but also runs the prior's diffusion, whose result it discards."""
    prior = KandinskyPriorPipeline.from_pretrained(find_source("kandinsky 2.1").split("+")[0])
    prior.set_progress_bar_config(disable=True)
    expected = prior.interpolate([NOISE], [1.0])
    with torch.no_grad():
        kwargs = external.kandinsky_kwargs(*load_pipeline("kandinsky 2.1").pipes, external.GenerationRequest([NOISE], [""], [], PARAMS))
    assert torch.allclose(kwargs["image_embeds"], expected.image_embeds, atol=1e-6)
    assert torch.allclose(kwargs["negative_image_embeds"], expected.negative_image_embeds, atol=1e-6)


def test_the_text_encoder_of_blip_is_causal(load_pipeline):
    """The causal mask has an effect: a later token does not change the states of earlier ones."""
    encoder = load_pipeline("blip").pipes[0].text_encoder
    ids = torch.arange(1, 13)[None]
    changed = ids.clone()
    changed[0, 8] = 40
    with torch.no_grad():
        before, after = (encoder(input_ids=tokens, ctx_embeddings=None)[0] for tokens in (ids, changed))
    assert torch.allclose(before[:, :8], after[:, :8], atol=1e-6)
    assert not torch.allclose(before[:, 8:], after[:, 8:], atol=1e-3)


def test_the_scale_is_that_of_the_controlnet(load_pipeline):
    without_control = SamplingParams(2, 3.0, (32, 32), scale=0.0)
    a, b = load_pipeline("shuffle").generate(make_samples(RED, NOISE), ["", ""], [1, 1], without_control)
    assert max_difference(a, b) <= 1


def test_content_shuffle():
    """Colors are kept, positions are not; the generator determines the new ones."""
    image = external._to_tensor(make_noise(3, (48, 40)))
    once, again, other = (external.shuffle_content(image, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert once.shape == image.shape and torch.equal(once, again) and not torch.allclose(once, other, atol=0.1)
    assert not torch.allclose(once, image, atol=0.1) and once.min() >= 0 and once.max() <= 1
    flat = external._to_tensor(RED)
    assert torch.allclose(external.shuffle_content(flat, torch.Generator()), flat, atol=1e-6)


def test_the_modules_of_diffusers_are_restored(find_source):
    before = {module: hasattr(pipelines, module) for module in ("unclip", "blip_diffusion")}
    external.load_external(find_source("karlo"), "cpu", torch.float32)
    assert before == {module: hasattr(pipelines, module) for module in before}


def test_a_pipeline_is_a_row_of_an_evaluation_on_coco(find_source, tmp_path, capsys):
    coco, out = tmp_path / "coco", tmp_path / "out"
    (coco / "annotations").mkdir(parents=True)
    (coco / "val2017").mkdir()
    images = [{"id": i, "file_name": f"{i:012}.jpg", "width": 40, "height": 36} for i in range(1, 6)]
    for image in images:
        make_noise(image["id"]).save(coco / "val2017" / image["file_name"])
    captions = [{"id": i, "image_id": i, "caption": f"image {i}"} for i in range(1, 6)]
    (coco / "annotations" / "captions_val2017.json").write_text(json.dumps({"images": images, "annotations": captions}))
    command = [
        "evaluate",
        "--adapter",
        "mini",
        "--data",
        str(coco),
        "--baseline",
        find_source("image variation"),
        "--num-images-per-prompt",
        "1",
    ]
    assert main([*command, "--steps", "2", "--num-prompts", "4", "--output-dir", str(out)]) == 0
    rows = {row["row"]: row for row in csv.DictReader((out / "table.csv").read_text().splitlines())}
    assert list(rows) == ["target (upper bound)", "text only", "mini", "image_variation"] and {row["images"] for row in rows.values()} == {
        "4"
    }
    assert all(
        float(rows["image_variation"][column]) < float(rows["target (upper bound)"][column])
        for column in ("CLIP-I (mini)", "feature cosine")
    )
    assert "image_variation" in capsys.readouterr().out


# ----------------------------------------------------------------------------------------------------------------- sources


def test_sources_of_pipelines_are_detected(name, find_source):
    assert external.is_external(find_source(name))


@pytest.mark.parametrize(
    "name",
    ["", "mini", "mini-plus", "adapter.safetensors", "runs/adapter.safetensors", "./none", "h94/IP-Adapter/models/x.bin"],
)
def test_the_hub_is_not_asked_about_files(name, monkeypatch):
    requests = []
    monkeypatch.setattr(DiffusionPipeline, "load_config", lambda location: requests.append(location))
    assert not external.is_external(name) and not requests


def test_a_hub_id_can_only_be_a_pipeline(monkeypatch):
    assert external.is_external("somebody/something") and external.is_external("somebody/prior+somebody/decoder")
    monkeypatch.setattr(DiffusionPipeline, "load_config", lambda location: {"_class_name": "KandinskyPipeline"})
    with pytest.raises(UserError, match=r"somebody/decoder is a KandinskyPipeline; expected one of .*KandinskyPriorPipeline"):
        SystemLoader.from_config(EvaluateConfig()).load_system("somebody/decoder")


def test_an_unreachable_hub_is_reported(monkeypatch):
    def raise_offline(location):
        raise OSError("offline mode is enabled")

    monkeypatch.setattr(DiffusionPipeline, "load_config", raise_offline)
    monkeypatch.setattr(ControlNetModel, "load_config", raise_offline)
    with pytest.raises(UserError, match=r"no pipeline at somebody/something: expected a folder .* or a hub id; .*offline mode is enabled"):
        SystemLoader.from_config(EvaluateConfig()).load_system("somebody/something")


# ---------------------------------------------------------------------------------------------------------- damaged sources


def truncate_weights(path: Path) -> None:
    weights = next(path.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])


def save_controlnet_with_layout(folder: Path) -> None:
    shutil.rmtree(folder)
    tiny.save_controlnet(folder, global_pool_conditions=False)


# The source that is copied, the index of its damaged pipeline, how it is damaged, and the expected message.
DAMAGES = {
    "a damaged index": ("image variation", 0, lambda f: (f / "model_index.json").write_text("{ no JSON"), "no pipeline at"),
    "an index without a class": ("image variation", 0, lambda f: (f / "model_index.json").write_text("{}"), "no pipeline at"),
    "an index that is a list": ("image variation", 0, lambda f: (f / "model_index.json").write_text("[]"), "no pipeline at"),
    "a damaged UNet": ("image variation", 0, lambda f: truncate_weights(f / "unet"), "the StableDiffusionImageVariationPipeline at"),
    "a damaged image encoder": ("stable unclip", 0, lambda f: truncate_weights(f / "image_encoder"), "the StableUnCLIPImg2ImgPipeline at"),
    "no image encoder": ("versatile", 0, lambda f: shutil.rmtree(f / "image_encoder"), "VersatileDiffusionImageVariationPipeline at"),
    "a damaged prior": ("kandinsky 2.1", 0, lambda f: truncate_weights(f / "image_encoder"), "the KandinskyPriorPipeline at"),
    "a damaged decoder": ("kandinsky 2.1", 1, lambda f: truncate_weights(f / "movq"), "the KandinskyPipeline at"),
    "a damaged ControlNet": ("shuffle", 1, truncate_weights, "the ControlNetModel at"),
    "a ControlNet that keeps the layout": ("shuffle", 1, save_controlnet_with_layout, "expected one with global_pool_conditions"),
}


def load_error(source: str) -> str:
    with pytest.raises(UserError) as error:
        external.load_external(source, "cpu", torch.float32)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_source_gets_one_sentence(damage, find_source, tmp_path):
    name, index, apply_damage, message = DAMAGES[damage]
    copies = [Path(shutil.copytree(folder, tmp_path / Path(folder).name)) for folder in find_source(name).split("+")]
    apply_damage(copies[index])
    assert message in load_error("+".join(map(str, copies)))


def test_other_sources_get_one_sentence(find_source, tmp_path):
    prior, decoder = find_source("kandinsky 2.1").split("+")
    base, _ = find_source("shuffle").split("+")
    offline = load_error("unknown/model")
    assert "no pipeline at unknown/model: expected" in offline and "model_index.json" in offline
    assert "no pipeline at" in load_error(str(tmp_path)) and "no pipeline at" in load_error(str(tmp_path / "none"))
    assert "is a StableDiffusionPipeline; expected one of StableDiffusionImageVariationPipeline, " in load_error(base)
    assert "is a KandinskyPriorPipeline; expected one of" in load_error(prior)
    assert "is a KandinskyPipeline+KandinskyPriorPipeline; expected one of" in load_error(f"{decoder}+{prior}")


def test_rejected_settings_are_reported(find_source, load_pipeline):
    with pytest.raises(UserError, match="num_inference_steps: expected at least 2 with UnCLIPImageVariationPipeline, received 1"):
        load_pipeline("karlo").generate(make_samples(RED), [""], [1], SamplingParams(1, 3.0, (32, 32)))
    with pytest.raises(UserError, match="fewer steps"):
        load_pipeline("image variation").generate(make_samples(RED), [""], [1], SamplingParams(1001, 3.0, (32, 32)))


def test_half_precision(name, find_source):
    """PyTorch has no antialiased resizing in it on CPUs, which Karlo uses, and NumPy no bfloat16, which BLIP-Diffusion's images need."""
    system = external.load_external(find_source(name), "cpu", torch.bfloat16)
    if name in ("karlo", "blip"):
        with pytest.raises(UserError, match="try float32"):
            system.generate(make_samples(RED), ["a fish"], [1], PARAMS)
    else:
        [image] = system.generate(make_samples(RED), ["a fish"], [1], PARAMS)
        assert image.size == (32, 32)
