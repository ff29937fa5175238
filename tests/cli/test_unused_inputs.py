"""What has no effect on the result is reported in one line on standard error, and what has an effect is not."""

import random

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter

import imprompt
from conftest import random_adapter, sd15_pipeline, sd15_unet
from imprompt.cli import main
from imprompt.config import EvaluateConfig, PersonalizeConfig, TrainConfig
from imprompt.errors import Notice
from imprompt.generation.inputs import find_cut_text, find_unknown_words
from imprompt.mini import world
from imprompt.mini.held_out import make_held_out_samples
from imprompt.mini.tokenizer import MAX_LENGTH
from imprompt.models import checkpoints
from imprompt.models.feature_distribution import FeatureDistribution
from imprompt.models.hub import MINI_PATH
from imprompt.models.image_encoders import ImageEncoder


@pytest.fixture(scope="module")
def sample():
    return make_held_out_samples(1)[0]


@pytest.fixture(scope="module")
def reference(sample, tmp_path_factory):
    path = tmp_path_factory.mktemp("reference") / "reference.png"
    sample.image.save(path)
    return str(path)


def notes(capsys, *arguments: str, code: int = 0) -> list[str]:
    """The notices of a command."""
    capsys.readouterr()
    assert main([*arguments]) == code
    lines = capsys.readouterr().err.splitlines()
    return [line.removeprefix("imprompt: note: ") for line in lines if line.startswith("imprompt: note: ")]


def generate_notes(capsys, tmp_path, *arguments: str) -> list[str]:
    return notes(capsys, "generate", "--steps", "2", "-n", "1", "--output-dir", str(tmp_path / "out"), *arguments)


def test_a_usual_command_has_no_notes(reference, sample, tmp_path, capsys):
    arguments = ["--image", reference, "--prompt", sample.caption, "--negative-prompt", "low quality", "--start-at", "0.5"]
    assert generate_notes(capsys, tmp_path, *arguments) == []


def test_everything_without_an_effect_has_its_line(reference, tmp_path, capsys):
    """All at once: each line is independent of the others, and stands there once although two batches are generated."""
    long = " ".join(["a red cat on a beach"] * 5 + ["near the Eiffel tower"])
    given = notes(
        capsys, "generate", reference, "--prompt", long, "--negative-prompt", "dog", "--negative-image", reference,
        "--guidance-scale", "1", "--start-at", "0.9", "--aggregation", "max", "--image-weights", "2", "--model-config", "folder",
        "--steps", "2", "-n", "2", "--output-dir", str(tmp_path / "out"),
    )  # fmt: skip
    beginnings = (
        "model_config: has an effect with a single file only",
        "aggregation: has no effect on a single reference image",
        "image_weights: has no effect on a single reference image",
        "negative_image: has no effect without classifier-free guidance; expected a guidance_scale above 1, received 1",
        "negative_prompt: has no effect without classifier-free guidance",
        "image prompt: no denoising step lies in its window 0.9 … 1",
        "prompt: the text encoder reads 22 tokens, so this is cut: 'a beach a red cat on a beach",
        "prompt: mini has a small vocabulary, and these words mean nothing to it: near, eiffel, tower",
        "negative_prompt: mini has a small vocabulary, and these words mean nothing to it: dog",
    )
    for beginning in beginnings:
        assert sum(line.startswith(beginning) for line in given) == 1, (beginning, given)
    assert len(given) == len(beginnings)


