"""Classifier-free guidance: which rows of the UNet's batch are conditioned on the image prompt, and which on its unconditional embedding.

Guidance puts several groups of rows into one batch. IP-Adapter (Ye et al., 2023, arXiv:2308.06721, equation 7) conditions one group on
text and image and the other on neither: ε̂ = w ε(x, text, image) + (1 − w) ε(x, uncond, uncond).
"""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from imprompt.errors import UserError

CFGLayout = tuple[Literal["uncond", "cond"], ...]  # the groups of rows of the UNet's batch, in order


def expand_to_cfg_batch(
    uncond: Float[Tensor, "#prompts *shape"], cond: Float[Tensor, "#prompts *shape"], layout: CFGLayout, rows: int, frames: int = 1
) -> Float[Tensor, "rows *shape"]:
    """Repeat the two embeddings to the rows of the UNet's batch: the batch that the two terms of equation 7 are computed in.

    Within a group each prompt is repeated once per image generated from it, consecutively, as diffusers repeats prompt embeddings.
    Each frame of a video is a row; `cond` may then have one prompt for every frame. Raises UserError where `rows` is not a multiple of the
    groups or of the prompts.
    """
    rows_per_group, rest = divmod(rows, len(layout) * frames)
    if rest:
        raise UserError(f"a batch of {rows // frames} rows does not split into the {len(layout)} guidance groups {layout}")
    groups = {"uncond": uncond, "cond": cond}
    return torch.cat([_repeat_prompts(groups[group], rows_per_group, frames) for group in layout])


def _repeat_prompts(x: Tensor, rows: int, frames: int) -> Tensor:
    """x: one entry, one for each text prompt, or one for each frame. rows: those of a group, without the frames."""
    repeats, rest = divmod(rows, len(x))
    is_per_frame = len(x) == frames > 1
    if is_per_frame and not rest:
        raise UserError(
            f"{frames} image prompts for {rows} videos of {frames} frames: one for each video, or one for each frame?; "
            "generate another number of videos at once"
        )
    if is_per_frame:
        return x.repeat(rows, *[1] * (x.ndim - 1))
    if rest:
        raise UserError(
            f"the image prompt is for {len(x)} text prompts, the batch has {rows} rows per guidance group; "
            "expected one image prompt for all text prompts, or one for each" + (f", or for each of {frames} frames" if frames > 1 else "")
        )
    return x.repeat_interleave(repeats * frames, 0)
