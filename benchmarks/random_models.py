"""Models of the real architectures with random weights: speed and memory do not depend on the values."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from diffusers import UNet2DConditionModel
from torch import nn

from imprompt.core.adapter import Adapter
from imprompt.core.image_projection import HEAD_DIM, ImageProjection, Resampler
from imprompt.unet.attn_processors import infer_adapter_shape

Model = TypeVar("Model", bound=nn.Module)

SD15: dict[str, Any] = {
    "sample_size": 64,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,  # the number of heads, in diffusers' older naming
}
SDXL: dict[str, Any] = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 6 * 256 + 1280,
}


def random_model(build: Callable[[], Model], dtype: torch.dtype = torch.float32) -> Model:
    """Build without initialization, which takes minutes at full size, and fill in weights that keep activations finite.

    Buffers are left undefined: for models that have none, or that are only saved.
    """
    with torch.device("meta"):
        model = build()
    model = model.to(dtype).to_empty(device="cpu").eval().requires_grad_(False)
    for name, weight in model.named_parameters():
        if weight.ndim > 1:
            weight.normal_(0, 0.02)
        else:
            weight.fill_(0 if name.endswith("bias") else 1)
    return model


def copy_unet_sharing_weights(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """Another UNet that shares all the weights of this one."""
    with torch.device("meta"):
        other = UNet2DConditionModel.from_config(unet.config)
    other.load_state_dict(unet.state_dict(), assign=True)
    return other.eval().requires_grad_(False)


def random_adapter(
    unet: UNet2DConditionModel, num_tokens: int, image_embed_dim: int, resampler_dim: int = 768, dtype: torch.dtype = torch.float32
) -> Adapter:
    """A base adapter for 4 tokens, a Plus adapter with a resampler of this width for more."""
    layers, cross_attention_dim = infer_adapter_shape(unet)

    def build() -> Adapter:
        if num_tokens == 4:
            return Adapter(ImageProjection(image_embed_dim, cross_attention_dim), layers, cross_attention_dim)
        num_heads = resampler_dim // HEAD_DIM
        resampler = Resampler(image_embed_dim, cross_attention_dim, num_tokens, resampler_dim, num_heads)
        return Adapter(resampler, layers, cross_attention_dim)

    return random_model(build, dtype)
