"""The same adapter file in diffusers' own loader and in ours gives the same latents."""

import pytest
import torch
from PIL import Image

from conftest import image_processor, random_adapter, sd15_pipeline, sdxl_pipeline, vision_encoder
from imprompt.models import checkpoints
from imprompt.models.image_encoders import ImageEncoder
from imprompt.models.image_prompt import ImagePromptEncoder
from imprompt.unet.injection import attach

STEPS = 10


def reference(seed):
    return Image.effect_noise((32, 32), 60 + 20 * seed).convert("RGB").rotate(30 * seed)


def drawn(pipe, **more):
    return pipe("a red fish", num_inference_steps=STEPS, generator=torch.Generator().manual_seed(0), output_type="latent", **more).images


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("kind", ["base", "plus", "full-face"])
@pytest.mark.parametrize("make", [sd15_pipeline, sdxl_pipeline])
@pytest.mark.parametrize("references", [1, 3])
def test_same_latents_as_diffusers(make, kind, references, tmp_path):
    images = [reference(i) for i in range(references)]
    path = tmp_path / "adapter.safetensors"
    checkpoints.save(random_adapter(make().unet, kind), path)

    theirs = make()
    theirs.load_ip_adapter(str(tmp_path), subfolder="", weight_name=path.name, image_encoder_folder=None)
    theirs.set_ip_adapter_scale(0.8)
    expected = drawn(theirs, ip_adapter_image=[images])

    ours = make()
    prompter = ImagePromptEncoder(*checkpoints.load_adapter(path), ImageEncoder(vision_encoder(), image_processor()))
    with attach(ours, prompter(images, scale=0.8)):
        received = drawn(ours)
    assert relative(received, expected) <= 1e-4
    assert relative(drawn(make()), expected) > 1e-2  # the prompt matters at all
