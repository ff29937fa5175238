"""DreamBooth, its low-rank form and Textual Inversion: what learns, what stays, and who reads the files."""

import copy
import re
import sys
from contextlib import ExitStack

import pytest
import torch
from PIL import Image

from conftest import sd15_pipeline, sdxl_pipeline
from imprompt.core.noise_schedule import Schedule
from imprompt.errors import CheckpointError, UserError
from imprompt.methods import create
from imprompt.methods.dreambooth import DreamBooth
from imprompt.methods.inversion import Inversion
from imprompt.models.base_pipelines import schedule_of
from imprompt.models.checkpoints import load_module, write
from imprompt.training.class_images import class_pictures
from imprompt.training.frozen_encoders import Encoded, Nulls, Text
from imprompt.training.objective import Objective, losses

NOTHING = torch.zeros(1, 1, 1, 1)
NAMES = ("dreambooth", "dreambooth-lora", "inversion")
PROMPTS = {"dreambooth": "a sks cat", "dreambooth-lora": "a sks cat", "inversion": "a <subject>"}


def made(name, pipe):
    torch.manual_seed(5)
    match name:
        case "dreambooth":
            return DreamBooth.create(pipe)
        case "dreambooth-lora":
            return DreamBooth.create_low_rank(pipe, rank=4)
    return Inversion.create(pipe, "cat", vectors=3)


def shaken(method):
    """As if trained."""
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in method.module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return method


def drawn(pipe, prompt="a cat on a beach"):
    return pipe(prompt, num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="latent").images


def state(pipe):
    """All that a method might have touched."""
    parts = ("unet", "text_encoder", "text_encoder_2", "vae")
    weights = {name: copy.deepcopy(getattr(pipe, name).state_dict()) for name in parts if getattr(pipe, name, None) is not None}
    flags = [p.requires_grad for p in pipe.unet.parameters()]
    return weights, flags, len(pipe.tokenizer), vars(pipe.text_encoder.get_input_embeddings()).get("forward"), dict(pipe.config)


def assert_same(before, after):
    for name, weights in before[0].items():
        assert list(weights) == list(after[0][name])
        assert all(torch.equal(weights[key], after[0][name][key]) for key in weights), f"{name} changed"
    assert before[1:] == after[1:]


def fixed_batch(pipe):
    g = torch.Generator().manual_seed(0)
    side = pipe.unet.config.sample_size
    mean = torch.randn(2, 4, side, side, generator=g)
    return mean, torch.full_like(mean, 0.1), torch.tensor([[16, 16, 0, 0, 16, 16]] * 2).float()


def loss_of(method, pipe, schedule: Schedule):
    """As the trainer has it: a method that speaks is listened to with gradient."""
    mean, std, sizes = fixed_batch(pipe)
    with ExitStack() as stack:
        if getattr(method, "speaks", False):
            stack.enter_context(method.spoken(pipe))
        found = pipe.encode_prompt(
            prompt=[PROMPTS[method.name]] * 2, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
        )
    text = Text(found[0], found[2] if len(found) == 4 else None)
    encoded = Encoded(mean, std, text, NOTHING.expand(2, -1, -1, -1), sizes, None, [1, 2])
    nulls = Nulls(text, method.null()[None])
    return losses(method, pipe.unet, schedule, encoded, nulls, Objective(0, 0, 0)).mean()


