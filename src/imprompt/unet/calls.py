"""Who calls a UNet, and how: the pipeline that is found on the call stack, and the guidance groups of the batch that it passes.

What a pipeline object reports is not enough: pipelines share UNets, one reports no guidance and uses it, others call the UNet for each
guidance group in turn. The local variables of the method that makes the call are what it computes with.
"""

import sys
import threading
from collections.abc import Callable, Mapping
from types import FrameType
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

from imprompt.core.guidance import CFGLayout
from imprompt.errors import UserError
from imprompt.utils.compat import unwrap_compiled

_GUIDANCE_IDENTIFIER = "__guidance_identifier__"  # the name under which guiders of modular pipelines label their batches


class DenoiserCall(NamedTuple):
    """A call of a UNet: the pipeline that makes it, the method that it is made in, and that method's local variables."""

    pipeline: Any
    method: str  # for example StableDiffusionPipeline.__call__
    variables: Mapping[str, Any]

    @property
    def scheduler(self) -> Any:
        """The scheduler whose timesteps this call takes; None where the pipeline has none."""
        name = "inverse_scheduler" if self.method.endswith(".invert") and hasattr(self.pipeline, "inverse_scheduler") else "scheduler"
        return getattr(self.pipeline, name, None)

    @property
    def is_guided(self) -> bool:
        """Whether this call uses classifier-free guidance. Raises UserError where the pipeline does not report it."""
        name = "do_classifier_free_guidance"
        guided = self.variables[name] if name in self.variables else getattr(self.pipeline, name, None)
        if guided is None:
            raise UserError(f"{type(self.pipeline).__name__} does not report which rows of its batch are conditional; {_ADVICE}")
        return bool(guided)


_ADVICE = 'if they are always the same, pass them: attach(pipe, prompt, cfg_layout=("uncond", "cond")), or ("cond",) without guidance'


