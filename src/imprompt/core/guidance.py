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

# Pipelines whose batch is neither [cond] nor [uncond, cond].
_SPECIAL_CFG_LAYOUTS: dict[str, CFGLayout] = {"StableDiffusionInstructPix2PixPipeline": ("cond", "uncond", "uncond")}


def read_cfg_layout(pipe: object) -> CFGLayout:
    """The groups of rows that a diffusers pipeline builds with its present settings. They may change from one UNet call to the next.

    Raises UserError for a pipeline that does not tell whether it uses guidance.
    """
    guided = getattr(pipe, "do_classifier_free_guidance", None)
    name = type(pipe).__name__
    if guided is None:
        raise UserError(
            f"{name} has no attribute do_classifier_free_guidance; attach to its UNet and pass the layout of its batch: "
            'attach(pipe.unet, prompt, cfg_layout=("uncond", "cond"))'
        )
    layout: CFGLayout = _SPECIAL_CFG_LAYOUTS.get(name, ("uncond", "cond")) if guided else ("cond",)
    perturbed = getattr(pipe, "do_perturbed_attention_guidance", False) and name not in _SPECIAL_CFG_LAYOUTS
    return (*layout, "cond") if perturbed else layout


def expand_to_cfg_batch(
    uncond: Float[Tensor, "#prompts *shape"], cond: Float[Tensor, "#prompts *shape"], layout: CFGLayout, rows: int
) -> Float[Tensor, "rows *shape"]:
    """Repeat the two embeddings to the rows of the UNet's batch: the batch that the two terms of equation 7 are computed in.

    Within a group each prompt is repeated once per image generated from it, consecutively, as diffusers repeats prompt embeddings.
    Raises UserError where `rows` is not a multiple of the groups or of the prompts.
    """
    rows_per_group, rest = divmod(rows, len(layout))
    if rest:
        raise UserError(f"a batch of {rows} rows does not split into the {len(layout)} guidance groups {layout}")
    return torch.cat([_repeat_prompts(cond if group == "cond" else uncond, rows_per_group) for group in layout])


def _repeat_prompts(x: Tensor, rows: int) -> Tensor:
    repeats, rest = divmod(rows, len(x))
    if rest:
        raise UserError(
            f"the image prompt is for {len(x)} text prompts, the batch has {rows} rows per guidance group; "
            "expected one image prompt for all text prompts, or one for each"
        )
    return x.repeat_interleave(repeats, 0)