@pytest.mark.parametrize("shape", [sd15_pipeline, sdxl_pipeline])
@pytest.mark.parametrize("name", NAMES)
def test_a_few_steps_lower_the_loss_and_touch_nothing_but_the_module(name, shape):
    pipe = shape()
    for part in (pipe.unet, pipe.vae, pipe.text_encoder, getattr(pipe, "text_encoder_2", None)):
        if part is not None:
            part.requires_grad_(False)
    before, plain = state(pipe), drawn(pipe)
    method, schedule = made(name, pipe), schedule_of(pipe.scheduler)
    assert all(p.requires_grad for p in method.module.parameters())
    optimiser = torch.optim.AdamW(method.module.parameters(), lr=0.1 if name == "inversion" else 3e-3)
    found = []
    for _ in range(6):
        loss = loss_of(method, pipe, schedule)
        loss.backward()
        assert all(p.grad is not None for p in method.module.parameters())
        optimiser.step()
        optimiser.zero_grad()
        found.append(float(loss.detach()))
    assert found[-1] < found[0]
    with method.attached(pipe, NOTHING, NOTHING):
        assert not torch.equal(drawn(pipe, PROMPTS[name]), plain)
    method.release()
    assert_same(before, state(pipe))
    assert torch.equal(drawn(pipe), plain)


def test_what_is_trained():
    pipe = sd15_pipeline()
    assert list(made("dreambooth", pipe).module.state_dict()) == list(pipe.unet.state_dict())
    low = made("dreambooth-lora", pipe).module
    names = [name for name, _ in low.named_parameters()]
    assert names == list(low.state_dict()) and len(names) == 32 * 4 * 2  # 16 self- and 16 cross-attention layers, 4 projections, A and B
    assert "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0.lora_B.weight" in names
    assert {name: tuple(p.shape) for name, p in made("inversion", pipe).module.named_parameters()} == {"<subject>": (3, 32)}
    two = made("inversion", sdxl_pipeline()).module
    assert {name: tuple(p.shape) for name, p in two.named_parameters()} == {"clip_l": (3, 32), "clip_g": (3, 32)}


def test_low_rank_updates_share_the_base_in_memory():
    pipe = sd15_pipeline()
    whole, own = made("dreambooth-lora", pipe).tuned, dict(pipe.unet.named_parameters())
    shared = {name.replace(".base_layer", ""): p for name, p in whole.named_parameters() if "lora_" not in name}
    assert shared.keys() == own.keys() and all(shared[name] is own[name] for name in own)


@pytest.mark.parametrize("shape", [sd15_pipeline, sdxl_pipeline])
@pytest.mark.parametrize("name", ["dreambooth", "dreambooth-lora"])
def test_untrained_it_is_the_base(name, shape):
    pipe = shape()
    before, method = drawn(pipe), made(name, pipe)
    with method.attached(pipe, NOTHING, NOTHING):
        assert torch.equal(drawn(pipe), before)


@pytest.mark.parametrize("shape", [sd15_pipeline, sdxl_pipeline])
def test_an_untrained_word_is_the_one_that_it_began_as(shape):
    pipe = shape()
    method = Inversion.create(pipe, "cat", vectors=1)
    with method.attached(pipe, NOTHING, NOTHING):
        assert torch.equal(drawn(pipe, "a <subject> on a beach"), drawn(pipe, "a cat on a beach"))
    several = Inversion.create(pipe, "cat", vectors=3)
    with several.attached(pipe, NOTHING, NOTHING):
        assert torch.equal(drawn(pipe, "a <subject> on a beach"), drawn(pipe, "a cat cat cat on a beach"))


def test_the_beginning_is_the_mean_over_a_words_tokens():
    pipe = sd15_pipeline()
    ids = pipe.tokenizer("teapot", add_special_tokens=False).input_ids
    assert len(ids) > 1
    table = pipe.text_encoder.get_input_embeddings().weight
    torch.testing.assert_close(Inversion.create(pipe, "teapot").words.rows()[0][2], table[ids].mean(0))
    with pytest.raises(UserError, match="expected a word"):
        Inversion.create(pipe, "")


@pytest.mark.parametrize("token", ["cat", "a.b", "two words", "<|endoftext|>"])
def test_a_placeholder_that_is_no_new_word_is_named(token):
    with pytest.raises(UserError, match="expected a new word"):
        Inversion.create(sd15_pipeline(), "cat", token=token)


