"""Image-to-image, inpainting and structure control: the pipeline for a task, and what it is given at each call."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image, ImageOps

from imprompt.config import TaskConfig
from imprompt.errors import UserError, notify
from imprompt.generation.controls import Control, load_control
from imprompt.models.base_pipelines import check_size, native_resolution, size_constraints, to_task_pipeline
from imprompt.utils.images import ImageInput, differs_in_shape, name_of, open_control_image, open_image, open_mask


@dataclass(frozen=True)
class GenerationTask:
    """A pipeline for the task, and what it is given at each call."""

    pipe: Any
    size: tuple[int, int]  # width and height in pixels
    step_fraction: float = 1.0  # of the denoising steps, how many are taken
    image: Image.Image | None = None  # to start from, at this size
    mask: Image.Image | None = None  # white where the image is repainted, at this size
    controlnets: Sequence[Control] = field(default=(), repr=False)
    t2i_adapters: Sequence[Control] = field(default=(), repr=False)

    def pipeline_kwargs(self, num_images: int) -> dict[str, Any]:
        """The arguments of the pipeline that depend on the task, for a batch of so many images."""
        kwargs: dict[str, Any] = {"width": self.size[0], "height": self.size[1]}
        if self.image:
            kwargs |= {"image": [self.image] * num_images, "strength": self.step_fraction}
        if self.mask:
            kwargs["mask_image"] = [self.mask] * num_images
        if self.controlnets:
            images = [control.image for control in self.controlnets]
            scales = [control.scale for control in self.controlnets]
            kwargs["control_image" if self.image else "image"] = images if len(images) > 1 else images[0]
            kwargs["controlnet_conditioning_scale"] = scales if len(scales) > 1 else scales[0]
        elif self.image and not self.mask:
            del kwargs["width"], kwargs["height"]  # the image has them
        return kwargs

    def postprocess(self, image: Image.Image) -> Image.Image:
        """Outside the mask the image stays as it was, to the bit."""
        return Image.composite(image, self.image, self.mask) if self.image and self.mask else image


def prepare_task(config: TaskConfig, base: Any, size: tuple[int, int] | None, *, model: str) -> GenerationTask:
    """Open and check everything that the configuration names, and find the pipeline for it.

    `size` is (width, height) in pixels; without it, the aspect ratio of the image to start from, or else of the first control
    image, at the model's own area; without either, the model's native resolution. Raises UserError.
    """
    image = None if config.source_image is None else open_image(config.source_image)
    mask = None if image is None or config.mask_image is None else fit_mask(config.mask_image, image)
    _check_in_channels(base, model, inpainting=config.inpaint_image is not None)
    control_images = [(kind, open_control_image(source), scale) for kind, source, scale in config.parse_controls()]
    shape = image or next((image for _, image, _ in control_images), None)
    size = size or (match_aspect_ratio(shape, base) if shape else (native_resolution(base),) * 2)
    check_size(base, *size)
    controls = _load_controls(control_images, base, model, size)
    controlnets = [control for control in controls if control.is_controlnet]
    pipe = to_task_pipeline(
        base, image_to_image=config.init_image is not None, inpainting=mask is not None, controlnets=[c.model for c in controlnets]
    )
    return GenerationTask(
        pipe,
        size,
        config.effective_strength(),
        ImageOps.fit(image, size, Image.Resampling.LANCZOS) if image else None,
        ImageOps.fit(mask, size, Image.Resampling.BILINEAR) if mask else None,
        controlnets,
        [control for control in controls if not control.is_controlnet],
    )


def fit_mask(source: ImageInput, image: Image.Image) -> Image.Image:
    """The mask of an image. One of another aspect ratio, as tools that work at a square size make it, is stretched to the image."""
    name = name_of(source, "mask_image")
    mask = open_mask(source, name)
    if differs_in_shape(mask.size, image.size):
        sizes = f"{mask.width} × {mask.height}, the image {image.width} × {image.height}"
        notify(f"the mask {name} is {sizes}: it is stretched to the image")
        return mask.resize(image.size, Image.Resampling.BILINEAR)
    return mask


def _check_in_channels(base: Any, model: str, *, inpainting: bool) -> None:
    channels = base.unet.config.in_channels
    if channels == 9 and not inpainting:
        raise UserError(f"{model} is an inpainting model; give --inpaint-image IMAGE and --mask-image IMAGE")
    if channels not in (4, 9):
        raise UserError(f"{model} has {channels} input channels; expected a text-to-image model (4) or one for inpainting (9)")


def _load_controls(images: Sequence[tuple[str, Image.Image, float]], base: Any, model: str, size: tuple[int, int]) -> list[Control]:
    """Each model once, however many images it is given; their images at the size of the output."""
    models = {kind: load_control(kind, model, base.unet.device, base.unet.dtype) for kind in dict.fromkeys(kind for kind, _, _ in images)}
    return [Control(models[kind], _fit_control_image(kind, image, size), scale) for kind, image, scale in images]


def _fit_control_image(kind: str, image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """A control image at the size of the output, cropped around its center as the image to start from is."""
    if differs_in_shape(image.size, size):
        notify(f"control {kind}: the image is {image.width} × {image.height}, the output {size[0]} × {size[1]}: its center is used")
    return ImageOps.fit(image, size, Image.Resampling.LANCZOS)


def match_aspect_ratio(image: Image.Image, base: Any) -> tuple[int, int]:
    """(width, height) in pixels with the aspect ratio of an image and the area of the model's native resolution."""
    step, smallest = size_constraints(base)
    shrink = native_resolution(base) / math.sqrt(image.width * image.height)
    width, height = (max(smallest, round(side * shrink / step) * step) for side in image.size)
    return width, height
