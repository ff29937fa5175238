"""Diffusers pipelines with image prompts by other authors: each is one row of EXTERNAL_PIPELINES, generated under our protocol."""

import inspect
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import diffusers
import numpy as np
import torch
import torch.nn.functional as F
from diffusers import ControlNetModel, DiffusionPipeline, pipelines
from diffusers.pipelines import deprecated
from PIL import Image, ImageOps
from torch import Tensor, nn

from imprompt.errors import UserError, summarize_error
from imprompt.evaluation.samples import EvalSample, SamplingParams
from imprompt.methods.shuffle import FIELD_SIZE, warp_by_field
from imprompt.models import hub
from imprompt.models.base_pipelines import SINGLE_FILE_SUFFIXES, check_model_index
from imprompt.utils.images import open_image

Args = tuple[object, ...]
SIZE_MULTIPLE = 8  # pixels; all of these pipelines need multiples of it


class GenerationRequest(NamedTuple):
    """What is generated in one call: as many references as prompts and generators."""

    references: list[Image.Image]
    prompts: list[str]
    generators: list[torch.Generator]
    params: SamplingParams

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels, rounded up to what the pipelines can generate."""
        width, height = self.params.size
        return -(-width // SIZE_MULTIPLE) * SIZE_MULTIPLE, -(-height // SIZE_MULTIPLE) * SIZE_MULTIPLE

    @property
    def common_kwargs(self) -> dict[str, object]:
        """The arguments that have the same names in most pipelines."""
        (width, height), steps, guidance_scale = self.size, self.params.num_inference_steps, self.params.guidance_scale
        return {"num_inference_steps": steps, "guidance_scale": guidance_scale, "width": width, "height": height}


# ---------------------------------------------------------------------------------------- the arguments of each pipeline's call


def image_variation_kwargs(pipe: DiffusionPipeline, request: GenerationRequest) -> dict[str, object]:
    """References are squashed to a square without antialiasing, as in training and as the model card asks; diffusers' processor smooths."""
    side, processor = pipe.image_encoder.config.image_size, pipe.feature_extractor
    mean, std = (torch.tensor(values)[:, None, None] for values in (processor.image_mean, processor.image_std))
    pixels = [F.interpolate(_to_tensor(image), (side, side), mode="bicubic") for image in request.references]
    return {"image": (torch.cat(pixels) - mean) / std, **request.common_kwargs}


def stable_unclip_kwargs(pipe: DiffusionPipeline, request: GenerationRequest) -> dict[str, object]:
    """The prompt as usual; the image embedding, without noise, is added to the time embedding."""
    return {"image": request.references, "prompt": request.prompts, **request.common_kwargs}


def karlo_kwargs(pipe: DiffusionPipeline, request: GenerationRequest) -> dict[str, object]:
    """Decoder and super-resolution have one fixed size and are not conditioned on text."""
    steps, guidance_scale = request.params.num_inference_steps, request.params.guidance_scale
    if steps < 2:
        raise UserError(f"num_inference_steps: expected at least 2 with {type(pipe).__name__}, received {steps}")
    return {"image": request.references, "decoder_num_inference_steps": steps, "decoder_guidance_scale": guidance_scale}


def kandinsky_22_kwargs(prior: DiffusionPipeline, pipe: DiffusionPipeline, request: GenerationRequest) -> dict[str, object]:
    """The prior's `interpolate` of one image at weight 1 is that image's embedding, so its diffusion need not run."""
    pixels = prior.image_processor(request.references, return_tensors="pt").pixel_values
    image_embeds = prior.image_encoder(pixels.to(prior.device, prior.image_encoder.dtype)).image_embeds
    return {"image_embeds": image_embeds, "negative_image_embeds": prior.get_zero_embed(len(pixels)), **request.common_kwargs}


def kandinsky_kwargs(prior: DiffusionPipeline, pipe: DiffusionPipeline, request: GenerationRequest) -> dict[str, object]:
    """As Kandinsky 2.2, but the decoder is also conditioned on the prompt."""
    return {"prompt": request.prompts, **kandinsky_22_kwargs(prior, pipe, request)}


