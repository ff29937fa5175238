"""An adapter is an image projection and one pair (W'k, W'v) per cross-attention layer. Its `state_dict` is the public file format."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from imprompt.core.aggregation import Aggregator
from imprompt.core.attention import KeyValues, rms_norm
from imprompt.core.image_projection import Projector, TimeResampler


@dataclass(frozen=True)
class AdapterFamily:
    """How the adapters of one family compute the image branch of an attention layer, and where it is added.

    The image's query is the one that the base model normalizes, before rotary embedding, in every family but those with `self_attention`.
    """

    name: str
    has_bias: bool = False  # of W'k and W'v
    key_norm_eps: float | None = None  # K' is normalized per head by its root mean square, without weights
    merge: Literal["before_output", "after_block"] = "before_output"  # the output projection, or the whole block
    self_attention: bool = False  # own normalization of the query, and attention to the image's own tokens too
    is_per_step: bool = False  # K' and V' depend on the timestep
    is_null_black: bool = False  # the unconditional features are those of a black image
    hosts: tuple[str, ...] = ()  # families of base models; empty for all transformers
    sides: tuple[str, ...] = ("joint", "single", "cross")  # kinds of attention layers that it has


FAMILIES = {
    family.name: family
    for family in (
        AdapterFamily("unet", hosts=("unet",)),  # IP-Adapter: cross-attention of UNets
        AdapterFamily("xlabs-flux", has_bias=True, merge="after_block", is_null_black=True, hosts=("flux", "chroma"), sides=("joint",)),
        AdapterFamily("instantx-flux", key_norm_eps=1e-5, hosts=("flux", "chroma")),
        AdapterFamily("instantx-sd3", self_attention=True, is_per_step=True, hosts=("sd3",)),
        AdapterFamily("transformer", key_norm_eps=1e-5),  # trained by imprompt: the layers of instantx-flux with few tokens
    )
}


class IPKeyValue(nn.Module):
    """W'k and W'v of one attention layer: K' = W'k c, V' = W'v c (IP-Adapter, Ye et al., 2023, equation 4).

    With `key_norm_eps` the K' of each head of `head_dim` channels is divided by its root mean square.
    """

    def __init__(
        self, cross_attention_dim: int, hidden_dim: int, *, bias: bool = False, key_norm_eps: float | None = None, head_dim: int = 0
    ):
        super().__init__()
        self.to_k_ip = nn.Linear(cross_attention_dim, hidden_dim, bias=bias)
        self.to_v_ip = nn.Linear(cross_attention_dim, hidden_dim, bias=bias)
        self.key_norm_eps, self.head_dim = key_norm_eps, head_dim

    def forward(self, image_tokens: Float[Tensor, "batch tokens cross"]) -> KeyValues:
        """The keys and the values of the image tokens, each (batch, tokens, hidden)."""
        key = self.to_k_ip(image_tokens)
        if self.key_norm_eps is not None:
            key = rms_norm(key.unflatten(-1, (-1, self.head_dim)), eps=self.key_norm_eps).flatten(-2)
        return KeyValues(key, self.to_v_ip(image_tokens))


class TimeKeyValue(nn.Module):
    """W'k and W'v of one layer of InstantX's adapter for SD3.5: of image tokens that are modulated by the timestep (AdaLN, DiT, figure 3).

    `norm_q` and `norm_k` are the adapter's own normalization of the image's query and keys.
    """

    def __init__(self, cross_attention_dim: int, hidden_dim: int, time_dim: int, head_dim: int):
        super().__init__()
        self.norm_ip = nn.ModuleDict({"linear": nn.Linear(time_dim, 2 * cross_attention_dim)})
        self.to_k_ip = nn.Linear(cross_attention_dim, hidden_dim, bias=False)
        self.to_v_ip = nn.Linear(cross_attention_dim, hidden_dim, bias=False)
        self.norm_q, self.norm_k, self.norm_ip_k = (RMSNormWeight(head_dim) for _ in range(3))
        self.head_dim = head_dim

    def forward(self, image_tokens: Float[Tensor, "batch tokens cross"], time_embedding: Float[Tensor, "batch time"]) -> KeyValues:
        """The keys, normalized, and the values of the image tokens at a timestep, each (batch, tokens, hidden)."""
        shift, scale = self.norm_ip["linear"](F.silu(time_embedding))[:, None].chunk(2, dim=-1)
        tokens = F.layer_norm(image_tokens, image_tokens.shape[-1:], eps=1e-6) * (1 + scale) + shift
        key = rms_norm(self.to_k_ip(tokens).unflatten(-1, (-1, self.head_dim)), self.norm_ip_k.weight)
        return KeyValues(key.flatten(-2), self.to_v_ip(tokens))


class RMSNormWeight(nn.Module):
    """The weight of an RMS normalization of each head, (channels,)."""

    def __init__(self, head_dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(head_dim))


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
    `cross_attention_dim` is the width of the image tokens, for UNets that of the text embeddings. `head_dim`, the number of channels of a
    head, is needed by families that normalize keys.
    """

    def __init__(
        self, image_proj: Projector, hidden_dims: Mapping[int, int], cross_attention_dim: int, aggregator: Aggregator | None = None,
        family: AdapterFamily = FAMILIES["unet"], head_dim: int = 0,
    ):  # fmt: skip
        super().__init__()
        self.cross_attention_dim, self.family, self.head_dim = cross_attention_dim, family, head_dim
        self.aggregator = aggregator or Aggregator()
        self.image_proj = image_proj
        self.ip_adapter = nn.ModuleDict({str(n): self._build_key_value(dim) for n, dim in hidden_dims.items()})

    def _build_key_value(self, hidden_dim: int) -> IPKeyValue | TimeKeyValue:
        if isinstance(self.image_proj, TimeResampler):
            return TimeKeyValue(self.cross_attention_dim, hidden_dim, self.image_proj.hidden_dim, self.head_dim)
        family = self.family
        return IPKeyValue(
            self.cross_attention_dim, hidden_dim, bias=family.has_bias, key_norm_eps=family.key_norm_eps, head_dim=self.head_dim
        )

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

    def self_attention_norms(self, n: int) -> tuple[Tensor, Tensor] | None:
        """The weights of the adapter's own normalization of the image's query and keys in layer n, (channels,); None without it."""
        modules = self.ip_adapter[str(n)]
        return (modules.norm_q.weight, modules.norm_k.weight) if isinstance(modules, TimeKeyValue) else None

    def image_tokens(
        self,
        features: Float[Tensor, "batch references patches dim"],
        reference_weights: Float[Tensor, "#batch references"] | None = None,
        aggregator: Aggregator | None = None,
        timestep: float | None = None,
    ) -> Float[Tensor, "batch tokens cross"]:
        """The image tokens c of IP-Adapter's equation 4. By default those of several reference images are concatenated.

        reference_weights: non-negative, all 1 by default. `aggregator` replaces the adapter's own aggregator. timestep: 0 … 1000, for
        families whose tokens depend on it.
        """
        aggregator = aggregator or self.aggregator
        weights = features.new_ones(features.shape[:2]) if reference_weights is None else reference_weights
        bias = aggregator.attention_bias(weights, features.shape[2])
        features = aggregator.aggregate_features(features, weights)
        batch, references = features.shape[:2]
        extra = [tensor for tensor in (self._embed_timestep(timestep), bias) if tensor is not None]
        tokens: Tensor = self.image_proj(features.flatten(0, 1), *extra)
        return aggregator.aggregate_tokens(tokens.reshape(batch, references, -1, self.cross_attention_dim), weights)

    def _embed_timestep(self, timestep: float | None) -> Tensor | None:
        return self.image_proj.embed_timestep(timestep or 0.0) if isinstance(self.image_proj, TimeResampler) else None

    def forward(
        self,
        features: Float[Tensor, "batch references patches dim"],
        reference_weights: Float[Tensor, "#batch references"] | None = None,
        aggregator: Aggregator | None = None,
        timestep: float | None = None,
    ) -> dict[int, KeyValues]:
        """The keys and values of image features for each layer n, each (batch, tokens, hidden)."""
        return self.key_values(self.image_tokens(features, reference_weights, aggregator, timestep), timestep)

    def key_values(self, image_tokens: Float[Tensor, "batch tokens cross"], timestep: float | None = None) -> dict[int, KeyValues]:
        """The keys and values of image tokens for each layer n, each (batch, tokens, hidden): IP-Adapter, equation 4."""
        time_embedding = self._embed_timestep(timestep)
        extra = [] if time_embedding is None else [time_embedding]
        return {n: self.key_value_projection(n)(image_tokens, *extra) for n in self.hidden_dims}

    def num_parameters(self) -> int:
        """The number of parameters, LoRA and aggregator included."""
        return sum(parameter.numel() for parameter in self.parameters())
