"""Every method: the same function in training and in use, the UNet left as it was, and the mechanism that its paper describes."""

import pytest
import torch
from PIL import Image

import imprompt
from conftest import image_processor, sd15_pipeline, sdxl_pipeline
from imprompt import config
from imprompt.errors import UserError
from imprompt.methods import MAKERS, create
from imprompt.methods.base import absent
from imprompt.methods.shuffle import warped
from imprompt.models.image_encoders import ImageEncoder

FITTING = 32  # the width of text and pooled embedding, for methods that put one in the other's place


def base(pooled=FITTING):
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(1)
    vision = CLIPVisionConfig(
        hidden_size=40, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, image_size=32, patch_size=8, projection_dim=pooled
    )
    return sd15_pipeline(), ImageEncoder(CLIPVisionModelWithProjection(vision), image_processor())


def picture(seed):
    g = torch.Generator().manual_seed(seed)
    return Image.fromarray((torch.rand(32, 32, 3, generator=g) * 255).byte().numpy())


def shaken(method):
    """Weights that matter: zero outlets would hide what lies behind them."""
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in method.module.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    method.module.eval()
    return method


@pytest.fixture(params=list(MAKERS))
def made(request):
    pipe, encoder = base()
    return pipe, shaken(create(request.param, pipe, encoder))


def features(method, *seeds):
    return method.encoder.encode([picture(seed) for seed in seeds], method.grid)[:, None]


def inputs(pipe, rows=2):
    g = torch.Generator().manual_seed(0)
    cross, side = pipe.unet.config.cross_attention_dim, pipe.unet.config.sample_size
    return torch.randn(rows, 4, side, side, generator=g), torch.full((rows,), 500), torch.randn(rows, 24, cross, generator=g)


def drawn(pipe, **more):
    generator = [torch.Generator().manual_seed(0), torch.Generator().manual_seed(1)]
    return pipe(["a cat", "a dog"], num_inference_steps=2, generator=generator, output_type="latent", **more).images


