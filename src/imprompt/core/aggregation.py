"""Several references of one subject → what one prompt hears.

Pooling and self-attention are those of the second paper ("P2": several photographs on top of IP-Adapter, sections 3.4 and
3.5). Each is a set function: the order of the references does not matter. A weight of 2 means the same as giving the
reference twice, a weight of 0 the same as leaving it out. P2's self-attention is both for nine references alone: of more
the first nine are read, of fewer some are drawn again, before any weight is looked at.
"""

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from imprompt.core.attention import attend


class Aggregator(nn.Module):
    """Concatenation: every reference keeps tokens of its own. The base of the others, and what an adapter does by itself."""

    name = "concat"
    beside = True  # every reference keeps tokens of its own

    def embeddings(self, features: Tensor, weights: Tensor) -> Tensor:
        """Before the projector. (batch, references, patches, width), (batch, references) → (batch, fewer, patches, width)."""
        return features

    def bias(self, weights: Tensor, patches: int) -> Tensor | None:
        """In it, where it attends to patches: added to their scores, (batch, 1, 1, references · patches). None for nothing."""
        return None

    def tokens(self, tokens: Tensor, weights: Tensor) -> Tensor:
        """After it. (batch, references, tokens, cross) → (batch, all tokens, cross)."""
        return tokens.flatten(1, 2)

    def chosen(self, count: int) -> list[int]:
        """Which of `count` references are read."""
        return list(range(count))


class Average(Aggregator):
    """The mean of the embeddings (P2, average pooling), or of the tokens."""

    beside = False

    def __init__(self, on_tokens: bool = False):
        super().__init__()
        self.on_tokens = on_tokens
        self.name = "average-tokens" if on_tokens else "average"

    def embeddings(self, features: Tensor, weights: Tensor) -> Tensor:
        return features if self.on_tokens else _mean(features, weights)

    def tokens(self, tokens: Tensor, weights: Tensor) -> Tensor:
        return (_mean(tokens, weights) if self.on_tokens else tokens).flatten(1, 2)


class Maximum(Aggregator):
    """The greatest of the embeddings, channel by channel (P2, max pooling), or of the tokens."""

    beside = False

    def __init__(self, on_tokens: bool = False):
        super().__init__()
        self.on_tokens = on_tokens
        self.name = "max-tokens" if on_tokens else "max"

    def embeddings(self, features: Tensor, weights: Tensor) -> Tensor:
        return features if self.on_tokens else _greatest(features, weights)

    def tokens(self, tokens: Tensor, weights: Tensor) -> Tensor:
        return (_greatest(tokens, weights) if self.on_tokens else tokens).flatten(1, 2)


class SelfAttention(Aggregator):
    """P2, algorithm 1: Q = xW_q, K = xW_k, V = xW_v, softmax(QKᵀ/√d)V over the embeddings; all of its rows go on to the projector.

    It is trained on nine references: of more the surplus is left out, and of fewer some are drawn again (bootstrap).
    """

    name = "self-attention"
    NUMBER = 9

    def __init__(self, width: int):
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width, bias=False) for _ in range(3))

    def embeddings(self, features: Tensor, weights: Tensor) -> Tensor:
        x = features.flatten(1, 2)
        bias = _bias(weights, features.shape[2]).to(x.dtype)
        z = attend(self.to_q(x), self.to_k(x), self.to_v(x), heads=1, bias=bias)
        return z.reshape(features.shape)

    def chosen(self, count: int) -> list[int]:
        """Nine of them, always the same ones."""
        again = torch.randint(count, (max(0, self.NUMBER - count),), generator=torch.Generator().manual_seed(0)).tolist()
        return [*range(min(count, self.NUMBER)), *again]


