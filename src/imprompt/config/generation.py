"""Configuration of `generate` and `personalize`."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from imprompt.config.common import (
    MAX_DENOISING_STEPS,
    MAX_IMAGES,
    MAX_SCALE,
    MAX_SIDE,
    MAX_STEPS,
    UNSET,
    DType,
    Options,
    PipelineConfig,
    ResizeMode,
    Scheduler,
    check_scale,
    expand_home,
    option,
    parse_weighted,
    part,
    shorten,
)
from imprompt.config.methods import PER_SUBJECT_METHODS, PERSONALIZATION_METHODS, TRAINING_FREE_AGGREGATIONS
from imprompt.errors import UserError

Aggregation = Literal["auto", "concat", "average", "max", "average-tokens", "max-tokens", "joint"]


@dataclass(frozen=True)
class ImagePromptConfig(Options):
    """Image prompt."""

    image: tuple[Any, ...] = option(
        (), "reference image, or a folder or pattern (cats/*.png) of images; several show one subject",
        metavar="PATH", alias=("-i",), positional=True, path=True,
    )  # fmt: skip
    scale: float = option(1.0, "λ, the scale of the image prompt: 0 ignores it, 1 is the usual value", ge=-MAX_SCALE, le=MAX_SCALE)
    image_weights: str = option("", "weight of each reference, such as 2,1,1: a weight of 2 is the same as giving the image twice")
    aggregation: Aggregation = option("auto", "how several references are aggregated (default: as the adapter was trained, else concat)")
    face_embeds: str | None = option(
        UNSET,
        "identity embeddings for a FaceID adapter, .npy or .safetensors (default: from the references, extra: faces)",
        metavar="FILE",
        path=True,
    )
    image_mask: Any = option(UNSET, "image that is white where the image prompt applies", metavar="PATH", path=True)
    scale_per_block: str = option("", "style, layout, or BLOCK=λ separated by commas, such as up_blocks=1,mid_block=0.5")
    start_at: float = option(0.0, "start of conditioning as a fraction of denoising", ge=0, le=1)
    end_at: float = option(1.0, "end of conditioning as a fraction of denoising", ge=0, le=1)
    negative_image: Any = option(UNSET, "negative reference image: replaces the unconditional embedding", metavar="PATH", path=True)
    adapter: str | None = option(UNSET, "adapter: a file, a hub file, mini, mini-plus … (default: mini with --model mini)", path=True)
    image_encoder: str | None = option(
        UNSET, "image encoder: a folder or hub id (default: the one the adapter was trained with)", path=True
    )
    resize_mode: ResizeMode = option("crop", "how references that are not square are resized")

    def check(self) -> None:
        if self.start_at > self.end_at:
            raise UserError(f"start_at: expected at most end_at ({self.end_at:g}), received {self.start_at:g}")
        self.parse_weights()
        self.parse_block_scales()

    def parse_weights(self) -> list[float] | None:
        """The weight of each reference, or None where all weigh the same. Raises UserError."""
        try:
            weights = [float(word) for word in self.image_weights.split(",")] if self.image_weights else None
        except ValueError as error:
            raise UserError(
                f"image_weights: expected numbers separated by commas, such as 2,1,1; received {self.image_weights!r}"
            ) from error
        if weights is not None and not all(0 <= weight <= MAX_SCALE for weight in weights):
            raise UserError(f"image_weights: expected numbers of at least 0, and at most {MAX_SCALE:g}; received {self.image_weights}")
        return weights

    def parse_block_scales(self) -> dict[str, float]:
        """Prefix of a layer's name → λ, or empty. Raises UserError."""
        scales: dict[str, float] = {}
        for word in filter(None, (w.strip() for w in self.scale_per_block.split(","))):
            name, _, number = word.partition("=")
            try:
                scales[name] = float(number) if number else 1.0
            except ValueError as error:
                raise UserError(f"scale_per_block: expected BLOCK=λ, such as up_blocks=0.8; received {word!r}") from error
            check_scale(f"scale_per_block: {name}", scales[name])
        return scales

    @property
    def has_reference(self) -> bool:
        """Whether there is anything to condition on."""
        return bool(self.image or self.face_embeds)