def versatile_kwargs(pipe: DiffusionPipeline, request: GenerationRequest) -> dict[str, object]:
    """The unconditional image is gray; diffusers' default has values that current image processors scale down to black."""
    gray = [Image.new("RGB", image.size, (128, 128, 128)) for image in request.references]
    return {"image": request.references, "negative_prompt": gray, **request.common_kwargs}


def blip_kwargs(pipe: DiffusionPipeline, request: GenerationRequest) -> dict[str, object]:
    """Empty categories for source and target subject: the evaluation has images and prompts only."""
    empty = [""] * len(request.prompts)
    subjects = {"source_subject_category": empty, "target_subject_category": empty}
    return {"prompt": request.prompts, "reference_image": request.references, **subjects, **request.common_kwargs}


def shuffle_kwargs(pipe: DiffusionPipeline, request: GenerationRequest) -> dict[str, object]:
    """The control image is the reference, warped with the first numbers of the image's generator."""
    images = [_to_tensor(ImageOps.fit(image, request.size)) for image in request.references]
    hints = [shuffle_content(image, generator) for image, generator in zip(images, request.generators, strict=True)]
    scale = request.params.scale
    return {"prompt": request.prompts, "image": torch.cat(hints), "controlnet_conditioning_scale": scale, **request.common_kwargs}


def shuffle_content(image: Tensor, generator: torch.Generator) -> Tensor:
    """Content shuffle as in the training of the ControlNet. (1, 3, height, width), 0 … 1."""
    return warp_by_field(image, torch.rand(1, 2, FIELD_SIZE, FIELD_SIZE, generator=generator))


def _to_tensor(image: Image.Image) -> Tensor:
    """(1, 3, height, width), 0 … 1."""
    return torch.from_numpy(np.array(image, dtype=np.float32) / 255).permute(2, 0, 1)[None]


# ------------------------------------------------------------------------------------------- loading from one location or two


def load_single(classes: list[str], locations: list[str], dtype: torch.dtype) -> list[DiffusionPipeline]:
    """The class that the index names."""
    return [_load_pretrained(classes[0], locations[0], dtype)]


def load_image_variation(classes: list[str], locations: list[str], dtype: torch.dtype) -> list[DiffusionPipeline]:
    """The image variation pipeline of a Versatile Diffusion, which also has others."""
    return [_load_pretrained("VersatileDiffusionImageVariationPipeline", locations[0], dtype)]


def load_prior_and_decoder(classes: list[str], locations: list[str], dtype: torch.dtype) -> list[DiffusionPipeline]:
    """The decoder, and of the prior its image encoder: the rest maps text to embeddings, which is not needed here."""
    unused = dict.fromkeys(("prior", "text_encoder", "tokenizer", "scheduler"))
    return [_load_pretrained(classes[0], locations[0], dtype, **unused), _load_pretrained(classes[1], locations[1], dtype)]


def load_with_controlnet(classes: list[str], locations: list[str], dtype: torch.dtype) -> list[DiffusionPipeline]:
    """A text-to-image model with a ControlNet. Raises UserError for a ControlNet that keeps the layout of the control image."""
    controlnet = _load_pretrained(classes[1], locations[1], dtype)
    if not controlnet.config.global_pool_conditions:
        raise UserError(
            f"{locations[1]} is a ControlNet that keeps the layout of its control image; expected one with global_pool_conditions, "
            "such as lllyasviel/control_v11e_sd15_shuffle"
        )
    return [_load_pretrained("StableDiffusionControlNetPipeline", locations[0], dtype, controlnet=controlnet)]


