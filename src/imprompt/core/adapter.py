"""Adapter = projector + one (W'k, W'v) per cross-attention layer. Its `state_dict` is the public file."""

from collections.abc import Mapping

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
        return {int(n): layer.to_k_ip.out_features for n, layer in self.ip_adapter.items()}  # type: ignore[union-attr, misc]

    def tokens(self, features: Tensor) -> Tensor:
        """(batch, references, patches, features) → (batch, references · tokens, cross): the references' tokens in a row."""
        batch, references = features.shape[:2]
        return self.image_proj(features.flatten(0, 1)).unflatten(0, (batch, references)).flatten(1, 2)

    def forward(self, features: Tensor) -> dict[int, KeyValues]:
        """(batch, references, patches, features) → for each layer n its keys and values, (batch, tokens, hidden)."""
        return self.key_values(self.tokens(features))

    def key_values(self, tokens: Tensor) -> dict[int, KeyValues]:
        """(batch, tokens, cross) → for each layer n its keys and values, (batch, tokens, hidden)."""
        return {int(n): layer(tokens) for n, layer in self.ip_adapter.items()}

    def trainable(self) -> int:
        """Number of parameters."""
        return sum(p.numel() for p in self.parameters())
