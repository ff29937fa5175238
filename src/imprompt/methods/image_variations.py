"""SD Image Variations: the image embedding is the one token of the context, in place of the text; the whole UNet is trained."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from imprompt.errors import UserError
from imprompt.methods.base import FineTuned, Given, pooled


class ImageVariations(FineTuned):
    """No picture is a zero token."""

    def __init__(self, unet: Any, features: int):
        if features != unet.config.cross_attention_dim:
            raise UserError(
                f"image variations put the embedding in the text's place: expected an encoder of width {unet.config.cross_attention_dim}, "
                f"received {features}; choose another --encoder"
            )
        super().__init__(unet)

    def given(self, image: Tensor) -> Given:
        return {"token": pooled(image)[:, None]}

    def call(self, unet: Callable[..., Any], x: Tensor, time: Tensor, text: Tensor, given: Given, **extra: Any) -> Tensor:
        return self.own(x, time, given["token"])