@dataclass(frozen=True)
class SamplingConfig(Options):
    """Sampling."""

    num_inference_steps: int = option(30, "denoising steps", ge=1, le=MAX_DENOISING_STEPS, alias=("--steps",))
    guidance_scale: float | None = option(UNSET, "classifier-free guidance scale (default: 3 on mini, 7.5 elsewhere)", ge=0, le=MAX_SCALE)
    scheduler: Scheduler = option("ddim", "noise scheduler")
    seed: int = option(0, "seed of the first image; the next ones count up", ge=0, le=2**63 - 1)
    num_images: int = option(4, "number of images for each prompt", ge=1, le=10_000, alias=("-n",))
    resolution: str | None = option(UNSET, "side in pixels, or WIDTHxHEIGHT (default: the model's native resolution)")
    dtype: DType = option("auto", "data type of the pipeline")

    def check(self) -> None:
        if self.seed + self.num_images > 2**63:
            raise UserError(f"seed: expected less than 2⁶³, received {self.seed}")
        self.parse_resolution()

    def parse_resolution(self) -> tuple[int, int] | None:
        """(width, height) in pixels, or None for the model's native resolution. Raises UserError."""
        if self.resolution is None:
            return None
        sides = self.resolution.lower().split("x")
        if len(sides) > 2 or not all(side.strip().isdecimal() and len(side) < 20 and int(side) > 0 for side in sides):
            raise UserError(f"resolution: expected a side in pixels or WIDTHxHEIGHT, received {shorten(self.resolution)}")
        if any(int(side) > MAX_SIDE for side in sides):
            raise UserError(f"resolution: expected at most {MAX_SIDE} pixels a side, received {self.resolution}")
        return int(sides[0]), int(sides[-1])


@dataclass(frozen=True)
class TaskConfig(Options):
    """Image-to-image, inpainting and structure control."""

    init_image: Any = option(UNSET, "image-to-image: the image to start from", metavar="PATH", path=True)
    strength: float | None = option(UNSET, "how much of the image is replaced by noise (default: 0.6; 1 for inpainting)", ge=0, le=1)
    inpaint_image: Any = option(UNSET, "inpainting: the image to repaint", metavar="PATH", path=True)
    mask_image: Any = option(UNSET, "inpainting: white where it is repainted", metavar="PATH", path=True)
    control: tuple[Any, ...] = option(
        (), "structure control: KIND=IMAGE or KIND=IMAGE:SCALE; edges or silhouette on mini, canny, depth, pose …, a folder or hub id",
        metavar="CONTROL",
    )  # fmt: skip
    lora: tuple[str, ...] = option((), "LoRA of the base model: a file, folder or hub id, with :SCALE after it", metavar="LORA", path=True)

    def check(self) -> None:
        if self.init_image is not UNSET and self.inpaint_image is not UNSET:
            raise UserError("init_image and inpaint_image: expected one of them; both name the image to start from")
        if (self.inpaint_image is UNSET) != (self.mask_image is UNSET):
            names = ("inpaint_image", "mask_image")
            missing, present = names if self.inpaint_image is UNSET else names[::-1]
            raise UserError(f"{missing}: {present} needs it; give both --inpaint-image IMAGE and --mask-image IMAGE")
        if self.strength is not None and self.source_image is UNSET:
            raise UserError("strength: has an effect with an image to start from only; give --init-image or --inpaint-image")
        self.parse_controls()
        self.parse_loras()

    @property
    def source_image(self) -> Any:
        """The image that sampling starts from."""
        return self.inpaint_image if self.init_image is UNSET else self.init_image

    def effective_strength(self) -> float:
        """The share of the denoising steps that are taken: 1 without an image to start from."""
        if self.strength is not None:
            return self.strength
        return 1.0 if self.init_image is UNSET else 0.6

    def parse_controls(self) -> list[tuple[str, Any, float]]:
        """Kind, image and conditioning scale of each structure control. Raises UserError."""
        return [_parse_control(one) for one in self.control]

    def parse_loras(self) -> list[tuple[str, float]]:
        """File, folder or hub id, and scale of each LoRA. Raises UserError."""
        parsed = [parse_weighted(word) for word in self.lora]
        return [(source, check_scale(f"lora: {source}", scale)) for source, scale in parsed]


