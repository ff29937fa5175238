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
    """What one image prompt adds to one layer: λV' for `value`; `mask` (1 or rows, positions, 1) or None for everywhere."""

    key: Tensor
    value: Tensor
    mask: Tensor | None = None


Kernel = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


def fused(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
    """softmax(Q Kᵀ/√d + bias) V by torch's fused kernel. All (rows, heads, length, channels)."""
    return F.scaled_dot_product_attention(query, key, value, attn_mask=bias)


def classic(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
    """The same in three steps. On CPU it is the faster one where shapes are small or keys are few."""
    rows, heads, _, channels = query.shape
    q, k, v = (x.flatten(0, 1) for x in (query, key, value))
    start = query.new_empty(()) if bias is None else bias.expand(rows, heads, -1, -1).flatten(0, 1)
    scores = torch.baddbmm(start, q, k.transpose(1, 2), beta=0 if bias is None else 1, alpha=channels**-0.5)
    return torch.bmm(scores.softmax(-1), v).unflatten(0, (rows, heads))


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
    q = _split(query, heads)
    out = _join(kernel(q, _split(text.key, heads), _split(text.value, heads), text_bias))
    for key, value, mask in branches:
        extra = _join(branch_kernel(q, _split(key, heads), _split(value, heads), None))
        out = out + (extra if mask is None else mask * extra)
    return out


def _split(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)  # (rows, heads, length, channels)


def _join(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)  # (rows, length, hidden)
