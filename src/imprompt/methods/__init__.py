"""The systems that are trained and compared: one small file each."""

from collections.abc import Callable
from typing import Any

import torch
from PIL import Image

from imprompt import config
from imprompt.errors import UserError
from imprompt.methods.base import Method as Method
from imprompt.methods.base import Rewriter
from imprompt.methods.blip import BlipDiffusion
from imprompt.methods.dreambooth import DreamBooth
from imprompt.methods.image_variations import ImageVariations
from imprompt.methods.inversion import Inversion
from imprompt.methods.ip_adapter import KINDS, IPAdapter, projector
from imprompt.methods.kandinsky import Kandinsky
from imprompt.methods.reference_only import ReferenceOnly
from imprompt.methods.seecoder import SeeCoder
from imprompt.methods.shuffle import Shuffle
from imprompt.methods.token_adapters import SimpleAdapter, T2IStyle, UniControlNetGlobal
from imprompt.methods.unclip import OpenUnCLIP, SDUnCLIP
from imprompt.methods.versatile import Versatile
from imprompt.models.base_pipelines import own_size, schedule_of
from imprompt.models.image_encoders import Encoder, ImageEncoder, LatentEncoder, NothingEncoder, PixelEncoder
from imprompt.unet.injection import adapter_shape

Maker = Callable[[str, Any, Any], Method]  # name, pipeline, and what turns pictures into features


def create(name: str, pipe: Any, encoder: ImageEncoder | None = None) -> Method:
    """A method of this name, untrained, for a base model and its image encoder, which those of one subject do without.

    Raises UserError for an unknown one.
    """
    if name not in MAKERS:
        raise UserError(f"method: expected one of {', '.join(MAKERS)}, received {name!r}")
    return MAKERS[name](name, pipe, reader(name, pipe, encoder))


def reader(name: str, pipe: Any, encoder: ImageEncoder | None) -> Encoder:
    """What turns pictures into the features that this method reads."""
    match config.READS[name]:
        case "pixels":
            return PixelEncoder(own_size(pipe))
        case "latents":
            return LatentEncoder(pipe.vae, own_size(pipe))
        case "nothing":
            return NothingEncoder()
    assert encoder is not None
    return encoder


def _ip_adapter(kind: str) -> Maker:
    return lambda name, pipe, encoder: IPAdapter.create(pipe.unet, encoder, kind)


def _simple(kind: str) -> Maker:
    return lambda name, pipe, encoder: Rewriter(
        name, pipe.unet, encoder, SimpleAdapter(projector(encoder, _cross(pipe), kind)), kind != "global"
    )


def _t2i_style(name: str, pipe: Any, encoder: ImageEncoder) -> Method:
    nothing = torch.zeros_like(encoder.null(True))
    return Rewriter(name, pipe.unet, encoder, T2IStyle(encoder.width(True), _cross(pipe)), True, nothing)


def _versatile(name: str, pipe: Any, encoder: ImageEncoder) -> Method:
    grey = encoder.encode([Image.new("RGB", (encoder.side, encoder.side), (128, 128, 128))], True)
    return Rewriter(name, pipe.unet, encoder, Versatile(pipe.unet, encoder), True, grey)


def _kandinsky(name: str, pipe: Any, encoder: ImageEncoder) -> Method:
    zero = encoder.features(torch.zeros(1, 3, encoder.side, encoder.side), False)
    return Rewriter(name, pipe.unet, encoder, Kandinsky(pipe.unet, encoder.width(False)), nothing=zero)


def _cross(pipe: Any) -> int:
    return adapter_shape(pipe.unet)[1]


# What `--method` may say, and how each is made; config.READS says what they read.
MAKERS: dict[str, Maker] = {
    **{name: _ip_adapter(kind) for kind, name in KINDS.items()},
    "simple": _simple("global"),
    "simple-plus": _simple("resampler"),
    "uni-controlnet": lambda name, pipe, e: Rewriter(name, pipe.unet, e, UniControlNetGlobal(e.width(False), _cross(pipe))),
    "t2i-style": _t2i_style,
    "shuffle": lambda name, pipe, e: Rewriter(name, pipe.unet, e, Shuffle(pipe.unet, pipe.vae_scale_factor)),
    "seecoder": lambda name, pipe, e: Rewriter(name, pipe.unet, e, SeeCoder(_cross(pipe))),
    "image-variations": lambda name, pipe, e: Rewriter(name, pipe.unet, e, ImageVariations(pipe.unet, e.width(False))),
    "sd-unclip": lambda name, pipe, e: Rewriter(name, pipe.unet, e, SDUnCLIP(pipe.unet, e.width(False))),
    "blip-diffusion": lambda name, pipe, e: Rewriter(name, pipe.unet, e, BlipDiffusion(pipe.unet, e.width(True)), True),
    "open-unclip": lambda name, pipe, e: Rewriter(name, pipe.unet, e, OpenUnCLIP(pipe.unet, e.width(False))),
    "kandinsky": _kandinsky,
    "versatile": _versatile,
    "reference-only": lambda name, pipe, e: Rewriter(name, pipe.unet, e, ReferenceOnly(pipe.unet, schedule_of(pipe.scheduler))),
    "dreambooth": lambda name, pipe, e: DreamBooth.create(pipe),
    "dreambooth-lora": lambda name, pipe, e: DreamBooth.create_low_rank(pipe),
    "inversion": lambda name, pipe, e: Inversion.create(pipe),
}
