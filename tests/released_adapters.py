"""The released IP-Adapter files, as the names and shapes of their tensors, in full size and (SDXL) reduced."""

from typing import NamedTuple

Shapes = dict[str, tuple[int, ...]]

SD15_LAYERS = {n: 320 if n in (1, 3, 25, 27, 29) else 640 if n in (5, 7, 19, 21, 23) else 1280 for n in range(1, 32, 2)}
SDXL_LAYERS = {n: 640 if n < 9 or 109 <= n < 121 else 1280 for n in range(1, 140, 2)}
LAYERS_AND_CROSS_DIM = {"SD 1.5": (SD15_LAYERS, 768), "SDXL": (SDXL_LAYERS, 2048)}


def linear_shapes(name: str, in_dim: int, out_dim: int) -> Shapes:
    return {f"{name}.weight": (out_dim, in_dim), f"{name}.bias": (out_dim,)}


def norm_shapes(name: str, dim: int) -> Shapes:
    return {f"{name}.weight": (dim,), f"{name}.bias": (dim,)}


def key_value_shapes(layers: dict[int, int], cross_dim: int) -> Shapes:
    return {f"ip_adapter.{n}.to_{kv}_ip.weight": (hidden_dim, cross_dim) for n, hidden_dim in layers.items() for kv in "kv"}


def base_projection(embed_dim: int, cross_dim: int, num_tokens: int = 4) -> Shapes:
    return linear_shapes("image_proj.proj", embed_dim, num_tokens * cross_dim) | norm_shapes("image_proj.norm", cross_dim)


def perceiver_shapes(prefix: str, embed_dim: int, dim: int, inner_dim: int, out_dim: int, depth: int = 4) -> Shapes:
    shapes = linear_shapes(f"{prefix}.proj_in", embed_dim, dim) | linear_shapes(f"{prefix}.proj_out", dim, out_dim)
    shapes |= norm_shapes(f"{prefix}.norm_out", out_dim)
    for i in range(depth):
        attention, mlp = f"{prefix}.layers.{i}.0", f"{prefix}.layers.{i}.1"
        shapes |= norm_shapes(f"{attention}.norm1", dim) | norm_shapes(f"{attention}.norm2", dim) | norm_shapes(f"{mlp}.0", dim)
        shapes |= {f"{attention}.to_q.weight": (inner_dim, dim), f"{attention}.to_kv.weight": (2 * inner_dim, dim)}
        shapes |= {f"{attention}.to_out.weight": (dim, inner_dim)}
        shapes |= {f"{mlp}.1.weight": (4 * dim, dim), f"{mlp}.3.weight": (dim, 4 * dim)}
    return shapes


def plus_projection(embed_dim: int, dim: int, inner_dim: int, cross_dim: int, num_tokens: int = 16) -> Shapes:
    return {"image_proj.latents": (1, num_tokens, dim)} | perceiver_shapes("image_proj", embed_dim, dim, inner_dim, cross_dim)


def full_face_projection(embed_dim: int, cross_dim: int) -> Shapes:
    shapes = linear_shapes("image_proj.proj.0", embed_dim, embed_dim) | linear_shapes("image_proj.proj.2", embed_dim, cross_dim)
    return shapes | norm_shapes("image_proj.proj.3", cross_dim)


def faceid_projection(cross_dim: int, num_tokens: int = 4, id_embed_dim: int = 512, hidden_dim: int = 1024) -> Shapes:
    shapes = linear_shapes("image_proj.proj.0", id_embed_dim, hidden_dim)
    return shapes | linear_shapes("image_proj.proj.2", hidden_dim, num_tokens * cross_dim) | norm_shapes("image_proj.norm", cross_dim)


def faceid_plus_projection(embed_dim: int, cross_dim: int, inner_dim: int) -> Shapes:
    resampler = perceiver_shapes("image_proj.perceiver_resampler", embed_dim, cross_dim, inner_dim, cross_dim)
    return faceid_projection(cross_dim) | resampler


def lora_shapes(layers: dict[int, int], cross_dim: int, rank: int = 128) -> Shapes:
    shapes = {}
    for n, hidden_dim in {m: h for k, h in layers.items() for m in (k - 1, k)}.items():
        for part in ("q", "k", "v", "out"):
            in_dim = cross_dim if n % 2 and part in "kv" else hidden_dim
            shapes |= {f"ip_adapter.{n}.to_{part}_lora.down.weight": (rank, in_dim)}
            shapes |= {f"ip_adapter.{n}.to_{part}_lora.up.weight": (hidden_dim, rank)}
    return shapes


