"""Aggregation of several reference images of one subject into one image prompt.

Mean pooling, max pooling and self-attention over image embeddings are those of Kazistova, Stepanov, Filatov, *Создание
персонализированных генераций изображений*, MIPT, sections 3.4 and 3.5: several images of a person on top of IP-Adapter. The other
aggregators are our own. Each is a set function: the order of the reference images does not matter. A weight of 2 is equivalent to
giving a reference image twice, a weight of 0 to leaving it out. The self-attention of the paper takes exactly nine reference images:
of more than nine the first nine are used, and of fewer some are repeated, in both cases before any weight is applied.
"""

from collections.abc import Callable
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from imprompt.core.attention import multi_head_attention


class Aggregator(nn.Module):
    """Concatenation, which every adapter supports: each reference image keeps its own image tokens. Base class of all aggregators."""

    name = "concat"
    concatenates = True  # whether each reference image keeps its own image tokens

    def aggregate_features(
        self, features: Float[Tensor, "batch references patches dim"], weights: Float[Tensor, "#batch references"]
    ) -> Float[Tensor, "batch aggregated_references aggregated_patches dim"]:
        """Aggregate image features before the image projection."""
        return features

    def attention_bias(self, weights: Float[Tensor, "batch references"], patches: int) -> Float[Tensor, "batch 1 1 keys"] | None:
        """The bias on the attention scores of the patches inside the image projection. None stands for no bias."""
        return None

    def aggregate_tokens(
        self, tokens: Float[Tensor, "batch references tokens cross"], weights: Float[Tensor, "#batch original_references"]
    ) -> Float[Tensor, "batch aggregated_tokens cross"]:
        """Aggregate image tokens after the image projection."""
        return tokens.flatten(1, 2)

    def select_references(self, count: int) -> list[int]:
        """The indices of the reference images that are used, out of `count`."""
        return list(range(count))


class _Pooling(Aggregator):
    """A reduction over reference images, of their embeddings or (`on_tokens`) of their image tokens."""

    concatenates = False

    def __init__(self, *, on_tokens: bool = False):
        super().__init__()
        self.on_tokens = on_tokens
        self.name = f"{self.name}-tokens" if on_tokens else self.name

    def pool(self, x: Tensor, weights: Tensor) -> Tensor:
        """Reduce dimension 1 of (batch, references, length, dim) to length 1."""
        raise NotImplementedError

    def aggregate_features(self, features: Tensor, weights: Tensor) -> Tensor:
        """Pool the embeddings, unless the tokens are to be pooled."""
        return features if self.on_tokens else self.pool(features, weights)

    def aggregate_tokens(self, tokens: Tensor, weights: Tensor) -> Tensor:
        """Pool the tokens, unless the embeddings were pooled."""
        return (self.pool(tokens, weights) if self.on_tokens else tokens).flatten(1, 2)


class MeanPooling(_Pooling):
    """The weighted mean over reference images (Kazistova, Stepanov, Filatov, section 3.4: average pooling)."""

    name = "average"

    def pool(self, x: Tensor, weights: Tensor) -> Tensor:
        """Σ wᵢ xᵢ / Σ wᵢ."""
        return _weighted_mean(x, weights)


class MaxPooling(_Pooling):
    """The maximum over reference images, channel by channel (Kazistova, Stepanov, Filatov, section 3.4: max pooling)."""

    name = "max"

    def pool(self, x: Tensor, weights: Tensor) -> Tensor:
        """max xᵢ over the reference images of non-zero weight."""
        return _masked_max(x, weights)


class SelfAttention(Aggregator):
    """Self-attention over the embeddings of nine reference images (Kazistova, Stepanov, Filatov, section 3.5, algorithm 1).

    Q = xW_q, K = xW_k, V = xW_v, z = softmax(QKᵀ/√d)V; all nine rows of z enter the image projection. Of more than nine reference
    images the first nine are used, of fewer some are repeated (bootstrap).
    """

    name = "self-attention"
    NUM_REFERENCES = 9

    def __init__(self, embed_dim: int):
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(embed_dim, embed_dim, bias=False) for _ in range(3))

    def aggregate_features(self, features: Tensor, weights: Tensor) -> Tensor:
        """Algorithm 1, with the logarithm of each weight added to the scores. The shape stays the same."""
        x = features.flatten(1, 2)
        bias = _log_weight_bias(weights, features.shape[2]).to(x.dtype)
        z = multi_head_attention(self.to_q(x), self.to_k(x), self.to_v(x), num_heads=1, bias=bias)
        return z.reshape(features.shape)

    def select_references(self, count: int) -> list[int]:
        """Nine indices, always the same ones for the same count."""
        missing = max(0, self.NUM_REFERENCES - count)
        repeated = torch.randint(count, (missing,), generator=torch.Generator().manual_seed(0)).tolist()
        return [*range(min(count, self.NUM_REFERENCES)), *repeated]


