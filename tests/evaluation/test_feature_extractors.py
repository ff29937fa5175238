"""Feature extractors: mini's attribute classifier, CLIP, and any image model by folder."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    CLIPImageProcessor,
    Dinov2Config,
    Dinov2Model,
    ResNetConfig,
    ResNetModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTModel,
)

from imprompt.config.evaluation import MetricsConfig
from imprompt.evaluation.features import FeatureExtractors

MAKE_MODEL = {
    "dino": lambda: Dinov2Model(Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8)),
    "vit": lambda: ViTModel(ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8)),
    "resnet": lambda: ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")),
    "siglip": lambda: SiglipVisionModel(
        SiglipVisionConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8, intermediate_size=64)
    ),
}


def make_extractors(feature_extractor, **options):
    return FeatureExtractors(MetricsConfig(clip_model="mini", feature_extractor=feature_extractor, **options))


def make_image(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return Image.fromarray((torch.rand(32, 32, 3, generator=generator) * 255).byte().numpy())


@pytest.mark.parametrize("architecture", list(MAKE_MODEL))
def test_features_of_a_model_by_folder_depend_on_the_whole_image(tmp_path, architecture):
    torch.manual_seed(0)
    MAKE_MODEL[architecture]().save_pretrained(tmp_path)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    image, occluded = make_image(), make_image()
    occluded.paste((0, 0, 0), (16, 16, 32, 32))
    features = make_extractors(str(tmp_path)).extract_features([image, occluded, image])
    assert features["features"].shape[0] == 3 and features["features"].ndim == 2 and features["patches"].ndim == 3
    assert torch.allclose(features["features"][0], features["features"][2], atol=1e-5)
    assert (features["features"][0] - features["features"][1]).abs().max() > 1e-3, "features depend on the lower right corner"
    if architecture in ("dino", "vit"):
        assert features["patches"].shape[1] == 16, "the class token is not a patch"


def test_minis_classifier_gives_a_posterior_over_categories_and_colors():
    features = make_extractors("mini").extract_features([make_image(), make_image(1)])
    assert features["class_probs"].shape == (2, 90) and torch.allclose(features["class_probs"].sum(1), torch.ones(2), atol=1e-4)
    assert features["features"].shape == (2, 192) and features["patches"].shape[:2] == (2, 16)


def test_clip_embeddings_can_be_the_features():
    features = make_extractors("clip").extract_features([make_image()])
    assert torch.equal(features["features"], features["clip_embeds"]) and "class_probs" not in features


def test_lpips_of_pairs_is_that_of_torchmetrics(monkeypatch):
    """With a fake network, whose weights are not available here: torchmetrics itself checks range and shapes."""
    from torchmetrics.image import lpip

    class FakeNetwork(torch.nn.Module):
        def __init__(self, net):
            super().__init__()
            assert net == "alex"

        def forward(self, a, b, normalize):
            assert not normalize and -1 <= a.min() < -0.9 and 0.9 < b.max() <= 1
            return (a - b).abs().mean((1, 2, 3), keepdim=True)

    monkeypatch.setattr(lpip, "_TORCHVISION_AVAILABLE", True)
    monkeypatch.setattr(lpip, "_NoTrainLpips", FakeNetwork)
    lpips = make_extractors("mini", lpips=True).lpips
    images, targets = [make_image(0), make_image(1), make_image(2)], [make_image(3), make_image(1), make_image(4)]
    expected = [np.abs(np.asarray(a, float) - np.asarray(b, float)).mean() / 127.5 for a, b in zip(images, targets, strict=True)]
    assert lpips(images, targets).tolist() == pytest.approx(expected, rel=1e-4) and expected[1] == 0
    assert lpips(images[:1], targets[:1]).tolist() == pytest.approx(expected[:1], rel=1e-4)
    assert lpips(images, [target.resize((64, 64)) for target in targets]).shape == (3,)
