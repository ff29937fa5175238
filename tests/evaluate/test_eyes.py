"""What looks at the pictures: mini's judge, CLIP, and any image model by folder."""

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

from imprompt.evaluation.features import Eyes

MODELS = {
    "dino": lambda: Dinov2Model(Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8)),
    "vit": lambda: ViTModel(ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8)),
    "resnet": lambda: ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")),
    "siglip": lambda: SiglipVisionModel(
        SiglipVisionConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8, intermediate_size=64)
    ),
}


def picture(seed=0):
    g = torch.Generator().manual_seed(seed)
    return Image.fromarray((torch.rand(32, 32, 3, generator=g) * 255).byte().numpy())


@pytest.mark.parametrize("kind", list(MODELS))
def test_a_model_by_folder_sees_the_whole_picture(tmp_path, kind):
    torch.manual_seed(0)
    MODELS[kind]().save_pretrained(tmp_path)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    eyes = Eyes("mini", str(tmp_path))
    whole, covered = picture(), picture()
    covered.paste((0, 0, 0), (16, 16, 32, 32))
    seen = eyes.see([whole, covered, whole])
    assert seen["features"].shape[0] == 3 and seen["features"].ndim == 2 and seen["patches"].ndim == 3
    assert torch.allclose(seen["features"][0], seen["features"][2], atol=1e-5)
    assert (seen["features"][0] - seen["features"][1]).abs().max() > 1e-3, "the lower right corner is seen"
    if kind in ("dino", "vit"):
        assert seen["patches"].shape[1] == 16, "the class token is no patch"


def test_minis_judge_gives_a_posterior_over_kinds_and_colours():
    seen = Eyes("mini", "mini").see([picture(), picture(1)])
    assert seen["classes"].shape == (2, 90) and torch.allclose(seen["classes"].sum(1), torch.ones(2), atol=1e-4)
    assert seen["features"].shape == (2, 192) and seen["patches"].shape[:2] == (2, 16)


def test_clip_looks_for_fid_too_where_nothing_else_does():
    seen = Eyes("mini", "clip").see([picture()])
    assert torch.equal(seen["features"], seen["clip"]) and "classes" not in seen


def test_lpips_of_pairs_is_what_torchmetrics_says_of_each(monkeypatch):
    """With a stand-in for the network, whose weights cannot be had here: torchmetrics itself checks range and shapes."""
    from torchmetrics.image import lpip

    class Net(torch.nn.Module):
        def __init__(self, net):
            super().__init__()
            assert net == "alex"

        def forward(self, a, b, normalize):
            assert not normalize and -1 <= a.min() < -0.9 and 0.9 < b.max() <= 1
            return (a - b).abs().mean((1, 2, 3), keepdim=True)

    monkeypatch.setattr(lpip, "_TORCHVISION_AVAILABLE", True)
    monkeypatch.setattr(lpip, "_NoTrainLpips", Net)
    lpips = Eyes("mini", "mini", lpips=True).lpips
    drawn, wanted = [picture(0), picture(1), picture(2)], [picture(3), picture(1), picture(4)]
    expected = [np.abs(np.asarray(a, float) - np.asarray(b, float)).mean() / 127.5 for a, b in zip(drawn, wanted, strict=True)]
    assert lpips(drawn, wanted).tolist() == pytest.approx(expected, rel=1e-4) and expected[1] == 0
    assert lpips(drawn[:1], wanted[:1]).tolist() == pytest.approx(expected[:1], rel=1e-4)
    assert lpips(drawn, [p.resize((64, 64)) for p in wanted]).shape == (3,)
