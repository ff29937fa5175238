"""Weights laid out once: the same numbers, gradients where they are wanted, and a weight that changes is noticed."""

import copy

import pytest
import torch
from torch import nn

from imprompt.unet.mkldnn import _laid_out, pack

needs_bfloat16 = pytest.mark.skipif(not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="this processor does not compute in bfloat16")


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
def test_the_numbers_are_the_same(model, x):
    plain = copy.deepcopy(model)
    pack(model)
    for rows in (x, x[:1], torch.cat([x, x, x])):
        torch.testing.assert_close(model(rows), plain(rows), rtol=2e-2, atol=2e-2)
    assert model(x).is_contiguous() and sum(m in _laid_out for m in model) == 4


@needs_bfloat16
@torch.no_grad()
def test_a_changed_weight_is_laid_out_anew(model, x):
    pack(model)
    model(x)
    model[0].weight.mul_(3)
    model[4].weight = nn.Parameter(model[4].weight * 2, requires_grad=False)
    fresh = copy.deepcopy(model)
    for module in fresh:
        module.__dict__.pop("forward", None)
    torch.testing.assert_close(model(x), fresh(x), rtol=2e-2, atol=5e-2)


def test_gradients_other_dtypes_and_copies_take_the_usual_way(model, x):
    plain = copy.deepcopy(model)
    pack(model)
    leaf = x.clone().requires_grad_(True)
    model(leaf).sum().backward()
    assert leaf.grad is not None and not any(m in _laid_out for m in model)
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(model).float()(x.float()), plain.float()(x.float()))
