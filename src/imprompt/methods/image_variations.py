"""SD Image Variations (Lambda Labs, 2022): the image embedding replaces the prompt as the only context token; the UNet is trained."""

from diffusers import UNet2DConditionModel
from torch import Tensor

from imprompt.errors import UserError
from imprompt.methods.base import Conditioning, ConditioningMethod, FineTunedUNet, UNetForward, get_pooled_embedding
from imprompt.models.image_encoders import ImageEncoder
from imprompt.utils.protocols import UNetPipeline


class ImageVariations(FineTunedUNet):
    """SD Image Variations' conditioning: the image embedding replaces the prompt. The unconditional input is a token of zeros."""

    def __init__(self, unet: UNet2DConditionModel, image_embed_dim: int):
        if image_embed_dim != unet.config.cross_attention_dim:
            raise UserError(
                "image variations replace the prompt by the image embedding: expected an encoder of width "
                f"{unet.config.cross_attention_dim}, received {image_embed_dim}; choose another --image-encoder"
            )
        super().__init__(unet)

    def encode_features(self, image_features: Tensor) -> Conditioning:
        """The pooled embedding as one token."""
        return {"token": get_pooled_embedding(image_features)[:, None]}

    def call_unet(
        self, unet: UNetForward, latents: Tensor, timesteps: Tensor, prompt_embeds: Tensor, cond: Conditioning, **unet_kwargs: object
    ) -> Tensor:
        """Call the fine-tuned UNet with the token in place of the prompt."""
        return self.predict_with_finetuned_unet(latents, timesteps, cond["token"])


def build_image_variations(pipe: UNetPipeline, encoder: ImageEncoder) -> ConditioningMethod:
    """Build the method with untrained weights. Raises UserError if image and prompt embeddings differ in dimension."""
    module = ImageVariations(pipe.unet, encoder.embed_dim(patches=False))
    return ConditioningMethod("image-variations", pipe.unet, encoder, module)