def find_denoiser_call(denoiser: nn.Module) -> DenoiserCall | None:
    """The call of this UNet or transformer that is being made in this thread; None where no pipeline makes it."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        pipeline = _find_owner(frame)
        parts = (getattr(pipeline, name, None) for name in ("unet", "transformer"))
        if any(part is not None and unwrap_compiled(part) is denoiser for part in parts):
            return DenoiserCall(pipeline, frame.f_code.co_qualname, frame.f_locals)
        frame = frame.f_back
    return None


def _find_owner(frame: FrameType) -> object | None:
    """The object whose method runs in this frame; for blocks of a modular pipeline, which are given its components, the pipeline."""
    code = frame.f_code
    if not code.co_argcount or code.co_varnames[0] != "self":
        return None
    owner = frame.f_locals.get("self")
    if isinstance(owner, nn.Module):
        return None
    return frame.f_locals["components"] if "components" in code.co_varnames[: code.co_argcount] else owner


def check_exclusive(call: DenoiserCall) -> None:
    """Raise UserError while another thread samples with the same scheduler, which keeps the state of one generation."""
    scheduler, own = getattr(call.pipeline, "scheduler", None), threading.get_ident()
    if scheduler is not None and any(_is_sampling(frame, scheduler) for thread, frame in sys._current_frames().items() if thread != own):
        raise UserError(
            "two threads are generating with one pipeline, whose scheduler keeps the state of a single generation: "
            "use a lock, or give each thread a pipeline with a scheduler of its own"
        )


def _is_sampling(frame: FrameType | None, scheduler: object) -> bool:
    while frame is not None:
        if frame.f_code.co_name == "__call__" and getattr(_find_owner(frame), "scheduler", None) is scheduler:
            return True
        frame = frame.f_back
    return False


def read_cfg_layout(call: DenoiserCall | None, rows: int, prompt_embeds: Tensor | None = None) -> CFGLayout:
    """The groups of rows in the batch of this call. They may change from one call to the next.

    rows: of the batch, without the frames of a video. Rows of a source prompt, or of a concept that is only compared, count as
    unconditional: the image prompt describes what is generated. Raises UserError for a call outside a pipeline, and for a pipeline
    that does not report whether it uses guidance.
    """
    if call is None:
        raise UserError(
            "the UNet was called, and not by a pipeline that has it: which rows of its batch are conditional is not known; "
            'attach with cfg_layout=("uncond", "cond"), or cfg_layout=("cond",) without guidance'
        )
    if call.method in _LAYOUTS:
        return _LAYOUTS[call.method](call, rows)
    if _is_modular(call.pipeline):
        return _read_modular_layout(call)
    if prompt_embeds is not None and prompt_embeds is call.variables.get("uncond_emb"):  # self-attention guidance
        return ("uncond",)
    layout: CFGLayout = ("uncond", "cond") if call.is_guided else ("cond",)
    return (*layout, "cond") if getattr(call.pipeline, "do_perturbed_attention_guidance", False) else layout


def _is_modular(pipeline: object) -> bool:
    return any(base.__name__ == "ModularPipeline" for base in type(pipeline).__mro__)


def _read_modular_layout(call: DenoiserCall) -> CFGLayout:
    """Guiders of modular pipelines call the UNet once for each prediction, which they name pred_cond, pred_uncond or alike."""
    identifier = getattr(call.variables.get("guider_state_batch"), _GUIDANCE_IDENTIFIER, None)
    if identifier is None:
        raise UserError(f"{call.method}: expected a block of diffusers, which labels its guidance batches; {_ADVICE}")
    return ("uncond",) if identifier == "pred_uncond" else ("cond",)


def _layout_if_guided(guided: CFGLayout, otherwise: CFGLayout) -> Callable[[DenoiserCall, int], CFGLayout]:
    return lambda call, rows: guided if call.is_guided else otherwise


def _read_plain_layout(call: DenoiserCall, rows: int) -> CFGLayout:
    """Latent diffusion: guided unless the guidance scale is 1."""
    return ("cond",) if call.variables["guidance_scale"] == 1 else ("uncond", "cond")


def _read_views_layout(call: DenoiserCall, rows: int) -> CFGLayout:
    """Panorama and ParaDiGMS: both rows of the first view or time, then both of the next."""
    if not call.is_guided:
        return ("cond",)
    return ("uncond", "cond") * int(call.variables.get("parallel_len", rows // 2))


def _read_concepts_layout(call: DenoiserCall, rows: int) -> CFGLayout:
    """Safe and semantic guidance: behind the usual two groups, one for each concept that the prediction is moved to or from."""
    if not call.is_guided:
        return ("cond",)
    concepts = call.variables.get("enabled_editing_prompts", call.variables.get("enable_safety_guidance", 0))
    return ("uncond", "cond", *_repeat("uncond", int(concepts)))


def _read_edits_layout(call: DenoiserCall, rows: int) -> CFGLayout:
    """LEDITS++: one unconditional group, then one for each editing prompt."""
    return ("uncond", *_repeat("cond", int(call.pipeline.enabled_editing_prompts)))


def _repeat(group: Literal["uncond", "cond"], times: int) -> CFGLayout:
    return (group,) * times


def _inversion_layout(call: DenoiserCall, rows: int) -> CFGLayout:
    return ("uncond",)


# By the method that calls the UNet: pipelines of diffusers whose batch is neither [cond] nor [uncond, cond].
_LAYOUTS: Mapping[str, Callable[[DenoiserCall, int], CFGLayout]] = {
    "StableDiffusionInstructPix2PixPipeline.__call__": _layout_if_guided(("cond", "uncond", "uncond"), ("cond",)),
    "StableDiffusionXLInstructPix2PixPipeline.__call__": _layout_if_guided(("cond", "uncond", "uncond"), ("cond",)),
    "LDMTextToImagePipeline.__call__": _read_plain_layout,
    "StableDiffusionPanoramaPipeline.__call__": _read_views_layout,
    "StableDiffusionParadigmsPipeline.__call__": _read_views_layout,
    "StableDiffusionPipelineSafe.__call__": _read_concepts_layout,
    "SemanticStableDiffusionPipeline.__call__": _read_concepts_layout,
    "CycleDiffusionPipeline.__call__": _layout_if_guided(("uncond", "uncond", "uncond", "cond"), ("uncond", "cond")),
    # diffusers exchanges prompt and negative prompt here: the third group has the text of the target prompt
    "StableDiffusionDiffEditPipeline.generate_mask": _layout_if_guided(("uncond", "uncond", "cond", "uncond"), ("uncond", "cond")),
    "StableDiffusionDiffEditPipeline.invert": _inversion_layout,
    "StableDiffusionPix2PixZeroPipeline.invert": _inversion_layout,
    "LEditsPPPipelineStableDiffusion.__call__": _read_edits_layout,
    "LEditsPPPipelineStableDiffusion.invert": _inversion_layout,
    "LEditsPPPipelineStableDiffusionXL.__call__": _read_edits_layout,
    "LEditsPPPipelineStableDiffusionXL.invert": _inversion_layout,
}
