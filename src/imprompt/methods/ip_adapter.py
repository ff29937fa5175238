"""IP-Adapter (arXiv:2308.06721): decoupled cross-attention, with global or fine-grained features, or every patch as a token."""

from contextlib import AbstractContextManager
from typing import Any, cast

from torch import Tensor, nn

from imprompt.core.adapter import Adapter
from imprompt.core.aggregation import AGGREGATORS
from imprompt.core.attention import KeyValues
from imprompt.core.image_projection import LinearProjector, MLPProjector, Projector, Resampler
from imprompt.errors import UserError
from imprompt.models.image_encoders import Encoder
from imprompt.models.image_prompt import ImagePrompt
from imprompt.unet.injection import Processors, adapter_shape, attach, initialise, layer_inputs


class IPAdapter:
    """Extra keys and values for every cross-attention layer."""

    name = "ip-adapter"

    def __init__(self, unet: Any, encoder: Encoder, adapter: Adapter):
        self.unet, self.encoder, self.module = unet, encoder, cast(nn.Module, adapter)
        self.adapter = adapter
        self.grid = adapter.image_proj.grid
        self.about = {"aggregator": adapter.aggregator.name}
        self.processors: Processors | None = None

    @classmethod
    def create(cls, unet: Any, encoder: Encoder, kind: str = "global") -> "IPAdapter":
        """Untrained, of one of KINDS: the projector at random, keys and values started from the UNet's own."""
        layers, cross = adapter_shape(unet)
        adapter = Adapter(projector(encoder, cross, kind), layers, cross)
        initialise(adapter, unet)
        return cls(unet, encoder, adapter)

    def bring_together(self, how: str) -> None:
        """Let several references be brought together in this way, by new weights where it has any. Raises UserError."""
        if self.grid and how == "attention":
            raise UserError("combine: attention reads pooled embeddings, and this adapter a grid; take attention-tokens")
        if how == "joint" and not isinstance(self.adapter.image_proj, Resampler):
            raise UserError("combine: joint lays the references' patches before a resampler, and this adapter has none; take average")
        self.adapter.aggregator = AGGREGATORS[how](self.encoder.width(self.grid), self.adapter.cross)
        self.about["aggregator"] = how

    def null(self) -> Tensor:
        return self.encoder.null(self.grid)

    def denoise(self, x: Tensor, time: Tensor, text: Tensor, image: Tensor, **extra: Any) -> Tensor:
        if self.processors is None:
            self.processors = Processors(self.unet)
        found = self.module(image.to(next(self.module.parameters()).dtype))
        found = {n: KeyValues(pair.key.to(x.dtype), pair.value.to(x.dtype)) for n, pair in found.items()}
        keys = layer_inputs(self.processors.layers, found)
        return self.unet(x, time, text, cross_attention_kwargs=keys, **extra).sample

    def release(self) -> None:
        if self.processors is not None:
            self.processors.restore()
            self.processors = None

    def attached(self, pipe: Any, image: Tensor, null: Tensor, scale: float = 1.0) -> AbstractContextManager[Any]:
        self.release()
        return attach(pipe, ImagePrompt(self.adapter, image, null, scale))


KINDS = {"global": "ip-adapter", "resampler": "ip-adapter-plus", "full-face": "ip-adapter-full-face"}  # kind → method


def projector(encoder: Encoder, cross: int, kind: str) -> Projector:
    """The projectors of the public releases; narrower for narrow text states, as mini's are."""
    match kind:
        case "global":
            return LinearProjector(encoder.width(False), cross)
        case "full-face":
            return MLPProjector(encoder.width(True), cross)
    width = {2048: 1280}.get(cross, cross)
    return Resampler(encoder.width(True), cross, 16, width, heads=max(2, width // 64), depth=4)
