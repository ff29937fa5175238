"""Every method: the same function in training and in use, the UNet left as it was, and the mechanism that its paper describes."""

import pytest
import torch
from PIL import Image

from conftest import image_processor, sd15_pipeline, sdxl_pipeline
from imprompt import config
from imprompt.encoders import ImageEncoder
from imprompt.errors import UserError
from imprompt.methods import MAKERS, create
from imprompt.methods.base import absent
from imprompt.methods.shuffle import warped

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
def test_the_picture_is_heard_and_the_unet_left_as_it_was(made):
    pipe, method = made
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
    torch.testing.assert_close(module.normal.running_mean, image[:, 0, 0].mean(0))
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


def test_an_unknown_method_is_named():
    with pytest.raises(UserError, match="expected one of ip-adapter"):
        create("dalle", *base())


def test_config_and_makers_agree():
    assert set(config.READS) == set(MAKERS) and set(config.COPIES) < set(MAKERS)
