"""Every method: the same function in training and at generation, the UNet restored, and the mechanism that its paper describes."""

import pytest
import torch
from PIL import Image

from conftest import VISION, image_processor, sd15_pipeline, sdxl_pipeline, vision_encoder
from imprompt.config import METHODS, MULTI_REFERENCE_METHODS, PER_SUBJECT_METHODS, REFERENCE_METHODS, UNET_METHODS, TrainConfig
from imprompt.core.adapter import Adapter
from imprompt.core.image_projection import Resampler
from imprompt.errors import UserError
from imprompt.methods import build_method
from imprompt.methods.base import is_null
from imprompt.methods.ip_adapter import build_projector
from imprompt.methods.shuffle import content_shuffle
from imprompt.models import checkpoints
from imprompt.models.image_encoders import ImageEncoder

EMBED_DIM = 32  # the width of prompt and pooled embeddings, for methods that replace one by the other


def small_pipeline_and_encoder(projection_dim=EMBED_DIM):
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(1)
    vision = CLIPVisionConfig(
        hidden_size=40,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
        projection_dim=projection_dim,
    )
    return sd15_pipeline(), ImageEncoder(CLIPVisionModelWithProjection(vision), image_processor())


def random_image(seed):
    g = torch.Generator().manual_seed(seed)
    return Image.fromarray((torch.rand(32, 32, 3, generator=g) * 255).byte().numpy())


def perturbed(method):
    """The method with random numbers added to its weights: output layers of zero would hide the layers before them."""
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in method.module.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    method.module.eval()
    return method


@pytest.fixture(scope="module", params=list(METHODS))
def registered_name(request):
    return request.param


@pytest.fixture(scope="module")
def built(registered_name):
    pipe, encoder = small_pipeline_and_encoder()
    return pipe, perturbed(build_method(registered_name, pipe, encoder))


@pytest.fixture
def pipe_and_method(built):
    """A pipeline and each method with its weights perturbed; between tests the method is not attached."""
    yield built
    built[1].remove_from_unet()


def encode_random_images(method, *seeds):
    return method.encoder.encode_images([random_image(seed) for seed in seeds], patches=method.uses_patch_features)[:, None]


def unet_inputs(pipe, rows=2):
    g = torch.Generator().manual_seed(0)
    dim, side = pipe.unet.config.cross_attention_dim, pipe.unet.config.sample_size
    return torch.randn(rows, 4, side, side, generator=g), torch.full((rows,), 500), torch.randn(rows, 24, dim, generator=g)


class Sampler:
    """Stands for a pipeline in the middle of a call: the UNet's batch is guided or not."""

    def __init__(self, pipe):
        self.unet = pipe.unet

    def call_unet(self, x, time, text, *, do_classifier_free_guidance):
        return self.unet(x, time, encoder_hidden_states=text, return_dict=False)[0]


def sample_latents(pipe, **options):
    generator = [torch.Generator().manual_seed(0), torch.Generator().manual_seed(1)]
    return pipe(["a cat", "a dog"], num_inference_steps=2, generator=generator, output_type="latent", **options).images


