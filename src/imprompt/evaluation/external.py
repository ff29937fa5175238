"""Other people's methods, as diffusers draws with them: one line of a table for each pipeline."""

import inspect
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import numpy as np
import torch
import torch.nn.functional as F
from diffusers import ControlNetModel, DiffusionPipeline, pipelines
from diffusers.pipelines import deprecated
from PIL import Image, ImageOps
from torch import Tensor, nn

from imprompt.errors import UserError, brief
from imprompt.evaluation.system import Case, How
from imprompt.methods.shuffle import COARSE, moved
from imprompt.models import hub
from imprompt.models.base_pipelines import FILES
from imprompt.utils.images import to_rgb

MULTIPLE = 8  # pixels; every one of these pipelines wants a size in whole ones


class Asked(NamedTuple):
    """What is to be drawn at once: as many references as texts and generators."""

    references: list[Image.Image]
    texts: list[str]
    generators: list[torch.Generator]
    how: How

    def usual(self) -> dict[str, Any]:
        """The arguments that most pipelines name alike."""
        width, height = (-(-n // MULTIPLE) * MULTIPLE for n in self.how.size)
        return {"num_inference_steps": self.how.steps, "guidance_scale": self.how.guidance, "width": width, "height": height}


# ------------------------------------------------------------------------------------- the words of each pipeline's call


def image_variation(pipe: Any, asked: Asked) -> dict[str, Any]:
    """The model was trained on references squashed without antialiasing, and its card asks for the same; diffusers' processor smooths."""
    side, processor = pipe.image_encoder.config.image_size, pipe.feature_extractor
    mean, deviation = (torch.tensor(values)[:, None, None] for values in (processor.image_mean, processor.image_std))
    pixels = [F.interpolate(_pixels(picture), (side, side), mode="bicubic") for picture in asked.references]
    return {"image": (torch.cat(pixels) - mean) / deviation, **asked.usual()}


def stable_unclip(pipe: Any, asked: Asked) -> dict[str, Any]:
    """The text as usual, the picture in the time embedding, without noise."""
    return {"image": asked.references, "prompt": asked.texts, **asked.usual()}


def karlo(pipe: Any, asked: Asked) -> dict[str, Any]:
    """Decoder and super-resolution draw one size only, and hear no text."""
    steps, guidance = asked.how.steps, asked.how.guidance
    if steps < 2:
        raise UserError(f"steps: expected at least 2 with {type(pipe).__name__}, received {steps}")
    return {"image": asked.references, "decoder_num_inference_steps": steps, "decoder_guidance_scale": guidance}


def kandinsky_22(prior: Any, pipe: Any, asked: Asked) -> dict[str, Any]:
    """The prior's `interpolate` of one picture at weight 1 is that picture's embedding; so its diffusion need not run."""
    pixels = prior.image_processor(asked.references, return_tensors="pt").pixel_values
    embedded = prior.image_encoder(pixels.to(prior.device, prior.image_encoder.dtype)).image_embeds
    return {"image_embeds": embedded, "negative_image_embeds": prior.get_zero_embed(len(pixels)), **asked.usual()}


def kandinsky(prior: Any, pipe: Any, asked: Asked) -> dict[str, Any]:
    """As 2.2, and the decoder hears the text too."""
    return {"prompt": asked.texts, **kandinsky_22(prior, pipe, asked)}


def versatile(pipe: Any, asked: Asked) -> dict[str, Any]:
    """Unconditional is a grey picture; diffusers' own has values that today's processors scale down to black."""
    grey = [Image.new("RGB", picture.size, (128, 128, 128)) for picture in asked.references]
    return {"image": asked.references, "negative_prompt": grey, **asked.usual()}


def blip(pipe: Any, asked: Asked) -> dict[str, Any]:
    """No word for what the reference shows or for what is to be drawn: a protocol of pictures and texts has none."""
    none = [""] * len(asked.texts)
    subjects = {"source_subject_category": none, "target_subject_category": none}
    return {"prompt": asked.texts, "reference_image": asked.references, **subjects, **asked.usual()}


def shuffle(pipe: Any, asked: Asked) -> dict[str, Any]:
    """The hint is the reference, warped with the first numbers of the picture's generator."""
    usual = asked.usual()
    fitted = [ImageOps.fit(picture, (usual["width"], usual["height"])) for picture in asked.references]
    hints = [shuffled(_pixels(picture), generator) for picture, generator in zip(fitted, asked.generators, strict=True)]
    return {"prompt": asked.texts, "image": torch.cat(hints), "controlnet_conditioning_scale": asked.how.scale, **usual}


def shuffled(picture: Tensor, generator: torch.Generator) -> Tensor:
    """Content shuffle, as the ControlNet was trained on. (1, 3, height, width)"""
    return moved(picture, torch.rand(1, 2, COARSE, COARSE, generator=generator))


def _pixels(picture: Image.Image) -> Tensor:
    """(1, 3, height, width), 0 to 1."""
    return torch.from_numpy(np.array(picture, dtype=np.float32) / 255).permute(2, 0, 1)[None]


# ---------------------------------------------------------------------------------------------- loading from one place or two


def alone(classes: list[str], places: list[str], dtype: torch.dtype) -> list[Any]:
    """The class that the index names."""
    return [_loaded(classes[0], places[0], dtype)]


def images_only(classes: list[str], places: list[str], dtype: torch.dtype) -> list[Any]:
    """Of a Versatile Diffusion that draws after texts too, the half that draws after pictures."""
    return [_loaded("VersatileDiffusionImageVariationPipeline", places[0], dtype)]


def prior_and_decoder(classes: list[str], places: list[str], dtype: torch.dtype) -> list[Any]:
    """Of the prior, its image encoder: the rest turns texts into embeddings, which nobody asks for here."""
    unused = dict.fromkeys(("prior", "text_encoder", "tokenizer", "scheduler"))
    return [_loaded(classes[0], places[0], dtype, **unused), _loaded(classes[1], places[1], dtype)]


def with_controlnet(classes: list[str], places: list[str], dtype: torch.dtype) -> list[Any]:
    """A text-to-image model and the ControlNet beside it. Raises UserError for a ControlNet that copies the hint's layout."""
    net = _loaded(classes[1], places[1], dtype)
    if not net.config.global_pool_conditions:
        raise UserError(
            f"{places[1]} is a ControlNet for the hint's layout; expected one with global_pool_conditions, "
            "such as lllyasviel/control_v11e_sd15_shuffle"
        )
    return [_loaded("StableDiffusionControlNetPipeline", places[0], dtype, controlnet=net)]


def mended_blip(classes: list[str], places: list[str], dtype: torch.dtype) -> list[Any]:
    """diffusers' BLIP-Diffusion calls its parts as transformers 4 had them; here those of transformers 5 are taught to understand.

    The text encoder's causal mask came under a name of its own, which is ignored now. The Q-Former's attention took a mask of
    heads in third place and answered with a tuple; two helpers for masks are gone.
    """

    def causal(encoder: nn.Module, args: Any, call: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return (), {"inputs_embeds": call["inputs_embeds"], "attention_mask": call["causal_attention_mask"]}

    def by_name(attention: nn.Module, args: Any, call: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        names = ("hidden_states", "attention_mask", "head_mask", "encoder_hidden_states", "encoder_attention_mask")
        return (), {name: value for name, value in zip(names, args, strict=False) if name != "head_mask"}

    def paired(attention: nn.Module, args: Any, output: Any) -> Any:
        return output if isinstance(output, tuple) else (output, None)

    [pipe] = alone(classes, places, dtype)
    pipe.text_encoder.text_model.encoder.register_forward_pre_hook(causal, with_kwargs=True)
    pipe.qformer.get_head_mask = pipe.qformer.invert_attention_mask = lambda *_: None  # no head and no patch is hidden
    for layer in pipe.qformer.encoder.layer:
        for attention in [layer.attention, *([layer.crossattention] if layer.has_cross_attention else [])]:
            attention.register_forward_pre_hook(by_name, with_kwargs=True)
            attention.register_forward_hook(paired)
    return [pipe]


@dataclass(frozen=True)
class Kind:
    """How a pipeline is called and loaded, and its parts that were trained to hear a picture."""

    words: Callable[..., dict[str, Any]]
    trained: tuple[str, ...] = ("unet",)
    load: Callable[[list[str], list[str], torch.dtype], list[Any]] = alone


# By the classes of a source, written as the source is.
KINDS = {
    "StableDiffusionImageVariationPipeline": Kind(image_variation),
    "StableUnCLIPImg2ImgPipeline": Kind(stable_unclip),
    "UnCLIPImageVariationPipeline": Kind(karlo, ("decoder", "text_proj")),
    "KandinskyPriorPipeline+KandinskyPipeline": Kind(kandinsky, load=prior_and_decoder),
    "KandinskyV22PriorPipeline+KandinskyV22Pipeline": Kind(kandinsky_22, load=prior_and_decoder),
    "VersatileDiffusionImageVariationPipeline": Kind(versatile, ("image_unet",)),
    "VersatileDiffusionPipeline": Kind(versatile, ("image_unet",), images_only),
    "BlipDiffusionPipeline": Kind(blip, ("unet", "text_encoder", "qformer"), mended_blip),
    "StableDiffusionPipeline+ControlNetModel": Kind(shuffle, ("controlnet",), with_controlnet),
}


# ------------------------------------------------------------------------------------------------------------ the contender


@dataclass(frozen=True)
class Outside:
    """A diffusers pipeline under our protocol."""

    name: str
    trainable: int
    kind: Kind = field(repr=False)
    pipes: tuple[Any, ...] = field(repr=False)  # the last one draws

    @torch.no_grad()
    def draw(self, cases: Sequence[Case], texts: Sequence[str], seeds: Sequence[int], how: How) -> list[Image.Image]:
        """One picture for each case's first reference, all at once; in `how.size`, whatever size the pipeline draws.

        A picture's randomness is its own, so it does not matter which pictures are drawn together. Raises UserError for
        settings that the pipeline refuses.
        """
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        asked = Asked([to_rgb(case.references[0]) for case in cases], list(texts), generators, how)
        words = self.kind.words(*self.pipes, asked)
        try:
            with _quiet():
                drawn = self.pipes[-1](**words, generator=generators).images
        except (NotImplementedError, TypeError, ValueError) as error:  # a type that a device lacks, more steps than there are
            raise UserError(f"{self.name} does not draw with these settings ({brief(error)}); try float32, or fewer steps") from error
        return [picture if picture.size == how.size else picture.resize(how.size, Image.Resampling.LANCZOS) for picture in drawn]


def is_outside(source: str) -> bool:
    """Whether a source can be nothing but pipelines: folders with an index, or hub ids. Asks nobody; `load_outside` says what is wrong."""
    return all(_indexed(place) or _is_hub_id(place) for place in _places(source))


def load_outside(source: str, device: str, dtype: torch.dtype) -> Outside:
    """A contender from a hub id or a folder in diffusers' form; from two of them, with a + between, where KINDS has one too.

    Raises UserError for a class that is not in KINDS, and for parts that are missing, damaged or of another kind.
    """
    places, classes = _places(source), _classes(source)
    if classes not in KINDS:
        raise UserError(f"{source} is a {classes}; expected one of {', '.join(KINDS)}")
    kind = KINDS[classes]
    pipes = kind.load(classes.split("+"), places, dtype)
    for pipe in pipes:
        pipe.set_progress_bar_config(disable=True)
        pipe.to(device)
    trained = [item for part in kind.trained for item in getattr(pipes[-1], part).named_parameters()]
    size = sum(p.numel() for name, p in trained if not name.startswith("visual_encoder."))  # a Q-Former holds its frozen eyes
    return Outside("+".join(Path(place).name for place in places), size, kind, tuple(pipes))


def _places(source: str) -> list[str]:
    return [source] if os.path.isdir(source) else source.split("+")


def _classes(source: str) -> str:
    """The classes that the indices of a source name. Raises UserError where one has no index."""
    return "+".join(_class_at(place) for place in _places(source))


def _indexed(place: str) -> bool:
    return any(os.path.isfile(os.path.join(place, name)) for name in ("model_index.json", "config.json"))


def _is_hub_id(place: str) -> bool:
    return not os.path.isdir(place) and hub.may_be_id(place) and not place.endswith(FILES)


def _class_at(place: str) -> str:
    expected = f"no pipeline at {place}: expected a folder in diffusers' form, or a hub id; of an adapter, its file"
    if not os.path.isdir(place) and not _is_hub_id(place):
        raise UserError(expected)
    reasons = []
    for kind in (DiffusionPipeline, ControlNetModel):  # model_index.json, config.json
        try:
            with _quiet():
                return str(kind.load_config(place)["_class_name"])
        except Exception as error:
            reasons.append(brief(error))
    raise UserError(f"{expected} ({reasons[0]})")


def _loaded(name: str, place: str, dtype: torch.dtype, **parts: Any) -> Any:
    """A pipeline or a model of this class, with these parts instead of its own. Raises UserError where it cannot be had."""
    kind = getattr(diffusers, name)
    if "requires_safety_checker" in inspect.signature(kind.__init__).parameters:
        parts |= {"safety_checker": None, "requires_safety_checker": False}
    try:
        with _quiet(), _old_rooms():
            return kind.from_pretrained(place, torch_dtype=dtype, **parts)
    except Exception as error:  # for missing and damaged parts the libraries raise nearly anything
        raise UserError(f"the {name} at {place} cannot be loaded; get it anew ({brief(error)})") from error


@contextmanager
def _old_rooms() -> Iterator[None]:
    """Published indices name modules where diffusers had them once; since it moved them, it does not find them itself."""
    rooms = [room for room in ("unclip", "blip_diffusion") if not hasattr(pipelines, room)]
    for room in rooms:
        setattr(pipelines, room, getattr(deprecated, room))
    try:
        yield
    finally:
        for room in rooms:
            delattr(pipelines, room)


@contextmanager
def _quiet() -> Iterator[None]:
    """What diffusers, transformers and the hub say to each other about names to come is not for the user."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch_dtype, which newer diffusers call dtype and older ones do not know
        warnings.filterwarnings("ignore", "The `local_dir_use_symlinks` argument is deprecated", UserWarning)
        yield
