"""Prepacked weights: the same outputs, gradients where they are needed, and a weight that changes is noticed."""

import copy

import pytest
import torch
from torch import nn

from imprompt.unet.mkldnn import _packed_weights, prepack_weights
from imprompt.utils import compat
from imprompt.utils.compat import has_bfloat16_kernels

needs_bfloat16 = pytest.mark.skipif(not has_bfloat16_kernels(), reason="oneDNN has no kernels for bfloat16 on this CPU")


@pytest.fixture
def model():
    torch.manual_seed(0)
    layers = nn.Sequential(
        nn.Conv2d(8, 16, 3, padding=1), nn.Conv2d(16, 16, 3, stride=2), nn.Conv2d(16, 16, 1), nn.Flatten(2), nn.Linear(9, 12, bias=False)
    )  # fmt: skip
    return layers.to(torch.bfloat16).requires_grad_(False)


@pytest.fixture
def x():
    return torch.randn(2, 8, 8, 8, dtype=torch.bfloat16)


@needs_bfloat16
@torch.no_grad()
def test_the_outputs_are_the_same(model, x):
    unpacked = copy.deepcopy(model)
    prepack_weights(model)
    for rows in (x, x[:1], torch.cat([x, x, x])):
        torch.testing.assert_close(model(rows), unpacked(rows), rtol=2e-2, atol=2e-2)
    assert model(x).is_contiguous() and sum(m in _packed_weights for m in model) == 4


@needs_bfloat16
@torch.no_grad()
def test_a_changed_weight_is_packed_again(model, x):
    prepack_weights(model)
    model(x)
    model[0].weight.mul_(3)
    model[4].weight = nn.Parameter(model[4].weight * 2, requires_grad=False)
    fresh = copy.deepcopy(model)
    for module in fresh:
        module.__dict__.pop("forward", None)
    torch.testing.assert_close(model(x), fresh(x), rtol=2e-2, atol=5e-2)


def test_gradients_other_dtypes_and_copies_use_the_original_weights(model, x):
    unpacked = copy.deepcopy(model)
    prepack_weights(model)
    leaf = x.clone().requires_grad_(True)
    model(leaf).sum().backward()
    assert leaf.grad is not None and not any(m in _packed_weights for m in model)
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(model).float()(x.float()), unpacked.float()(x.float()))


@torch.no_grad()
def test_without_bfloat16_kernels_the_layers_are_left_alone(model, x, monkeypatch):
    """The operators raise there, where PyTorch's own layers emulate bfloat16."""
    monkeypatch.setattr(compat, "has_bfloat16_kernels", lambda: False)
    prepack_weights(model)
    assert model(x).isfinite().all() and not any("forward" in vars(m) or m in _packed_weights for m in model)
