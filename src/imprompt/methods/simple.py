"""The paper's ablation (arXiv:2308.06721, section 4.4.1): image tokens behind the text tokens, in the frozen cross-attention.

Only the projector trains. There is no λ of its own; `scale` shrinks the tokens.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from imprompt.core import guidance
from imprompt.core.projectors import LinearProjector, Projector
from imprompt.encoders import ImageEncoder
from imprompt.hosts.unet import adapter_shape
from imprompt.methods.ip_adapter import projector


class SimpleAdapter(nn.Module):
    """Image features → tokens in the text's own space."""

    def __init__(self, image_proj: Projector):
        super().__init__()
        self.image_proj = image_proj

    def forward(self, features: Tensor) -> Tensor:
        """(batch, references, patches, features) → (batch, references · tokens, cross)."""
        batch, references = features.shape[:2]
        tokens: Tensor = self.image_proj(features.flatten(0, 1))
        return tokens.reshape(batch, references * tokens.shape[1], -1)


class Simple:
    """Tokens concatenated to the text's."""

    name = "simple"

    def __init__(self, unet: Any, module: SimpleAdapter):
        self.unet, self.adapter = unet, module
        self.module: nn.Module = module
        self.grid = not isinstance(module.image_proj, LinearProjector)

    @classmethod
    def create(cls, unet: Any, encoder: ImageEncoder, grid: bool = False, tokens: int = 0) -> "Simple":
        """Untrained."""
        _, cross = adapter_shape(unet)
        return cls(unet, SimpleAdapter(projector(encoder.width(grid), cross, grid, tokens)))

    def denoise(self, x: Tensor, time: Tensor, text: Tensor, image: Tensor, **extra: Any) -> Tensor:
        tokens = self.module(image.to(next(self.module.parameters()).dtype)).to(text)
        return self.unet(x, time, torch.cat([text, tokens], dim=1), **extra).sample

    def release(self) -> None:
        """Nothing was placed in the UNet."""

    @contextmanager
    def attached(self, pipe: Any, image: Tensor, null: Tensor, scale: float = 1.0) -> Iterator[None]:
        with torch.no_grad():
            dtype = next(self.adapter.parameters()).dtype
            tokens = scale * self.adapter(image.to(dtype))
            nothing = self.adapter(null.to(dtype).expand(1, image.shape[1], -1, -1))

        def lengthen(unet: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
            states = kwargs["encoder_hidden_states"]
            rows = guidance.spread(nothing, tokens, guidance.guidance_groups(pipe), len(states))
            return args, {**kwargs, "encoder_hidden_states": torch.cat([states, rows.to(states)], dim=1)}

        handle = pipe.unet.register_forward_pre_hook(lengthen, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()