class SetAttention(Aggregator):
    """Ours: `slots` learned queries read all references by attention of several heads, and add what they find to the mean.

    Any number of references. The outlet is zero at first, so that it starts as the average.
    """

    name = "attention"
    beside = False

    def __init__(self, width: int, heads: int = 4, slots: int = 4):
        super().__init__()
        self.heads = heads
        self.slots = nn.Parameter(torch.randn(slots, width) / width**0.5)
        self.norm, self.norm_mean, self.norm_read = (nn.LayerNorm(width) for _ in range(3))
        self.to_qkv = nn.Linear(width, 3 * width, bias=False)
        self.between = nn.Linear(width, width)
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_kv = nn.Linear(width, 2 * width, bias=False)
        self.mlp = _silent_mlp(width)

    def embeddings(self, features: Tensor, weights: Tensor) -> Tensor:
        mean = _mean(features, weights).mean(2)  # (batch, 1, width)
        x = self.norm(features.flatten(1, 2))
        bias = _bias(weights, features.shape[2]).to(x.dtype)
        query, key, value = self.to_qkv(x).chunk(3, dim=-1)
        x = x + self.between(attend(query, key, value, self.heads, bias=bias))
        query = self.to_q(self.slots + self.norm_mean(mean))
        key, value = self.to_kv(self.norm_read(x)).chunk(2, dim=-1)
        found = attend(query, key, value, self.heads, bias=bias)
        return cast(Tensor, mean + self.mlp(query + found))[:, :, None]


class TokenAttention(Aggregator):
    """Ours, after the projector: each token of the mean reads all references' tokens by attention of several heads, and adds what it finds.

    Any number of references. The outlet is zero at first, so that it starts as the average of the tokens. Of a resampler's tokens, which
    have kept what a pooled embedding has lost.
    """

    name = "attention-tokens"
    beside = False

    def __init__(self, cross: int, heads: int = 4):
        super().__init__()
        self.heads = heads
        self.norm_mean, self.norm_read = nn.LayerNorm(cross), nn.LayerNorm(cross)
        self.to_q = nn.Linear(cross, cross, bias=False)
        self.to_kv = nn.Linear(cross, 2 * cross, bias=False)
        self.mlp = _silent_mlp(cross)

    def tokens(self, tokens: Tensor, weights: Tensor) -> Tensor:
        mean = _mean(tokens, weights).flatten(1, 2)
        key, value = self.to_kv(self.norm_read(tokens.flatten(1, 2))).chunk(2, dim=-1)
        query = self.to_q(self.norm_mean(mean))
        bias = _bias(weights, tokens.shape[2]).to(tokens.dtype)
        return cast(Tensor, mean + self.mlp(query + attend(query, key, value, self.heads, bias=bias)))


class Joint(Aggregator):
    """For resamplers: all references' patches lie before the queries at once, so the tokens stay as many as for one.

    Together they weigh as much as one reference's, so the same pictures twice are the same as once.
    """

    name = "joint"
    beside = False

    def embeddings(self, features: Tensor, weights: Tensor) -> Tensor:
        return features.flatten(1, 2)[:, None]

    def bias(self, weights: Tensor, patches: int) -> Tensor | None:
        return None if weights.shape[1] == 1 else _bias(weights / weights.sum(1, keepdim=True), patches)


# By name, from the widths of features and tokens. config.COMBINE are those that need no training.
AGGREGATORS: dict[str, Callable[[int, int], Aggregator]] = {
    "concat": lambda width, cross: Aggregator(),
    "average": lambda width, cross: Average(),
    "max": lambda width, cross: Maximum(),
    "average-tokens": lambda width, cross: Average(on_tokens=True),
    "max-tokens": lambda width, cross: Maximum(on_tokens=True),
    "joint": lambda width, cross: Joint(),
    "self-attention": lambda width, cross: SelfAttention(width),
    "attention": lambda width, cross: SetAttention(width),
    "attention-tokens": lambda width, cross: TokenAttention(cross),
}


def _silent_mlp(width: int) -> nn.Sequential:
    """Says nothing until it is trained: its outlet is zero."""
    outlet = nn.Linear(2 * width, width)
    nn.init.zeros_(outlet.weight)
    nn.init.zeros_(outlet.bias)
    return nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), outlet)


def _mean(x: Tensor, weights: Tensor) -> Tensor:
    """Over dimension 1, which stays."""
    share = (weights / weights.sum(1, keepdim=True)).to(x)
    return (x * share[:, :, None, None]).sum(1, keepdim=True)


def _greatest(x: Tensor, weights: Tensor) -> Tensor:
    return x.masked_fill((weights == 0)[:, :, None, None], -torch.inf).amax(1, keepdim=True)


def _bias(weights: Tensor, patches: int) -> Tensor:
    """log w for every key, (batch, 1, 1, references · patches): in a softmax, a weight of 2 is the key standing there twice."""
    return weights.log().repeat_interleave(patches, 1)[:, None, None]
