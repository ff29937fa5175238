"""Adapter = projector + one (W'k, W'v) per cross-attention layer. Its `state_dict` is the public file."""

from collections.abc import Mapping
from typing import cast

from torch import Tensor, nn

from imprompt.core.attention import KeyValues
from imprompt.core.projectors import Projector


class LayerProjection(nn.Module):
    """W'k and W'v of one layer (IP-Adapter, equation 4)."""

    def __init__(self, cross: int, hidden: int):
        super().__init__()
        self.to_k_ip = nn.Linear(cross, hidden, bias=False)
        self.to_v_ip = nn.Linear(cross, hidden, bias=False)

    def forward(self, tokens: Tensor) -> KeyValues:
        return KeyValues(self.to_k_ip(tokens), self.to_v_ip(tokens))


class Adapter(nn.Module):
    """Turns image features into extra keys and values for every cross-attention layer.

    `layers` maps the public index n of a layer (its position in `unet.attn_processors`) to its hidden width;
    `cross` is the width of the text states and of the image tokens.
    """

    def __init__(self, image_proj: Projector, layers: Mapping[int, int], cross: int):
        super().__init__()
        self.cross = cross
        self.image_proj = image_proj
        self.ip_adapter = nn.ModuleDict({str(n): LayerProjection(cross, hidden) for n, hidden in layers.items()})

    @property
    def layers(self) -> dict[int, int]:
        """Public layer index → hidden width."""
        return {int(n): self.layer(int(n)).to_k_ip.out_features for n in self.ip_adapter}

    def layer(self, n: int) -> LayerProjection:
        """W'k and W'v of layer n."""
        return cast(LayerProjection, self.ip_adapter[str(n)])

    def tokens(self, features: Tensor) -> Tensor:
        """(batch, references, patches, features) → (batch, references · tokens, cross): the references' tokens in a row."""
        batch, references = features.shape[:2]
        tokens: Tensor = self.image_proj(features.flatten(0, 1))
        return tokens.reshape(batch, references * tokens.shape[1], self.cross)

    def forward(self, features: Tensor) -> dict[int, KeyValues]:
        """(batch, references, patches, features) → for each layer n its keys and values, (batch, tokens, hidden)."""
        return self.key_values(self.tokens(features))

    def key_values(self, tokens: Tensor) -> dict[int, KeyValues]:
        """(batch, tokens, cross) → for each layer n its keys and values, (batch, tokens, hidden)."""
        return {int(n): self.layer(int(n))(tokens) for n in self.ip_adapter}

    def trainable(self) -> int:
        """Number of parameters."""
        return sum(p.numel() for p in self.parameters())
