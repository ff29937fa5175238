"""Decoupled attention is equation 8 of IP-Adapter (Ye et al., 2023), to 1e-10 in float64, with either implementation of attention."""

import pytest
import torch

from imprompt.core.attention import ImageBranch, KeyValues, attention_bmm, attention_sdpa, decoupled_attention

ROWS, HEADS, POSITIONS, HIDDEN = 3, 4, 20, 32


def equation_8(query, text, image_prompts):
    """softmax(QKᵀ/√d)V + Σ mask · λ · softmax(QK'ᵀ/√d)V', one row and one head at a time."""
    channels = HIDDEN // HEADS
    out = torch.zeros_like(query)
    for row in range(ROWS):
        for head in range(HEADS):
            part = slice(head * channels, (head + 1) * channels)

            def attention(key, value, row=row, part=part):
                scores = query[row, :, part] @ key[row, :, part].T / channels**0.5
                weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
                return weights @ value[row, :, part]

            total = attention(*text)
            for key, value, scale, mask in image_prompts:
                total = total + scale * (attention(key, value) if mask is None else mask[0] * attention(key, value))
            out[row, :, part] = total
    return out


def random_key_value(tokens):
    return [torch.randn(ROWS, tokens, HIDDEN, dtype=torch.float64) for _ in range(2)]


@pytest.mark.parametrize("text_attention", [attention_sdpa, attention_bmm])
@pytest.mark.parametrize("branch_attention", [attention_sdpa, attention_bmm])
def test_equals_the_formula_with_several_prompts_masks_and_scales(text_attention, branch_attention):
    torch.manual_seed(0)
    query = torch.randn(ROWS, POSITIONS, HIDDEN, dtype=torch.float64)
    text = KeyValues(*random_key_value(7))
    mask = torch.rand(1, POSITIONS, 1, dtype=torch.float64)
    image_prompts = [
        (*random_key_value(4), 0.7, None), (*random_key_value(16), 0.3, mask), (*random_key_value(5), -1.2, (mask > 0.5).double())
    ]  # fmt: skip
    branches = [ImageBranch(key, scale * value, mask) for key, value, scale, mask in image_prompts]
    out = decoupled_attention(query, text, branches, HEADS, text_attention, branch_attention)
    assert (out - equation_8(query, text, image_prompts)).abs().max() < 1e-10


@pytest.mark.parametrize("text_attention", [attention_sdpa, attention_bmm])
def test_text_bias_hides_tokens(text_attention):
    torch.manual_seed(0)
    query = torch.randn(ROWS, POSITIONS, HIDDEN, dtype=torch.float64)
    key, value = random_key_value(6)
    bias = torch.zeros(ROWS, 1, 1, 6, dtype=torch.float64)
    bias[..., 4:] = -1e4
    hidden = decoupled_attention(query, KeyValues(key, value), [], HEADS, text_attention, text_bias=bias)
    shorter = decoupled_attention(query, KeyValues(key[:, :4], value[:, :4]), [], HEADS, text_attention)
    assert torch.allclose(hidden, shorter, atol=1e-10)


def test_zero_scale_adds_exactly_nothing():
    torch.manual_seed(0)
    query, text = torch.randn(ROWS, POSITIONS, HIDDEN), KeyValues(torch.randn(ROWS, 7, HIDDEN), torch.randn(ROWS, 7, HIDDEN))
    key, value = torch.randn(ROWS, 4, HIDDEN), torch.randn(ROWS, 4, HIDDEN)
    with_prompt = decoupled_attention(query, text, [ImageBranch(key, 0.0 * value)], HEADS)
    assert torch.equal(with_prompt, decoupled_attention(query, text, [], HEADS))


def test_wrong_shapes_are_refused():
    """The tests of core run with the shapes of its signatures checked."""
    query, key = torch.randn(ROWS, POSITIONS, HIDDEN), torch.randn(ROWS, 7, HIDDEN + 4)
    with pytest.raises(Exception, match="hidden"):
        decoupled_attention(query, KeyValues(key, key), [], HEADS)
