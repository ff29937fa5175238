"""IP-Adapter (Ye et al., 2023, arXiv:2308.06721): decoupled cross-attention to pooled features, resampled patches, or every patch."""

from contextlib import AbstractContextManager
from typing import cast

from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from imprompt.config.methods import AdapterType
from imprompt.core.adapter import Adapter
from imprompt.core.aggregation import AGGREGATORS
from imprompt.core.attention import KeyValues
from imprompt.core.image_projection import FullImageProjection, ImageProjection, Projector, Resampler
from imprompt.dit.attach import attach
from imprompt.errors import UserError
from imprompt.methods.base import get_dtype
from imprompt.models.image_encoders import FeatureEncoder
from imprompt.models.image_prompt import ImagePrompt
from imprompt.unet.attn_processors import InstalledAttnProcessors, build_cross_attention_kwargs, infer_adapter_shape, init_from_unet
from imprompt.utils.protocols import UNetPipeline


class IPAdapter:
    """Additional keys and values for every cross-attention layer."""

    name = "ip-adapter"

    def __init__(self, unet: UNet2DConditionModel, encoder: FeatureEncoder, adapter: Adapter):
        self.unet, self.encoder, self.adapter = unet, encoder, adapter
        self.module: nn.Module = adapter  # the trainer may wrap it
        self.uses_patch_features = adapter.image_proj.uses_patch_features
        self.metadata = {"aggregator": adapter.aggregator.name}
        self._processors: InstalledAttnProcessors | None = None

    def set_aggregator(self, name: str) -> None:
        """Replace the aggregator of reference images; its weights start untrained. Raises UserError where it does not fit."""
        if self.uses_patch_features and name == "attention":
            raise UserError("aggregation: attention takes pooled features, and this adapter patch features; expected attention-tokens")
        if name == "joint" and not isinstance(self.adapter.image_proj, Resampler):
            raise UserError("aggregation: joint needs an adapter with a resampler, and this one has none; expected average")
        embed_dim = self.encoder.embed_dim(patches=self.uses_patch_features)
        self.adapter.aggregator = AGGREGATORS[name](embed_dim, self.adapter.cross_attention_dim)
        self.metadata["aggregator"] = name

    def uncond_features(self) -> Tensor:
        """The encoder's features of no image, (1, patches, features)."""
        return self.encoder.uncond_features(patches=self.uses_patch_features)

    def predict(self, latents: Tensor, timesteps: Tensor, prompt_embeds: Tensor, image_features: Tensor, **unet_kwargs: object) -> Tensor:
        """The prediction in training, see `Method`. Installs attention processors in the UNet, until `remove_from_unet`."""
        if self._processors is None:
            self._processors = InstalledAttnProcessors(self.unet)
        key_values: dict[int, KeyValues] = self.module(image_features.to(get_dtype(self.module)))
        key_values = {n: KeyValues(key.to(latents.dtype), value.to(latents.dtype)) for n, (key, value) in key_values.items()}
        kwargs = build_cross_attention_kwargs(self._processors.layers, key_values)
        return cast(Tensor, self.unet(latents, timesteps, prompt_embeds, cross_attention_kwargs=kwargs, **unet_kwargs).sample)

    def remove_from_unet(self) -> None:
        """Restore the UNet's own attention processors."""
        if self._processors is not None:
            self._processors.restore()
            self._processors = None

    def apply_to(
        self, pipe: UNetPipeline, image_features: Tensor, uncond_features: Tensor, scale: float = 1.0
    ) -> AbstractContextManager[object]:
        """Within the context the pipeline generates images conditioned on these features, see `Method`."""
        self.remove_from_unet()
        return attach(pipe, ImagePrompt(self.adapter, image_features, uncond_features, scale))


def build_projector(encoder: FeatureEncoder, cross_attention_dim: int, adapter_type: AdapterType) -> Projector:
    """The image projection of the public releases, untrained. A resampler is narrower for narrow text embeddings, such as mini's.

    ComfyUI and the WebUI read resamplers with 12 heads, whatever their width, or with 20 for SDXL.
    """
    match adapter_type:
        case "base":
            return ImageProjection(encoder.embed_dim(patches=False), cross_attention_dim)
        case "full-face":
            return FullImageProjection(encoder.embed_dim(patches=True), cross_attention_dim)
    is_sdxl = cross_attention_dim == 2048
    hidden_dim, num_heads = (1280, 20) if is_sdxl else (cross_attention_dim, min(12, max(2, cross_attention_dim // 64)))
    return Resampler(encoder.embed_dim(patches=True), cross_attention_dim, 16, hidden_dim, num_heads=num_heads, depth=4)


def _build_untrained(pipe: UNetPipeline, encoder: FeatureEncoder, adapter_type: AdapterType) -> IPAdapter:
    """A random image projection; keys and values initialized from the UNet's own."""
    hidden_dims, cross_attention_dim = infer_adapter_shape(pipe.unet)
    adapter = Adapter(build_projector(encoder, cross_attention_dim, adapter_type), hidden_dims, cross_attention_dim)
    init_from_unet(adapter, pipe.unet)
    return IPAdapter(pipe.unet, encoder, adapter)


def build_base(pipe: UNetPipeline, encoder: FeatureEncoder) -> IPAdapter:
    """The base IP-Adapter, with pooled features, untrained."""
    return _build_untrained(pipe, encoder, "base")


def build_plus(pipe: UNetPipeline, encoder: FeatureEncoder) -> IPAdapter:
    """IP-Adapter Plus, with a resampler over patch features, untrained."""
    return _build_untrained(pipe, encoder, "plus")


def build_full_face(pipe: UNetPipeline, encoder: FeatureEncoder) -> IPAdapter:
    """The full-face IP-Adapter, with one token per patch, untrained."""
    return _build_untrained(pipe, encoder, "full-face")
