"""Image prompts in transformers under gradient checkpointing, offloading, LoRA, batches of prompts and several references."""

import pytest
import torch
from accelerate import cpu_offload
from small_transformers import BUILDERS, build_adapter, build_prompt, build_transformer, call_transformer, transformer_inputs

from imprompt.core.conditioning import ramp_scale
from imprompt.dit.injection import AttachedToTransformer
from imprompt.dit.sites import find_sites
from imprompt.errors import CheckpointError, UserError

HOSTS = list(BUILDERS)


def compute_gradients(host, *, checkpointing):
    transformer = build_transformer(host).train()
    if checkpointing:
        transformer.enable_gradient_checkpointing()
    adapter = build_adapter("transformer", transformer).requires_grad_(True)
    with AttachedToTransformer(transformer, [build_prompt(adapter)], ("cond",)):
        transformer(**transformer_inputs(host), return_dict=False)[0].square().mean().backward()
    return {name: parameter.grad for name, parameter in adapter.named_parameters()}


@pytest.mark.parametrize("host", HOSTS)
def test_gradient_checkpointing_does_not_lose_the_prompt(host):
    plain, checkpointed = (compute_gradients(host, checkpointing=on) for on in (False, True))
    assert all(grad is not None and grad.any() for grad in plain.values())
    for name, grad in plain.items():
        torch.testing.assert_close(checkpointed[name], grad, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("host", HOSTS)
def test_a_batch_of_prompts_is_the_loop(host):
    transformer = build_transformer(host)
    adapter = build_adapter("transformer", transformer)
    singles = [build_prompt(adapter, seed) for seed in (3, 4)]
    inputs = transformer_inputs(host)
    together = build_prompt(adapter)
    together = type(together)(adapter, torch.cat([p.image_features for p in singles]), singles[0].uncond_features)
    with AttachedToTransformer(transformer, [together], ("cond",)) as attached:
        batch = call_transformer(transformer, host)
        for row, prompt in enumerate(singles):
            attached.prompts = [prompt]
            torch.testing.assert_close(call_transformer(transformer, host)[row], batch[row], atol=1e-5, rtol=1e-5)
    assert len(inputs["hidden_states"]) == 2


@pytest.mark.parametrize("host", ["flux", "sd3", "pixart"])
def test_weights_may_be_offloaded(host):
    transformer, other = build_transformer(host), build_transformer(host)
    prompt = build_prompt(build_adapter("transformer", transformer))
    with AttachedToTransformer(transformer, [prompt], ("cond",)):
        expected = call_transformer(transformer, host)
    cpu_offload(other, torch.device("cpu"), offload_buffers=True)
    with AttachedToTransformer(other, [prompt], ("cond",)):
        assert torch.equal(call_transformer(other, host), expected)


@pytest.mark.parametrize("host", ["flux", "sd3"])
def test_two_prompts_with_masks_each_condition_their_half(host):
    """A prompt whose mask is one half changes the output as without the other prompt there, in the first layer that has it."""
    transformer = build_transformer(host)
    adapter = build_adapter("transformer", transformer)
    left, right = torch.zeros(6, 10), torch.zeros(6, 10)
    left[:, :4], right[:, 4:] = 1, 1
    masked = [build_prompt(adapter, 3, mask=left), build_prompt(adapter, 4, mask=right)]
    first = find_sites(transformer)[0].attention
    outputs = []
    first.register_forward_hook(lambda module, args, out: outputs.append(out[0]))
    with AttachedToTransformer(transformer, [masked[0], masked[1]], ("cond",)) as attached:
        for prompts in (masked, [build_prompt(adapter, 3)], [build_prompt(adapter, 4)]):
            attached.prompts = prompts
            call_transformer(transformer, host)
    both, only_left, only_right = (out.unflatten(1, (3, 5)) for out in outputs)
    torch.testing.assert_close(both[:, :, :2], only_left[:, :, :2])
    torch.testing.assert_close(both[:, :, 2:], only_right[:, :, 2:])


def test_a_ramp_has_a_scale_for_each_block():
    transformer = build_transformer("flux")
    names = [site.name for site in find_sites(transformer) if site.side == "joint"]
    ramp = ramp_scale(0.3, 0.92, names)
    assert list(ramp.values()) == pytest.approx([0.3, 0.92])
    with AttachedToTransformer(transformer, [build_prompt(build_adapter("xlabs-flux", transformer), scale=ramp)], ("cond",)):
        call_transformer(transformer, "flux")


@pytest.mark.parametrize(
    ("family", "made_for", "host", "sentence"),
    [
        ("xlabs-flux", "flux", "sd3", "the adapter was made for flux or chroma, and the model is sd3"),
        ("instantx-sd3", "sd3", "flux", "the adapter was made for sd3, and the model is flux"),
        ("transformer", "sd3", "qwen-image", "made for 3 attention layers of width 128, the model has 2"),
    ],
)
def test_an_adapter_of_another_model_is_one_sentence(family, made_for, host, sentence):
    adapter = build_adapter(family, build_transformer(made_for))
    with pytest.raises(CheckpointError, match=sentence):
        AttachedToTransformer(build_transformer(host), [build_prompt(adapter)], ("cond",))


def test_an_unsupported_transformer_names_those_that_are():
    from diffusers import SanaTransformer2DModel

    sana = SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_layers=1, num_attention_heads=2, attention_head_dim=8, num_cross_attention_heads=2,
        cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=8, sample_size=8,
    )  # fmt: skip
    with pytest.raises(UserError, match="SanaTransformer2DModel; expected a UNet, or one of FluxTransformer, ChromaTransformer"):
        AttachedToTransformer(sana, [], ("cond",))


@pytest.mark.parametrize("options", [{"frame_weights": torch.ones(2)}, {"mask": torch.ones(2, 6, 10)}], ids=["weights", "masks"])
def test_what_is_for_the_frames_of_a_video_is_refused(options):
    transformer = build_transformer("flux")
    prompt = build_prompt(build_adapter("transformer", transformer), **options)
    with pytest.raises(UserError, match="given for the frames of a video, and this transformer generates an image"):
        AttachedToTransformer(transformer, [prompt], ("cond",))
