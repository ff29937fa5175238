"""Adapter = projector + one (W'k, W'v) per cross-attention layer. Its `state_dict` is the public file."""

from collections.abc import Mapping
from typing import cast

from torch import Tensor, nn

from imprompt.core.aggregation import Aggregator
from imprompt.core.attention import KeyValues
from imprompt.core.image_projection import Projector


class LayerProjection(nn.Module):
    """W'k and W'v of one layer (IP-Adapter, equation 4)."""

    def __init__(self, cross: int, hidden: int):
        super().__init__()
        self.to_k_ip = nn.Linear(cross, hidden, bias=False)
        self.to_v_ip = nn.Linear(cross, hidden, bias=False)

    def forward(self, tokens: Tensor) -> KeyValues:
        return KeyValues(self.to_k_ip(tokens), self.to_v_ip(tokens))


class LowRank(nn.Module):
    """What is added to one of a layer's projections: up(down(x))."""

    def __init__(self, inner: int, outer: int, rank: int):
        super().__init__()
        self.down = nn.Linear(inner, rank, bias=False)
        self.up = nn.Linear(rank, outer, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.up(self.down(x)))


PARTS = ("q", "k", "v", "out")  # the projections of a layer that have a LowRank in FaceID


class Adapter(nn.Module):
    """Turns image features into extra keys and values for every cross-attention layer.

    `layers` maps the public index n of a layer (its position in `unet.attn_processors`) to its hidden width;
    `cross` is the width of the text states and of the image tokens.
    """

    def __init__(self, image_proj: Projector, layers: Mapping[int, int], cross: int, aggregator: Aggregator | None = None):
        super().__init__()
        self.cross = cross
        self.aggregator = aggregator or Aggregator()
        self.image_proj = image_proj
        self.ip_adapter = nn.ModuleDict({str(n): LayerProjection(cross, hidden) for n, hidden in layers.items()})

    def add_low_rank(self, n: int, sizes: Mapping[str, tuple[int, int, int]]) -> None:
        """Give layer n, of cross- or self-attention, low-rank additions: part → width in, width out, rank (FaceID)."""
        if str(n) not in self.ip_adapter:
            self.ip_adapter[str(n)] = nn.Module()
        for part, size in sizes.items():
            self.ip_adapter[str(n)].add_module(f"to_{part}_lora", LowRank(*size))

    @property
    def layers(self) -> dict[int, int]:
        """Public layer index → hidden width, of cross-attention."""
        return {int(n): self.layer(int(n)).to_k_ip.out_features for n, own in self.ip_adapter.items() if hasattr(own, "to_k_ip")}

    @property
    def low_rank(self) -> dict[int, dict[str, LowRank]]:
        """Public layer index → part → what is added to it. Of most adapters nothing."""
        found = {int(n): {part: getattr(own, f"to_{part}_lora", None) for part in PARTS} for n, own in self.ip_adapter.items()}
        return {n: {part: low for part, low in parts.items() if low is not None} for n, parts in found.items() if any(parts.values())}

    def layer(self, n: int) -> LayerProjection:
        """W'k and W'v of layer n."""
        return cast(LayerProjection, self.ip_adapter[str(n)])

    def tokens(self, features: Tensor, weights: Tensor | None = None, aggregator: Aggregator | None = None) -> Tensor:
        """(batch, references, patches, features) → (batch, tokens, cross); side by side where nothing brings them together.

        weights: (batch, references), all 1 if not given. `aggregator` stands in for the adapter's own.
        """
        together = aggregator or self.aggregator
        weights = features.new_ones(features.shape[:2]) if weights is None else weights
        bias = together.bias(weights, features.shape[2])
        features = together.embeddings(features, weights)
        batch, references = features.shape[:2]
        tokens: Tensor = self.image_proj(features.flatten(0, 1), *(() if bias is None else (bias,)))
        return together.tokens(tokens.reshape(batch, references, -1, self.cross), weights)

    def forward(self, features: Tensor, weights: Tensor | None = None, aggregator: Aggregator | None = None) -> dict[int, KeyValues]:
        """(batch, references, patches, features) → for each layer n its keys and values, (batch, tokens, hidden)."""
        return self.key_values(self.tokens(features, weights, aggregator))

    def key_values(self, tokens: Tensor) -> dict[int, KeyValues]:
        """(batch, tokens, cross) → for each layer n its keys and values, (batch, tokens, hidden)."""
        return {n: self.layer(n)(tokens) for n in self.layers}

    def trainable(self) -> int:
        """Number of parameters."""
        return sum(p.numel() for p in self.parameters())
