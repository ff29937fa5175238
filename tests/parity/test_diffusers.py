"""The same adapter file in diffusers' own loader and in ours gives the same latents."""

import pytest
import torch
from PIL import Image

from conftest import image_processor, random_adapter, sd15_pipeline, sdxl_pipeline, vision_encoder
from imprompt.dit.attach import attach
from imprompt.models import checkpoints
from imprompt.models.image_encoders import ImageEncoder
from imprompt.models.image_prompt import ImagePromptEncoder

STEPS = 10


def random_image(seed):
    return Image.effect_noise((32, 32), 60 + 20 * seed).convert("RGB").rotate(30 * seed)


def sample_latents(pipe, **options):
    return pipe("a red fish", num_inference_steps=STEPS, generator=torch.Generator().manual_seed(0), output_type="latent", **options).images


def relative_error(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("adapter_type", ["base", "plus", "full-face"])
@pytest.mark.parametrize("make_pipeline", [sd15_pipeline, sdxl_pipeline])
@pytest.mark.parametrize("references", [1, 3])
def test_same_latents_as_diffusers(make_pipeline, adapter_type, references, tmp_path):
    images = [random_image(i) for i in range(references)]
    path = tmp_path / "adapter.safetensors"
    checkpoints.save(random_adapter(make_pipeline().unet, adapter_type), path)

    diffusers_pipe = make_pipeline()
    diffusers_pipe.load_ip_adapter(str(tmp_path), subfolder="", weight_name=path.name, image_encoder_folder=None)
    diffusers_pipe.set_ip_adapter_scale(0.8)
    expected = sample_latents(diffusers_pipe, ip_adapter_image=[images])

    pipe = make_pipeline()
    prompt_encoder = ImagePromptEncoder(*checkpoints.load_adapter(path), ImageEncoder(vision_encoder(), image_processor()))
    with attach(pipe, prompt_encoder(images, scale=0.8)):
        received = sample_latents(pipe)
    assert relative_error(received, expected) <= 1e-4
    assert relative_error(sample_latents(make_pipeline()), expected) > 1e-2  # the image prompt has an effect at all
