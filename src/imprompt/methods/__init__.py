"""The systems that are trained and compared, one file each. `config.methods` is their registry."""

from importlib import import_module

from imprompt.config.methods import METHODS
from imprompt.errors import UserError
from imprompt.methods.base import Method as Method
from imprompt.models.base_pipelines import native_resolution
from imprompt.models.image_encoders import FeatureEncoder, ImageEncoder, LatentEncoder, NullEncoder, PixelEncoder
from imprompt.utils.protocols import UNetPipeline


def build_method(name: str, pipe: UNetPipeline, image_encoder: ImageEncoder | None = None) -> Method:
    """An untrained method for a base model and its image encoder, which per-subject methods do without.

    Raises UserError for an unknown name.
    """
    if name not in METHODS:
        raise UserError(f"method: expected one of {', '.join(METHODS)}, received {name!r}")
    module, _, factory = METHODS[name].factory.partition(":")
    method: Method = getattr(import_module(f"imprompt.methods.{module}"), factory)(pipe, feature_encoder(name, pipe, image_encoder))
    return method


def feature_encoder(name: str, pipe: UNetPipeline, image_encoder: ImageEncoder | None) -> FeatureEncoder:
    """The encoder of a method's image features: the image encoder, or one that returns pixels, latents or nothing."""
    match METHODS[name].features:
        case "pixels":
            return PixelEncoder(native_resolution(pipe))
        case "latents":
            return LatentEncoder(pipe.vae, native_resolution(pipe))
        case "none":
            return NullEncoder()
    assert image_encoder is not None
    return image_encoder
