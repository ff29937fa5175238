"""The whole of mini is built from nothing, and what comes out is a Stable Diffusion folder with adapters."""

import json

import pytest
import torch
from diffusers import StableDiffusionPipeline

from imprompt import checkpoints, hub, pipelines, prompter
from imprompt.config import Generate
from imprompt.errors import UserError
from imprompt.generating import draw
from imprompt.mini import world
from imprompt.mini.judging import Judge
from imprompt.mini.recipe import ATTRIBUTES, Build, autoencoder, normalise_latents

PARTS = {"clip", "judge-clip", "judge", "vae", "unet", "adapter", "adapter-plus"}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mini")
    Build(folder / "work", lambda *_: None, budget=0.0002).make()
    Build(folder / "work", lambda *_: None, budget=0.0002).install(folder / "weights")
    return folder


def test_every_part_is_kept_and_not_made_again(built):
    assert {path.name for path in (built / "work" / "parts").iterdir()} == PARTS
    said = []
    Build(built / "work", lambda *words: said.append(words), budget=0.0002).make()
    assert said == []


def test_the_folder_is_a_stable_diffusion(built):
    pipe = StableDiffusionPipeline.from_pretrained(built / "weights")
    pipe.set_progress_bar_config(disable=True)
    assert pipe("a red fish", num_inference_steps=2).images[0].size == (world.SIZE, world.SIZE)
    index = json.loads((built / "weights" / "model_index.json").read_text())
    assert index["image_encoder"] == ["transformers", "CLIPVisionModelWithProjection"]


@pytest.mark.parametrize("name, kind", [("adapter", "global"), ("adapter-plus", "resampler")])
def test_the_adapters_are_public_files(built, name, kind):
    adapter, spec = checkpoints.load_adapter(built / "weights" / f"{name}.safetensors")
    assert (spec.kind, spec.base, spec.dtype) == (kind, "mini", "float16")
    assert len(spec.layers) == 7 and adapter.trainable() == spec.parameters


def test_it_generates_after_a_reference(built, monkeypatch):
    for module in (hub, pipelines):
        monkeypatch.setattr(module, "MINI", built / "weights")
    pipelines.load_base.cache_clear()
    photo = world.draw(world.subject(0), world.scene(0))
    for adapter in ("mini", "mini-plus"):
        with_image = draw(Generate(image=(photo,), adapter=adapter, steps=2, count=2))
        assert [picture.seed for picture in with_image] == [0, 1]
    assert prompter.load("mini").spec.grid is False
    pipelines.load_base.cache_clear()


def test_the_judge_reads_every_attribute(built):
    judge = Judge(built / "weights")
    read = judge.read([world.draw(world.subject(i), world.scene(i)) for i in range(3)])
    assert [set(row) for row in read] == [set(ATTRIBUTES)] * 3
    assert all(value in ATTRIBUTES[name] for row in read for name, value in row.items())


def test_unknown_parts_are_named(tmp_path):
    with pytest.raises(UserError, match="no part called 'unt'"):
        Build(tmp_path, lambda *_: None, budget=0.0002).make(["unt"])


def test_folding_the_latents_statistics_changes_nothing_but_their_scale():
    class Pictures:
        count = 64

        def images(self, rows):
            return torch.randn(len(rows), 3, 16, 16, generator=torch.Generator().manual_seed(0))

    torch.manual_seed(0)
    vae = autoencoder().eval().requires_grad_(False)
    x = Pictures().images(range(8))
    before = vae.decode(vae.encode(x).latent_dist.mean).sample
    std = vae.encode(x).latent_dist.std
    mean = vae.encode(Pictures().images(range(64))).latent_dist.mean
    normalise_latents(vae, Pictures())
    after = vae.encode(x).latent_dist
    assert torch.allclose(vae.decode(after.mean).sample, before, atol=1e-4)
    scale = mean.std((0, 2, 3))[None, :, None, None]
    assert torch.allclose(after.std * scale, std, rtol=1e-3)
