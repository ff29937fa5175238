"""The attention layers of a diffusion transformer that image prompts can be added to, and what is particular to each architecture."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

from imprompt.errors import UserError

Side = Literal["joint", "single", "cross"]


@dataclass(frozen=True, eq=False)
class AttentionSite:
    """One attention layer.

    `side`: "joint" attention has separate projections for image and text tokens; "single" has one sequence [text ; image]; "cross"
    attends from image tokens to text tokens.
    """

    index: int  # n in adapter files: the position among all sites
    name: str  # for example transformer_blocks.3.attn
    attention: nn.Module
    side: Side
    num_heads: int
    hidden_dim: int  # num_heads · channels per head


class TokenGrid(NamedTuple):
    """The layout of the image tokens: the first height × width of them are those of the generated image; Kontext appends a reference's."""

    height: int
    width: int
    num_tokens: int


class Host(NamedTuple):
    """What differs between the architectures of diffusion transformers."""

    family: str  # of base models: flux, chroma, sd3, qwen-image, pixart
    text_dim: Callable[[Any], int]  # config → width of the text embeddings that the transformer takes
    read_grid: Callable[[nn.Module, Mapping[str, Any]], TokenGrid]  # from the transformer and the arguments of its call
    batches_guidance: bool  # both terms of guidance in one batch, unconditional first; otherwise two calls
    timestep_scale: float  # timestep argument × timestep_scale = scheduler timestep, 0 … 1000


def _read_packed_grid(transformer: nn.Module, kwargs: Mapping[str, Any]) -> TokenGrid:
    """Flux and Chroma: `img_ids`, (tokens, 3), has the kind, row and column of each image token; kind 0 is the generated image."""
    ids: Tensor = kwargs["img_ids"]
    ids = ids[0] if ids.ndim == 3 else ids
    own = ids[ids[:, 0] == ids[0, 0]]
    height, width = (int(side) + 1 for side in own[:, 1:].amax(0))
    return TokenGrid(height, width, len(ids))


def _read_latent_grid(transformer: Any, kwargs: Mapping[str, Any]) -> TokenGrid:
    """SD3 and PixArt: the input is latents, (rows, channels, height, width), cut into patches."""
    height, width = (side // transformer.config.patch_size for side in kwargs["hidden_states"].shape[-2:])
    return TokenGrid(height, width, height * width)


def _read_shapes_grid(transformer: nn.Module, kwargs: Mapping[str, Any]) -> TokenGrid:
    """Qwen-Image: `img_shapes` has (frames, height, width) of every image in the sequence, for each row or for all."""
    shapes = kwargs["img_shapes"]
    shapes = shapes[0] if isinstance(shapes[0], list) else shapes
    _, height, width = shapes[0]
    return TokenGrid(height, width, sum(frames * h * w for frames, h, w in shapes))


HOSTS: Mapping[str, Host] = {
    "FluxTransformer2DModel": Host("flux", lambda config: config.joint_attention_dim, _read_packed_grid, False, 1000),
    "ChromaTransformer2DModel": Host("chroma", lambda config: config.joint_attention_dim, _read_packed_grid, False, 1000),
    "QwenImageTransformer2DModel": Host("qwen-image", lambda config: config.joint_attention_dim, _read_shapes_grid, False, 1000),
    "SD3Transformer2DModel": Host("sd3", lambda config: config.joint_attention_dim, _read_latent_grid, True, 1),
    "PixArtTransformer2DModel": Host("pixart", lambda config: config.caption_channels, _read_latent_grid, True, 1),
}


def find_host(transformer: object) -> Host:
    """The architecture of a transformer. Raises UserError, which names those that are supported, for another one."""
    host = HOSTS.get(type(transformer).__name__)
    if host is None:
        names = ", ".join(name.removesuffix("2DModel") for name in HOSTS)
        raise UserError(f"image prompts cannot be added to {type(transformer).__name__}; expected a UNet, or one of {names}")
    return host


def find_sites(transformer: nn.Module) -> list[AttentionSite]:
    """The sites in the order of adapter files: joint or cross-attention blocks first, then Flux's single blocks."""
    find_host(transformer)
    return [
        AttentionSite(n, name, attention, side, attention.heads, attention.to_q.out_features)
        for n, (name, attention, side) in enumerate(_iterate_attention(transformer))
    ]


def _iterate_attention(transformer: nn.Module) -> Iterator[tuple[str, Any, Side]]:
    blocks: dict[str, tuple[str, Side]] = {"transformer_blocks": ("attn", "joint"), "single_transformer_blocks": ("attn", "single")}
    if type(transformer).__name__ == "PixArtTransformer2DModel":
        blocks = {"transformer_blocks": ("attn2", "cross")}
    for list_name, (attribute, side) in blocks.items():
        for i, block in enumerate(getattr(transformer, list_name, ())):
            yield f"{list_name}.{i}.{attribute}", getattr(block, attribute), side
