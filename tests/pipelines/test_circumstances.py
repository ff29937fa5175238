"""What people switch on to save memory or time: an image prompt works under it, or one sentence says what to do."""

import diffusers
import pytest
import torch
from accelerate import cpu_offload
from packaging.version import Version
from torch import nn

from conftest import POOLED, random_adapter, sd15_pipeline
from imprompt.models.image_prompt import ImagePrompt
from imprompt.unet.injection import attach


def prompt(unet, scale=0.8, seed=0, references=1):
    torch.manual_seed(seed)
    return ImagePrompt(random_adapter(unet, "global"), torch.randn(1, references, 1, POOLED), torch.zeros(1, 1, 1, POOLED), scale)


def drawn(pipe, **more):
    return pipe("a red fish", num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="latent", **more).images


def expected(**how):
    pipe = sd15_pipeline()
    with attach(pipe, prompt(pipe.unet, **how)):
        return drawn(pipe)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("kind", ["sequential", "model", "groups"])
def test_offloading(kind, order):
    pipe = sd15_pipeline()
    made = prompt(pipe.unet)

    def offload():
        if kind == "sequential":
            cpu_offload(pipe.unet, torch.device("cpu"))  # of the pipeline as a whole it needs a GPU
        elif kind == "model":
            pipe.enable_model_cpu_offload(device="cpu")
        elif Version(diffusers.__version__) < Version("0.40") and not torch.accelerator.is_available():
            pytest.skip("this diffusers asks for an accelerator")
        else:
            pipe.unet.enable_group_offload(torch.device("cpu"), torch.device("cpu"), offload_type="leaf_level")

    if order == "before":
        offload()
    with attach(pipe, made):
        if order == "after":
            offload()
        torch.testing.assert_close(drawn(pipe), expected(), rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_vae_slicing_and_tiling():
    pipe = sd15_pipeline()
    pipe.vae.enable_slicing()
    pipe.vae.enable_tiling()
    with attach(pipe, prompt(pipe.unet)):
        assert torch.equal(drawn(pipe), expected())
        assert pipe("a red fish", num_inference_steps=1).images[0].size == (32, 32)


@pytest.mark.parametrize("order", ["before", "after"])
def test_attention_slicing_is_refused_in_one_sentence(order):
    pipe = sd15_pipeline()
    if order == "before":
        pipe.enable_attention_slicing()
        with pytest.raises(RuntimeError, match="set_default_attn_processor"):
            attach(pipe, prompt(pipe.unet))
        return
    with attach(pipe, prompt(pipe.unet)):
        pipe.enable_attention_slicing()
        with pytest.raises(RuntimeError, match="attach last"):
            drawn(pipe)


def lora(pipe, folder):
    from safetensors.torch import save_file

    from imprompt.methods.dreambooth import LowRank

    torch.manual_seed(3)
    tensors = {key: torch.randn_like(value) * 0.3 for key, value in LowRank(pipe.unet, 2).state_dict().items()}
    save_file(tensors, folder / "lora.safetensors")
    return {"pretrained_model_name_or_path_or_dict": str(folder), "weight_name": "lora.safetensors"}


@pytest.mark.filterwarnings("ignore")
def test_a_lora_loaded_before_or_after(tmp_path):
    before, after = sd15_pipeline(), sd15_pipeline()
    file = lora(sd15_pipeline(), tmp_path)
    before.load_lora_weights(**file)
    alone = drawn(before)
    with attach(before, prompt(before.unet)):
        first = drawn(before)
    assert torch.equal(drawn(before), alone)
    with attach(after, prompt(after.unet)):
        assert torch.equal(drawn(after), expected())
        after.load_lora_weights(**file)
        torch.testing.assert_close(drawn(after), first, rtol=1e-4, atol=1e-4)
        after.unload_lora_weights()
        assert torch.equal(drawn(after), expected())
    assert not torch.allclose(first, alone, atol=1e-3) and not torch.allclose(first, expected(), atol=1e-3)


@pytest.mark.filterwarnings("ignore")
def test_a_quantised_unet():
    pipe = sd15_pipeline()
    pipe.unet = torch.ao.quantization.quantize_dynamic(pipe.unet, {nn.Linear}, dtype=torch.qint8)
    plain = drawn(pipe)
    made = prompt(sd15_pipeline().unet)
    with attach(pipe, made):
        heard = drawn(pipe)
    close = ((heard - expected()).norm() / expected().norm()).item()
    assert close < 0.1 < ((heard - plain).norm() / plain.norm()).item() * 100
    assert torch.equal(drawn(pipe), plain)


@pytest.mark.filterwarnings("ignore")
def test_compiled_no_new_graph_for_a_scale_a_prompt_or_a_reference():
    torch._dynamo.reset()
    pipe = sd15_pipeline()
    pipe.unet = torch.compile(pipe.unet, backend="eager", fullgraph=True)
    first = prompt(pipe.unet._orig_mod)
    with attach(pipe, first) as link:
        torch.testing.assert_close(drawn(pipe), expected(), rtol=1e-4, atol=1e-4)
        with torch._dynamo.config.patch(error_on_recompile=True):
            link.prompts = [first.scaled(0.3)]
            torch.testing.assert_close(drawn(pipe), expected(scale=0.3), rtol=1e-4, atol=1e-4)
            link.prompts = [prompt(pipe.unet._orig_mod, seed=4)]
            torch.testing.assert_close(drawn(pipe), expected(seed=4), rtol=1e-4, atol=1e-4)
            pipe("another text", num_inference_steps=2, output_type="latent")
    torch._dynamo.reset()
