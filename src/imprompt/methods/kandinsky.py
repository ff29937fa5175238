"""Kandinsky 2.1 (arXiv:2310.03502): z → 10 tokens beside the projected text, and z with the text joins the time. All is trained.

The tokens and the time's part are diffusers' own `TextImageProjection` and `TextImageTimeEmbedding`.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from imprompt.errors import UserError
from imprompt.methods.base import FineTuned, Given, pooled


class Kandinsky(FineTuned):
    """No picture is the embedding of zeros in the place of pixels."""

    def __init__(self, unet: Any, features: int):
        cross = unet.config.cross_attention_dim
        if features != cross:
            raise UserError(f"Kandinsky's projections expect an encoder of width {cross}, received {features}; choose another --encoder")
        super().__init__(unet, encoder_hid_dim_type="text_image_proj", encoder_hid_dim=cross, addition_embed_type="text_image")

    def given(self, image: Tensor) -> Given:
        return {"z": pooled(image)}

    def call(self, unet: Callable[..., Any], x: Tensor, time: Tensor, text: Tensor, given: Given, **extra: Any) -> Tensor:
        dtype = self.unet.dtype
        added = {"text_embeds": text[:, -1].to(dtype), "image_embeds": given["z"].to(dtype)}
        return self.own(x, time, text, added_cond_kwargs=added)
