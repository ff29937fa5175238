"""DreamBooth, with all weights and with LoRA, and Textual Inversion: what is trained, what is restored, which libraries read the files."""

import copy
import re
import sys
from contextlib import ExitStack

import pytest
import torch
from PIL import Image

from conftest import sd15_pipeline, sdxl_pipeline
from imprompt.config.training import LossConfig
from imprompt.core.noise_schedule import NoiseSchedule
from imprompt.errors import CheckpointError, UserError
from imprompt.methods import build_method
from imprompt.methods.dreambooth import DreamBooth
from imprompt.methods.inversion import TextualInversion
from imprompt.methods.loading import load_method
from imprompt.models.base_pipelines import noise_schedule_from
from imprompt.models.checkpoints import load_module, write_tensors
from imprompt.training.class_images import generate_class_images
from imprompt.training.frozen_encoders import PromptEmbeds, TrainingBatch, UncondInputs
from imprompt.training.objective import compute_loss

NULL_FEATURES = torch.zeros(1, 1, 1, 1)
NAMES = ("dreambooth", "dreambooth-lora", "inversion")
PROMPTS = {"dreambooth": "a sks cat", "dreambooth-lora": "a sks cat", "inversion": "a <subject>"}


def build_small(name, pipe):
    torch.manual_seed(5)
    match name:
        case "dreambooth":
            return DreamBooth.create_full(pipe)
        case "dreambooth-lora":
            return DreamBooth.create_lora(pipe, rank=4)
    return TextualInversion.create(pipe, "cat", num_vectors=3)


def perturbed(method):
    """The method with random numbers added to its weights, as if it were trained."""
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in method.module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return method


def sample_latents(pipe, prompt="a cat on a beach"):
    return pipe(prompt, num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="latent").images


def pipeline_state(pipe):
    """Everything in a pipeline that a method might change."""
    parts = ("unet", "text_encoder", "text_encoder_2", "vae")
    weights = {name: copy.deepcopy(getattr(pipe, name).state_dict()) for name in parts if getattr(pipe, name, None) is not None}
    flags = [p.requires_grad for p in pipe.unet.parameters()]
    return weights, flags, len(pipe.tokenizer), vars(pipe.text_encoder.get_input_embeddings()).get("forward"), dict(pipe.config)


def assert_equal_states(before, after):
    for name, weights in before[0].items():
        assert list(weights) == list(after[0][name])
        assert all(torch.equal(weights[key], after[0][name][key]) for key in weights), f"{name} changed"
    assert before[1:] == after[1:]


def fixed_batch(pipe):
    g = torch.Generator().manual_seed(0)
    side = pipe.unet.config.sample_size
    mean = torch.randn(2, 4, side, side, generator=g)
    return mean, torch.full_like(mean, 0.1), torch.tensor([[16, 16, 0, 0, 16, 16]] * 2).float()


def compute_fixed_loss(method, pipe, schedule: NoiseSchedule):
    """The training loss of a fixed batch; with gradient through the text encoders for a method that trains text embeddings."""
    mean, std, time_ids = fixed_batch(pipe)
    with ExitStack() as stack:
        if getattr(method, "trains_text_embeds", False):
            stack.enter_context(method.with_placeholder_tokens(pipe))
        encoded = pipe.encode_prompt(
            prompt=[PROMPTS[method.name]] * 2, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
        )
    text = PromptEmbeds(encoded[0], encoded[2] if len(encoded) == 4 else None)
    batch = TrainingBatch(mean, std, text, NULL_FEATURES.expand(2, -1, -1, -1), time_ids, None, [1, 2])
    uncond = UncondInputs(text, method.uncond_features()[None])
    config = LossConfig(text_drop_prob=0, image_drop_prob=0, both_drop_prob=0, timestep_sampling="uniform")
    return compute_loss(method, pipe.unet, schedule, batch, uncond, config).mean()


@pytest.mark.parametrize("make_pipeline", [sd15_pipeline, sdxl_pipeline])
@pytest.mark.parametrize("name", NAMES)
def test_a_few_steps_lower_the_loss_and_change_only_the_module(name, make_pipeline):
    pipe = make_pipeline()
    for part in (pipe.unet, pipe.vae, pipe.text_encoder, getattr(pipe, "text_encoder_2", None)):
        if part is not None:
            part.requires_grad_(False)
    before, base = pipeline_state(pipe), sample_latents(pipe)
    method, schedule = build_small(name, pipe), noise_schedule_from(pipe.scheduler)
    assert all(p.requires_grad for p in method.module.parameters())
    optimizer = torch.optim.AdamW(method.module.parameters(), lr=0.1 if name == "inversion" else 3e-3)
    losses = []
    for _ in range(6):
        loss = compute_fixed_loss(method, pipe, schedule)
        loss.backward()
        assert all(p.grad is not None for p in method.module.parameters())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    with method.apply_to(pipe, NULL_FEATURES, NULL_FEATURES):
        assert not torch.equal(sample_latents(pipe, PROMPTS[name]), base)
    method.remove_from_unet()
    assert_equal_states(before, pipeline_state(pipe))
    assert torch.equal(sample_latents(pipe), base)