@pytest.mark.parametrize(("scheduler", "start", "end", "is_open"), [
    ("ddim", "0.9", "1", False), ("ddim", "0.5", "1", True), ("heun", "0.999", "1", False), ("ddim", "0.2", "0.2", False),
    ("euler", "0", "0.01", True), ("ddim", "0.4", "0.45", False),
])  # fmt: skip
def test_a_window_without_a_step_is_reported(scheduler, start, end, is_open, reference, tmp_path, capsys):
    """Where it is, the image is the one without the reference: the note is right."""
    window = ["--scheduler", scheduler, "--start-at", start, "--end-at", end]
    lines = generate_notes(capsys, tmp_path, "--image", reference, *window)
    assert [line.split(":")[0] for line in lines] == ([] if is_open else ["image prompt"])
    generate_notes(capsys, tmp_path / "without", "--image", reference, "--scale", "0", "--scheduler", scheduler)
    same = np.array_equal(*(np.asarray(Image.open(folder / "out" / "000000.png")) for folder in (tmp_path, tmp_path / "without")))
    assert same != is_open


def test_a_window_of_image_to_image_counts_the_steps_that_are_taken(reference, tmp_path, capsys):
    window = ["--image", reference, "--init-image", reference, "--strength", "0.5", "--steps", "4", "--end-at", "0.4"]
    assert "no denoising step lies in its window 0 … 0.4" in generate_notes(capsys, tmp_path, *window)[0]


def test_what_a_missing_reference_makes_useless_is_reported(tmp_path, capsys):
    given = generate_notes(
        capsys, tmp_path, "--prompt", "a cat", "--scale", "0.5", "--image-mask", "mask.png", "--save-embeds", "a.safetensors"
    )
    assert [line.split(":")[0] for line in given] == ["scale", "image_mask", "save_embeds"]


def test_options_of_saved_embeddings_are_reported(reference, tmp_path, capsys):
    saved = str(tmp_path / "saved.safetensors")
    generate_notes(capsys, tmp_path, "--image", reference, "--save-embeds", saved)
    given = generate_notes(capsys, tmp_path, "--image", saved, "--resize-mode", "pad", "--negative-image", reference)
    assert [line.split(":")[0] for line in given] == ["negative_image", "resize_mode"]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (TrainConfig.from_options(class_noun="cat", prior_loss_weight=2.0), ["class_noun", "prior_loss_weight"]),
        (TrainConfig.from_options(test_fraction=0.5), ["test_fraction"]),
        (TrainConfig.from_options(num_validation_images=0, validation_steps=5), ["validation_steps"]),
        (TrainConfig.from_options(method="inversion", class_noun="cat", num_class_images=3), ["num_class_images"]),
        (TrainConfig.from_options(method="dreambooth", class_noun="cat", image_drop_prob=0.2), ["image_drop_prob"]),
        (TrainConfig.from_options(method="dreambooth", class_noun="cat", prior_loss_weight=0.5, class_data_dir="a"), []),
        (EvaluateConfig.from_options(finetune_steps=10), ["finetune_steps"]),
        (EvaluateConfig.from_options(finetune_steps=10, baseline=("dreambooth",)), []),
        (EvaluateConfig.from_options(identity_encoder="mini"), ["identity_encoder"]),
        (PersonalizeConfig.from_options(data="a", class_noun="cat", prompt=("a dog",)), ["class_noun"]),
        (PersonalizeConfig.from_options(data="a", class_noun="cat", prompt=("a *",)), []),
    ],
)
def test_options_that_the_method_ignores_are_reported(config, expected):
    assert [sentence.split(":")[0] for sentence in config.find_unused()] == expected


def test_python_receives_the_same_notices(sample):
    with pytest.warns(Notice, match="negative_prompt: has no effect without classifier-free guidance"):
        imprompt.generate(sample.image, negative_prompt="bad", guidance_scale=0, num_inference_steps=1, num_images=1)


def test_the_cut_text_is_what_lies_beyond_the_last_token():
    tokenizer = sd15_pipeline().tokenizer
    fitting = " ".join(["cat"] * (MAX_LENGTH - 2))
    assert find_cut_text(fitting, tokenizer) == "" == find_cut_text("", tokenizer)
    assert find_cut_text(fitting + " red fish", tokenizer) == "red fish"