class AttentionPooling(Aggregator):
    """Learned queries cross-attend to the embeddings of all reference images, and the result is added to their mean. Our own.

    Works with any number of reference images. The output projection is initialized to zero, so that training starts from the mean.
    """

    name = "attention"
    concatenates = False

    def __init__(self, embed_dim: int, num_heads: int = 4, num_queries: int = 4):
        super().__init__()
        self.num_heads = num_heads
        self.queries = nn.Parameter(torch.randn(num_queries, embed_dim) / embed_dim**0.5)
        self.norm, self.norm_mean, self.norm_read = (nn.LayerNorm(embed_dim) for _ in range(3))
        self.to_qkv = nn.Linear(embed_dim, 3 * embed_dim, bias=False)
        self.self_attn_out = nn.Linear(embed_dim, embed_dim)
        self.to_q = nn.Linear(embed_dim, embed_dim, bias=False)
        self.to_kv = nn.Linear(embed_dim, 2 * embed_dim, bias=False)
        self.mlp = _zero_init_mlp(embed_dim)

    def aggregate_features(self, features: Tensor, weights: Tensor) -> Tensor:
        """(batch, references, patches, dim) → (batch, queries, 1, dim)."""
        mean = _weighted_mean(features, weights).mean(2)  # (batch, 1, dim)
        x = self.norm(features.flatten(1, 2))
        bias = _log_weight_bias(weights, features.shape[2]).to(x.dtype)
        query, key, value = self.to_qkv(x).chunk(3, dim=-1)
        x = x + self.self_attn_out(multi_head_attention(query, key, value, self.num_heads, bias=bias))
        query = self.to_q(self.queries + self.norm_mean(mean))
        key, value = self.to_kv(self.norm_read(x)).chunk(2, dim=-1)
        attended = multi_head_attention(query, key, value, self.num_heads, bias=bias)
        return cast(Tensor, mean + self.mlp(query + attended))[:, :, None]


class TokenAttentionPooling(Aggregator):
    """Each token of the mean cross-attends to the image tokens of all reference images, and the result is added to it. Our own.

    Works after the image projection and with any number of reference images. The output projection is initialized to zero, so that
    training starts from the mean of the tokens. Meant for the tokens of a resampler, which keep details that a pooled embedding lacks.
    """

    name = "attention-tokens"
    concatenates = False

    def __init__(self, cross_attention_dim: int, num_heads: int = 4):
        super().__init__()
        self.num_heads = num_heads
        self.norm_mean, self.norm_read = nn.LayerNorm(cross_attention_dim), nn.LayerNorm(cross_attention_dim)
        self.to_q = nn.Linear(cross_attention_dim, cross_attention_dim, bias=False)
        self.to_kv = nn.Linear(cross_attention_dim, 2 * cross_attention_dim, bias=False)
        self.mlp = _zero_init_mlp(cross_attention_dim)

    def aggregate_tokens(self, tokens: Tensor, weights: Tensor) -> Tensor:
        """(batch, references, tokens, cross) → (batch, tokens, cross)."""
        mean = _weighted_mean(tokens, weights).flatten(1, 2)
        key, value = self.to_kv(self.norm_read(tokens.flatten(1, 2))).chunk(2, dim=-1)
        query = self.to_q(self.norm_mean(mean))
        bias = _log_weight_bias(weights, tokens.shape[2]).to(tokens.dtype)
        return cast(Tensor, mean + self.mlp(query + multi_head_attention(query, key, value, self.num_heads, bias=bias)))


class JointResampling(Aggregator):
    """The queries of a resampler attend to the patches of all reference images in one softmax. Our own; no training.

    There are as many image tokens as for one reference image. The weights are normalized to a sum of 1, so that the same images
    given twice have the effect of giving them once.
    """

    name = "joint"
    concatenates = False

    def aggregate_features(self, features: Tensor, weights: Tensor) -> Tensor:
        """(batch, references, patches, dim) → (batch, 1, references · patches, dim)."""
        return features.flatten(1, 2)[:, None]

    def attention_bias(self, weights: Tensor, patches: int) -> Tensor | None:
        """The logarithm of the normalized weights; None for a single reference image."""
        return None if weights.shape[1] == 1 else _log_weight_bias(weights / weights.sum(1, keepdim=True), patches)


# Name → (width of the image features, width of the image tokens) → aggregator. `config.methods` lists those that need no training.
AGGREGATORS: dict[str, Callable[[int, int], Aggregator]] = {
    "concat": lambda embed_dim, cross_attention_dim: Aggregator(),
    "average": lambda embed_dim, cross_attention_dim: MeanPooling(),
    "max": lambda embed_dim, cross_attention_dim: MaxPooling(),
    "average-tokens": lambda embed_dim, cross_attention_dim: MeanPooling(on_tokens=True),
    "max-tokens": lambda embed_dim, cross_attention_dim: MaxPooling(on_tokens=True),
    "joint": lambda embed_dim, cross_attention_dim: JointResampling(),
    "self-attention": lambda embed_dim, cross_attention_dim: SelfAttention(embed_dim),
    "attention": lambda embed_dim, cross_attention_dim: AttentionPooling(embed_dim),
    "attention-tokens": lambda embed_dim, cross_attention_dim: TokenAttentionPooling(cross_attention_dim),
}


def _zero_init_mlp(dim: int) -> nn.Sequential:
    """A two-layer MLP whose output is zero until it is trained."""
    out = nn.Linear(2 * dim, dim)
    nn.init.zeros_(out.weight)
    nn.init.zeros_(out.bias)
    return nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), out)


def _weighted_mean(
    x: Float[Tensor, "batch references length dim"], weights: Float[Tensor, "#batch references"]
) -> Float[Tensor, "batch 1 length dim"]:
    """Σ wᵢ xᵢ / Σ wᵢ over dimension 1."""
    normalized = (weights / weights.sum(1, keepdim=True)).to(x)
    return (x * normalized[:, :, None, None]).sum(1, keepdim=True)


def _masked_max(
    x: Float[Tensor, "batch references length dim"], weights: Float[Tensor, "#batch references"]
) -> Float[Tensor, "batch 1 length dim"]:
    """The maximum over dimension 1 where the weight is not zero."""
    return x.masked_fill((weights == 0)[:, :, None, None], -torch.inf).amax(1, keepdim=True)


def _log_weight_bias(weights: Float[Tensor, "batch references"], patches: int) -> Float[Tensor, "batch 1 1 keys"]:
    """log w for every key, so that a weight of 2 acts in a softmax as the key given twice. keys = references · patches."""
    return weights.log().repeat_interleave(patches, 1)[:, None, None]