def test_the_trained_parameters():
    pipe = sd15_pipeline()
    assert list(build_small("dreambooth", pipe).module.state_dict()) == list(pipe.unet.state_dict())
    lora = build_small("dreambooth-lora", pipe).module
    names = [name for name, _ in lora.named_parameters()]
    assert names == list(lora.state_dict()) and len(names) == 32 * 4 * 2  # 16 self- and 16 cross-attention layers, 4 projections, A and B
    assert "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0.lora_B.weight" in names
    assert {name: tuple(p.shape) for name, p in build_small("inversion", pipe).module.named_parameters()} == {"<subject>": (3, 32)}
    sdxl = build_small("inversion", sdxl_pipeline()).module
    assert {name: tuple(p.shape) for name, p in sdxl.named_parameters()} == {"clip_l": (3, 32), "clip_g": (3, 32)}


def test_lora_shares_the_base_models_memory():
    pipe = sd15_pipeline()
    lora_unet, base = build_small("dreambooth-lora", pipe).finetuned_unet, dict(pipe.unet.named_parameters())
    shared = {name.replace(".base_layer", ""): p for name, p in lora_unet.named_parameters() if "lora_" not in name}
    assert shared.keys() == base.keys() and all(shared[name] is base[name] for name in base)


@pytest.mark.parametrize("make_pipeline", [sd15_pipeline, sdxl_pipeline])
@pytest.mark.parametrize("name", ["dreambooth", "dreambooth-lora"])
def test_an_untrained_unet_is_the_base(name, make_pipeline):
    pipe = make_pipeline()
    before, method = sample_latents(pipe), build_small(name, pipe)
    with method.apply_to(pipe, NULL_FEATURES, NULL_FEATURES):
        assert torch.equal(sample_latents(pipe), before)


@pytest.mark.parametrize("make_pipeline", [sd15_pipeline, sdxl_pipeline])
def test_an_untrained_placeholder_is_its_initial_word(make_pipeline):
    pipe = make_pipeline()
    method = TextualInversion.create(pipe, "cat", num_vectors=1)
    with method.apply_to(pipe, NULL_FEATURES, NULL_FEATURES):
        assert torch.equal(sample_latents(pipe, "a <subject> on a beach"), sample_latents(pipe, "a cat on a beach"))
    several = TextualInversion.create(pipe, "cat", num_vectors=3)
    with several.apply_to(pipe, NULL_FEATURES, NULL_FEATURES):
        assert torch.equal(sample_latents(pipe, "a <subject> on a beach"), sample_latents(pipe, "a cat cat cat on a beach"))


def test_the_initialization_is_the_mean_over_a_words_tokens():
    pipe = sd15_pipeline()
    ids = pipe.tokenizer("teapot", add_special_tokens=False).input_ids
    assert len(ids) > 1
    table = pipe.text_encoder.get_input_embeddings().weight
    torch.testing.assert_close(TextualInversion.create(pipe, "teapot").placeholder_embeddings.vectors[0][2], table[ids].mean(0))
    with pytest.raises(UserError, match="expected a word"):
        TextualInversion.create(pipe, "")


@pytest.mark.parametrize("token", ["cat", "a.b", "two words", "<|endoftext|>"])
def test_a_placeholder_must_be_a_new_word(token):
    with pytest.raises(UserError, match="expected a new word"):
        TextualInversion.create(sd15_pipeline(), "cat", token=token)


@pytest.mark.parametrize("name", NAMES)
def test_training_and_generation_are_the_same_function(name):
    pipe = sd15_pipeline()
    method = perturbed(build_small(name, pipe))
    g = torch.Generator().manual_seed(0)
    x, time, text = torch.randn(2, 4, 16, 16, generator=g), torch.tensor([300, 300]), torch.randn(2, 24, 32, generator=g)
    with torch.no_grad():
        prediction = method.predict(x, time, text, NULL_FEATURES)
        with method.apply_to(pipe, NULL_FEATURES, NULL_FEATURES):
            torch.testing.assert_close(pipe.unet(x, time[0], text).sample, prediction)
            torch.testing.assert_close(pipe.unet(x, time[0], encoder_hidden_states=text, return_dict=False)[0], prediction)


