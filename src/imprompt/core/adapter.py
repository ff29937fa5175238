"""An adapter is an image projection and one pair (W'k, W'v) per cross-attention layer. Its `state_dict` is the public file format."""

from collections.abc import Mapping
from typing import cast

from jaxtyping import Float
from torch import Tensor, nn

from imprompt.core.aggregation import Aggregator
from imprompt.core.attention import KeyValues
from imprompt.core.image_projection import Projector


class IPKeyValue(nn.Module):
    """W'k and W'v of one cross-attention layer: K' = W'k c, V' = W'v c (IP-Adapter, Ye et al., 2023, equation 4)."""

    def __init__(self, cross_attention_dim: int, hidden_dim: int):
        super().__init__()
        self.to_k_ip = nn.Linear(cross_attention_dim, hidden_dim, bias=False)
        self.to_v_ip = nn.Linear(cross_attention_dim, hidden_dim, bias=False)

    def forward(self, image_tokens: Float[Tensor, "batch tokens cross"]) -> KeyValues:
        """The keys and the values of the image tokens, each (batch, tokens, hidden)."""
        return KeyValues(self.to_k_ip(image_tokens), self.to_v_ip(image_tokens))


class LoRALinear(nn.Module):
    """The low-rank update BAx of one linear projection (LoRA, Hu et al., 2021, arXiv:2106.09685, equation 3)."""

    def __init__(self, in_features: int, out_features: int, rank: int):
        super().__init__()
        self.down = nn.Linear(in_features, rank, bias=False)
        self.up = nn.Linear(rank, out_features, bias=False)

    def forward(self, x: Float[Tensor, "*batch in_features"]) -> Float[Tensor, "*batch out_features"]:
        """The update, to be added to the output of the projection."""
        return cast(Tensor, self.up(self.down(x)))


LORA_PROJECTIONS = ("q", "k", "v", "out")  # the projections of an attention layer that FaceID adapters update


class Adapter(nn.Module):
    """Turns image features into additional keys and values for every cross-attention layer.

    `hidden_dims` maps the public index n of a layer (its position in `unet.attn_processors`) to the width of its keys and values;
    `cross_attention_dim` is the width of the text embeddings and of the image tokens.
    """

    def __init__(
        self, image_proj: Projector, hidden_dims: Mapping[int, int], cross_attention_dim: int, aggregator: Aggregator | None = None
    ):
        super().__init__()
        self.cross_attention_dim = cross_attention_dim
        self.aggregator = aggregator or Aggregator()
        self.image_proj = image_proj
        self.ip_adapter = nn.ModuleDict({str(n): IPKeyValue(cross_attention_dim, dim) for n, dim in hidden_dims.items()})

    def add_lora(self, n: int, sizes: Mapping[str, tuple[int, int, int]]) -> None:
        """Add the low-rank updates of FaceID to layer n, which may be cross- or self-attention.

        sizes: name of a projection (one of LORA_PROJECTIONS) → input width, output width, rank.
        """
        if str(n) not in self.ip_adapter:
            self.ip_adapter[str(n)] = nn.Module()
        for projection, size in sizes.items():
            self.ip_adapter[str(n)].add_module(f"to_{projection}_lora", LoRALinear(*size))

    @property
    def hidden_dims(self) -> dict[int, int]:
        """Public index of each cross-attention layer → width of its keys and values."""
        return {
            int(n): self.key_value_projection(int(n)).to_k_ip.out_features
            for n, modules in self.ip_adapter.items()
            if hasattr(modules, "to_k_ip")
        }

    @property
    def lora_layers(self) -> dict[int, dict[str, LoRALinear]]:
        """Public index of a layer → name of a projection → its low-rank update. Empty for adapters outside the FaceID family."""
        updates: dict[int, dict[str, LoRALinear]] = {}
        for n, modules in self.ip_adapter.items():
            for projection in LORA_PROJECTIONS:
                if (update := getattr(modules, f"to_{projection}_lora", None)) is not None:
                    updates.setdefault(int(n), {})[projection] = update
        return updates

    def key_value_projection(self, n: int) -> IPKeyValue:
        """W'k and W'v of layer n."""
        return cast(IPKeyValue, self.ip_adapter[str(n)])

    def image_tokens(
        self,
        features: Float[Tensor, "batch references patches dim"],
        reference_weights: Float[Tensor, "#batch references"] | None = None,
        aggregator: Aggregator | None = None,
    ) -> Float[Tensor, "batch tokens cross"]:
        """The image tokens c of IP-Adapter's equation 4. By default those of several reference images are concatenated.

        reference_weights: non-negative, all 1 by default. `aggregator` replaces the adapter's own aggregator.
        """
        aggregator = aggregator or self.aggregator
        weights = features.new_ones(features.shape[:2]) if reference_weights is None else reference_weights
        bias = aggregator.attention_bias(weights, features.shape[2])
        features = aggregator.aggregate_features(features, weights)
        batch, references = features.shape[:2]
        tokens: Tensor = self.image_proj(features.flatten(0, 1), *(() if bias is None else (bias,)))
        return aggregator.aggregate_tokens(tokens.reshape(batch, references, -1, self.cross_attention_dim), weights)

    def forward(
        self,
        features: Float[Tensor, "batch references patches dim"],
        reference_weights: Float[Tensor, "#batch references"] | None = None,
        aggregator: Aggregator | None = None,
    ) -> dict[int, KeyValues]:
        """The keys and values of image features for each layer n, each (batch, tokens, hidden)."""
        return self.key_values(self.image_tokens(features, reference_weights, aggregator))

    def key_values(self, image_tokens: Float[Tensor, "batch tokens cross"]) -> dict[int, KeyValues]:
        """The keys and values of image tokens for each layer n, each (batch, tokens, hidden): IP-Adapter, equation 4."""
        return {n: self.key_value_projection(n)(image_tokens) for n in self.hidden_dims}

    def num_parameters(self) -> int:
        """The number of parameters, LoRA and aggregator included."""
        return sum(parameter.numel() for parameter in self.parameters())