class ReleasedAdapter(NamedTuple):
    """A released adapter file: the shapes of its tensors, and what must be detected from them."""

    base_model: str
    image_proj: Shapes
    adapter_type: str
    num_tokens: int
    image_encoder: str  # how its description begins
    millions: float | None  # of parameters, as published
    has_lora: bool = False

    @property
    def shapes(self) -> Shapes:
        layers, cross_dim = LAYERS_AND_CROSS_DIM[self.base_model]
        return self.image_proj | key_value_shapes(layers, cross_dim) | (lora_shapes(layers, cross_dim) if self.has_lora else {})


VIT_H, VIT_G = "CLIP ViT-H/14", "CLIP ViT-bigG/14"
VIT_H_PATCHES = f"{VIT_H}, penultimate patch features (1280)"
FACE_RECOGNITION = "face recognition"
RELEASED_ADAPTERS = {
    "sd15": ReleasedAdapter("SD 1.5", base_projection(1024, 768), "base", 4, f"{VIT_H}, pooled embedding (1024)", 22.32),
    "sd15_vit-G": ReleasedAdapter("SD 1.5", base_projection(1280, 768), "base", 4, f"{VIT_G}, pooled embedding (1280)", 23.1),
    "sdxl": ReleasedAdapter("SDXL", base_projection(1280, 2048), "base", 4, f"{VIT_G}, pooled embedding (1280)", 351.3),
    "sdxl_vit-h": ReleasedAdapter("SDXL", base_projection(1024, 2048), "base", 4, f"{VIT_H}, pooled embedding (1024)", 349.2),
    "plus_sd15": ReleasedAdapter("SD 1.5", plus_projection(1280, 768, 768, 768), "plus", 16, VIT_H_PATCHES, 49.1),
    "plus_sdxl_vit-h": ReleasedAdapter("SDXL", plus_projection(1280, 1280, 1280, 2048), "plus", 16, VIT_H_PATCHES, 423.7),
    "full-face_sd15": ReleasedAdapter("SD 1.5", full_face_projection(1280, 768), "full-face", 0, VIT_H_PATCHES, 21.8),
    "faceid_sd15": ReleasedAdapter("SD 1.5", faceid_projection(768), "faceid", 4, FACE_RECOGNITION, 48.4, has_lora=True),
    "faceid_sdxl": ReleasedAdapter("SDXL", faceid_projection(2048), "faceid", 4, FACE_RECOGNITION, 535.5, has_lora=True),
    "faceid-plus_sd15": ReleasedAdapter("SD 1.5", faceid_plus_projection(1280, 768, 768), "faceid-plus", 4, VIT_H, 78.3, has_lora=True),
    "faceid-plus_sdxl": ReleasedAdapter("SDXL", faceid_plus_projection(1280, 2048, 2048), "faceid-plus", 4, VIT_H, 743.7, has_lora=True),
    "faceid-portrait_sd15": ReleasedAdapter("SD 1.5", faceid_projection(768, num_tokens=16), "faceid", 16, FACE_RECOGNITION, None),
    "faceid-portrait_sdxl": ReleasedAdapter("SDXL", faceid_projection(2048, num_tokens=16), "faceid", 16, FACE_RECOGNITION, None),
    "faceid-portrait_sdxl_unnorm": ReleasedAdapter(
        "SDXL", plus_projection(512, 2048, 768, 2048), "faceid-resampler", 16, FACE_RECOGNITION, None
    ),
}
NON_FACEID_ADAPTERS = {name: released for name, released in RELEASED_ADAPTERS.items() if not released.adapter_type.startswith("faceid")}
FULL_SIZE_ADAPTERS = [name for name, released in NON_FACEID_ADAPTERS.items() if released.base_model == "SD 1.5"]

REDUCED_SDXL_LAYERS = {n: hidden // 20 for n, hidden in SDXL_LAYERS.items()}
REDUCED_SDXL_SHAPES = {
    "sdxl": base_projection(80, 128) | key_value_shapes(REDUCED_SDXL_LAYERS, 128),
    "sdxl_vit-h": base_projection(64, 128) | key_value_shapes(REDUCED_SDXL_LAYERS, 128),
    "plus_sdxl_vit-h": plus_projection(80, 80, 64, 128) | key_value_shapes(REDUCED_SDXL_LAYERS, 128),
}
