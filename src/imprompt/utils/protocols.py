"""What is needed of diffusers' objects, as protocols: pipelines of any task and version fit, and so do wrappers around their models."""

from typing import TYPE_CHECKING, Any, Protocol, Self

from torch import Tensor

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, SchedulerMixin, UNet2DConditionModel, UNetMotionModel
    from diffusers.image_processor import VaeImageProcessor
    from transformers import CLIPTextModel, CLIPTokenizer


class UNetPipeline(Protocol):
    """A Stable Diffusion 1.5, 2.1 or XL pipeline of diffusers, for any task."""

    unet: "UNet2DConditionModel | UNetMotionModel"
    vae: "AutoencoderKL"
    text_encoder: "CLIPTextModel"
    tokenizer: "CLIPTokenizer"
    scheduler: "SchedulerMixin"
    vae_scale_factor: int
    image_processor: "VaeImageProcessor"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Sample images; returns an output with `images`."""

    def encode_prompt(self, *args: Any, **kwargs: Any) -> tuple[Tensor | None, ...]:
        """Text embeddings of prompts and negative prompts; SDXL also returns pooled ones."""
        ...

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Move every model to a device or data type."""
        ...

    def set_progress_bar_config(self, **kwargs: Any) -> None:
        """Options of tqdm for the denoising steps."""