@torch.no_grad()
def test_training_and_generation_are_the_same_function(pipe_and_method):
    pipe, method = pipe_and_method
    x, time, text = unet_inputs(pipe)
    image = encode_random_images(method, 0, 1)
    prediction = method.predict(x, time, text, image)
    method.remove_from_unet()
    with method.apply_to(pipe, image, method.uncond_features()[None]):
        in_use = Sampler(pipe).call_unet(x, time[0], text, do_classifier_free_guidance=False)
    torch.testing.assert_close(in_use, prediction, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("images_per_prompt", [1, 2])
def test_with_guidance_the_first_half_is_unconditional_and_the_second_conditional(pipe_and_method, images_per_prompt):
    pipe, method = pipe_and_method
    if method.name in PER_SUBJECT_METHODS:
        pytest.skip("takes no image: tests/methods/test_per_subject.py")
    if method.name == "reference-only":
        pytest.skip("its unconditional rows attend to the reference image too")
    x, time, text = unet_inputs(pipe, 4 * images_per_prompt)
    image, uncond = encode_random_images(method, 0, 1), method.uncond_features()[None]
    rows = torch.cat([uncond.expand(2 * images_per_prompt, -1, -1, -1), image.repeat_interleave(images_per_prompt, 0)])
    expected = method.predict(x, time, text, rows)
    method.remove_from_unet()
    with method.apply_to(pipe, image, uncond):
        in_use = Sampler(pipe).call_unet(x, time[0], text, do_classifier_free_guidance=True)
    torch.testing.assert_close(in_use, expected, rtol=1e-4, atol=1e-5)
    assert (expected[-1] - method.predict(x, time, text, uncond.expand(4 * images_per_prompt, -1, -1, -1))[-1]).abs().max() > 1e-5
    method.remove_from_unet()


@torch.no_grad()
def test_reference_only_mixes_in_the_unconditional_rows_alone():
    pipe, encoder = small_pipeline_and_encoder()
    method = build_method("reference-only", pipe, encoder)
    x, time, text = unet_inputs(pipe, 2)
    x, text = x[:1].expand(2, -1, -1, -1), text[:1].expand(2, -1, -1)
    base = pipe.unet(x, time, text).sample
    with method.apply_to(pipe, encode_random_images(method, 0), method.uncond_features()[None]):
        uncond, cond = Sampler(pipe).call_unet(x, time[0], text, do_classifier_free_guidance=True)
    assert 0 < (uncond - base[0]).abs().mean() < (cond - base[1]).abs().mean()


def test_a_patched_forward_is_restored():
    pipe, encoder = small_pipeline_and_encoder()
    method = build_method("simple", pipe, encoder)
    inner = pipe.unet.forward
    pipe.unet.forward = hooked = lambda *a, **k: inner(*a, **k)
    with method.apply_to(pipe, encode_random_images(method, 0, 1), method.uncond_features()[None]):
        assert pipe.unet.forward is not hooked
        sample_latents(pipe)
    assert pipe.unet.forward is hooked


@torch.no_grad()
def test_the_image_conditions_and_the_unet_is_restored(pipe_and_method):
    pipe, method = pipe_and_method
    if method.name in PER_SUBJECT_METHODS:
        pytest.skip("takes no image: tests/methods/test_per_subject.py")
    before, keys = sample_latents(pipe), list(pipe.unet.state_dict())
    uncond = method.uncond_features()[None]
    with method.apply_to(pipe, encode_random_images(method, 0, 1), uncond):
        one = sample_latents(pipe)
        assert torch.equal(one, sample_latents(pipe))
    with method.apply_to(pipe, encode_random_images(method, 2, 1), uncond):
        other = sample_latents(pipe)
    assert (one[0] - other[0]).abs().max() > 1e-4, "another reference image gives another image"
    torch.testing.assert_close(one[1], other[1], rtol=1e-3, atol=1e-4)  # each prompt is conditioned on its own reference image only
    assert torch.equal(before, sample_latents(pipe)) and list(pipe.unet.state_dict()) == keys


@torch.no_grad()
def test_the_scale_interpolates_from_no_image_to_the_image(pipe_and_method):
    pipe, method = pipe_and_method
    if method.name in PER_SUBJECT_METHODS:
        pytest.skip("takes no image: tests/methods/test_per_subject.py")
    if method.name == "reference-only":
        pytest.skip("has no scale")
    uncond, image = method.uncond_features()[None], encode_random_images(method, 0, 1)
    results = []
    for scale in (0.0, 0.01, 1.0):
        with method.apply_to(pipe, image, uncond, scale):
            results.append(sample_latents(pipe))
    assert (results[1] - results[0]).abs().mean() < (results[2] - results[0]).abs().mean()


@torch.no_grad()
def test_some_methods_replace_the_prompt(pipe_and_method):
    pipe, method = pipe_and_method
    x, time, text = unet_inputs(pipe)
    other = torch.randn(text.shape, generator=torch.Generator().manual_seed(5))
    image = encode_random_images(method, 0, 1)
    same = torch.equal(method.predict(x, time, text, image), method.predict(x, time, other, image))
    assert same == (method.name in ("image-variations", "versatile", "seecoder"))


def finetuned_unet_inputs(method, monkeypatch, pipe, image):
    """The prompt embeddings, and what the fine-tuned UNet is called with instead: states for cross-attention, keyword arguments."""
    x, time, text = unet_inputs(pipe, len(image))
    calls = []
    monkeypatch.setattr(method.module, "predict_with_finetuned_unet", lambda _, __, states, **kwargs: calls.append((states, kwargs)) or x)
    method.module.call_unet(pipe.unet, x, time, text, method.module.encode_features(image))
    return text, *calls[0]


@torch.no_grad()
def test_image_variations_has_the_embedding_as_its_only_token(monkeypatch):
    pipe, encoder = small_pipeline_and_encoder()
    method = build_method("image-variations", pipe, encoder)
    image = encode_random_images(method, 0, 1)
    _, states, _ = finetuned_unet_inputs(method, monkeypatch, pipe, image)
    expected = encoder.model(encoder.preprocess([random_image(0), random_image(1)])).image_embeds
    torch.testing.assert_close(states, expected[:, None])


@torch.no_grad()
def test_versatile_has_the_patches_of_diffusers_pipeline(monkeypatch):
    """After `encode_image_embeddings` of diffusers' VersatileDiffusionImageVariationPipeline, on the whole vision model."""
    pipe, encoder = small_pipeline_and_encoder()
    method = build_method("versatile", pipe, encoder)
    model = encoder.model

    def pipeline_patches(images):
        patches = model.visual_projection(model.vision_model.post_layernorm(model(encoder.preprocess(images)).last_hidden_state))
        return patches / patches[:, :1].norm(dim=-1, keepdim=True)

    _, states, _ = finetuned_unet_inputs(method, monkeypatch, pipe, encode_random_images(method, 0, 1))
    torch.testing.assert_close(states, pipeline_patches([random_image(0), random_image(1)]))
    _, uncond, _ = finetuned_unet_inputs(method, monkeypatch, pipe, method.uncond_features()[None])
    torch.testing.assert_close(uncond, pipeline_patches([Image.new("RGB", (32, 32), (128, 128, 128))]))


@torch.no_grad()
def test_kandinsky_encodes_pixels_of_zero_for_no_image(monkeypatch):
    pipe, encoder = small_pipeline_and_encoder()
    method = build_method("kandinsky", pipe, encoder)
    text, states, kwargs = finetuned_unet_inputs(method, monkeypatch, pipe, method.uncond_features()[None].expand(2, -1, -1, -1))
    black = encoder.model(torch.zeros(2, 3, 32, 32)).image_embeds
    torch.testing.assert_close(kwargs["added_cond_kwargs"]["image_embeds"], black)
    assert torch.equal(kwargs["added_cond_kwargs"]["text_embeds"], text[:, -1]) and torch.equal(states, text)
    projection = method.module.unet.encoder_hid_proj
    assert type(projection).__name__ == "TextImageProjection" and projection(text, black).shape[1] == 10 + text.shape[1]


@torch.no_grad()
def test_open_unclip_has_four_tokens_before_the_text_and_a_learned_null(monkeypatch):
    pipe, encoder = small_pipeline_and_encoder()
    method = perturbed(build_method("open-unclip", pipe, encoder))
    image = torch.cat([encode_random_images(method, 0), method.uncond_features()[None]])
    text, states, kwargs = finetuned_unet_inputs(method, monkeypatch, pipe, image)
    z = torch.stack([encoder.model(encoder.preprocess([random_image(0)])).image_embeds[0], method.module.null_embedding])
    torch.testing.assert_close(kwargs["class_labels"], torch.cat([z, text[:, -1]], dim=1))
    torch.testing.assert_close(states[:, :4].flatten(1), method.module.token_proj(z))
    assert states.shape[1] == 4 + text.shape[1]


@torch.no_grad()
def test_blips_queries_follow_the_start_of_the_text(monkeypatch):
    pipe, encoder = small_pipeline_and_encoder()
    method = perturbed(build_method("blip-diffusion", pipe, encoder))
    text_inputs = []
    handle = method.module.text_layer.register_forward_pre_hook(lambda _, args: text_inputs.append(args[0]))
    text, states, _ = finetuned_unet_inputs(method, monkeypatch, pipe, encode_random_images(method, 0, 1))
    handle.remove()
    assert states.shape[1] == text_inputs[0].shape[1] == 16 + text.shape[1]
    assert torch.equal(text_inputs[0][:, :1], text[:, :1]) and torch.equal(text_inputs[0][:, 17:], text[:, 1:])
    torch.testing.assert_close(states[:, 0], method.module.text_layer(text[:, :1])[:, 0])  # causal: the start token attends to itself only


@torch.no_grad()
def test_seecoders_tokens_depend_on_every_level_and_on_both_kinds_of_queries():
    pipe, encoder = small_pipeline_and_encoder()
    method = perturbed(build_method("seecoder", pipe, encoder))
    module, image = method.module, encode_random_images(method, 0, 1)
    before = module.encode_features(image)["tokens"]
    assert before.shape[1] == 16 + 4
    for part in (module.local_queries, module.global_queries, *module.position_embeds, *(lateral.weight for lateral in module.laterals)):
        original = part.clone()
        part.add_(torch.randn_like(part))
        assert (module.encode_features(image)["tokens"][:, :16] - before[:, :16]).abs().max() > 1e-4
        part.copy_(original)
    assert torch.equal(module.encode_features(image)["tokens"], before)


@torch.no_grad()
def test_shuffle_adds_one_number_per_channel():
    pipe, encoder = small_pipeline_and_encoder()
    method = perturbed(build_method("shuffle", pipe, encoder))
    x, time, text = unet_inputs(pipe)
    calls = []
    cond = method.module.encode_features(encode_random_images(method, 0, 1))
    method.module.call_unet(lambda *_, **kwargs: calls.append(kwargs) or pipe.unet(x, time, text), x, time, text, cond)
    residuals = [*calls[0]["down_block_additional_residuals"], calls[0]["mid_block_additional_residual"]]
    assert all(r.shape[2:] == (1, 1) and r.abs().sum() > 0 for r in residuals)
    uncond = method.module.encode_features(method.uncond_features()[None].expand(2, -1, -1, -1))
    method.module.call_unet(lambda *_, **kwargs: calls.append(kwargs) or pipe.unet(x, time, text), x, time, text, uncond)
    assert all(r.abs().sum() == 0 for r in calls[1]["down_block_additional_residuals"])


def test_a_warp_moves_pixels_and_keeps_colors():
    pixels = torch.rand(2, 3, 32, 32)
    first, second, random = (content_shuffle(pixels, random=random) for random in (False, False, True))
    assert torch.equal(first, second) and not torch.equal(first, random) and not torch.equal(first, pixels)
    assert first.min() >= pixels.min() and first.max() <= pixels.max()


@torch.no_grad()
def test_sd_unclip_adds_noise_in_training_only_and_tracks_the_data():
    pipe, encoder = small_pipeline_and_encoder()
    method = build_method("sd-unclip", pipe, encoder)
    module, image = method.module, encode_random_images(method, 0, 1, 2, 3)
    module.train()
    noisy = module.encode_features(image)["labels"]
    assert not torch.equal(noisy, module.encode_features(image)["labels"])
    mean, std = module.compute_mean_std()
    torch.testing.assert_close(mean, image[:, 0, 0].mean(0))
    torch.testing.assert_close(std, image[:, 0, 0].std(0, correction=0), rtol=1e-3, atol=1e-4)
    module.encode_features(method.uncond_features()[None])
    torch.testing.assert_close(module.compute_mean_std()[0], mean)  # dropped images are not counted, even alone in a batch
    module.eval()
    clean = module.encode_features(image)["labels"]
    torch.testing.assert_close(clean[:, :EMBED_DIM], image[:, 0, 0], rtol=1e-4, atol=1e-4)
    assert module.encode_features(method.uncond_features()[None])["labels"].abs().sum() == 0


@torch.no_grad()
def test_a_dropped_image_is_the_texts_own_tail_for_t2i_style():
    pipe, encoder = small_pipeline_and_encoder()
    method = perturbed(build_method("t2i-style", pipe, encoder))
    x, time, text = unet_inputs(pipe)
    uncond = method.predict(x, time, text, method.uncond_features()[None].expand(2, -1, -1, -1))
    tail = pipe.unet(x, time, torch.cat([text, text[:, -8:]], dim=1)).sample
    torch.testing.assert_close(uncond, tail)


def test_reference_only_has_no_parameters_and_restores_self_attention():
    pipe, encoder = small_pipeline_and_encoder()
    method = build_method("reference-only", pipe, encoder)
    assert not list(method.module.parameters())
    before = {name: type(p) for name, p in pipe.unet.attn_processors.items()}
    with torch.no_grad(), method.apply_to(pipe, encode_random_images(method, 0, 1), method.uncond_features()[None]):
        sample_latents(pipe)
    assert {name: type(p) for name, p in pipe.unet.attn_processors.items()} == before


def test_zeros_stand_for_no_image():
    image = torch.zeros(2, 1, 3, 4)
    image[1, 0, 0, 0] = 1
    assert is_null(image).tolist() == [True, False]


@pytest.mark.parametrize("name", [n for n in UNET_METHODS if n != "shuffle"])
def test_methods_that_train_a_unet_refuse_sdxl(name):
    pipe = sdxl_pipeline()
    _, encoder = small_pipeline_and_encoder(projection_dim=64)
    with pytest.raises(UserError, match="expected SD"):
        build_method(name, pipe, encoder)


@pytest.mark.parametrize("name", ["image-variations", "kandinsky", "versatile"])
def test_an_encoder_of_the_wrong_width_is_named(name):
    with pytest.raises(UserError, match="an encoder of width 32, received 24"):
        build_method(name, *small_pipeline_and_encoder(projection_dim=24))


@torch.no_grad()
@pytest.mark.parametrize("name", ["simple", "uni-controlnet", "t2i-style", "shuffle", "seecoder", "reference-only"])
def test_adapters_work_on_sdxl(name):
    pipe, (_, encoder) = sdxl_pipeline(), small_pipeline_and_encoder()
    method = perturbed(build_method(name, pipe, encoder))
    before = sample_latents(pipe)
    with method.apply_to(pipe, encode_random_images(method, 0, 1), method.uncond_features()[None]):
        assert not torch.equal(before, sample_latents(pipe))
    assert torch.equal(before, sample_latents(pipe))


@pytest.mark.parametrize("name", UNET_METHODS)
def test_methods_that_train_a_unet_start_close_to_the_base(name):
    if name == "shuffle":
        pytest.skip("its output layers are zero")
    from imprompt.mini.held_out import make_held_out_samples
    from imprompt.models.base_pipelines import load_pipeline
    from imprompt.models.hub import MINI_PATH
    from imprompt.training.frozen_encoders import FrozenEncoders

    pipe = load_pipeline("mini")
    encoder = ImageEncoder.load(MINI_PATH / "image_encoder")
    method = build_method(name, pipe, encoder)
    encoders = FrozenEncoders(pipe, encoder, patches=method.uses_patch_features)
    text = encoders.encode_prompts([sample.caption for sample in make_held_out_samples(4)]).prompt_embeds
    x, time = torch.randn(4, 4, 16, 16, generator=torch.Generator().manual_seed(0)), torch.full((4,), 600)
    method.module.eval()
    with torch.no_grad():
        base = pipe.unet(x, time, text).sample
        prediction = method.predict(x, time, text, method.uncond_features()[None].expand(4, -1, -1, -1))
    difference = float((prediction - base).norm() / base.norm())
    if name in ("image-variations", "versatile"):  # they have no prompt
        assert difference < 2
    else:
        assert difference < 0.35, f"{name} starts {difference:.2f} away from the base"


@pytest.mark.parametrize("name", ["image-variations", "kandinsky", "shuffle"])
def test_a_copy_has_gradient_checkpointing_where_the_base_has(name):
    pipe, encoder = small_pipeline_and_encoder()
    pipe.unet.enable_gradient_checkpointing()
    module = build_method(name, pipe, encoder).module
    assert (module.controlnet if name == "shuffle" else module.unet).is_gradient_checkpointing


@pytest.mark.parametrize("name", sorted({*REFERENCE_METHODS, *PER_SUBJECT_METHODS} - {*MULTI_REFERENCE_METHODS}))
def test_methods_with_one_reference_image_refuse_two(name):
    with pytest.raises(UserError, match=f"num_references: {name} is conditioned on one"):
        TrainConfig.from_options(method=name, num_references=2)


def test_an_unknown_method_is_named():
    with pytest.raises(UserError, match="expected one of ip-adapter"):
        build_method("dalle", *small_pipeline_and_encoder())


def test_the_registry_agrees_with_the_method(registered_name, pipe_and_method):
    (_, method), info = pipe_and_method, METHODS[registered_name]
    assert method.uses_patch_features == (info.features == "patches")
    if registered_name not in PER_SUBJECT_METHODS:
        assert (hasattr(method.module, "unet") or hasattr(method.module, "controlnet")) == info.trains_unet


@pytest.mark.parametrize(("cross_attention_dim", "width", "heads"), [(768, 768, 12), (1024, 1024, 12), (2048, 1280, 20), (128, 128, 2)])
def test_a_resampler_has_the_heads_that_comfyui_and_the_webui_expect(cross_attention_dim, width, heads):
    """They read 12 for SD 1.5 and 2.1, 20 for SDXL."""
    projector = build_projector(ImageEncoder(vision_encoder()), cross_attention_dim, "plus")
    assert projector.layers[0][0].to_q.weight.shape == (64 * heads, width)


def test_plus_adapters_for_sd21_are_read_with_12_and_with_16_heads(tmp_path):
    for heads in (12, 16):
        resampler = Resampler(VISION, 1024, 16, 1024, num_heads=heads)
        checkpoints.save(Adapter(resampler, {n: 4 for n in range(1, 32, 2)}, 1024), tmp_path / "adapter.safetensors")
        adapter, spec = checkpoints.load_adapter(tmp_path / "adapter.safetensors")
        assert adapter.image_proj.layers[0][0].num_heads == heads and spec.base_model == "SD 2.1"