@pytest.mark.parametrize("name", ["dreambooth", "dreambooth-lora"])
def test_the_scale_interpolates_from_the_base_to_the_finetuned_unet(name):
    pipe = sd15_pipeline()
    method, before, differences = perturbed(build_small(name, pipe)), sample_latents(pipe), []
    for scale in (0.0, 0.5, 1.0):
        with method.apply_to(pipe, NULL_FEATURES, NULL_FEATURES, scale):
            differences.append(float((sample_latents(pipe) - before).abs().mean()))
    assert differences[0] < 1e-5 < differences[1] < differences[2]


@pytest.mark.parametrize("name", NAMES)
def test_a_patched_forward_is_restored(name):
    pipe = sd15_pipeline()
    layer = pipe.text_encoder.get_input_embeddings() if name == "inversion" else pipe.unet
    inner = layer.forward
    layer.forward = hooked = lambda *a, **k: inner(*a, **k)
    method = build_small(name, pipe)
    with method.apply_to(pipe, NULL_FEATURES, NULL_FEATURES):
        assert layer.forward is not hooked
        sample_latents(pipe)
    assert layer.forward is hooked


def test_a_copy_does_not_have_what_is_attached():
    pipe = sd15_pipeline()
    pipe.unet.forward = lambda *a, **k: pytest.fail("the copy calls what was attached to the base")
    build_small("dreambooth", pipe).predict(torch.zeros(1, 4, 16, 16), torch.tensor([3]), torch.zeros(1, 24, 32), NULL_FEATURES)


@pytest.mark.parametrize("name", NAMES)
def test_a_file_restores_the_method(name, tmp_path):
    pipe = sd15_pipeline()
    method, again = perturbed(build_small(name, pipe)), build_small(name, pipe)
    write_tensors(method.module.state_dict(), tmp_path / "x.safetensors", {"method": name})
    load_module(again.module, tmp_path / "x.safetensors")
    latents = []
    for loaded in (method, again):
        with loaded.apply_to(pipe, NULL_FEATURES, NULL_FEATURES):
            latents.append(sample_latents(pipe, PROMPTS[name]))
    assert torch.equal(*latents)


@pytest.mark.parametrize("make_pipeline", [sd15_pipeline, sdxl_pipeline])
@pytest.mark.parametrize("name", NAMES)
def test_diffusers_reads_the_file(name, make_pipeline, tmp_path):
    pipe, method = make_pipeline(), None
    method = perturbed(build_small(name, pipe))
    path = tmp_path / "trained.safetensors"
    write_tensors(method.module.state_dict(), path, {"method": name})
    with method.apply_to(pipe, NULL_FEATURES, NULL_FEATURES):
        ours = sample_latents(pipe, PROMPTS[name])
    other = make_pipeline()
    assert not torch.allclose(sample_latents(other, PROMPTS[name]), ours, atol=1e-3)
    if name == "dreambooth":
        from safetensors.torch import load_file

        other.unet.load_state_dict(load_file(path))
    elif name == "dreambooth-lora":
        other.load_lora_weights(str(path))
    elif make_pipeline is sd15_pipeline:
        other.load_textual_inversion(str(path))
    else:
        from safetensors.torch import load_file

        tensors = load_file(path)
        other.load_textual_inversion(tensors["clip_l"], token="<subject>", text_encoder=other.text_encoder, tokenizer=other.tokenizer)
        other.load_textual_inversion(tensors["clip_g"], token="<subject>", text_encoder=other.text_encoder_2, tokenizer=other.tokenizer_2)
    torch.testing.assert_close(sample_latents(other, PROMPTS[name]), ours, rtol=1e-4, atol=1e-4)


def test_a_file_of_another_rank_is_an_error(tmp_path):
    pipe = sd15_pipeline()
    write_tensors(build_small("dreambooth-lora", pipe).module.state_dict(), tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="should be"):
        load_module(DreamBooth.create_lora(pipe, rank=2).module, tmp_path / "x.safetensors")


def test_without_peft_the_error_names_the_extra(monkeypatch):
    pipe = sd15_pipeline()
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r"pip install 'imprompt\[lora\]'"):
        DreamBooth.create_lora(pipe)


def test_a_copy_has_gradient_checkpointing_where_the_base_has():
    pipe = sd15_pipeline()
    pipe.unet.enable_gradient_checkpointing()
    for name in ("dreambooth", "dreambooth-lora"):
        assert build_small(name, pipe).finetuned_unet.is_gradient_checkpointing


