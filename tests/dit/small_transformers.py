"""Small transformers of every supported architecture, random but fixed, and random adapters of each family."""

import warnings
from typing import Any

import torch
from diffusers import (
    ChromaTransformer2DModel,
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
)
from torch import nn

from imprompt.core.adapter import FAMILIES, Adapter
from imprompt.core.image_projection import ImageProjection, MLPImageProjection, TimeResampler
from imprompt.dit.sites import find_sites
from imprompt.models.image_prompt import ImagePrompt

TEXT_DIM = 32
HEADS, HEAD_DIM = 2, 64


def build_flux(cls: type = FluxTransformer2DModel, **config: Any) -> nn.Module:
    guidance = {} if cls is ChromaTransformer2DModel else {"pooled_projection_dim": 16, "guidance_embeds": False}
    options = {"in_channels": 16, "num_layers": 2, "num_single_layers": 2, "axes_dims_rope": (16, 24, 24)}
    chroma = {"approximator_num_channels": 8, "approximator_hidden_dim": 16, "approximator_layers": 1}
    extra = chroma if cls is ChromaTransformer2DModel else {}
    return cls(**options | extra | guidance | config, num_attention_heads=HEADS, attention_head_dim=HEAD_DIM, joint_attention_dim=TEXT_DIM)


def build_sd3(**config: Any) -> SD3Transformer2DModel:
    channels = {"in_channels": 4, "out_channels": 4}
    return SD3Transformer2DModel(
        sample_size=16, patch_size=2, num_layers=3, num_attention_heads=HEADS, attention_head_dim=HEAD_DIM,
        joint_attention_dim=TEXT_DIM, caption_projection_dim=HEADS * HEAD_DIM, pooled_projection_dim=16, pos_embed_max_size=16,
        qk_norm="rms_norm", **channels | config,
    )  # fmt: skip


def build_qwen() -> QwenImageTransformer2DModel:
    return QwenImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=2, num_attention_heads=HEADS, attention_head_dim=HEAD_DIM, joint_attention_dim=TEXT_DIM,
        axes_dims_rope=(16, 24, 24),
    )  # fmt: skip


def build_pixart() -> PixArtTransformer2DModel:
    return PixArtTransformer2DModel(
        sample_size=16, num_layers=2, num_attention_heads=HEADS, attention_head_dim=HEAD_DIM, in_channels=4, out_channels=8,
        cross_attention_dim=HEADS * HEAD_DIM, caption_channels=TEXT_DIM, use_additional_conditions=False,
    )  # fmt: skip


BUILDERS = {
    "flux": build_flux,
    "chroma": lambda: build_flux(ChromaTransformer2DModel),
    "sd3": build_sd3,
    "sd35-medium": lambda: build_sd3(dual_attention_layers=(0,)),
    "qwen-image": build_qwen,
    "pixart": build_pixart,
}


def build_transformer(name: str) -> nn.Module:
    """A small random transformer whose zero-initialized layers are random too, so that every block changes its input."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # Chroma's, of an import of its own
        model = BUILDERS[name]().eval().requires_grad_(False)
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.2)
    return model


def transformer_inputs(name: str, rows: int = 2) -> dict[str, Any]:
    """The arguments of one call: 6 × 10 latents, 5 text tokens; rows that belong together differ."""
    g = torch.Generator().manual_seed(1)
    text = torch.randn(rows, 5, TEXT_DIM, generator=g)
    latents, tokens = torch.randn(rows, 4, 6, 10, generator=g), torch.randn(rows, 15, 16, generator=g)
    match name:
        case "flux" | "chroma":
            ids = torch.stack(
                [torch.zeros(15), *(x.flatten() for x in torch.meshgrid(torch.arange(3.0), torch.arange(5.0), indexing="ij"))], 1
            )
            pooled = {} if name == "chroma" else {"pooled_projections": torch.randn(rows, 16, generator=g)}
            return {
                "hidden_states": tokens, "encoder_hidden_states": text, "timestep": torch.full((rows,), 0.6), "img_ids": ids,
                "txt_ids": torch.zeros(5, 3), **pooled,
            }  # fmt: skip
        case "sd3" | "sd35-medium":
            pooled = torch.randn(rows, 16, generator=g)
            return {
                "hidden_states": latents,
                "encoder_hidden_states": text,
                "pooled_projections": pooled,
                "timestep": torch.full((rows,), 600.0),
            }
        case "qwen-image":
            return {
                "hidden_states": tokens, "encoder_hidden_states": text, "encoder_hidden_states_mask": torch.ones(rows, 5, dtype=torch.bool),
                "timestep": torch.full((rows,), 0.6), "img_shapes": [[(1, 3, 5)]] * rows,
            }  # fmt: skip
        case "pixart":
            return {"hidden_states": latents, "encoder_hidden_states": text, "timestep": torch.full((rows,), 600), "added_cond_kwargs": {}}
    raise ValueError(name)


def build_adapter(family: str, transformer: nn.Module, image_embed_dim: int = 24, num_tokens: int = 4) -> Adapter:
    """A random adapter of a family for a transformer."""
    torch.manual_seed(2)
    hidden_dims = {site.index: site.hidden_dim for site in find_sites(transformer)}
    width = HEADS * HEAD_DIM
    match family:
        case "xlabs-flux":
            projection: Any = ImageProjection(image_embed_dim, TEXT_DIM, num_tokens)
            hidden_dims, width = {n: dim for n, dim in hidden_dims.items() if n < len(transformer.transformer_blocks)}, TEXT_DIM
        case "instantx-flux":
            projection, width = MLPImageProjection(image_embed_dim, TEXT_DIM, num_tokens), TEXT_DIM
        case "instantx-sd3":
            projection = TimeResampler(image_embed_dim, width, num_tokens, hidden_dim=64, depth=4)
        case "transformer":
            projection, width = ImageProjection(image_embed_dim, TEXT_DIM, num_tokens), TEXT_DIM
    adapter = Adapter(projection, hidden_dims, width, family=FAMILIES[family], head_dim=HEAD_DIM).eval().requires_grad_(False)
    for parameter in adapter.parameters():
        parameter.copy_(torch.randn(parameter.shape) * 0.3)
    return adapter


def build_prompt(adapter: Adapter, seed: int = 3, references: int = 1, patches: int = 1, **options: Any) -> ImagePrompt:
    """A random image prompt of an adapter: features of `references` images, and other unconditional features."""
    g = torch.Generator().manual_seed(seed)
    features, uncond = torch.randn(1, references, patches, 24, generator=g), torch.randn(1, 1, patches, 24, generator=g)
    return ImagePrompt(adapter, features, uncond, **options)


@torch.no_grad()
def call_transformer(transformer: nn.Module, name: str, **changes: Any) -> torch.Tensor:
    """Call a transformer without gradients: its output, (rows, …)."""
    return transformer(**transformer_inputs(name) | changes, return_dict=False)[0]
