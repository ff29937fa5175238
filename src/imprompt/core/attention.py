"""Decoupled cross-attention (IP-Adapter, arXiv:2308.06721, equation 5).

    Z_new = softmax(Q Kᵀ/√d) V  +  Σ λ · softmax(Q K'ᵀ/√d) V'

The text is one branch and every image prompt is another. A branch arrives as finished keys and values: λ and the
start/end window are already multiplied into V', which is the same sum and lets a slider move without touching the layer.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class KeyValues(NamedTuple):
    """The keys and values of one layer: each (rows, tokens, hidden)."""

    key: Tensor
    value: Tensor


class Branch(NamedTuple):
    """What one image prompt adds to one layer: λV' for `value`; `mask` (1 or rows, positions, 1) or None for everywhere.

    `bias`, (rows, 1, 1, tokens), is added to the scores: the logarithms of the references' weights.
    """

    key: Tensor
    value: Tensor
    mask: Tensor | None = None
    bias: Tensor | None = None


Kernel = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


def fused(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
    """softmax(Q Kᵀ/√d + bias) V by torch's fused kernel. All (rows, heads, length, channels)."""
    return F.scaled_dot_product_attention(query, key, value, attn_mask=bias)


def classic(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
    """The same in three steps. On CPU it is the faster one in bfloat16, and where shapes are small."""
    rows, heads, _, channels = query.shape
    q, k, v = (x.flatten(0, 1) for x in (query, key, value))
    start = query.new_empty(()) if bias is None else bias.expand(rows, heads, -1, -1).flatten(0, 1)
    scores = torch.baddbmm(start, q, k.transpose(1, 2), beta=0 if bias is None else 1, alpha=channels**-0.5)
    return torch.bmm(scores.softmax(-1), v).reshape(query.shape)


def decoupled_attention(
    query: Tensor,
    text: KeyValues,
    branches: Sequence[Branch],
    heads: int,
    kernel: Kernel = fused,
    branch_kernel: Kernel = fused,
    text_bias: Tensor | None = None,
) -> Tensor:
    """Attend to the text and to every branch with one query, and add up.

    query: (rows, positions, hidden). text and branches: (rows, tokens, hidden), each with its own number of tokens.
    text_bias: added to the text's scores, broadcastable to (rows, heads, positions, tokens). Returns (rows, positions, hidden).
    """
    out = attend(query, text.key, text.value, heads, kernel, text_bias)
    for key, value, mask, bias in branches:
        extra = attend(query, key, value, heads, branch_kernel, bias)
        out = out + (extra if mask is None else mask * extra)
    return out


def attend(query: Tensor, key: Tensor, value: Tensor, heads: int, kernel: Kernel = fused, bias: Tensor | None = None) -> Tensor:
    """Multi-head attention on (rows, length, hidden), without projections."""
    q, k, v = (x.reshape(*x.shape[:2], heads, -1).transpose(1, 2) for x in (query, key, value))  # (rows, heads, length, channels)
    return kernel(q, k, v, bias).transpose(1, 2).flatten(2)