@pytest.mark.parametrize(
    ("prompt", "unknown"),
    [
        ("A Red CAT, on a beach!", []),
        ("a portrait of a dragon-fly", ["portrait", "dragon-fly"]),
        ("猫 on a beach", ["猫"]),
        ("a cat's house", ["cat's"]),
        ("", []),
        ("4 cats cats", ["4", "cats"]),
    ],
)
def test_words_that_mini_does_not_know_are_found(prompt, unknown):
    assert find_unknown_words(prompt) == unknown


def test_every_caption_of_the_world_is_known():
    rng = random.Random(0)
    for i, subject in zip(range(100), world.iterate_subjects(), strict=False):
        assert find_unknown_words(world.sample_caption(subject, world.make_scene(i), rng)) == []


def foreign_images() -> dict[str, Image.Image]:
    """Images that are not of mini's world: noise, gradients, shaded spheres, blurred and textured ones."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[-1:1:96j, -1:1:96j]
    sphere = np.clip(1 - x**2 - y**2, 0, 1) ** 0.5
    noise = rng.integers(0, 256, (96, 96, 3), dtype=np.uint8)
    text = Image.new("RGB", (96, 96), "white")
    ImageDraw.Draw(text).text((5, 20), "terms and\nconditions\napply here", fill="black")
    return {
        "noise": Image.fromarray(noise),
        "clouds": Image.fromarray(noise).filter(ImageFilter.GaussianBlur(6)),
        "sphere": Image.fromarray((255 * np.stack([sphere, sphere**2, sphere**4], -1)).astype(np.uint8)),
        "text": text,
        "stripes": Image.fromarray(np.repeat((127 + 127 * np.sin(40 * x + 30 * y))[..., None], 3, -1).astype(np.uint8)),
    }


def test_references_far_from_the_world_are_found_and_its_own_are_not():
    """At most 1 % of the world's own images on average: 300 of them that did not fix the threshold."""
    encoder = ImageEncoder.load(MINI_PATH / "image_encoder")
    unseen = [sample.image for sample in make_held_out_samples(6_300)[6_000:]]
    assert len(encoder.find_unfamiliar(unseen)) <= 8  # 3 expected; more than 8 has a probability of 0.4 %
    foreign = foreign_images()
    found = encoder.find_unfamiliar(list(foreign.values()))
    assert found == list(range(len(foreign))), list(foreign)


def test_a_foreign_reference_is_reported_once(reference, tmp_path, capsys):
    foreign_images()["sphere"].save(tmp_path / "sphere.png")
    given = generate_notes(capsys, tmp_path, "--image", reference, "--image", str(tmp_path / "sphere.png"))
    assert len(given) == 1 and "mini only knows its own synthetic world, and 1 of 2 references" in given[0] and "--model" in given[0]


def test_other_models_have_no_distribution(tmp_path, recwarn):
    pipe = sd15_pipeline()
    pipe.image_encoder.save_pretrained(tmp_path / "encoder")
    checkpoints.save(random_adapter(sd15_unet(), "base"), tmp_path / "a.safetensors")
    imprompt.load(tmp_path / "a.safetensors", image_encoder=tmp_path / "encoder")(foreign_images()["noise"])
    assert not [warning for warning in recwarn if warning.category is Notice]


def test_a_distribution_is_kept_in_its_file(tmp_path):
    features = np.random.default_rng(0).normal(size=(500, 4)) * [1, 2, 3, 4]
    import torch

    fitted = FeatureDistribution.fit(torch.tensor(features), torch.tensor(features))
    assert 0.005 < float((fitted.distances(torch.tensor(features)) > fitted.max_distance).float().mean()) < 0.015
    fitted.save(tmp_path)
    loaded = FeatureDistribution.load(tmp_path)
    assert loaded is not None and loaded.max_distance == pytest.approx(fitted.max_distance)
    assert FeatureDistribution.load(tmp_path / "none") is None
    far = torch.tensor([[0.0, 0, 0, 100]])
    assert loaded.distances(far) > 20