def _parse_control(control: Any) -> tuple[str, Any, float]:
    """KIND=IMAGE or KIND=IMAGE:SCALE; from Python also a kind, an image of any type and possibly its scale."""
    if isinstance(control, tuple) and 2 <= len(control) <= 3 and isinstance(control[0], str):
        kind, image, scale = control if len(control) == 3 else (*control, 1.0)
    else:
        kind, _, rest = control.partition("=") if isinstance(control, str) else ("", "", "")
        if not (kind and rest):
            raise UserError(f"control: expected KIND=IMAGE or KIND=IMAGE:SCALE, such as canny=edges.png:0.8; received {shorten(control)}")
        image, scale = parse_weighted(rest)
    return expand_home(kind), expand_home(image), check_scale(f"control: {kind}", scale)


@dataclass(frozen=True)
class OutputConfig(Options):
    """Output."""

    output_dir: str = option("imprompt-out", "folder for images and contact sheet", alias=("-o",), path=True)
    metadata: Literal["full", "no-paths", "none"] = option(
        "full", "options in each image's metadata, with which --config IMAGE repeats it: all, without local folders, or none"
    )


@dataclass(frozen=True)
class GenerateConfig(Options):
    """Generate images from reference images."""

    reference: ImagePromptConfig = part(ImagePromptConfig)
    prompt: str = option("", "text prompt", alias=("-p",))
    negative_prompt: str = option("", "negative text prompt")
    image_prompt: tuple[str, ...] = option(
        (), "a further image prompt: image=b.png,scale=0.5,… with any option of an image prompt", metavar="SPEC"
    )
    save_embeds: str | None = option(
        UNSET, "save the encoded image prompt to this .safetensors file; --image reads it", metavar="FILE", path=True
    )
    sampling: SamplingConfig = part(SamplingConfig)
    task: TaskConfig = part(TaskConfig)
    pipeline: PipelineConfig = part(PipelineConfig)
    output: OutputConfig = part(OutputConfig)

    def check(self) -> None:
        steps = self.sampling.num_inference_steps
        strength = self.task.effective_strength()
        if strength * steps < 1:
            raise UserError(f"strength: {strength:g} of {steps} steps is less than one; expected at least {1 / steps:.2g}")
        self.parse_image_prompts()
        if self.save_embeds and not self.save_embeds.endswith(".safetensors"):
            raise UserError(f"save_embeds: an image prompt is saved to a .safetensors file, received {self.save_embeds}")

    def find_unused(self) -> Iterator[str]:
        if not self.reference.has_reference and not self.reference.adapter:
            others = [name for name in _PROMPT_OPTIONS if name not in ("image", "adapter")]
            yield from (f"{name}: has no effect without a reference; give --image" for name in self.given(*others, "save_embeds"))

    def parse_image_prompts(self) -> list[ImagePromptConfig]:
        """Every image prompt that has a reference, the main one first. Raises UserError."""
        every = [self.reference, *(_parse_image_prompt(word) for word in self.image_prompt)]
        return [one for one in every if one.has_reference]


_PROMPT_OPTIONS = tuple(ImagePromptConfig().to_options())


def _parse_image_prompt(spec: str) -> ImagePromptConfig:
    """image=a.png,image=b.png,scale=0.5. A comma that no option follows belongs to the value before it."""
    values: dict[str, Any] = {}
    for word in re.split(r",(?=[a-z_]+=)", spec):
        name, sign, value = word.partition("=")
        if not sign or name not in _PROMPT_OPTIONS:
            usual = ", ".join(f"{n}=…" for n in _PROMPT_OPTIONS[:4])
            raise UserError(f"image_prompt: expected {usual} … separated by commas; received {word!r}")
        if name == "image":
            values["image"] = (*values.get("image", ()), value)
        elif name in ("scale", "start_at", "end_at"):
            try:
                values[name] = float(value)
            except ValueError as error:
                raise UserError(f"image_prompt: {name}: expected a number, received {value!r}") from error
        else:
            values[name] = value
    if not values.get("image"):
        raise UserError(f"image_prompt: expected at least one image=PATH; received {spec!r}")
    return ImagePromptConfig.from_options(**values)


