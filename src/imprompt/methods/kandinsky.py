"""Kandinsky 2.1 (Razzhigaev et al., 2023, arXiv:2310.03502): ten image tokens precede the projected prompt; the UNet is trained.

The image embedding and the embedding of the last token, in place of a pooled prompt, are added to the time embedding. The two
projections are diffusers' own `TextImageProjection` and `TextImageTimeEmbedding`.
"""

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from imprompt.errors import UserError
from imprompt.methods.base import Conditioning, ConditioningMethod, FineTunedUNet, UNetForward, get_pooled_embedding
from imprompt.models.image_encoders import ImageEncoder
from imprompt.utils.protocols import UNetPipeline


class Kandinsky(FineTunedUNet):
    """Kandinsky 2.1's conditioning. The unconditional image embedding is that of an image whose preprocessed pixels are zeros."""

    def __init__(self, unet: UNet2DConditionModel, image_embed_dim: int):
        dim = unet.config.cross_attention_dim
        if image_embed_dim != dim:
            raise UserError(
                f"Kandinsky's projections expect an encoder of width {dim}, received {image_embed_dim}; choose another --image-encoder"
            )
        super().__init__(unet, encoder_hid_dim_type="text_image_proj", encoder_hid_dim=dim, addition_embed_type="text_image")

    def encode_features(self, image_features: Tensor) -> Conditioning:
        """The pooled embedding."""
        return {"image_embeds": get_pooled_embedding(image_features)}

    def call_unet(
        self, unet: UNetForward, latents: Tensor, timesteps: Tensor, prompt_embeds: Tensor, cond: Conditioning, **unet_kwargs: object
    ) -> Tensor:
        """Call the fine-tuned UNet with the embeddings of image and prompt as added conditions."""
        dtype = self.unet.dtype
        added_cond_kwargs = {"text_embeds": prompt_embeds[:, -1].to(dtype), "image_embeds": cond["image_embeds"].to(dtype)}
        return self.predict_with_finetuned_unet(latents, timesteps, prompt_embeds, added_cond_kwargs=added_cond_kwargs)


def build_kandinsky(pipe: UNetPipeline, encoder: ImageEncoder) -> ConditioningMethod:
    """Build the method with untrained weights. Raises UserError if image and prompt embeddings differ in dimension."""
    module = Kandinsky(pipe.unet, encoder.embed_dim(patches=False))
    zero_pixels = torch.zeros(1, 3, encoder.image_size, encoder.image_size)
    uncond = encoder.encode_pixels(zero_pixels, patches=False)
    return ConditioningMethod("kandinsky", pipe.unet, encoder, module, uncond_features=uncond)
