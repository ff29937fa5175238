"""All of mini is built from scratch; the result is a Stable Diffusion folder with adapters."""

import json
from dataclasses import replace

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file

from imprompt.config import GenerateConfig, TrainConfig, read_options
from imprompt.errors import UserError
from imprompt.generation.generate import generate_images
from imprompt.mini import world
from imprompt.mini.attribute_classifier import AttributeClassifier
from imprompt.models import base_pipelines as pipelines
from imprompt.models import checkpoints, hub
from imprompt.models import image_prompt as prompter
from imprompt.recipes import build, controlnets, mini_models
from imprompt.recipes.build import CONFIGS, build_mini
from imprompt.recipes.mini_models import ADAPTER_PARTS, ATTRIBUTES, MiniBuild, build_vae, normalize_latents
from imprompt.recipes.style import STYLES, train_style

PARTS = {
    "clip",
    "judge-clip",
    "judge",
    "identity",
    "vae",
    "unet",
    "adapter",
    "adapter-plus",
    "adapter-subject",
    "edges",
    "silhouette",
    "judge-silhouette",
}

SMALL_ADAPTER = {"train_batch_size": 4, "num_validation_images": 2, "validation_num_inference_steps": 2}


@pytest.fixture(scope="module")
def small_batches():
    """Every part and adapter trains on small batches."""
    with pytest.MonkeyPatch.context() as patch:
        for plans in (mini_models.PLANS, controlnets.PLANS):
            for name, plan in plans.items():
                patch.setitem(plans, name, replace(plan, batch_size=16 if name == "identity" else 8))  # identity: one group of subjects
        patch.setattr(
            build, "adapter_config", lambda *args, adapter_config=build.adapter_config: adapter_config(*args).with_options(**SMALL_ADAPTER)
        )
        yield


@pytest.fixture(scope="module")
def built(tmp_path_factory, small_batches):
    """A folder with a finished build in `work` and its model in `weights`: two steps for every part."""
    folder = tmp_path_factory.mktemp("mini")
    build_mini(MiniBuild(folder / "work", lambda *_: None, budget=0.0002))
    MiniBuild(folder / "work", lambda *_: None, budget=0.0002).assemble_model(folder / "weights")
    return folder


def test_every_part_is_saved_and_not_trained_again(built):
    assert {path.name for path in (built / "work" / "parts").iterdir()} == PARTS
    progress = []
    build_mini(MiniBuild(built / "work", lambda *call: progress.append(call), budget=0.0002))
    assert progress == []


def test_the_folder_is_a_stable_diffusion(built):
    pipe = StableDiffusionPipeline.from_pretrained(built / "weights")
    pipe.set_progress_bar_config(disable=True)
    assert pipe("a red fish", num_inference_steps=2).images[0].size == (world.SIZE, world.SIZE)
    index = json.loads((built / "weights" / "model_index.json").read_text())
    assert index["image_encoder"] == ["transformers", "CLIPVisionModelWithProjection"]


@pytest.mark.parametrize("name, kind", [("adapter", "base"), ("adapter-plus", "plus"), ("adapter-subject", "plus")])
def test_the_adapters_are_public_files(built, name, kind):
    adapter, spec = checkpoints.load_adapter(built / "weights" / f"{name}.safetensors")
    assert (spec.adapter_type, spec.base_model, spec.dtype) == (kind, "mini", "float16")
    assert len(spec.layers) == 7 and adapter.num_parameters() == spec.num_parameters


def test_it_generates_from_a_reference(built, monkeypatch):
    for module in (hub, pipelines):
        monkeypatch.setattr(module, "MINI_PATH", built / "weights")
    image = world.render(world.make_subject(0), world.make_scene(0))
    for adapter in hub.BUNDLED_ADAPTERS:
        generated = generate_images(GenerateConfig.from_options(image=(image,), adapter=adapter, num_inference_steps=2, num_images=2))
        assert [one.seed for one in generated] == [0, 1]
    assert prompter.load("mini").spec.uses_patch_features is False