@pytest.mark.parametrize("name", NAMES)
def test_training_and_use_are_the_same_function(name):
    pipe = sd15_pipeline()
    method = shaken(made(name, pipe))
    g = torch.Generator().manual_seed(0)
    x, time, text = torch.randn(2, 4, 16, 16, generator=g), torch.tensor([300, 300]), torch.randn(2, 24, 32, generator=g)
    with torch.no_grad():
        trained = method.denoise(x, time, text, NOTHING)
        with method.attached(pipe, NOTHING, NOTHING):
            torch.testing.assert_close(pipe.unet(x, time[0], text).sample, trained)
            torch.testing.assert_close(pipe.unet(x, time[0], encoder_hidden_states=text, return_dict=False)[0], trained)


@pytest.mark.parametrize("name", ["dreambooth", "dreambooth-lora"])
def test_the_scale_leads_from_the_base_to_the_copy(name):
    pipe = sd15_pipeline()
    method, before, apart = shaken(made(name, pipe)), drawn(pipe), []
    for scale in (0.0, 0.5, 1.0):
        with method.attached(pipe, NOTHING, NOTHING, scale):
            apart.append(float((drawn(pipe) - before).abs().mean()))
    assert apart[0] < 1e-5 < apart[1] < apart[2]


@pytest.mark.parametrize("name", NAMES)
def test_what_somebody_else_put_there_is_put_back(name):
    pipe = sd15_pipeline()
    layer = pipe.text_encoder.get_input_embeddings() if name == "inversion" else pipe.unet
    inner = layer.forward
    layer.forward = hooked = lambda *a, **k: inner(*a, **k)
    method = made(name, pipe)
    with method.attached(pipe, NOTHING, NOTHING):
        assert layer.forward is not hooked
        drawn(pipe)
    assert layer.forward is hooked


def test_a_copy_leaves_behind_what_is_attached():
    pipe = sd15_pipeline()
    pipe.unet.forward = lambda *a, **k: pytest.fail("the copy calls what was attached to the base")
    made("dreambooth", pipe).denoise(torch.zeros(1, 4, 16, 16), torch.tensor([3]), torch.zeros(1, 24, 32), NOTHING)


@pytest.mark.parametrize("name", NAMES)
def test_a_file_comes_back(name, tmp_path):
    pipe = sd15_pipeline()
    method, again = shaken(made(name, pipe)), made(name, pipe)
    write(method.module.state_dict(), tmp_path / "x.safetensors", {"method": name})
    load_module(again.module, tmp_path / "x.safetensors")
    latents = []
    for one in (method, again):
        with one.attached(pipe, NOTHING, NOTHING):
            latents.append(drawn(pipe, PROMPTS[name]))
    assert torch.equal(*latents)


@pytest.mark.parametrize("shape", [sd15_pipeline, sdxl_pipeline])
@pytest.mark.parametrize("name", NAMES)
def test_diffusers_reads_the_file(name, shape, tmp_path):
    pipe, method = shape(), None
    method = shaken(made(name, pipe))
    path = tmp_path / "trained.safetensors"
    write(method.module.state_dict(), path, {"method": name})
    with method.attached(pipe, NOTHING, NOTHING):
        ours = drawn(pipe, PROMPTS[name])
    other = shape()
    assert not torch.allclose(drawn(other, PROMPTS[name]), ours, atol=1e-3)
    if name == "dreambooth":
        from safetensors.torch import load_file

        other.unet.load_state_dict(load_file(path))
    elif name == "dreambooth-lora":
        other.load_lora_weights(str(path))
    elif shape is sd15_pipeline:
        other.load_textual_inversion(str(path))
    else:
        from safetensors.torch import load_file

        tensors = load_file(path)
        other.load_textual_inversion(tensors["clip_l"], token="<subject>", text_encoder=other.text_encoder, tokenizer=other.tokenizer)
        other.load_textual_inversion(tensors["clip_g"], token="<subject>", text_encoder=other.text_encoder_2, tokenizer=other.tokenizer_2)
    torch.testing.assert_close(drawn(other, PROMPTS[name]), ours, rtol=1e-4, atol=1e-4)