@torch.no_grad()
def test_training_and_use_are_the_same_function(made):
    pipe, method = made
    x, time, text = inputs(pipe)
    image = features(method, 0, 1)
    trained = method.denoise(x, time, text, image)
    method.release()
    pipe._guidance_scale = 1.0  # no guidance: every row listens
    with method.attached(pipe, image, method.null()[None]):
        used = pipe.unet(x, time[0], encoder_hidden_states=text, return_dict=False)[0]
    torch.testing.assert_close(used, trained, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("each", [1, 2])
def test_with_guidance_the_first_half_hears_nothing_and_the_second_the_pictures(made, each):
    pipe, method = made
    if method.name in config.PERSONAL:
        pytest.skip("hears no picture: tests/methods/test_per_subject.py")
    if method.name == "reference-only":
        pytest.skip("its unconditional rows read the reference too")
    x, time, text = inputs(pipe, 4 * each)
    image, null = features(method, 0, 1), method.null()[None]
    rows = torch.cat([null.expand(2 * each, -1, -1, -1), image.repeat_interleave(each, 0)])
    expected = method.denoise(x, time, text, rows)
    method.release()
    pipe._guidance_scale, pipe._interrupt = 3.0, False
    with method.attached(pipe, image, null):
        found = pipe.unet(x, time[0], encoder_hidden_states=text, return_dict=False)[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert (expected[-1] - method.denoise(x, time, text, null.expand(4 * each, -1, -1, -1))[-1]).abs().max() > 1e-5
    method.release()


@torch.no_grad()
def test_reference_only_mixes_in_the_unconditional_rows_alone():
    pipe, encoder = base()
    method = create("reference-only", pipe, encoder)
    x, time, text = inputs(pipe, 2)
    x, text = x[:1].expand(2, -1, -1, -1), text[:1].expand(2, -1, -1)
    pipe._guidance_scale = 3.0
    plain = pipe.unet(x, time, text).sample
    with method.attached(pipe, features(method, 0), method.null()[None]):
        nothing, heard = pipe.unet(x, time[0], encoder_hidden_states=text, return_dict=False)[0]
    assert 0 < (nothing - plain[0]).abs().mean() < (heard - plain[1]).abs().mean()


def test_a_forward_of_somebody_else_is_put_back():
    pipe, encoder = base()
    method = create("simple", pipe, encoder)
    inner = pipe.unet.forward
    pipe.unet.forward = hooked = lambda *a, **k: inner(*a, **k)
    with method.attached(pipe, features(method, 0, 1), method.null()[None]):
        assert pipe.unet.forward is not hooked
        drawn(pipe)
    assert pipe.unet.forward is hooked


@torch.no_grad()
def test_the_picture_is_heard_and_the_unet_left_as_it_was(made):
    pipe, method = made
    if method.name in config.PERSONAL:
        pytest.skip("hears no picture: tests/methods/test_per_subject.py")
    before, keys = drawn(pipe), list(pipe.unet.state_dict())
    null = method.null()[None]
    with method.attached(pipe, features(method, 0, 1), null):
        one = drawn(pipe)
        assert torch.equal(one, drawn(pipe))
    with method.attached(pipe, features(method, 2, 1), null):
        other = drawn(pipe)
    assert (one[0] - other[0]).abs().max() > 1e-4, "another reference draws another picture"
    torch.testing.assert_close(one[1], other[1], rtol=1e-3, atol=1e-4)  # each prompt hears its own reference only
    assert torch.equal(before, drawn(pipe)) and list(pipe.unet.state_dict()) == keys


@torch.no_grad()
def test_the_scale_leads_from_no_picture_to_the_picture(made):
    pipe, method = made
    if method.name in config.PERSONAL:
        pytest.skip("hears no picture: tests/methods/test_per_subject.py")
    if method.name == "reference-only":
        pytest.skip("has no weight")
    null, image = method.null()[None], features(method, 0, 1)
    results = []
    for scale in (0.0, 0.01, 1.0):
        with method.attached(pipe, image, null, scale):
            results.append(drawn(pipe))
    assert (results[1] - results[0]).abs().mean() < (results[2] - results[0]).abs().mean()


@torch.no_grad()
def test_some_stand_in_the_texts_place(made):
    pipe, method = made
    x, time, text = inputs(pipe)
    other = torch.randn(text.shape, generator=torch.Generator().manual_seed(5))
    image = features(method, 0, 1)
    same = torch.equal(method.denoise(x, time, text, image), method.denoise(x, time, other, image))
    assert same == (method.name in ("image-variations", "versatile", "seecoder"))


def handed(method, monkeypatch, pipe, image):
    """What the method's own UNet is called with: the states that cross-attention reads, and the rest."""
    x, time, text = inputs(pipe, len(image))
    calls = []
    monkeypatch.setattr(method.module, "own", lambda _, __, states, **extra: calls.append((states, extra)) or x)
    method.module.call(pipe.unet, x, time, text, method.module.given(image))
    return text, *calls[0]


@torch.no_grad()
def test_image_variations_reads_the_embedding_as_its_only_token(monkeypatch):
    pipe, encoder = base()
    method = create("image-variations", pipe, encoder)
    image = features(method, 0, 1)
    _, states, _ = handed(method, monkeypatch, pipe, image)
    expected = encoder.model(encoder.prepare([picture(0), picture(1)])).image_embeds
    torch.testing.assert_close(states, expected[:, None])


@torch.no_grad()
def test_versatile_reads_patches_as_its_pipeline_encodes_pictures(monkeypatch):
    """After `encode_image_embeddings` of diffusers' VersatileDiffusionImageVariationPipeline, on the whole vision model."""
    pipe, encoder = base()
    method = create("versatile", pipe, encoder)
    model = encoder.model

    def by_the_pipeline(pictures):
        patches = model.visual_projection(model.vision_model.post_layernorm(model(encoder.prepare(pictures)).last_hidden_state))
        return patches / patches[:, :1].norm(dim=-1, keepdim=True)

    _, states, _ = handed(method, monkeypatch, pipe, features(method, 0, 1))
    torch.testing.assert_close(states, by_the_pipeline([picture(0), picture(1)]))
    _, nothing, _ = handed(method, monkeypatch, pipe, method.null()[None])
    torch.testing.assert_close(nothing, by_the_pipeline([Image.new("RGB", (32, 32), (128, 128, 128))]))


@torch.no_grad()
def test_kandinsky_hears_pixels_of_zero_as_no_picture(monkeypatch):
    pipe, encoder = base()
    method = create("kandinsky", pipe, encoder)
    text, states, extra = handed(method, monkeypatch, pipe, method.null()[None].expand(2, -1, -1, -1))
    black = encoder.model(torch.zeros(2, 3, 32, 32)).image_embeds
    torch.testing.assert_close(extra["added_cond_kwargs"]["image_embeds"], black)
    assert torch.equal(extra["added_cond_kwargs"]["text_embeds"], text[:, -1]) and torch.equal(states, text)
    projection = method.module.unet.encoder_hid_proj
    assert type(projection).__name__ == "TextImageProjection" and projection(text, black).shape[1] == 10 + text.shape[1]


@torch.no_grad()
def test_open_unclip_has_four_tokens_before_the_text_and_a_learned_null(monkeypatch):
    pipe, encoder = base()
    method = shaken(create("open-unclip", pipe, encoder))
    image = torch.cat([features(method, 0), method.null()[None]])
    text, states, extra = handed(method, monkeypatch, pipe, image)
    z = torch.stack([encoder.model(encoder.prepare([picture(0)])).image_embeds[0], method.module.nothing])
    torch.testing.assert_close(extra["class_labels"], torch.cat([z, text[:, -1]], dim=1))
    torch.testing.assert_close(states[:, :4].flatten(1), method.module.tokens(z))
    assert states.shape[1] == 4 + text.shape[1]


@torch.no_grad()
def test_blips_queries_stand_after_the_start_of_the_text(monkeypatch):
    pipe, encoder = base()
    method = shaken(create("blip-diffusion", pipe, encoder))
    read = []
    handle = method.module.text.register_forward_pre_hook(lambda _, args: read.append(args[0]))
    text, states, _ = handed(method, monkeypatch, pipe, features(method, 0, 1))
    handle.remove()
    assert states.shape[1] == read[0].shape[1] == 16 + text.shape[1]
    assert torch.equal(read[0][:, :1], text[:, :1]) and torch.equal(read[0][:, 17:], text[:, 1:])
    torch.testing.assert_close(states[:, 0], method.module.text(text[:, :1])[:, 0])  # causal: the start hears itself alone


@torch.no_grad()
def test_seecoders_tokens_depend_on_every_level_and_on_both_kinds_of_queries():
    pipe, encoder = base()
    method = shaken(create("seecoder", pipe, encoder))
    module, image = method.module, features(method, 0, 1)
    before = module.given(image)["tokens"]
    assert before.shape[1] == 16 + 4
    for part in (module.local, module.whole, *module.places, *(lateral.weight for lateral in module.laterals)):
        kept = part.clone()
        part.add_(torch.randn_like(part))
        assert (module.given(image)["tokens"][:, :16] - before[:, :16]).abs().max() > 1e-4
        part.copy_(kept)
    assert torch.equal(module.given(image)["tokens"], before)


@torch.no_grad()
def test_shuffle_adds_one_number_for_each_channel():
    pipe, encoder = base()
    method = shaken(create("shuffle", pipe, encoder))
    x, time, text = inputs(pipe)
    seen = []
    given = method.module.given(features(method, 0, 1))
    method.module.call(lambda *_, **more: seen.append(more) or pipe.unet(x, time, text), x, time, text, given)
    residuals = [*seen[0]["down_block_additional_residuals"], seen[0]["mid_block_additional_residual"]]
    assert all(r.shape[2:] == (1, 1) and r.abs().sum() > 0 for r in residuals)
    silent = method.module.given(method.null()[None].expand(2, -1, -1, -1))
    method.module.call(lambda *_, **more: seen.append(more) or pipe.unet(x, time, text), x, time, text, silent)
    assert all(r.abs().sum() == 0 for r in seen[1]["down_block_additional_residuals"])


def test_a_warp_moves_pixels_and_keeps_colours():
    pictures = torch.rand(2, 3, 32, 32)
    first, again, anew = warped(pictures, False), warped(pictures, False), warped(pictures, True)
    assert torch.equal(first, again) and not torch.equal(first, anew) and not torch.equal(first, pictures)
    assert first.min() >= pictures.min() and first.max() <= pictures.max()


@torch.no_grad()
def test_sd_unclip_adds_noise_in_training_only_and_knows_the_data():
    pipe, encoder = base()
    method = create("sd-unclip", pipe, encoder)
    module, image = method.module, features(method, 0, 1, 2, 3)
    module.train()
    noisy = module.given(image)["labels"]
    assert not torch.equal(noisy, module.given(image)["labels"])
    mean, std = module.statistics()
    torch.testing.assert_close(mean, image[:, 0, 0].mean(0))
    torch.testing.assert_close(std, image[:, 0, 0].std(0, correction=0), rtol=1e-3, atol=1e-4)
    module.given(method.null()[None])
    torch.testing.assert_close(module.statistics()[0], mean)  # what is dropped is no data, even alone in a batch
    module.eval()
    clean = module.given(image)["labels"]
    torch.testing.assert_close(clean[:, :FITTING], image[:, 0, 0], rtol=1e-4, atol=1e-4)
    assert module.given(method.null()[None])["labels"].abs().sum() == 0


@torch.no_grad()
def test_a_dropped_picture_is_the_texts_own_tail_for_t2i_style():
    pipe, encoder = base()
    method = shaken(create("t2i-style", pipe, encoder))
    x, time, text = inputs(pipe)
    nothing = method.denoise(x, time, text, method.null()[None].expand(2, -1, -1, -1))
    tail = pipe.unet(x, time, torch.cat([text, text[:, -8:]], dim=1)).sample
    torch.testing.assert_close(nothing, tail)


def test_reference_only_trains_nothing_and_reads_through_self_attention():
    pipe, encoder = base()
    method = create("reference-only", pipe, encoder)
    assert not list(method.module.parameters())
    before = {name: type(p) for name, p in pipe.unet.attn_processors.items()}
    with torch.no_grad(), method.attached(pipe, features(method, 0, 1), method.null()[None]):
        drawn(pipe)
    assert {name: type(p) for name, p in pipe.unet.attn_processors.items()} == before


def test_zeros_stand_for_no_picture():
    image = torch.zeros(2, 1, 3, 4)
    image[1, 0, 0, 0] = 1
    assert absent(image).tolist() == [True, False]


@pytest.mark.parametrize("name", [n for n in config.COPIES if n != "shuffle"])
def test_what_trains_a_unet_says_where_it_cannot(name):
    pipe = sdxl_pipeline()
    _, encoder = base(pooled=64)
    with pytest.raises(UserError, match="expected SD"):
        create(name, pipe, encoder)


@pytest.mark.parametrize("name", ["image-variations", "kandinsky", "versatile"])
def test_an_encoder_of_the_wrong_width_is_named(name):
    with pytest.raises(UserError, match="an encoder of width 32, received 24"):
        create(name, *base(pooled=24))


@torch.no_grad()
@pytest.mark.parametrize("name", ["simple", "uni-controlnet", "t2i-style", "shuffle", "seecoder", "reference-only"])
def test_adapters_work_on_sdxl(name):
    pipe, (_, encoder) = sdxl_pipeline(), base()
    method = shaken(create(name, pipe, encoder))
    before = drawn(pipe)
    with method.attached(pipe, features(method, 0, 1), method.null()[None]):
        assert not torch.equal(before, drawn(pipe))
    assert torch.equal(before, drawn(pipe))


@pytest.mark.parametrize("name", config.COPIES)
def test_what_trains_a_unet_starts_much_as_the_base(name):
    if name == "shuffle":
        pytest.skip("its outlets are zero")
    from imprompt.mini.judge import cases
    from imprompt.models.base_pipelines import load_base
    from imprompt.training.frozen_encoders import Frozen

    pipe = load_base("mini")
    encoder = ImageEncoder.load(imprompt.MINI / "image_encoder")
    method = create(name, pipe, encoder)
    text = Frozen(pipe, encoder, method.grid).text([case.text for case in cases(4)]).states
    x, time = torch.randn(4, 4, 16, 16, generator=torch.Generator().manual_seed(0)), torch.full((4,), 600)
    method.module.eval()
    with torch.no_grad():
        base_says, said = pipe.unet(x, time, text).sample, method.denoise(x, time, text, method.null()[None].expand(4, -1, -1, -1))
    apart = float((said - base_says).norm() / base_says.norm())
    if name in ("image-variations", "versatile"):  # they have no text
        assert apart < 2
    else:
        assert apart < 0.35, f"{name} starts {apart:.2f} away from the base"


@pytest.mark.parametrize("name", ["image-variations", "kandinsky", "shuffle"])
def test_a_copy_computes_activations_twice_where_the_base_does(name):
    pipe, encoder = base()
    pipe.unet.enable_gradient_checkpointing()
    module = create(name, pipe, encoder).module
    assert (module.controlnet if name == "shuffle" else module.unet).is_gradient_checkpointing


@pytest.mark.parametrize("name", sorted(set(config.METHODS) - set(config.MANY)))
def test_what_hears_one_reference_says_so(name):
    with pytest.raises(UserError, match=f"references: {name} hears one"):
        config.Train(method=name, references=2)


def test_an_unknown_method_is_named():
    with pytest.raises(UserError, match="expected one of ip-adapter"):
        create("dalle", *base())


def test_config_and_makers_agree():
    assert set(config.READS) == set(MAKERS) and set(config.COPIES) < set(MAKERS)
