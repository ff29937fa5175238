"""BLIP-Diffusion (Li et al., 2023, arXiv:2305.14720): the output of a Q-Former is inserted into the prompt, after its start token.

The Q-Former, the text encoder and the UNet are trained. There are two departures, because a method receives the output of the frozen
text encoder and not the prompt: the Q-Former attends to the whole prompt instead of the subject's name, and the trained part of the
text encoder is one additional layer, over the prompt with the queries in it. A third keeps the code simple: the rows of the text
attend to the patches as the queries do, whereas in the released Q-Former only the queries do.
"""

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from imprompt.methods.base import Conditioning, ConditioningMethod, FineTunedUNet, UNetForward, get_dtype
from imprompt.models.image_encoders import ImageEncoder
from imprompt.utils.protocols import UNetPipeline


class BlipDiffusion(FineTunedUNet):
    """Queries attend to each other and to the prompt, then to the patches."""

    QUERIES, LAYERS = 16, 2

    def __init__(self, unet: UNet2DConditionModel, image_embed_dim: int):
        super().__init__(unet)
        dim = unet.config.cross_attention_dim
        heads = max(1, dim // 64)
        self.queries = nn.Parameter(torch.randn(1, self.QUERIES, dim) / dim**0.5)
        self.patch_proj = nn.Sequential(nn.LayerNorm(image_embed_dim), nn.Linear(image_embed_dim, dim))
        self.qformer_layers = nn.ModuleList(
            nn.TransformerDecoderLayer(dim, heads, 4 * dim, 0.0, "gelu", batch_first=True, norm_first=True) for _ in range(self.LAYERS)
        )
        self.proj = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, dim))
        self.text_layer = nn.TransformerEncoderLayer(dim, heads, 4 * dim, 0.0, "gelu", batch_first=True, norm_first=True)
        with torch.no_grad():  # training starts close to the base model
            for output_layer in (self.text_layer.self_attn.out_proj, self.text_layer.linear2):
                output_layer.weight.mul_(0.1)

    def encode_features(self, image_features: Tensor) -> Conditioning:
        """The patches of all reference images, projected to the width of the prompt embeddings."""
        return {"patches": self.patch_proj(image_features.flatten(1, 2).to(get_dtype(self)))}

    def call_unet(
        self, unet: UNetForward, latents: Tensor, timesteps: Tensor, prompt_embeds: Tensor, cond: Conditioning, **unet_kwargs: object
    ) -> Tensor:
        """Insert the Q-Former's output after the start token, and call the fine-tuned UNet."""
        text = prompt_embeds.to(get_dtype(self))
        hidden = torch.cat([self.queries.expand(len(text), -1, -1), text], dim=1)
        for layer in self.qformer_layers:
            hidden = layer(hidden, cond["patches"])
        tokens = self.proj(hidden[:, : self.QUERIES])
        states = torch.cat([text[:, :1], tokens, text[:, 1:]], dim=1)
        causal = nn.Transformer.generate_square_subsequent_mask(states.shape[1], states.device, states.dtype)
        return self.predict_with_finetuned_unet(latents, timesteps, self.text_layer(states, src_mask=causal))


def build_blip_diffusion(pipe: UNetPipeline, encoder: ImageEncoder) -> ConditioningMethod:
    """Build BLIP-Diffusion's conditioning with untrained weights."""
    module = BlipDiffusion(pipe.unet, encoder.embed_dim(patches=True))
    return ConditioningMethod("blip-diffusion", pipe.unet, encoder, module, patches=True)