def test_the_classifier_reads_every_attribute(built):
    classifier = AttributeClassifier(built / "weights")
    predictions = classifier.classify([world.render(world.make_subject(i), world.make_scene(i)) for i in range(3)])
    assert [set(row) for row in predictions] == [set(ATTRIBUTES)] * 3
    assert all(value in ATTRIBUTES[name] for row in predictions for name, value in row.items())


@pytest.mark.parametrize("name", ADAPTER_PARTS)
def test_the_shipped_adapters_have_the_options_of_their_configuration(name):
    config = TrainConfig.from_options(**read_options(CONFIGS / f"{name}.toml"))
    by_subject = name == "adapter-subject"
    assert (config.pipeline.model, config.dataset.data, config.adapter) == (
        "mini",
        "mini:12000x10" if by_subject else "mini",
        "mini-plus" if by_subject else None,
    )
    assert checkpoints.load_adapter(hub.MINI_PATH / f"{name}.safetensors")[0].aggregator.name == (
        "attention-tokens" if by_subject else "concat"
    )
    assert (
        checkpoints.detect_spec(*checkpoints.read_adapter_file(hub.MINI_PATH / f"{name}.safetensors"))
        .metadata["recipe"]
        .endswith(f"configs/{name}.toml")
    )


def test_a_custom_model_in_another_style_takes_the_adapter(tmp_path):
    model = train_style("mosaic", tmp_path, lambda *_: None, budget=0.004)
    before = load_file(hub.MINI_PATH / "unet" / "diffusion_pytorch_model.safetensors")
    after = load_file(model / "unet" / "diffusion_pytorch_model.safetensors")
    assert before.keys() == after.keys() and not torch.equal(before["conv_in.weight"], after["conv_in.weight"])
    image = world.render(world.make_subject(0), world.make_scene(0))
    assert generate_images(
        GenerateConfig.from_options(
            image=(image,), model=str(model), adapter="mini", guidance_scale=3.0, num_inference_steps=2, num_images=1
        )
    )[0].image.size == (64, 64)


@pytest.mark.parametrize("style", list(STYLES))
def test_a_style_changes_the_look_and_not_the_subject(style):
    images = [world.render(subject, world.make_scene(i)) for i, subject in zip(range(40), world.iterate_subjects(), strict=False)]
    predictions = AttributeClassifier().classify([STYLES[style](image) for image in images])
    assert all(STYLES[style](image) != image for image in images)
    correct = sum(row["category"] == subject.category for row, subject in zip(predictions, world.iterate_subjects(), strict=False))
    assert correct >= 20  # the classifier was not trained on the style


def test_unknown_parts_are_named(tmp_path):
    with pytest.raises(UserError, match="no part called 'unt'"):
        build_mini(MiniBuild(tmp_path, lambda *_: None, budget=0.0002), ["unt"])


def test_folding_the_latents_statistics_changes_nothing_but_their_scale():
    class RandomImages:
        count = 64

        def load_images(self, rows):
            return torch.randn(len(rows), 3, 16, 16, generator=torch.Generator().manual_seed(0))

    torch.manual_seed(0)
    vae = build_vae().eval().requires_grad_(False)
    x = RandomImages().load_images(range(8))
    before = vae.decode(vae.encode(x).latent_dist.mean).sample
    std = vae.encode(x).latent_dist.std
    mean = vae.encode(RandomImages().load_images(range(64))).latent_dist.mean
    normalize_latents(vae, RandomImages())
    after = vae.encode(x).latent_dist
    assert torch.allclose(vae.decode(after.mean).sample, before, atol=1e-4)
    scale = mean.std((0, 2, 3))[None, :, None, None]
    assert torch.allclose(after.std * scale, std, rtol=1e-3)
