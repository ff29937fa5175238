"""Decoupled cross-attention, equations 5 and 8 of IP-Adapter (Ye et al., 2023, arXiv:2308.06721).

    Z_new = softmax(Q Kᵀ/√d) V  +  Σ λ · softmax(Q K'ᵀ/√d) V'

The text is one branch and every image prompt is another. A branch arrives as finished keys and values: its scale λ and the gate of
its conditioning window are already multiplied into V'. The sum is the same, and changing λ does not touch the attention layer.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


class KeyValues(NamedTuple):
    """The keys and values of one layer, each of shape (rows, tokens, hidden)."""

    key: Tensor
    value: Tensor


class SelfAttention(NamedTuple):
    """For adapters whose image branch attends to the image's own tokens as well (InstantX, SD3.5): softmax(q̃ [k̃ ; K']ᵀ) [v ; V'].

    `query_norm` and `key_norm`, (channels,), are the weights of the adapter's own RMS normalization of the query and of the keys. As the
    values v are not the adapter's, λ and the gate of the window cannot be multiplied into V': `scale`, (1 or rows, 1, 1), is their product.
    """

    query_norm: Tensor
    key_norm: Tensor
    scale: Tensor


class ImageBranch(NamedTuple):
    """The contribution of one image prompt to one layer: keys K', and values with the scale multiplied in, λV'.

    `mask`, (1 or rows, positions, 1), weights the output at each position; None stands for 1 everywhere. `bias`, (rows, 1, 1, tokens),
    is added to the attention scores: the logarithm of each reference image's weight.
    """

    key: Tensor
    value: Tensor
    mask: Tensor | None = None
    bias: Tensor | None = None
    self_attention: SelfAttention | None = None


AttentionFn = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]  # query, key, value, bias → output, all per head


def attention_sdpa(
    query: Float[Tensor, "rows heads positions channels"],
    key: Float[Tensor, "rows heads tokens channels"],
    value: Float[Tensor, "rows heads tokens channels"],
    bias: Float[Tensor, "..."] | None = None,
) -> Float[Tensor, "rows heads positions channels"]:
    """softmax(Q Kᵀ/√d + bias) V (IP-Adapter, equation 3; Vaswani et al., 2017, equation 1) by torch's fused kernel."""
    return F.scaled_dot_product_attention(query, key, value, attn_mask=bias)


def attention_bmm(
    query: Float[Tensor, "rows heads positions channels"],
    key: Float[Tensor, "rows heads tokens channels"],
    value: Float[Tensor, "rows heads tokens channels"],
    bias: Float[Tensor, "..."] | None = None,
) -> Float[Tensor, "rows heads positions channels"]:
    """The same equation as two batched matrix products. On CPU it is faster than the fused kernel in bfloat16 and for small shapes."""
    rows, heads, _, channels = query.shape
    q, k, v = (x.flatten(0, 1) for x in (query, key, value))
    addend = query.new_empty(()) if bias is None else bias.expand(rows, heads, -1, -1).flatten(0, 1)
    scores = torch.baddbmm(addend, q, k.transpose(1, 2), beta=0 if bias is None else 1, alpha=channels**-0.5)
    return torch.bmm(scores.softmax(-1), v).reshape(query.shape)


def decoupled_attention(
    query: Float[Tensor, "rows positions hidden"],
    text: KeyValues,
    branches: Sequence[ImageBranch],
    num_heads: int,
    text_attention: AttentionFn = attention_sdpa,
    branch_attention: AttentionFn = attention_sdpa,
    text_bias: Float[Tensor, "..."] | None = None,
) -> Float[Tensor, "rows positions hidden"]:
    """IP-Adapter, equation 8: attention to the text plus scaled attention to every image prompt, with one query.

    `text` and `branches` may each have their own number of tokens. `text_bias` is added to the scores of the text and must be
    broadcastable to (rows, heads, positions, tokens).
    """
    out = multi_head_attention(query, text.key, text.value, num_heads, text_attention, text_bias)
    for key, value, mask, bias, _ in branches:
        image_out = multi_head_attention(query, key, value, num_heads, branch_attention, bias)
        out = out + (image_out if mask is None else mask * image_out)
    return out


def multi_head_attention(
    query: Float[Tensor, "rows positions hidden"],
    key: Float[Tensor, "rows tokens hidden"],
    value: Float[Tensor, "rows tokens hidden"],
    num_heads: int,
    attention: AttentionFn = attention_sdpa,
    bias: Float[Tensor, "..."] | None = None,
) -> Float[Tensor, "rows positions hidden"]:
    """Multi-head attention (Vaswani et al., 2017, section 3.2.2) without its linear projections."""
    q, k, v = (x.reshape(*x.shape[:2], num_heads, -1).transpose(1, 2) for x in (query, key, value))  # (rows, heads, length, channels)
    return attention(q, k, v, bias).transpose(1, 2).flatten(2)


def image_attention(
    branch: ImageBranch,
    query: Float[Tensor, "rows heads positions channels"],
    raw_query: Float[Tensor, "rows heads positions channels"],
    raw_key: Float[Tensor, "rows heads positions channels"],
    value: Float[Tensor, "rows heads positions channels"],
    attention: AttentionFn = attention_sdpa,
) -> Float[Tensor, "rows positions hidden"]:
    """The term λ · softmax(Q K'ᵀ/√d) V' of equation 8 for one image prompt in a transformer, masked.

    `query` is the one that the transformer normalizes. `raw_query`, `raw_key` and `value`, of the image's own tokens before normalization,
    serve adapters whose branch has its own normalization and attends to the image as well (`SelfAttention`).
    """
    heads = query.shape[1]
    image_key, image_value = (x.reshape(*x.shape[:2], heads, -1).transpose(1, 2) for x in (branch.key, branch.value))
    bias, own = branch.bias, branch.self_attention
    if own is not None:
        query, raw_key = (rms_norm(x, weight) for x, weight in ((raw_query, own.query_norm), (raw_key, own.key_norm)))
        image_key, image_value = torch.cat([raw_key, image_key], 2), torch.cat([value, image_value], 2)
        bias = None if bias is None else F.pad(bias, (raw_key.shape[2], 0))
    out = attention(query, image_key, image_value, bias).transpose(1, 2).flatten(2)
    out = out if own is None else own.scale * out
    return out if branch.mask is None else branch.mask * out


def rms_norm(x: Float[Tensor, "*shape channels"], weight: Tensor | None = None, eps: float = 1e-6) -> Float[Tensor, "*shape channels"]:
    """x / RMS(x) · weight, computed in float32 (Zhang and Sennrich, 2019, arXiv:1910.07467, equation 4)."""
    normalized = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)
    return normalized.to(x.dtype) if weight is None else normalized.to(x.dtype) * weight
