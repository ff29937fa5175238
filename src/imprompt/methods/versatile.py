"""Versatile Diffusion (Xu et al., 2022, arXiv:2211.08332), image flow: all patches replace the prompt; the UNet is trained."""

import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from torch import Tensor

from imprompt.errors import UserError
from imprompt.methods.base import Conditioning, ConditioningMethod, FineTunedUNet, UNetForward
from imprompt.models.image_encoders import ImageEncoder
from imprompt.utils.protocols import UNetPipeline


class Versatile(FineTunedUNet):
    """Patches pass the encoder's last layer, norm and projection, and are divided by the norm of the pooled embedding."""

    def __init__(self, unet: UNet2DConditionModel, encoder: ImageEncoder):
        if (width := encoder.embed_dim(patches=False)) != unet.config.cross_attention_dim:
            raise UserError(
                "versatile replaces the prompt by patches: expected an encoder of width "
                f"{unet.config.cross_attention_dim}, received {width}; choose another --image-encoder"
            )
        super().__init__(unet)
        self._encoder = (encoder,)  # in a tuple, so that the encoder is no submodule

    @torch.no_grad()
    def encode_features(self, image_features: Tensor) -> Conditioning:
        """The projected and normalized patches of the first reference image."""
        model = self._encoder[0].model
        states = model.vision_model.encoder.layers[-1](image_features[:, 0].to(model.device, model.dtype), None)
        states = states[0] if isinstance(states, tuple) else states
        patches = model.visual_projection(model.vision_model.post_layernorm(states))
        return {"tokens": (patches / patches[:, :1].norm(dim=-1, keepdim=True)).to(image_features.device)}

    def call_unet(
        self, unet: UNetForward, latents: Tensor, timesteps: Tensor, prompt_embeds: Tensor, cond: Conditioning, **unet_kwargs: object
    ) -> Tensor:
        """Call the fine-tuned UNet with the patches in place of the prompt."""
        return self.predict_with_finetuned_unet(latents, timesteps, cond["tokens"])


def build_versatile(pipe: UNetPipeline, encoder: ImageEncoder) -> ConditioningMethod:
    """Build the method with untrained weights; the unconditional input is a gray image.

    Raises UserError if image and prompt embeddings differ in dimension.
    """
    gray = Image.new("RGB", (encoder.image_size, encoder.image_size), (128, 128, 128))
    uncond = encoder.encode_images([gray], patches=True)
    return ConditioningMethod("versatile", pipe.unet, encoder, Versatile(pipe.unet, encoder), patches=True, uncond_features=uncond)