def load_blip_compat(classes: list[str], locations: list[str], dtype: torch.dtype) -> list[DiffusionPipeline]:
    """BLIP-Diffusion with hooks for transformers 5: diffusers calls its modules with the arguments of transformers 4.

    The causal mask of the text encoder had an argument of its own, which is ignored now. The attention of the Q-Former took a
    head mask as third argument and returned a tuple; two helper functions for masks were removed.
    """

    def pass_causal_mask(encoder: nn.Module, args: Args, kwargs: dict[str, object]) -> tuple[Args, dict[str, object]]:
        return (), {"inputs_embeds": kwargs["inputs_embeds"], "attention_mask": kwargs["causal_attention_mask"]}

    def drop_head_mask(attention: nn.Module, args: Args, kwargs: dict[str, object]) -> tuple[Args, dict[str, object]]:
        names = ("hidden_states", "attention_mask", "head_mask", "encoder_hidden_states", "encoder_attention_mask")
        return (), {name: value for name, value in zip(names, args, strict=False) if name != "head_mask"}

    def return_tuple(attention: nn.Module, args: Args, output: object) -> object:
        return output if isinstance(output, tuple) else (output, None)

    [pipe] = load_single(classes, locations, dtype)
    pipe.text_encoder.text_model.encoder.register_forward_pre_hook(pass_causal_mask, with_kwargs=True)
    pipe.qformer.get_head_mask = pipe.qformer.invert_attention_mask = lambda *_: None  # no head and no patch is masked
    for layer in pipe.qformer.encoder.layer:
        for attention in [layer.attention, *([layer.crossattention] if layer.has_cross_attention else [])]:
            attention.register_forward_pre_hook(drop_head_mask, with_kwargs=True)
            attention.register_forward_hook(return_tuple)
    return [pipe]


@dataclass(frozen=True)
class PipelineSpec:
    """How a pipeline is called and loaded, and which of its modules were trained for image prompts."""

    build_kwargs: Callable[..., dict[str, object]]
    trained_modules: tuple[str, ...] = ("unet",)
    load: Callable[[list[str], list[str], torch.dtype], list[DiffusionPipeline]] = load_single


# By the class names of a source, joined as the source is.
EXTERNAL_PIPELINES = {
    "StableDiffusionImageVariationPipeline": PipelineSpec(image_variation_kwargs),
    "StableUnCLIPImg2ImgPipeline": PipelineSpec(stable_unclip_kwargs),
    "UnCLIPImageVariationPipeline": PipelineSpec(karlo_kwargs, ("decoder", "text_proj")),
    "KandinskyPriorPipeline+KandinskyPipeline": PipelineSpec(kandinsky_kwargs, load=load_prior_and_decoder),
    "KandinskyV22PriorPipeline+KandinskyV22Pipeline": PipelineSpec(kandinsky_22_kwargs, load=load_prior_and_decoder),
    "VersatileDiffusionImageVariationPipeline": PipelineSpec(versatile_kwargs, ("image_unet",)),
    "VersatileDiffusionPipeline": PipelineSpec(versatile_kwargs, ("image_unet",), load_image_variation),
    "BlipDiffusionPipeline": PipelineSpec(blip_kwargs, ("unet", "text_encoder", "qformer"), load_blip_compat),
    "StableDiffusionPipeline+ControlNetModel": PipelineSpec(shuffle_kwargs, ("controlnet",), load_with_controlnet),
}


# ------------------------------------------------------------------------------------------------------------------ the system


@dataclass(frozen=True)
class ExternalPipeline:
    """A diffusers pipeline as a system of an evaluation."""

    name: str
    trainable_params: int
    spec: PipelineSpec = field(repr=False)
    pipes: tuple[DiffusionPipeline, ...] = field(repr=False)  # the last one generates the images

    @torch.no_grad()
    def generate(
        self, samples: Sequence[EvalSample], prompts: Sequence[str], seeds: Sequence[int], params: SamplingParams
    ) -> list[Image.Image]:
        """One image for each sample's first reference, all in one batch; resized to `params.size` where the pipeline has a fixed size.

        Every image has a generator of its own, so it does not depend on the others of the batch. Raises UserError for
        parameters that the pipeline rejects.
        """
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        request = GenerationRequest([open_image(sample.references[0]) for sample in samples], list(prompts), generators, params)
        kwargs = self.spec.build_kwargs(*self.pipes, request)
        try:
            with _silence_third_party_warnings():
                images = self.pipes[-1](**kwargs, generator=generators).images
        except (NotImplementedError, TypeError, ValueError) as error:  # a dtype that the device does not support, too many steps
            raise UserError(
                f"{self.name} cannot generate with these settings ({summarize_error(error)}); try float32, or fewer steps"
            ) from error
        return [image if image.size == params.size else image.resize(params.size, Image.Resampling.LANCZOS) for image in images]


