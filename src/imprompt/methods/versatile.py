"""Versatile Diffusion (arXiv:2211.08332), its image flow: cross-attention to all patches, in place of the text. All is trained."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from imprompt.errors import UserError
from imprompt.methods.base import FineTuned, Given
from imprompt.models.image_encoders import ImageEncoder


class Versatile(FineTuned):
    """Every patch goes through the encoder's last layer, norm and projection, and is divided by the length of the pooled one."""

    def __init__(self, unet: Any, encoder: ImageEncoder):
        if encoder.width(False) != unet.config.cross_attention_dim:
            raise UserError(
                f"the patches stand in the text's place: expected an encoder of width {unet.config.cross_attention_dim}, "
                f"received {encoder.width(False)}; choose another --encoder"
            )
        super().__init__(unet)
        self._encoder = (encoder,)  # a tuple, so that it is not a part of this module

    @torch.no_grad()
    def given(self, image: Tensor) -> Given:
        model = self._encoder[0].model
        states = model.vision_model.encoder.layers[-1](image[:, 0].to(model.device, model.dtype), None)
        states = states[0] if isinstance(states, tuple) else states
        patches = model.visual_projection(model.vision_model.post_layernorm(states))
        return {"tokens": (patches / patches[:, :1].norm(dim=-1, keepdim=True)).to(image.device)}

    def call(self, unet: Callable[..., Any], x: Tensor, time: Tensor, text: Tensor, given: Given, **extra: Any) -> Tensor:
        return self.own(x, time, given["tokens"])
