"""Which rows of the denoiser's batch listen to the image prompt, and which to its null.

Classifier-free guidance puts several groups of rows into one batch. IP-Adapter gives the conditional group the image
and the unconditional group its null (section 3.1): ε̂ = w ε(x, text, image) + (1 − w) ε(x, null, null).
"""

from typing import Any

import torch
from torch import Tensor

from imprompt.errors import UserError

NULL, CONDITIONAL = 0, 1
Groups = tuple[int, ...]

# Pipelines whose batch is neither [conditional] nor [null, conditional].
_ODD: dict[str, Groups] = {"StableDiffusionInstructPix2PixPipeline": (CONDITIONAL, NULL, NULL)}


def guidance_groups(pipe: Any) -> Groups:
    """The groups of rows that this pipeline builds at this moment; read anew at every call of the denoiser."""
    guided = getattr(pipe, "do_classifier_free_guidance", None)
    if guided is None:
        raise UserError(
            f"{type(pipe).__name__} does not say whether it uses guidance; "
            "attach to its UNet and name the groups: attach(pipe.unet, prompt, groups=(0, 1))"
        )
    if type(pipe).__name__ in _ODD:
        return _ODD[type(pipe).__name__] if guided else (CONDITIONAL,)
    groups: Groups = (NULL, CONDITIONAL) if guided else (CONDITIONAL,)
    return (*groups, CONDITIONAL) if getattr(pipe, "do_perturbed_attention_guidance", False) else groups


def spread(null: Tensor, conditional: Tensor, groups: Groups, rows: int) -> Tensor:
    """Lay null and conditional out as the batch has them.

    null, conditional: (1 or prompts, …). Within a group every prompt stands as often as there are pictures of it,
    side by side, as diffusers repeats prompts. Returns (rows, …).
    """
    each, rest = divmod(rows, len(groups))
    if rest:
        raise UserError(f"a batch of {rows} rows does not split into the {len(groups)} guidance groups {groups}")
    return torch.cat([_repeat(conditional if group else null, each) for group in groups])


def _repeat(x: Tensor, rows: int) -> Tensor:
    times, rest = divmod(rows, len(x))
    if rest:
        raise UserError(
            f"the image prompt is for {len(x)} text prompts, the batch has {rows} rows per guidance group; "
            "give one image prompt for all, or one for each text prompt"
        )
    return x.repeat_interleave(times, 0)
