"""`attach`: image prompts for a pipeline with a UNet or with a diffusion transformer."""

from torch import nn

from imprompt.core.guidance import CFGLayout
from imprompt.dit.injection import AttachedToTransformer
from imprompt.dit.sites import HOSTS
from imprompt.unet.attachment import ImagePromptLike
from imprompt.unet.injection import AttachedImagePrompts
from imprompt.utils.compat import unwrap_compiled
from imprompt.utils.protocols import UNetPipeline


def attach(
    target: UNetPipeline | nn.Module, *prompts: ImagePromptLike, cfg_layout: CFGLayout | None = None
) -> AttachedImagePrompts | AttachedToTransformer:
    """Attach image prompts to a diffusers pipeline, or to a bare UNet or transformer; docs/pipelines.md lists what works.

    Use the result as a context manager, or keep it: its `prompts` may be replaced, and `detach()` restores the model exactly.

    Which rows of a batch are conditional is read from the call that a pipeline makes, also of another one that shares the model. A bare
    model, or a pipeline that does not report it, needs `cfg_layout`, the groups of rows of the batch: ("uncond", "cond") with guidance,
    ("cond",) without. In a training loop gradients reach the adapter's parameters that require them. Raises UserError for unknown blocks
    in a scale, where the layout is not known, or for a transformer that is not supported, CheckpointError for an adapter of another model,
    RuntimeError for a model whose attention processors are not diffusers' default.
    """
    has_transformer = getattr(target, "transformer", None) is not None and not isinstance(target, nn.Module)
    is_transformer = isinstance(target, nn.Module) and type(unwrap_compiled(target)).__name__ in HOSTS
    if has_transformer or is_transformer:
        return AttachedToTransformer(target, prompts, cfg_layout)
    return AttachedImagePrompts(target, prompts, cfg_layout)