def test_a_file_of_another_rank_is_an_error(tmp_path):
    pipe = sd15_pipeline()
    write(made("dreambooth-lora", pipe).module.state_dict(), tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="should be"):
        load_module(DreamBooth.create_low_rank(pipe, rank=2).module, tmp_path / "x.safetensors")


def test_without_peft_the_next_move_is_named(monkeypatch):
    pipe = sd15_pipeline()
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r"pip install 'imprompt\[lora\]'"):
        DreamBooth.create_low_rank(pipe)


def test_a_copy_computes_activations_twice_where_the_base_does():
    pipe = sd15_pipeline()
    pipe.unet.enable_gradient_checkpointing()
    for name in ("dreambooth", "dreambooth-lora"):
        assert made(name, pipe).tuned.is_gradient_checkpointing


@pytest.mark.parametrize("name", ["dreambooth", "dreambooth-lora"])
def test_packed_layers_of_mini_are_no_obstacle(name):
    from imprompt.unet.mkldnn import pack

    pipe = sd15_pipeline()
    pipe.unet.requires_grad_(False)
    pack(pipe.unet)
    precision = torch.bfloat16 if torch.ops.mkldnn._is_mkldnn_bf16_supported() else torch.float32
    pipe.to(precision)
    before, method = drawn(pipe), made(name, pipe)
    x, text = torch.randn(1, 4, 16, 16, dtype=precision), torch.randn(1, 24, 32, dtype=precision)
    method.denoise(x, torch.tensor([300]), text, NOTHING).float().square().mean().backward()
    assert any(p.grad.abs().sum() > 0 for p in method.module.parameters())
    with method.attached(pipe, NOTHING, NOTHING):
        assert (drawn(pipe) - before).abs().max() < 0.1
    shaken(method)
    with method.attached(pipe, NOTHING, NOTHING):
        assert (drawn(pipe) - before).abs().max() > 0.1, "weights laid out before the training are laid out anew"
    assert torch.equal(drawn(pipe), before)


@pytest.mark.parametrize("name", NAMES)
def test_by_name(name):
    method = create(name, sd15_pipeline(), None)
    assert method.name == name and method.null().shape == (1, 1, 1)
    seen = method.encoder.encode([Image.new("RGB", (8, 8))] * 2, False)
    assert seen.shape == (2, 1, method.encoder.width(False)) and not seen.any()
    assert method.encoder.prepare([Image.new("RGB", (8, 8))]).shape[-1] == method.encoder.side


def test_class_pictures_are_drawn_once_and_do_not_depend_on_the_batch(tmp_path):
    pipe = sd15_pipeline()
    own = pipe.scheduler
    first = list(class_pictures(pipe, "cat", 3, tmp_path, steps=2, batch=2))
    assert all(re.fullmatch(rf"cat-[0-9a-f]{{8}}-{n:04}\.png", p.name) for n, p in enumerate(first)) and len(first) == 3
    assert pipe.scheduler is own
    pixels = [Image.open(p).tobytes() for p in first]
    first[1].unlink()
    times = [p.stat().st_mtime_ns for p in (first[0], first[2])]
    again = list(class_pictures(pipe, "cat", 3, tmp_path, steps=2, batch=3))
    assert again == first and [p.stat().st_mtime_ns for p in (first[0], first[2])] == times
    apart = [abs(a - b) for a, b in zip(Image.open(first[1]).tobytes(), pixels[1], strict=True)]
    assert max(apart) <= 2
    assert not [p for p in tmp_path.iterdir() if p.suffix != ".png"]
    assert not set(class_pictures(pipe, "cat", 3, tmp_path, steps=2, base="another")) & set(first)
