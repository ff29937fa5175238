"""unCLIP twice: Open unCLIP (Karlo, after arXiv:2204.06125) and SD unCLIP. The whole UNet is trained."""

import math
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from imprompt.methods.base import FineTuned, Given, absent, dtype_of, pooled

LEVELS = 1000  # of the noise on the embedding


class OpenUnCLIP(FineTuned):
    """Linear(z) + Linear(pooled text) joins the time embedding; Linear(z) → 4 tokens stands before the projected text.

    A learned embedding stands for no picture. The text is pooled by its last token, which is the end of the text.
    """

    TOKENS = 4

    def __init__(self, unet: Any, features: int):
        cross = unet.config.cross_attention_dim
        super().__init__(unet, class_embed_type="simple_projection", projection_class_embeddings_input_dim=features + cross)
        self.nothing = nn.Parameter(torch.randn(features) / features**0.5)
        self.tokens = nn.Linear(features, self.TOKENS * cross)
        self.text = nn.Linear(cross, cross)
        self.norm = nn.LayerNorm(cross)
        with torch.no_grad():
            self.text.weight.copy_(torch.eye(cross))
            self.text.bias.zero_()

    def given(self, image: Tensor) -> Given:
        z = pooled(image).to(dtype_of(self))
        return {"z": torch.where(absent(image)[:, None], self.nothing, z)}

    def call(self, unet: Callable[..., Any], x: Tensor, time: Tensor, text: Tensor, given: Given, **extra: Any) -> Tensor:
        z, text = given["z"], text.to(dtype_of(self))
        states = torch.cat([self.tokens(z).unflatten(1, (self.TOKENS, -1)), self.norm(self.text(text))], dim=1)
        return self.own(x, time, states, class_labels=torch.cat([z, text[:, -1]], dim=1))


class SDUnCLIP(FineTuned):
    """z, brought to the data's mean and variance, gets noise of a level ℓ; [z ; sinusoid(ℓ)] → MLP joins the time embedding.

    Text stays in the cross-attention. ℓ is drawn in training and is 0 in use. No picture is zeros, the level's too.
    """

    def __init__(self, unet: Any, features: int):
        super().__init__(unet, class_embed_type="projection", projection_class_embeddings_input_dim=2 * features)
        self.register_buffer("sums", torch.zeros(3, features))  # of the data's embeddings: how many, Σ z, Σ z²

    def given(self, image: Tensor) -> Given:
        z, here = pooled(image).to(dtype_of(self)), ~absent(image)
        if self.training:
            seen = z[here].detach()
            now = torch.stack([torch.full_like(z[0], len(seen)), seen.sum(0), seen.square().sum(0)])
            cast(Tensor, self.sums).add_(now)
        mean, std = self.statistics()
        level, noisy = torch.zeros(len(z), device=z.device), (z - mean) / std
        if self.training:
            level = torch.randint(LEVELS, (len(z),), device=z.device).float()
            angle = (level / LEVELS * math.pi / 2)[:, None]  # ᾱ = cos²
            noisy = angle.cos() * noisy + angle.sin() * torch.randn_like(noisy)
        labels = torch.cat([noisy * std + mean, _sinusoid(level, z.shape[1]).to(z)], dim=1)
        return {"labels": labels * here[:, None]}

    def statistics(self) -> tuple[Tensor, Tensor]:
        """The data's mean and standard deviation, as far as they are known."""
        count, total, squares = cast(Tensor, self.sums)
        mean = total / count.clamp(min=1)
        variance = torch.where(count > 1, squares / count.clamp(min=1) - mean.square(), torch.ones_like(mean))
        return mean, variance.clamp(min=1e-6).sqrt()

    def call(self, unet: Callable[..., Any], x: Tensor, time: Tensor, text: Tensor, given: Given, **extra: Any) -> Tensor:
        return self.own(x, time, text, class_labels=given["labels"])


def _sinusoid(level: Tensor, width: int) -> Tensor:
    """(batch,) → (batch, width): the usual embedding of a time."""
    frequencies = torch.exp(-math.log(10_000) * torch.arange(width // 2, device=level.device) / (width // 2))
    angles = level[:, None].float() * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)
