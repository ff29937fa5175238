"""Decoupled attention is the paper's equation, to 1e-10 in float64, whatever the kernel."""

import pytest
import torch

from imprompt.core.attention import Branch, KeyValues, classic, decoupled_attention, fused

ROWS, HEADS, POSITIONS, HIDDEN = 3, 4, 20, 32


def by_the_formula(query, text, prompts):
    """softmax(QKᵀ/√d)V + Σ mask · λ · softmax(QK'ᵀ/√d)V', one row and one head at a time."""
    channels = HIDDEN // HEADS
    out = torch.zeros_like(query)
    for row in range(ROWS):
        for head in range(HEADS):
            part = slice(head * channels, (head + 1) * channels)

            def attend(key, value, row=row, part=part):
                scores = query[row, :, part] @ key[row, :, part].T / channels**0.5
                weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
                return weights @ value[row, :, part]

            total = attend(*text)
            for key, value, scale, mask in prompts:
                total = total + scale * (attend(key, value) if mask is None else mask[0] * attend(key, value))
            out[row, :, part] = total
    return out


def draw(tokens):
    return [torch.randn(ROWS, tokens, HIDDEN, dtype=torch.float64) for _ in range(2)]


@pytest.mark.parametrize("kernel", [fused, classic])
@pytest.mark.parametrize("branch_kernel", [fused, classic])
def test_equals_the_formula_with_several_prompts_masks_and_scales(kernel, branch_kernel):
    torch.manual_seed(0)
    query = torch.randn(ROWS, POSITIONS, HIDDEN, dtype=torch.float64)
    text = KeyValues(*draw(7))
    mask = torch.rand(1, POSITIONS, 1, dtype=torch.float64)
    prompts = [(*draw(4), 0.7, None), (*draw(16), 0.3, mask), (*draw(5), -1.2, (mask > 0.5).double())]
    branches = [Branch(key, scale * value, where) for key, value, scale, where in prompts]
    ours = decoupled_attention(query, text, branches, HEADS, kernel, branch_kernel)
    assert (ours - by_the_formula(query, text, prompts)).abs().max() < 1e-10


@pytest.mark.parametrize("kernel", [fused, classic])
def test_text_bias_hides_tokens(kernel):
    torch.manual_seed(0)
    query = torch.randn(ROWS, POSITIONS, HIDDEN, dtype=torch.float64)
    key, value = draw(6)
    bias = torch.zeros(ROWS, 1, 1, 6, dtype=torch.float64)
    bias[..., 4:] = -1e4
    hidden = decoupled_attention(query, KeyValues(key, value), [], HEADS, kernel, text_bias=bias)
    shorter = decoupled_attention(query, KeyValues(key[:, :4], value[:, :4]), [], HEADS, kernel)
    assert torch.allclose(hidden, shorter, atol=1e-10)


def test_zero_scale_adds_exactly_nothing():
    torch.manual_seed(0)
    query, text = torch.randn(ROWS, POSITIONS, HIDDEN), KeyValues(torch.randn(ROWS, 7, HIDDEN), torch.randn(ROWS, 7, HIDDEN))
    key, value = torch.randn(ROWS, 4, HIDDEN), torch.randn(ROWS, 4, HIDDEN)
    with_prompt = decoupled_attention(query, text, [Branch(key, 0.0 * value)], HEADS)
    assert torch.equal(with_prompt, decoupled_attention(query, text, [], HEADS))