@pytest.mark.bf16
@pytest.mark.parametrize("name", ["dreambooth", "dreambooth-lora"])
def test_finetuning_works_from_a_base_with_prepacked_weights(name, cpu_bf16):
    """Compared with a base whose weights are not packed. The mean absolute error of bfloat16 is .18 here, for latents of magnitude 2.1."""
    from imprompt.unet.mkldnn import prepack_weights

    pipe, plain = sd15_pipeline(), sd15_pipeline()
    pipe.unet.requires_grad_(False)
    prepack_weights(pipe.unet)
    dtype = torch.bfloat16 if cpu_bf16 else torch.float32
    pipe.to(dtype)
    plain.to(dtype)
    before, method, other = sample_latents(pipe), build_small(name, pipe), build_small(name, plain)
    x, text = torch.randn(1, 4, 16, 16, dtype=dtype), torch.randn(1, 24, 32, dtype=dtype)
    method.predict(x, torch.tensor([300]), text, NULL_FEATURES).float().square().mean().backward()
    assert any(p.grad.abs().sum() > 0 for p in method.module.parameters())
    with method.apply_to(pipe, NULL_FEATURES, NULL_FEATURES), other.apply_to(plain, NULL_FEATURES, NULL_FEATURES):
        untrained = sample_latents(pipe)
        expected = before if name == "dreambooth-lora" else sample_latents(plain)  # the copy is in float32, whatever the base is in
    assert torch.equal(untrained, expected)
    perturbed(method)
    perturbed(other)
    with method.apply_to(pipe, NULL_FEATURES, NULL_FEATURES), other.apply_to(plain, NULL_FEATURES, NULL_FEATURES):
        trained, expected = sample_latents(pipe), sample_latents(plain)
    rounding, change = ((trained - latents).float().abs().mean() for latents in (expected, before))
    assert change > 0.1 and rounding < 0.1 * change, "weights packed before the training were used after it"
    assert torch.equal(sample_latents(pipe), before)


@pytest.mark.parametrize("name", NAMES)
def test_methods_by_name(name):
    method = build_method(name, sd15_pipeline(), None)
    assert method.name == name and method.uncond_features().shape == (1, 1, 1)
    features = method.encoder.encode_images([Image.new("RGB", (8, 8))] * 2, patches=False)
    assert features.shape == (2, 1, method.encoder.embed_dim(patches=False)) and not features.any()
    assert method.encoder.preprocess([Image.new("RGB", (8, 8))]).shape[-1] == method.encoder.image_size


def test_class_images_are_generated_once_and_do_not_depend_on_the_batch(tmp_path):
    pipe = sd15_pipeline()
    scheduler = pipe.scheduler
    first = list(generate_class_images(pipe, "mini", "cat", 3, tmp_path, num_inference_steps=2, batch_size=2))
    assert all(re.fullmatch(rf"cat-[0-9a-f]{{8}}-{n:04}\.png", p.name) for n, p in enumerate(first)) and len(first) == 3
    assert pipe.scheduler is scheduler
    pixels = [Image.open(p).tobytes() for p in first]
    first[1].unlink()
    times = [p.stat().st_mtime_ns for p in (first[0], first[2])]
    again = list(generate_class_images(pipe, "mini", "cat", 3, tmp_path, num_inference_steps=2, batch_size=3))
    assert again == first and [p.stat().st_mtime_ns for p in (first[0], first[2])] == times
    differences = [abs(a - b) for a, b in zip(Image.open(first[1]).tobytes(), pixels[1], strict=True)]
    assert max(differences) <= 2
    assert not [p for p in tmp_path.iterdir() if p.suffix != ".png"]
    assert not set(generate_class_images(pipe, "another", "cat", 3, tmp_path, num_inference_steps=2)) & set(first)


@pytest.mark.parametrize("name", ["inversion", "dreambooth-lora"])
@pytest.mark.parametrize("metadata", [{"token": "\udcff"}, {"token": "\x1b[2J"}, {"noun": "a\nb"}])
def test_words_in_a_file_that_are_not_printable_are_refused(name, metadata, tmp_path):
    pipe = sd15_pipeline()
    write_tensors(build_small(name, pipe).module.state_dict(), tmp_path / "x.safetensors", {"method": name} | metadata)
    with pytest.raises(CheckpointError, match="expected printable words"):
        load_method(str(tmp_path / "x.safetensors"), pipe, "small")


@pytest.mark.parametrize("claim", ["1000000000", "-1", {}, "x", None])
def test_sizes_of_a_file_are_those_of_its_tensors_whatever_it_claims(claim, tmp_path):
    pipe = sd15_pipeline()
    for name in ("inversion", "dreambooth-lora"):
        method = build_small(name, pipe)
        write_tensors(method.module.state_dict(), tmp_path / "x.safetensors", {"method": name, "vectors": claim, "rank": claim})
        loaded = load_method(str(tmp_path / "x.safetensors"), pipe, "small")
        assert all(torch.equal(value, method.module.state_dict()[key]) for key, value in loaded.module.state_dict().items())