def is_external(source: str) -> bool:
    """Whether a source can only be pipelines: folders with an index, or hub ids. Does not access the hub; `load_external` checks them."""
    return all(_has_index(location) or _is_hub_id(location) for location in _locations(source))


def load_external(source: str, device: str, dtype: torch.dtype) -> ExternalPipeline:
    """A system from a hub id or a folder in diffusers' form; from two, joined by +, where EXTERNAL_PIPELINES has two as well.

    Raises UserError for classes that are not in EXTERNAL_PIPELINES, and for modules that are missing, damaged or of another class.
    """
    locations, class_names = _locations(source), _class_names(source)
    if class_names not in EXTERNAL_PIPELINES:
        raise UserError(f"{source} is a {class_names}; expected one of {', '.join(EXTERNAL_PIPELINES)}")
    spec = EXTERNAL_PIPELINES[class_names]
    pipes = spec.load(class_names.split("+"), locations, dtype)
    for pipe in pipes:
        pipe.set_progress_bar_config(disable=True)
        pipe.to(device)
    trained = [item for module in spec.trained_modules for item in getattr(pipes[-1], module).named_parameters()]
    num_params = sum(p.numel() for name, p in trained if not name.startswith("visual_encoder."))  # frozen, though part of a Q-Former
    return ExternalPipeline("+".join(Path(location).name for location in locations), num_params, spec, tuple(pipes))


def _locations(source: str) -> list[str]:
    return [source] if os.path.isdir(source) else source.split("+")


def _class_names(source: str) -> str:
    """The classes that the indices of a source name. Raises UserError where one has no index."""
    return "+".join(_class_name_at(location) for location in _locations(source))


def _has_index(location: str) -> bool:
    return any(os.path.isfile(os.path.join(location, name)) for name in ("model_index.json", "config.json"))


def _is_hub_id(location: str) -> bool:
    return not os.path.isdir(location) and hub.is_hub_id(location) and not location.endswith(SINGLE_FILE_SUFFIXES)


def _class_name_at(location: str) -> str:
    expected = f"no pipeline at {location}: expected a folder in diffusers' form, or a hub id; of an adapter, its file"
    if not os.path.isdir(location) and not _is_hub_id(location):
        raise UserError(expected)
    hub.prepare(location)
    errors = []
    for cls in (DiffusionPipeline, ControlNetModel):  # model_index.json, config.json
        try:
            with _silence_third_party_warnings():
                return str(cls.load_config(location)["_class_name"])
        except Exception as error:
            errors.append(hub.explain_failure(error))
    raise UserError(f"{expected} ({errors[0]})")


def _load_pretrained(class_name: str, location: str, dtype: torch.dtype, **modules: object) -> DiffusionPipeline:
    """A pipeline or a model of this class, with these modules in place of its own. Raises UserError where it does not load."""
    cls = getattr(diffusers, class_name)
    if "requires_safety_checker" in inspect.signature(cls.__init__).parameters:
        modules |= {"safety_checker": None, "requires_safety_checker": False}
    try:
        if issubclass(cls, DiffusionPipeline):
            check_model_index(location)
        with _silence_third_party_warnings(), _deprecated_modules():
            return cls.from_pretrained(location, torch_dtype=dtype, **modules)
    except UserError:
        raise
    except Exception as error:  # for missing and damaged files the libraries raise nearly anything
        raise UserError(f"the {class_name} at {location} cannot be loaded; download it again ({summarize_error(error)})") from error


@contextmanager
def _deprecated_modules() -> Iterator[None]:
    """Make modules available under the names that published indices use: diffusers has moved them since, and does not find them."""
    names = [name for name in ("unclip", "blip_diffusion") if not hasattr(pipelines, name)]
    for name in names:
        setattr(pipelines, name, getattr(deprecated, name))
    try:
        yield
    finally:
        for name in names:
            delattr(pipelines, name)


@contextmanager
def _silence_third_party_warnings() -> Iterator[None]:
    """Hide deprecation warnings of diffusers, transformers and the hub about each other."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch_dtype is called dtype in newer versions, but not in older ones
        warnings.filterwarnings("ignore", "The `local_dir_use_symlinks` argument is deprecated", UserWarning)
        yield