@dataclass(frozen=True)
class PersonalizeConfig(Options):
    """Generate a person or a thing again, from several images of it."""

    data: str = option("", "folder of images of one subject, or a list of them", positional=True, path=True)
    prompt: tuple[str, ...] = option((), "text prompt, * stands for the subject; repeat it for several", metavar="TEXT", alias=("-p",))
    negative_prompt: str = option("", "negative text prompt")
    method: str = option("average-tokens", f"one of {', '.join(PERSONALIZATION_METHODS)}; the last three fine-tune first")
    class_noun: str = option("", "what the subject is: cat, person; required by the methods that fine-tune")
    adapter: str | None = option(UNSET, "adapter: a file, mini … (default: the embedded one that suits the method, on mini)", path=True)
    image_encoder: str | None = option(
        UNSET, "image encoder: a folder or hub id (default: the one the adapter was trained with)", path=True
    )
    scale: float = option(1.0, "λ, the scale of the image prompt: 0 ignores it, 1 is the usual value", ge=-MAX_SCALE, le=MAX_SCALE)
    resize_mode: ResizeMode = option("crop", "how images that are not square are resized")
    finetune_steps: int | None = option(
        UNSET, "optimizer steps of a method that fine-tunes (default: the method's own)", ge=1, le=MAX_STEPS
    )
    num_class_images: int | None = option(
        UNSET,
        "class images for prior preservation (DreamBooth), generated by the base model (default: 200, 16 on mini)",
        ge=0,
        le=MAX_IMAGES,
    )
    sampling: SamplingConfig = part(SamplingConfig)
    pipeline: PipelineConfig = part(PipelineConfig)
    output: OutputConfig = part(OutputConfig)

    def check(self) -> None:
        if self.method not in PERSONALIZATION_METHODS:
            raise UserError(f"method: expected one of {', '.join(PERSONALIZATION_METHODS)}; received {self.method!r}")
        if not self.data:
            raise UserError("data: expected a folder of images of one subject, received nothing")
        if self.finetunes and not self.class_noun:
            raise UserError(f"class_noun: {self.method} needs to know what the subject is, such as cat or person; received nothing")
        if not self.class_noun and any("*" in text for text in self.prompt):
            raise UserError("class_noun: * in a prompt stands for the subject; name its class, such as cat or person")
        self._check_effective()
        if self.method == "inversion" and self.scale != 1:
            raise UserError("scale: has no effect with Textual Inversion; remove it")

    def _check_effective(self) -> None:
        """Options that have no effect with the method are refused."""
        of_adapter = {"adapter": self.adapter, "image_encoder": self.image_encoder, "resize_mode": self.resize_mode != "crop" or UNSET}
        of_finetuning = {"finetune_steps": self.finetune_steps, "num_class_images": self.num_class_images}
        what = "fine-tunes the base model" if self.finetunes else "needs no fine-tuning"
        for name, value in (of_adapter if self.finetunes else of_finetuning).items():
            if value is not UNSET:
                raise UserError(f"{name}: has no effect with {self.method}, which {what}; remove it")

    def find_unused(self) -> Iterator[str]:
        if self.class_noun and self.prompt and not self.finetunes and not any("*" in text for text in self.prompt):
            yield "class_noun: no prompt has a * that stands for the subject, so it has no effect"
        if self.method == "inversion" and self.given("num_class_images"):
            yield "num_class_images: has no effect with Textual Inversion"

    @property
    def finetunes(self) -> bool:
        """Whether the method fine-tunes on the subject first."""
        return self.method in PER_SUBJECT_METHODS

    @property
    def finetune_dir(self) -> str:
        """Where a method that fine-tunes keeps its run."""
        return f"{self.output.output_dir}/{self.method}"

    def format_prompts(self) -> tuple[str, ...]:
        """Each prompt, with the class noun in the place of *; without any, a photo of the subject."""
        prompts = self.prompt or (f"a photo of a {self.class_noun}" if self.class_noun else "",)
        return tuple(text if self.finetunes else text.replace("*", self.class_noun) for text in prompts)


assert set(TRAINING_FREE_AGGREGATIONS) | {"auto"} == set(Aggregation.__args__)  # type: ignore[attr-defined]
