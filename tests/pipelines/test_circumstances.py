"""Memory and speed options of diffusers: an image prompt works with each of them, or one sentence with the next step."""

import diffusers
import pytest
import torch
from accelerate import cpu_offload
from packaging.version import Version
from torch import nn

from conftest import POOLED, random_adapter, sd15_pipeline
from imprompt.dit.attach import attach
from imprompt.models.image_prompt import ImagePrompt


def random_prompt(unet, scale=0.8, seed=0, references=1):
    torch.manual_seed(seed)
    return ImagePrompt(random_adapter(unet, "base"), torch.randn(1, references, 1, POOLED), torch.zeros(1, 1, 1, POOLED), scale)


def sample_latents(pipe, **arguments):
    return pipe("a red fish", num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="latent", **arguments).images


def expected_latents(**options):
    """Latents of an unmodified pipeline."""
    pipe = sd15_pipeline()
    with attach(pipe, random_prompt(pipe.unet, **options)):
        return sample_latents(pipe)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("offloading", ["sequential", "model", "groups"])
def test_offloading(offloading, order):
    pipe = sd15_pipeline()
    prompt = random_prompt(pipe.unet)

    def offload():
        if offloading == "sequential":
            cpu_offload(pipe.unet, torch.device("cpu"))  # offloading the whole pipeline sequentially needs a GPU
        elif offloading == "model":
            pipe.enable_model_cpu_offload(device="cpu")
        elif Version(diffusers.__version__) < Version("0.40") and not torch.accelerator.is_available():
            pytest.skip("this version of diffusers requires an accelerator")
        else:
            pipe.unet.enable_group_offload(torch.device("cpu"), torch.device("cpu"), offload_type="leaf_level")

    if order == "before":
        offload()
    with attach(pipe, prompt):
        if order == "after":
            offload()
        torch.testing.assert_close(sample_latents(pipe), expected_latents(), rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_vae_slicing_and_tiling():
    pipe = sd15_pipeline()
    pipe.vae.enable_slicing()
    pipe.vae.enable_tiling()
    with attach(pipe, random_prompt(pipe.unet)):
        assert torch.equal(sample_latents(pipe), expected_latents())
        assert pipe("a red fish", num_inference_steps=1).images[0].size == (32, 32)


@pytest.mark.parametrize("order", ["before", "after"])
def test_attention_slicing_is_refused_in_one_sentence(order):
    pipe = sd15_pipeline()
    if order == "before":
        pipe.enable_attention_slicing()
        with pytest.raises(RuntimeError, match="set_default_attn_processor"):
            attach(pipe, random_prompt(pipe.unet))
        return
    with attach(pipe, random_prompt(pipe.unet)):
        pipe.enable_attention_slicing()
        with pytest.raises(RuntimeError, match="attach last"):
            sample_latents(pipe)


def random_lora(pipe, folder):
    """The arguments of `load_lora_weights` for a LoRA file with random weights."""
    from safetensors.torch import save_file

    from imprompt.methods.dreambooth import LoRAUNet

    torch.manual_seed(3)
    tensors = {key: torch.randn_like(value) * 0.3 for key, value in LoRAUNet(pipe.unet, 2).state_dict().items()}
    save_file(tensors, folder / "lora.safetensors")
    return {"pretrained_model_name_or_path_or_dict": str(folder), "weight_name": "lora.safetensors"}


@pytest.mark.filterwarnings("ignore")
def test_a_lora_loaded_before_or_after(tmp_path):
    before, after = sd15_pipeline(), sd15_pipeline()
    lora = random_lora(sd15_pipeline(), tmp_path)
    before.load_lora_weights(**lora)
    with_lora = sample_latents(before)
    with attach(before, random_prompt(before.unet)):
        with_both = sample_latents(before)
    assert torch.equal(sample_latents(before), with_lora)
    with attach(after, random_prompt(after.unet)):
        assert torch.equal(sample_latents(after), expected_latents())
        after.load_lora_weights(**lora)
        torch.testing.assert_close(sample_latents(after), with_both, rtol=1e-4, atol=1e-4)
        after.unload_lora_weights()
        assert torch.equal(sample_latents(after), expected_latents())
    assert not torch.allclose(with_both, with_lora, atol=1e-3) and not torch.allclose(with_both, expected_latents(), atol=1e-3)


@pytest.mark.filterwarnings("ignore")
def test_a_quantized_unet():
    pipe = sd15_pipeline()
    pipe.unet = torch.ao.quantization.quantize_dynamic(pipe.unet, {nn.Linear}, dtype=torch.qint8)
    without_prompt = sample_latents(pipe)
    prompt = random_prompt(sd15_pipeline().unet)
    with attach(pipe, prompt):
        with_prompt = sample_latents(pipe)
    error = ((with_prompt - expected_latents()).norm() / expected_latents().norm()).item()
    assert error < 0.1 < ((with_prompt - without_prompt).norm() / without_prompt.norm()).item() * 100
    assert torch.equal(sample_latents(pipe), without_prompt)


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_unet_is_not_recompiled_for_another_scale_prompt_or_reference():
    torch._dynamo.reset()
    pipe = sd15_pipeline()
    pipe.unet = torch.compile(pipe.unet, backend="eager", fullgraph=True)
    prompt = random_prompt(pipe.unet._orig_mod)
    with attach(pipe, prompt) as attached:
        torch.testing.assert_close(sample_latents(pipe), expected_latents(), rtol=1e-4, atol=1e-4)
        with torch._dynamo.config.patch(error_on_recompile=True):
            attached.prompts = [prompt.with_scale(0.3)]
            torch.testing.assert_close(sample_latents(pipe), expected_latents(scale=0.3), rtol=1e-4, atol=1e-4)
            attached.prompts = [random_prompt(pipe.unet._orig_mod, seed=4)]
            torch.testing.assert_close(sample_latents(pipe), expected_latents(seed=4), rtol=1e-4, atol=1e-4)
            pipe("another prompt", num_inference_steps=2, output_type="latent")
    torch._dynamo.reset()
